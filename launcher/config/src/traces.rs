//! Where spans go, as typed or as OpenTelemetry's variables have it.

use std::path::{Path, PathBuf};
use std::{fmt, fs};

use clap::builder::BoolishValueParser;
use clap::{Args, ValueEnum};

use crate::cli::Typed;
use crate::machine::Machine;
use crate::resolve::ConfigError;
use crate::{ClientCertificate, Pair, Tls, Traces};

const HTTP: &str = "http://";
const HTTPS: &str = "https://";
/// What HTTP posts spans to.
const PATH: &str = "/v1/traces";
/// Spans that may wait at most: some hundred bytes each.
const QUEUE_MAX: u64 = 10_000_000;
/// What stands before the base64 of PEM.
const CERTIFICATE: [&str; 1] = ["-----BEGIN CERTIFICATE-----"];
const KEY: [&str; 3] = [
    "-----BEGIN PRIVATE KEY-----",
    "-----BEGIN EC PRIVATE KEY-----",
    "-----BEGIN RSA PRIVATE KEY-----",
];
/// What a collector may take, and a span may wait, at most: ten minutes.
const TIME_MAX_MS: u64 = 600_000;

/// Hidden where the standard variable is how one sets it.
#[derive(Clone, PartialEq, Args)]
pub struct TraceArgs {
    /// How spans travel to --otlp-endpoint
    #[arg(
        long,
        env = "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL",
        value_name = "NAME",
        value_enum,
        default_value_t = OtlpProtocol::Grpc
    )]
    pub otlp_protocol: OtlpProtocol,
    /// Which requests are traced, where there is an endpoint
    #[arg(
        long,
        env = "OTEL_TRACES_SAMPLER",
        value_name = "NAME",
        value_enum,
        default_value_t = Sampler::ParentbasedAlwaysOn
    )]
    pub traces_sampler: Sampler,
    /// The share of requests that a sampler with a ratio takes, from 0 to 1
    #[arg(
        long,
        env = "OTEL_TRACES_SAMPLER_ARG",
        value_name = "RATIO",
        default_value_t = 1.0
    )]
    pub traces_sampler_arg: f64,
    /// The collector's address for traces, with its path where there is one
    #[arg(
        long,
        hide = true,
        env = "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT",
        value_name = "URL"
    )]
    pub otlp_traces_endpoint: Option<String>,
    /// The collector's address for all signals
    #[arg(
        long,
        hide = true,
        env = "OTEL_EXPORTER_OTLP_ENDPOINT",
        value_name = "URL"
    )]
    pub otlp_any_endpoint: Option<String>,
    /// Whether an address for gRPC that names neither http nor https is one without TLS
    #[arg(
        long,
        hide = true,
        env = "OTEL_EXPORTER_OTLP_TRACES_INSECURE",
        value_name = "true|false",
        value_parser = BoolishValueParser::new()
    )]
    pub otlp_insecure: Option<bool>,
    /// PEM file of the root certificates that a collector is trusted by, instead of the system's
    #[arg(
        long,
        hide = true,
        env = "OTEL_EXPORTER_OTLP_TRACES_CERTIFICATE",
        value_name = "FILE"
    )]
    pub otlp_certificate: Option<PathBuf>,
    /// PEM file of the certificate that a collector is shown
    #[arg(
        long,
        hide = true,
        env = "OTEL_EXPORTER_OTLP_TRACES_CLIENT_CERTIFICATE",
        value_name = "FILE"
    )]
    pub otlp_client_certificate: Option<PathBuf>,
    /// PEM file of its private key
    #[arg(
        long,
        hide = true,
        env = "OTEL_EXPORTER_OTLP_TRACES_CLIENT_KEY",
        value_name = "FILE"
    )]
    pub otlp_client_key: Option<PathBuf>,
    /// PEM file of the root certificates that the system trusts
    #[arg(long, hide = true, env = "SSL_CERT_FILE", value_name = "FILE")]
    pub ssl_cert_file: Option<PathBuf>,
    /// Headers sent with spans: name=value,…
    #[arg(
        long,
        hide = true,
        env = "OTEL_EXPORTER_OTLP_TRACES_HEADERS",
        value_name = "LIST"
    )]
    pub otlp_headers: Option<String>,
    /// Milliseconds that the collector may take to answer
    #[arg(
        long,
        hide = true,
        env = "OTEL_EXPORTER_OTLP_TRACES_TIMEOUT",
        value_name = "MS",
        default_value_t = 10_000
    )]
    pub otlp_timeout: u64,
    /// Attributes of the process in traces: name=value,…
    #[arg(
        long,
        hide = true,
        env = "OTEL_RESOURCE_ATTRIBUTES",
        value_name = "LIST"
    )]
    pub otel_resource_attributes: Option<String>,
    /// otlp, or none: no spans whatever the endpoint is
    #[arg(long, hide = true, env = "OTEL_TRACES_EXPORTER", value_name = "NAME", value_enum, default_value_t = TracesExporter::Otlp)]
    pub traces_exporter: TracesExporter,
    /// No spans whatever the endpoint is
    #[arg(long, hide = true, env = "OTEL_SDK_DISABLED")]
    pub otel_sdk_disabled: bool,
    /// Spans that may wait for the collector; more are dropped
    #[arg(
        long,
        hide = true,
        env = "OTEL_BSP_MAX_QUEUE_SIZE",
        value_name = "N",
        default_value_t = 32_768
    )]
    pub otel_queue_max: usize,
    /// Spans that are sent together at most
    #[arg(
        long,
        hide = true,
        env = "OTEL_BSP_MAX_EXPORT_BATCH_SIZE",
        value_name = "N",
        default_value_t = 512
    )]
    pub otel_batch_max: usize,
    /// Milliseconds that a span waits for company at most
    #[arg(
        long,
        hide = true,
        env = "OTEL_BSP_SCHEDULE_DELAY",
        value_name = "MS",
        default_value_t = 1000
    )]
    pub otel_delay: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum OtlpProtocol {
    Grpc,
    #[value(name = "http/protobuf")]
    HttpProtobuf,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum TracesExporter {
    Otlp,
    None,
}

/// The `parentbased_` ones follow the caller's decision, where a request comes with one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Sampler {
    #[value(name = "always_on")]
    AlwaysOn,
    #[value(name = "always_off")]
    AlwaysOff,
    #[value(name = "traceidratio")]
    TraceIdRatio,
    #[value(name = "parentbased_always_on")]
    ParentbasedAlwaysOn,
    #[value(name = "parentbased_always_off")]
    ParentbasedAlwaysOff,
    #[value(name = "parentbased_traceidratio")]
    ParentbasedTraceIdRatio,
}

