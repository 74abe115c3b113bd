//! What was typed → what is meant: every default, every check. Pure, but for the files that are named:
//! the machine is an argument.

use std::ffi::OsString;
use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;
use std::time::Duration;

use crate::cli::{
    DeviceKind, DialectName, Dtype, KvCacheDtype, LoadFormat, Quantize, ToolCallParser, Typed,
};
use crate::machine::Machine;
use crate::{Device, Dialect, Engine, Http, Model, Requests, Serve, Telemetry, Watermark, traces};

/// What is served when nobody says.
pub const DEFAULT_MODEL: &str = "HuggingFaceTB/SmolLM2-135M-Instruct";

/// Ranks of one group at most: one host.
const SHARDS_MAX: usize = 64;
/// Sequences running at one time at most: a row of every device buffer each.
const RUNNING_MAX: u32 = 4096;
/// Requests in the server at one time at most.
const REQUESTS_MAX: usize = 1_000_000;
/// Tokens of a step at most: positions and offsets are 32-bit in every kernel.
const STEP_TOKENS_MAX: u32 = 1 << 20;
/// Tokens of a step when nobody says: large enough to keep matrix products efficient, small
/// enough that running streams do not wait long for somebody's prompt.
const STEP_TOKENS_CPU: u32 = 1024;
const STEP_TOKENS_CUDA: u32 = 8192;
/// Sequences running at one time when nobody says; on a GPU as many as its graphs go up to.
const RUNNING_CPU: u32 = 256;
const RUNNING_CUDA: u32 = 512;
/// What a step may wait for masks at most: a second.
const MASK_MAX_MS: u32 = 1000;
/// The target of the gaps between tokens at most: a minute.
const ITL_TARGET_MAX_MS: u32 = 60_000;
/// A block holds this many tokens at most.
const BLOCK_TOKENS_MAX: u32 = 1024;
/// Plans in flight at most; the referee tests no more.
const DEPTH_MAX: u32 = 3;
/// Any timeout at most, a week: sums of deadlines stay far from overflow.
pub const TIMEOUT_MAX_S: u64 = 7 * 24 * 3600;