// === impl TraceArgs ===

impl fmt::Debug for TraceArgs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TraceArgs")
            .field("otlp_protocol", &self.otlp_protocol)
            .field("traces_sampler", &self.traces_sampler)
            .finish_non_exhaustive()
    }
}

// === free functions ===

/// The whole address, unless there is none or traces are off. A flag wins over the variable of
/// traces, and that over the one of all signals.
pub(crate) fn endpoint(typed: &Typed) -> Result<Option<String>, ConfigError> {
    let asked = &typed.traces;
    if asked.otel_sdk_disabled || asked.traces_exporter == TracesExporter::None {
        return Ok(None);
    }
    let traces = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", false);
    let given = [
        (&typed.telemetry.otlp_endpoint, ("--otlp-endpoint", true)),
        (&asked.otlp_traces_endpoint, traces),
        (
            &asked.otlp_any_endpoint,
            ("OTEL_EXPORTER_OTLP_ENDPOINT", true),
        ),
    ];
    let given = given
        .into_iter()
        .find_map(|(value, how)| Some((value.as_deref()?, how)));
    let Some((value, (flag, is_base))) = given else {
        return Ok(None);
    };
    let (scheme, address) = parted(flag, value)?;
    let is_grpc = asked.otlp_protocol == OtlpProtocol::Grpc;
    // Without the variable such an address means what it means to TGI.
    let scheme = scheme.unwrap_or(if is_grpc && asked.otlp_insecure == Some(false) {
        HTTPS
    } else {
        HTTP
    });
    let adds_path = is_base && !is_grpc && !address.ends_with(PATH);
    let path = if adds_path { PATH } else { "" };
    Ok(Some(format!("{scheme}{address}{path}")))
}