/// A command line that cannot be served. The texts name the flag and the number.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum ConfigError {
    #[error("{flag} must be at least {min}, it is {value}")]
    TooSmall {
        flag: &'static str,
        value: u64,
        min: u64,
    },
    #[error("{flag} must be a path that begins with `/`, it is {value:?}")]
    NotAPath { flag: &'static str, value: String },
    #[error("{flag} must be at most {max}, it is {value}")]
    TooLarge {
        flag: &'static str,
        value: u64,
        max: u64,
    },
    #[error("{flag} must lie above 0 and at most at 1, it is {value}")]
    NotAFraction { flag: &'static str, value: f32 },
    #[error("{flag} must lie above 0 and below 1, it is {value}")]
    NotAProperShare { flag: &'static str, value: f32 },
    #[error("{flag} must lie above 0 and at most at {TIMEOUT_MAX_S} seconds, it is {value}")]
    NotATimeout { flag: &'static str, value: f64 },
    #[error("{flag} must be a finite number, it is {value}")]
    NotFinite { flag: &'static str, value: f32 },
    #[error("--max-input-tokens ({input}) must be less than --max-total-tokens ({total})")]
    InputNotBelowTotal { input: u32, total: u32 },
    #[error(
        "--max-input-tokens ({tokens}) and --max-input-length ({length}) are two names of one \
         limit: give one"
    )]
    InputLimitTwice { tokens: u32, length: u32 },
    #[error("--sharded true with --num-shard {num_shard}: a model is split over 2 shards or more")]
    ShardedOverOne { num_shard: usize },
    #[error("--sharded true needs --num-shard when there is no GPU to count")]
    ShardedOverUnknown,
    #[error("{needed} CUDA devices are needed, {found} are visible{hint}")]
    NotEnoughCudaDevices {
        needed: u64,
        found: u32,
        hint: &'static str,
    },
    #[error("--block-tokens must be a power of two, it is {value}")]
    BlockNotPowerOfTwo { value: u32 },
    #[error("{flag} is empty")]
    Empty { flag: &'static str },
    #[error("--tokenizer-config-path: {path} is no file")]
    NoSuchFile { path: PathBuf },
    #[error(
        "--quantize {format} is not served: take a checkpoint in the format of gptq, awq, \
         compressed-tensors or fp8, or quantize one of 16 bits when it is loaded, by --quantize \
         fp8, eetq, bitsandbytes, bitsandbytes-nf4 or bitsandbytes-fp4"
    )]
    NotServed { format: &'static str },
    #[error(
        "{flag} is `http://host:port`, `https://host:port` or `host:port` of an OpenTelemetry \
         collector; it is {value:?}"
    )]
    NoEndpoint { flag: &'static str, value: String },
    #[error("{flag}: {path} cannot be read: {why}")]
    Unreadable {
        flag: &'static str,
        path: PathBuf,
        why: String,
    },
    #[error("{flag}: {path} has no {what}")]
    NotInFile {
        flag: &'static str,
        path: PathBuf,
        what: &'static str,
    },
    #[error("{given} is set and {missing} is not: a certificate and its key go together")]
    HalfAPair {
        given: &'static str,
        missing: &'static str,
    },
    #[error(
        "spans go to a collector by https, and this system has no root certificates to trust: \
         install them (`ca-certificates`), or name a file of some in OTEL_EXPORTER_OTLP_CERTIFICATE"
    )]
    NoRoots,
    #[error("{flag} is a list of name=value, with commas between; it has {value:?}")]
    NoPair { flag: &'static str, value: String },
    #[error("{flag} must lie between 0 and 1, it is {value}")]
    NotARatio { flag: &'static str, value: f64 },
    #[error("{flag}: {what} not supported yet; start without it")]
    Unsupported {
        flag: &'static str,
        what: &'static str,
    },
}

/// A command line understood.
#[derive(Debug, Clone, PartialEq)]
pub struct Resolved {
    /// Complete but for the model's path and sha and the shards, which the launcher fills in.
    pub serve: Serve,
    /// What only the launcher needs.
    pub launch: Launch,
    /// Sentences for the log.
    pub warnings: Vec<String>,
}

/// What only the launcher needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Launch {
    /// The id as typed; `None` serves the default model.
    pub model_id: Option<String>,
    pub num_shard: u32,
    /// Sockets are `<prefix>-<rank>`; `None` puts them in the launcher's own folder.
    pub socket_prefix: Option<PathBuf>,
    /// Where ranks meet.
    pub rendezvous_host: String,
    /// `None` takes a free port.
    pub rendezvous_port: Option<u16>,
    pub hub_cache: Option<PathBuf>,
    pub startup_deadline: Duration,
    /// Whether to log what the server runs on.
    pub log_machine: bool,
}

/// Decides everything that was left open, and refuses what cannot work.
pub fn resolve(typed: &Typed, machine: &Machine) -> Result<Resolved, ConfigError> {
    typed.compat.check()?;
    let mut warnings = typed.compat.warnings();
    let num_shard = num_shard(typed, machine)?;
    let on_gpu = uses_gpu(typed, machine);
    if !on_gpu && num_shard > machine.cores {
        warnings.push(format!(
            "{num_shard} shards share {} cores: fewer shards are faster",
            machine.cores
        ));
    }
    let otlp_endpoint = traces::endpoint(typed)?;
    let serve = Serve {
        model: model(typed)?,
        device: device(typed, machine, num_shard)?,
        requests: requests(typed)?,
        engine: engine(typed, on_gpu)?,
        watermark: watermark(typed)?,
        http: http(typed, &mut warnings)?,
        shards: Vec::new(),
        telemetry: Telemetry {
            log_level: typed.telemetry.log_level.clone(),
            json_output: typed.telemetry.json_output,
            otlp_service_name: typed.telemetry.otlp_service_name.clone(),
            traces: traces::traces(&typed.traces, otlp_endpoint.as_deref(), machine)?,
            otlp_endpoint,
        },
    };
    let process = &typed.process;
    let launch = Launch {
        model_id: typed.model.model_id.clone(),
        num_shard,
        socket_prefix: process.shard_uds_path.clone(),
        rendezvous_host: process.master_addr.clone(),
        rendezvous_port: process.master_port,
        hub_cache: typed.model.huggingface_hub_cache.clone(),
        startup_deadline: Duration::from_millis(serve.engine.prepare_deadline_ms),
        log_machine: typed.telemetry.env,
    };
    Ok(Resolved {
        serve,
        launch,
        warnings,
    })
}

/// Variables that are secrets: they reach the process that needs them and no other.
pub const SECRET_VARIABLES: [&str; 5] = [
    "API_KEY",
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
    "HF_API_TOKEN",
    "NGROK_AUTHTOKEN",
];

/// The Hub's token, under any of the names it goes by.
pub fn hub_token(env: &dyn Fn(&str) -> Option<OsString>) -> Option<OsString> {
    let names = ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_API_TOKEN"];
    names
        .into_iter()
        .filter_map(env)
        .find(|token| !token.is_empty())
}

fn uses_gpu(typed: &Typed, machine: &Machine) -> bool {
    match typed.device.device {
        DeviceKind::Cpu => false,
        DeviceKind::Cuda => true,
        DeviceKind::Auto => machine.gpus_visible() > 0,
    }
}

/// TGI's rules: a number wins; `--sharded true` takes every visible GPU; without either, a variable
/// that names GPUs says how many.
fn num_shard(typed: &Typed, machine: &Machine) -> Result<u32, ConfigError> {
    let on_gpu = uses_gpu(typed, machine);
    let gpus = machine.gpus_visible();
    let count = match (typed.device.sharded, typed.device.num_shard) {
        (Some(true), Some(num_shard)) if num_shard <= 1 => {
            return Err(ConfigError::ShardedOverOne { num_shard });
        }
        (_, Some(num_shard)) => num_shard,
        (Some(true), None) if !on_gpu => return Err(ConfigError::ShardedOverUnknown),
        (Some(true), None) if gpus <= 1 => {
            return Err(ConfigError::NotEnoughCudaDevices {
                needed: 2,
                found: gpus,
                hint: " (--sharded true)",
            });
        }
        (Some(true), None) => gpus as usize,
        (None, None) if on_gpu && machine.gpus_named.is_some() => gpus.max(1) as usize,
        (Some(false) | None, None) => 1,
    };
    let count = bounded("--num-shard", count as u64, 1, SHARDS_MAX as u64)?;
    if on_gpu && count > u64::from(gpus) {
        let hint = if machine.gpus_named.is_some() {
            " (CUDA_VISIBLE_DEVICES or NVIDIA_VISIBLE_DEVICES names them)"
        } else {
            ""
        };
        return Err(ConfigError::NotEnoughCudaDevices {
            needed: count,
            found: gpus,
            hint,
        });
    }
    Ok(narrow(count))
}