/// Everything else about traces, whose spans go to `endpoint`.
pub(crate) fn traces(
    asked: &TraceArgs,
    endpoint: Option<&str>,
    machine: &Machine,
) -> Result<Traces, ConfigError> {
    let ratio = asked.traces_sampler_arg;
    if !(0.0..=1.0).contains(&ratio) {
        let flag = "--traces-sampler-arg";
        return Err(ConfigError::NotARatio { flag, value: ratio });
    }
    let queue_max = within(
        "OTEL_BSP_MAX_QUEUE_SIZE",
        asked.otel_queue_max as u64,
        QUEUE_MAX,
    )?;
    let batch_max = within(
        "OTEL_BSP_MAX_EXPORT_BATCH_SIZE",
        asked.otel_batch_max as u64,
        queue_max,
    )?;
    Ok(Traces {
        protocol: name(&asked.otlp_protocol),
        tls: match endpoint {
            Some(endpoint) if endpoint.starts_with(HTTPS) => Some(tls(asked, machine)?),
            _ => None,
        },
        headers: pairs(
            "OTEL_EXPORTER_OTLP_HEADERS",
            asked.otlp_headers.as_deref(),
            Shown::No,
        )?,
        resource: pairs(
            "OTEL_RESOURCE_ATTRIBUTES",
            asked.otel_resource_attributes.as_deref(),
            Shown::Yes,
        )?,
        sampler: name(&asked.traces_sampler),
        sampler_ratio: ratio,
        timeout_ms: within(
            "OTEL_EXPORTER_OTLP_TIMEOUT",
            asked.otlp_timeout,
            TIME_MAX_MS,
        )?,
        queue_max: usize::try_from(queue_max).unwrap_or(usize::MAX),
        batch_max: usize::try_from(batch_max).unwrap_or(usize::MAX),
        delay_ms: within("OTEL_BSP_SCHEDULE_DELAY", asked.otel_delay, TIME_MAX_MS)?,
    })
}

/// Whether an error may show a value.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Shown {
    Yes,
    No,
}

/// Whom a collector is trusted by, and what it is shown. Every file is looked into: a server does
/// not load a model to find that it cannot read a certificate.
fn tls(asked: &TraceArgs, machine: &Machine) -> Result<Tls, ConfigError> {
    let certificate = |flag, path| file(flag, path, &CERTIFICATE, "certificate in PEM");
    let roots = match (&asked.otlp_certificate, &asked.ssl_cert_file) {
        (Some(path), _) => certificate("OTEL_EXPORTER_OTLP_CERTIFICATE", path)?,
        (None, Some(path)) => certificate("SSL_CERT_FILE", path)?,
        (None, None) => machine.roots.ok_or(ConfigError::NoRoots)?.into(),
    };
    let (named, key) = (
        "OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE",
        "OTEL_EXPORTER_OTLP_CLIENT_KEY",
    );
    let half = |given, missing| Err(ConfigError::HalfAPair { given, missing });
    let client = match (&asked.otlp_client_certificate, &asked.otlp_client_key) {
        (None, None) => None,
        (Some(_), None) => return half(named, key),
        (None, Some(_)) => return half(key, named),
        (Some(path), Some(its)) => Some(ClientCertificate {
            certificate: certificate(named, path)?,
            key: file(key, its, &KEY, "private key in PEM that needs no password")?,
        }),
    };
    Ok(Tls { roots, client })
}