fn model(typed: &Typed) -> Result<Model, ConfigError> {
    let model = &typed.model;
    if let Some(path) = model
        .tokenizer_config_path
        .as_ref()
        .filter(|path| !path.is_file())
    {
        return Err(ConfigError::NoSuchFile { path: path.clone() });
    }
    if model
        .model_id
        .as_ref()
        .is_some_and(|id| id.trim().is_empty())
    {
        return Err(ConfigError::Empty { flag: "--model-id" });
    }
    let load_format = match model.load_format {
        LoadFormat::Auto => "auto",
        LoadFormat::Dummy => "dummy",
    };
    let quantize = match model.quantize {
        None => "",
        Some(Quantize::Gptq) => "gptq",
        Some(Quantize::Awq) => "awq",
        Some(Quantize::CompressedTensors) => "compressed-tensors",
        Some(Quantize::Fp8) => "fp8",
        Some(Quantize::Eetq) => "eetq",
        Some(Quantize::Bitsandbytes) => "bitsandbytes",
        Some(Quantize::BitsandbytesNf4) => "bitsandbytes-nf4",
        Some(Quantize::BitsandbytesFp4) => "bitsandbytes-fp4",
        Some(Quantize::Exl2) => return Err(ConfigError::NotServed { format: "exl2" }),
        Some(Quantize::Marlin) => return Err(ConfigError::NotServed { format: "marlin" }),
    };
    let tool_call_parser = match model.tool_call_parser {
        ToolCallParser::Auto => "auto",
        ToolCallParser::Llama3Json => "llama3-json",
        ToolCallParser::Pythonic => "pythonic",
        ToolCallParser::Hermes => "hermes",
        ToolCallParser::Mistral => "mistral",
        ToolCallParser::Qwen3Coder => "qwen3_coder",
        ToolCallParser::DeepSeekV3 => "deepseek_v3",
        ToolCallParser::DeepSeekV31 => "deepseek_v31",
        ToolCallParser::Json => "json",
        ToolCallParser::None => "none",
    };
    Ok(Model {
        id: model
            .model_id
            .clone()
            .unwrap_or_else(|| DEFAULT_MODEL.to_owned()),
        revision: model.revision.clone(),
        sha: None,
        path: PathBuf::new(),
        load_format: load_format.to_owned(),
        quantize: quantize.to_owned(),
        quantize_activations: model.quantize_activations,
        tokenizer_config_path: model.tokenizer_config_path.clone(),
        tool_call_parser: tool_call_parser.to_owned(),
    })
}

fn device(typed: &Typed, machine: &Machine, num_shard: u32) -> Result<Device, ConfigError> {
    let graphs = typed.compat.records_graphs();
    let typed = &typed.device;
    let fraction = typed.cuda_memory_fraction;
    if !(fraction > 0.0 && fraction <= 1.0) {
        let flag = "--cuda-memory-fraction";
        return Err(ConfigError::NotAFraction {
            flag,
            value: fraction,
        });
    }
    let threads = match typed.threads {
        Some(threads) => narrow(bounded("--threads", threads.into(), 1, 1024)?),
        None => (machine.cores / num_shard).max(1),
    };
    let kind = match typed.device {
        DeviceKind::Auto => "auto",
        DeviceKind::Cpu => "cpu",
        DeviceKind::Cuda => "cuda",
    };
    let dtype = match typed.dtype {
        Dtype::Auto => "auto",
        Dtype::Float32 => "float32",
        Dtype::Bfloat16 => "bfloat16",
        Dtype::Float16 => "float16",
    };
    // TGI's default of 1 means "what the device takes to be all", as our 0 does.
    let is_default = fraction.to_bits() == 1.0_f32.to_bits();
    Ok(Device {
        kind: kind.to_owned(),
        dtype: dtype.to_owned(),
        kv_dtype: match typed.kv_cache_dtype {
            KvCacheDtype::Auto => "",
            KvCacheDtype::Fp8E4m3fn => "float8_e4m3fn",
            KvCacheDtype::Fp8E5m2 => "float8_e5m2",
        }
        .to_owned(),
        memory_fraction: if is_default { 0.0 } else { fraction },
        kv_bytes_max: match typed.kv_memory {
            Some(bytes) => bounded("--kv-memory", bytes, 1, u64::MAX)?,
            None => 0,
        },
        threads,
        reference_ops: typed.reference_ops,
        graphs,
    })
}

fn requests(typed: &Typed) -> Result<Requests, ConfigError> {
    let typed = &typed.requests;
    let input = match (typed.max_input_tokens, typed.max_input_length) {
        (Some(tokens), Some(length)) => {
            return Err(ConfigError::InputLimitTwice { tokens, length });
        }
        (tokens, length) => tokens.or(length),
    };
    if let Some(input) = input {
        bounded("--max-input-tokens", input.into(), 1, u32::MAX.into())?;
    }
    if let Some(total) = typed.max_total_tokens {
        bounded("--max-total-tokens", total.into(), 2, u32::MAX.into())?;
        if let Some(input) = input.filter(|input| *input >= total) {
            return Err(ConfigError::InputNotBelowTotal { input, total });
        }
    }
    let least_one = |flag, value: usize, max: usize| -> Result<usize, ConfigError> {
        bounded(flag, value as u64, 1, max as u64).map(|_| value)
    };
    Ok(Requests {
        max_concurrent_requests: least_one(
            "--max-concurrent-requests",
            typed.max_concurrent_requests,
            REQUESTS_MAX,
        )?,
        max_best_of: least_one("--max-best-of", typed.max_best_of, 1024)?,
        max_stop_sequences: typed.max_stop_sequences,
        max_top_n_tokens: typed.max_top_n_tokens,
        max_input_tokens: input,
        max_total_tokens: typed.max_total_tokens,
        max_client_batch_size: least_one(
            "--max-client-batch-size",
            typed.max_client_batch_size,
            REQUESTS_MAX,
        )?,
        payload_limit: least_one("--payload-limit", typed.payload_limit, usize::MAX)?,
        validation_workers: least_one("--validation-workers", typed.validation_workers, 1024)?,
        disable_grammar_support: typed.disable_grammar_support,
        timeout_ms: request_timeout(typed.request_timeout)?,
    })
}

/// In milliseconds, rounded up: none is 0.
fn request_timeout(seconds: Option<f64>) -> Result<Option<u64>, ConfigError> {
    match seconds {
        None => Ok(None),
        Some(value) if value > 0.0 && value <= TIMEOUT_MAX_S as f64 => {
            let ms = Duration::from_secs_f64(value)
                .as_nanos()
                .div_ceil(1_000_000);
            Ok(Some(u64::try_from(ms).unwrap_or(u64::MAX)))
        }
        Some(value) => Err(ConfigError::NotATimeout {
            flag: "--request-timeout",
            value,
        }),
    }
}

fn engine(typed: &Typed, on_gpu: bool) -> Result<Engine, ConfigError> {
    let timeout_ms = |flag, seconds| bounded(flag, seconds, 1, TIMEOUT_MAX_S).map(|s| s * 1000);
    let prepare_deadline_ms = timeout_ms("--startup-timeout", typed.process.startup_timeout)?;
    let typed = &typed.engine;
    let running_default = if on_gpu { RUNNING_CUDA } else { RUNNING_CPU };
    let running_max = bounded(
        "--max-running",
        typed.max_running.unwrap_or(running_default).into(),
        1,
        RUNNING_MAX.into(),
    )?;
    let running_max = match typed.max_batch_size {
        None => running_max,
        Some(rows) => {
            bounded("--max-batch-size", rows.into(), 1, u32::MAX.into())?.min(running_max)
        }
    };
    let prefill = match typed.max_batch_prefill_tokens {
        Some(tokens) => bounded(
            "--max-batch-prefill-tokens",
            tokens.into(),
            1,
            STEP_TOKENS_MAX.into(),
        )?,
        None => u64::from(if on_gpu {
            STEP_TOKENS_CUDA
        } else {
            STEP_TOKENS_CPU
        }),
    };
    let itl_target_ms = bounded(
        "--itl-target-ms",
        typed.itl_target_ms.into(),
        0,
        ITL_TARGET_MAX_MS.into(),
    )?;
    let mask_ms_max = bounded(
        "--mask-ms-max",
        typed.mask_ms_max.into(),
        1,
        MASK_MAX_MS.into(),
    )?;
    let block_tokens = match typed.block_tokens {
        None => 0,
        Some(value) if !value.is_power_of_two() && value != 0 => {
            return Err(ConfigError::BlockNotPowerOfTwo { value });
        }
        Some(value) => bounded("--block-tokens", value.into(), 1, BLOCK_TOKENS_MAX.into())?,
    };
    let depth = bounded(
        "--pipeline-depth",
        typed.pipeline_depth.into(),
        1,
        DEPTH_MAX.into(),
    )?;
    Ok(Engine {
        block_tokens: narrow(block_tokens),
        blocks_max: 0,
        running_max: narrow(running_max),
        // Every running sequence must fit in a step, whatever the budget of prompts is.
        step_tokens_max: narrow(prefill.max(running_max)),
        prefill_tokens_max: narrow(prefill),
        itl_target_ms: narrow(itl_target_ms),
        pipeline_depth: narrow(depth),
        prefix_caching: typed.prefix_caching,
        mask_ms_max: narrow(mask_ms_max),
        record: typed.record_plans.clone(),
        step_deadline_ms: timeout_ms("--step-timeout", typed.step_timeout)?,
        prepare_deadline_ms,
    })
}