/// The whole path of a file that has one of these lines.
fn file(
    flag: &'static str,
    path: &Path,
    lines: &[&str],
    what: &'static str,
) -> Result<PathBuf, ConfigError> {
    let whole = std::path::absolute(path);
    let read = whole.and_then(|whole| Ok((fs::read(&whole)?, whole)));
    let (text, whole) = read.map_err(|error| ConfigError::Unreadable {
        flag,
        path: path.to_owned(),
        why: error.to_string(),
    })?;
    let text = String::from_utf8_lossy(&text);
    if lines.iter().any(|line| text.contains(line)) {
        return Ok(whole);
    }
    Err(ConfigError::NotInFile {
        flag,
        path: path.to_owned(),
        what,
    })
}

/// The scheme, if it has one, and `host:port` and perhaps a path, without a slash at its end.
fn parted<'a>(
    flag: &'static str,
    value: &'a str,
) -> Result<(Option<&'static str>, &'a str), ConfigError> {
    let value = value.trim();
    let (scheme, rest) = [HTTP, HTTPS]
        .into_iter()
        .find_map(|scheme| Some((Some(scheme), value.strip_prefix(scheme)?)))
        .unwrap_or((None, value));
    let rest = rest.trim_end_matches('/');
    let host = rest.split('/').next().unwrap_or_default();
    let is_address = !host.is_empty() && !host.starts_with(':') && rest.is_ascii();
    let is_other = scheme.is_none() && rest.contains("://");
    if !is_address || is_other || rest.contains(char::is_whitespace) || rest.contains('@') {
        return Err(ConfigError::NoEndpoint {
            flag,
            value: value.to_owned(),
        });
    }
    Ok((scheme, rest))
}

/// `a=b,c=d`, whose values may have bytes written as `%20`.
fn pairs(flag: &'static str, list: Option<&str>, shown: Shown) -> Result<Vec<Pair>, ConfigError> {
    let entries = list.unwrap_or_default().split(',').map(str::trim);
    let pair = |entry: &str| {
        let read = entry.split_once('=').and_then(|(name, value)| {
            let name = name.trim();
            let value = decoded(value.trim())?;
            (!name.is_empty()).then(|| Pair {
                name: name.to_owned(),
                value,
            })
        });
        read.ok_or_else(|| {
            let value = if shown == Shown::Yes {
                entry
            } else {
                "(hidden)"
            };
            ConfigError::NoPair {
                flag,
                value: value.to_owned(),
            }
        })
    };
    entries
        .filter(|entry| !entry.is_empty())
        .map(pair)
        .collect()
}

fn decoded(value: &str) -> Option<String> {
    let mut bytes = value.bytes();
    let mut out = Vec::with_capacity(value.len());
    while let Some(byte) = bytes.next() {
        if byte != b'%' {
            out.push(byte);
            continue;
        }
        let digit = |byte: Option<u8>| char::from(byte?).to_digit(16);
        let code = digit(bytes.next())? * 16 + digit(bytes.next())?;
        out.push(u8::try_from(code).ok()?);
    }
    String::from_utf8(out).ok()
}

fn within(flag: &'static str, value: u64, max: u64) -> Result<u64, ConfigError> {
    if value == 0 {
        return Err(ConfigError::TooSmall {
            flag,
            value,
            min: 1,
        });
    }
    if value > max {
        return Err(ConfigError::TooLarge { flag, value, max });
    }
    Ok(value)
}

/// A choice as it is typed.
fn name(choice: &impl ValueEnum) -> String {
    choice
        .to_possible_value()
        .map(|value| value.get_name().to_owned())
        .unwrap_or_default()
}