fn watermark(typed: &Typed) -> Result<Watermark, ConfigError> {
    let (gamma, delta) = (
        typed.requests.watermark_gamma,
        typed.requests.watermark_delta,
    );
    if !(gamma > 0.0 && gamma < 1.0) {
        return Err(ConfigError::NotAProperShare {
            flag: "--watermark-gamma",
            value: gamma,
        });
    }
    if !delta.is_finite() {
        return Err(ConfigError::NotFinite {
            flag: "--watermark-delta",
            value: delta,
        });
    }
    Ok(Watermark { gamma, delta })
}

/// A route that is named in the environment.
fn path(flag: &'static str, given: Option<&String>) -> Result<Option<String>, ConfigError> {
    match given {
        Some(value) if !value.starts_with('/') => {
            let value = value.clone();
            Err(ConfigError::NotAPath { flag, value })
        }
        _ => Ok(given.cloned()),
    }
}

fn http(typed: &Typed, warnings: &mut Vec<String>) -> Result<Http, ConfigError> {
    let typed = &typed.http;
    let hostname = match typed.hostname.parse::<IpAddr>() {
        Ok(_) => typed.hostname.clone(),
        Err(_) if typed.hostname == "localhost" => Ipv4Addr::LOCALHOST.to_string(),
        Err(_) => {
            warnings.push(format!(
                "hostname `{}` is not an IP address: listening on 0.0.0.0",
                typed.hostname
            ));
            Ipv4Addr::UNSPECIFIED.to_string()
        }
    };
    if typed.api_key.as_ref().is_some_and(String::is_empty) {
        return Err(ConfigError::Empty { flag: "--api-key" });
    }
    let drain_s = bounded(
        "--graceful-termination-timeout",
        typed.graceful_termination_timeout,
        0,
        TIMEOUT_MAX_S,
    )?;
    Ok(Http {
        hostname,
        port: typed.aip_http_port.unwrap_or(typed.port),
        prometheus_port: typed.prometheus_port,
        api_key: typed.api_key.clone(),
        cors_allow_origin: typed.cors_allow_origin.clone(),
        compute_type: typed.compute_type.clone(),
        predict_route: path("AIP_PREDICT_ROUTE", typed.aip_predict_route.as_ref())?,
        health_route: path("AIP_HEALTH_ROUTE", typed.aip_health_route.as_ref())?,
        v1_dialect: match typed.v1_dialect {
            DialectName::Openai => Dialect::Openai,
            DialectName::Tgi => Dialect::Tgi,
        },
        drain_deadline_ms: drain_s * 1000,
    })
}

fn bounded(flag: &'static str, value: u64, min: u64, max: u64) -> Result<u64, ConfigError> {
    if value < min {
        return Err(ConfigError::TooSmall { flag, value, min });
    }
    if value > max {
        return Err(ConfigError::TooLarge { flag, value, max });
    }
    Ok(value)
}

fn narrow(value: u64) -> u32 {
    u32::try_from(value).expect("a bounded value is below 2^32; its bound in resolve.rs is wrong")
}
