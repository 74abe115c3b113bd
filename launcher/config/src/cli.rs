//! What was typed: every flag with its environment twin and its help text. Names and meanings
//! are TGI's, so that its command lines and environments work unchanged; what is ours alone has an
//! environment name that starts with `HEADRACE_` (but for `ITL_TARGET_MS`). Nothing is decided here.

use std::ffi::{OsStr, OsString};
use std::path::PathBuf;

use clap::builder::{BoolishValueParser, TypedValueParser};
use clap::parser::ValueSource;
use clap::{
    Arg, ArgAction, ArgMatches, Args, Command, CommandFactory, FromArgMatches, Parser, ValueEnum,
};

use crate::compat::{CompatArgs, IGNORED_VARIABLES};
use crate::size::parse_bytes;
use crate::traces::TraceArgs;

const ABOUT: &str = "Serve a large language model over HTTP.

Without any flag a small default model is served on port 3000, on the GPU if there is one and on \
the CPU if not. Routes: /v1/chat/completions and /v1/completions as OpenAI's, /generate and \
/generate_stream as TGI's, /info, /health, /metrics.";

const COMMANDS: &str = "\
Commands:
  headrace [serve] [OPTIONS]          Serve a model: what this page describes
  headrace download --model-id <ID>   Fetch a model and print where it is
  headrace quantize MODEL OUT         Make a checkpoint of four bits
  headrace compile --help             Compile a GPU's kernels before a server needs them
  headrace describe --help            Say what a shard of a model would be
  headrace replay --help              Execute plans again that --record-plans wrote
  headrace bench --help               Measure how fast a server is

Examples:
  headrace --model-id Qwen/Qwen3-0.6B --port 8080
  headrace --model-id ./my-model --device cpu --dtype float32
  MODEL_ID=Qwen/Qwen3-0.6B PORT=8080 headrace

A flag wins over its variable, and an empty variable counts as unset; switches take 1, true, yes, \
on and 0, false, no, off in the environment. HF_TOKEN, HF_HOME and HF_HUB_OFFLINE mean what they \
mean to the Hub's own tools. Called as text-generation-launcher the program does the same.

AIP_HTTP_PORT, AIP_PREDICT_ROUTE and AIP_HEALTH_ROUTE, which Vertex AI sets, name a port that comes \
before --port and further paths of /vertex and /health. SageMaker's HF_MODEL_ID, HF_MODEL_REVISION, \
SM_NUM_GPUS, HF_MODEL_QUANTIZE and HF_MODEL_TRUST_REMOTE_CODE stand for the variables without HF_MODEL \
or SM. COMPUTE_TYPE is what the header x-compute-type says.

Flags of TGI that are taken and without effect here: --trust-remote-code, \
--waiting-served-ratio, --max-waiting-tokens, --max-batch-total-tokens, --cuda-graphs other than 0, \
--disable-custom-kernels, --enable-prefill-logprobs, --usage-stats. Not supported yet, and \
refused: --lora-adapters, --weights-cache-override, --rope-scaling, \
--rope-factor, --ngrok, and --speculate with more than 0.";

/// The command line of `headrace serve`.
#[derive(Debug, Clone, PartialEq, Parser)]
#[command(
    name = "headrace",
    version,
    about = ABOUT,
    after_help = COMMANDS,
    next_line_help = true,
    disable_help_flag = true,
    disable_version_flag = true,
    max_term_width = 100
)]
pub struct Typed {
    #[command(flatten, next_help_heading = "Model")]
    pub model: ModelArgs,
    #[command(flatten, next_help_heading = "Where HTTP listens")]
    pub http: HttpArgs,
    #[command(flatten, next_help_heading = "What it runs on")]
    pub device: DeviceArgs,
    #[command(flatten, next_help_heading = "What requests may ask for")]
    pub requests: RequestArgs,
    #[command(flatten, next_help_heading = "How steps are made")]
    pub engine: EngineArgs,
    #[command(flatten, next_help_heading = "Logs and traces")]
    pub telemetry: TelemetryArgs,
    #[command(flatten, next_help_heading = "Logs and traces")]
    pub traces: TraceArgs,
    #[command(flatten, next_help_heading = "Processes")]
    pub process: ProcessArgs,
    #[command(flatten)]
    pub compat: CompatArgs,
    /// Print this page
    #[arg(short, long, action = ArgAction::Help, help_heading = "About")]
    help: Option<bool>,
    /// Print the version
    #[arg(short = 'V', long, action = ArgAction::Version, help_heading = "About")]
    version: Option<bool>,
}

#[derive(Debug, Clone, PartialEq, Args)]
pub struct ModelArgs {
    /// Hub id or local folder [default: HuggingFaceTB/SmolLM2-135M-Instruct]
    #[arg(long, env = "MODEL_ID", value_name = "ID")]
    pub model_id: Option<String>,
    /// Branch, tag, commit or refs/pr/N of the Hub repository
    #[arg(long, env = "REVISION")]
    pub revision: Option<String>,
    /// File that replaces the model's tokenizer_config.json, for another chat template
    #[arg(long, env = "TOKENIZER_CONFIG_PATH", value_name = "FILE")]
    pub tokenizer_config_path: Option<PathBuf>,
    /// Folder where the Hub's files are kept
    #[arg(long, env = "HUGGINGFACE_HUB_CACHE", value_name = "DIR")]
    pub huggingface_hub_cache: Option<PathBuf>,
    /// Where weights come from: dummy makes random ones of the right shapes, to measure speed
    #[arg(long, env = "HEADRACE_LOAD_FORMAT", value_name = "auto|dummy", hide_possible_values = true, value_enum, default_value_t = LoadFormat::Auto)]
    pub load_format: LoadFormat,
    /// Format of a checkpoint that is quantized, which config.json names as well; or what a
    /// checkpoint of 16 bits is quantized to when it is loaded: fp8, eetq and bitsandbytes (8 bits),
    /// bitsandbytes-nf4 and bitsandbytes-fp4 (4 bits)
    #[arg(long, env = "QUANTIZE", value_name = "FORMAT", value_enum)]
    pub quantize: Option<Quantize>,
    /// Rounds activations to eight bits where weights are integers of four: prompts and large
    /// batches are faster on GPUs with FP8, and answers change a little
    #[arg(long, env = "HEADRACE_QUANTIZE_ACTIVATIONS")]
    pub quantize_activations: bool,
    /// Format that the model writes calls of tools in; auto asks its chat template, none leaves
    /// them in the text
    #[arg(long, env = "HEADRACE_TOOL_CALL_PARSER", value_name = "auto|llama3-json|pythonic|hermes|mistral|qwen3_coder|deepseek_v3|deepseek_v31|json|none", hide_possible_values = true, value_enum, default_value_t = ToolCallParser::Auto)]
    pub tool_call_parser: ToolCallParser,
}

#[derive(Debug, Clone, PartialEq, Args)]
pub struct HttpArgs {
    /// IP address; a name that is none falls back to 0.0.0.0, since containers export HOSTNAME
    #[arg(long, env = "HOSTNAME", value_name = "IP", default_value = "0.0.0.0")]
    pub hostname: String,
    /// Port; 0 takes a free one and the banner names it
    #[arg(short, long, env = "PORT", default_value_t = 3000)]
    pub port: u16,
    /// Second port for /metrics, which --port serves as well; one that is taken is warned of
    #[arg(long, env = "PROMETHEUS_PORT", value_name = "PORT")]
    pub prometheus_port: Option<u16>,
    /// Key that requests must carry as a bearer token; better given as a variable than typed
    #[arg(long, env = "API_KEY", value_name = "KEY")]
    pub api_key: Option<String>,
    /// Origin that browsers may call from, repeatable [default: any]
    #[arg(long, env = "CORS_ALLOW_ORIGIN", value_name = "ORIGIN")]
    pub cors_allow_origin: Vec<String>,
    /// Port that Vertex AI asks for, before --port
    #[arg(long, hide = true, env = "AIP_HTTP_PORT", value_name = "PORT")]
    pub aip_http_port: Option<u16>,
    /// Path of Vertex AI's predictions, beside /vertex
    #[arg(long, hide = true, env = "AIP_PREDICT_ROUTE", value_name = "PATH")]
    pub aip_predict_route: Option<String>,
    /// Path of Vertex AI's probe, beside /health
    #[arg(long, hide = true, env = "AIP_HEALTH_ROUTE", value_name = "PATH")]
    pub aip_health_route: Option<String>,
    /// What the header x-compute-type says [default: the number of shards and the device]
    #[arg(long, hide = true, env = "COMPUTE_TYPE", value_name = "TEXT")]
    pub compute_type: Option<String>,
    /// Whose habits /v1 has where OpenAI's types and TGI disagree; ?dialect= says it of one request.
    /// tgi: a chat's and a whole completion's finish_reason is stop_sequence after a stop string,
    /// which stays in the text; calls of tools end with stop; an event a token in streams, with the
    /// text of special tokens in those of completions; ids of answers are empty; log-probabilities
    /// are of the distribution that tokens are drawn from; presence_penalty p is a
    /// repetition_penalty of p + 2; errors in streams say 422
    #[arg(long, env = "HEADRACE_V1_DIALECT", value_name = "openai|tgi", hide_possible_values = true, value_enum, default_value_t = DialectName::Openai)]
    pub v1_dialect: DialectName,
    /// Seconds that running streams get to end after SIGTERM
    #[arg(
        short,
        long,
        env = "GRACEFUL_TERMINATION_TIMEOUT",
        value_name = "SECONDS",
        default_value_t = 90
    )]
    pub graceful_termination_timeout: u64,
}

#[derive(Debug, Clone, PartialEq, Args)]
pub struct DeviceArgs {
    /// Device; auto takes the GPU if there is one and the CPU if not
    #[arg(long, env = "HEADRACE_DEVICE", value_name = "auto|cpu|cuda", hide_possible_values = true, value_enum, default_value_t = DeviceKind::Auto)]
    pub device: DeviceKind,
    /// Precision of weights and activations; auto asks the checkpoint and the device
    #[arg(long, env = "DTYPE", value_name = "auto|float32|bfloat16|float16", hide_possible_values = true, value_enum, default_value_t = Dtype::Auto)]
    pub dtype: Dtype,
    /// Precision of the KV cache; auto keeps the model's. Eight bits hold twice the tokens: e4m3fn is
    /// closer, e5m2 reaches further; the checkpoint's scales are used, else 1.0
    #[arg(long, env = "KV_CACHE_DTYPE", value_name = "auto|fp8_e4m3fn|fp8_e5m2", hide_possible_values = true, value_enum, default_value_t = KvCacheDtype::Auto)]
    pub kv_cache_dtype: KvCacheDtype,
    /// Processes the model is split over (tensor parallelism) [default: 1, or the visible GPUs]
    #[arg(long, env = "NUM_SHARD", value_name = "N")]
    pub num_shard: Option<usize>,
    /// true: split over all visible GPUs; false: do not split
    #[arg(long, env = "SHARDED", value_name = "true|false", hide_possible_values = true, value_parser = BoolishValueParser::new())]
    pub sharded: Option<bool>,
    /// Threads of one shard [default: cores / shards]
    #[arg(long, env = "HEADRACE_THREADS", value_name = "N")]
    pub threads: Option<u32>,
    /// Memory of the KV cache of one shard, such as 512MiB or 4GiB [default: what is sensible]
    #[arg(long, env = "HEADRACE_KV_MEMORY", value_name = "BYTES", value_parser = parse_bytes)]
    pub kv_memory: Option<u64>,
    /// Share of the GPU's memory to use
    #[arg(
        long,
        env = "CUDA_MEMORY_FRACTION",
        value_name = "FRACTION",
        default_value_t = 1.0
    )]
    pub cuda_memory_fraction: f32,
    /// Use only the plain reference operations: slow, to tell a kernel's bug from a model's
    #[arg(long, env = "HEADRACE_REFERENCE_OPS")]
    pub reference_ops: bool,
}

#[derive(Debug, Clone, PartialEq, Args)]
pub struct RequestArgs {
    /// Requests in the server at one time; more are answered with 429
    #[arg(
        long,
        env = "MAX_CONCURRENT_REQUESTS",
        value_name = "N",
        default_value_t = 128
    )]
    pub max_concurrent_requests: usize,
    /// Tokens of a prompt [default: what leaves room for one new token]
    #[arg(long, env = "MAX_INPUT_TOKENS", value_name = "N")]
    pub max_input_tokens: Option<u32>,
    /// Old name of --max-input-tokens
    #[arg(long, env = "MAX_INPUT_LENGTH", value_name = "N")]
    pub max_input_length: Option<u32>,
    /// Tokens of a prompt and its answer together [default: the model's context, if it fits]
    #[arg(long, env = "MAX_TOTAL_TOKENS", value_name = "N")]
    pub max_total_tokens: Option<u32>,
    /// Candidates that best_of may ask for; 1 switches it off
    #[arg(long, env = "MAX_BEST_OF", value_name = "N", default_value_t = 2)]
    pub max_best_of: usize,
    /// Stop strings a request may name
    #[arg(
        long,
        env = "MAX_STOP_SEQUENCES",
        value_name = "N",
        default_value_t = 4
    )]
    pub max_stop_sequences: usize,
    /// Alternatives a request may ask for at each token
    #[arg(long, env = "MAX_TOP_N_TOKENS", value_name = "N", default_value_t = 5)]
    pub max_top_n_tokens: u32,
    /// Prompts in one call of /v1/completions
    #[arg(
        long,
        env = "MAX_CLIENT_BATCH_SIZE",
        value_name = "N",
        default_value_t = 4
    )]
    pub max_client_batch_size: usize,
    /// Bytes of a request's body
    #[arg(
        long,
        env = "PAYLOAD_LIMIT",
        value_name = "BYTES",
        default_value_t = 2_000_000
    )]
    pub payload_limit: usize,
    /// Threads that tokenize; as many compile grammars, and as many compute what these allow
    #[arg(
        long,
        env = "VALIDATION_WORKERS",
        value_name = "N",
        default_value_t = 2
    )]
    pub validation_workers: usize,
    /// Seconds that a request may take from its arrival to its last token, unless its own header
    /// x-request-timeout says otherwise; one that takes longer ends with an error [default: any]
    #[arg(long, env = "HEADRACE_REQUEST_TIMEOUT", value_name = "SECONDS")]
    pub request_timeout: Option<f64>,
    /// Refuse requests for a grammar
    #[arg(long, env = "DISABLE_GRAMMAR_SUPPORT")]
    pub disable_grammar_support: bool,
    /// Share of the vocabulary that a watermark favours after each token; above 0 and below 1
    #[arg(
        long,
        env = "WATERMARK_GAMMA",
        value_name = "SHARE",
        default_value_t = 0.5
    )]
    pub watermark_gamma: f32,
    /// What a watermark adds to the logits of the tokens that it favours
    #[arg(
        long,
        env = "WATERMARK_DELTA",
        value_name = "LOGITS",
        default_value_t = 2.0,
        allow_negative_numbers = true
    )]
    pub watermark_delta: f32,
}

#[derive(Debug, Clone, PartialEq, Args)]
pub struct EngineArgs {
    /// Milliseconds between two tokens of a stream, at the 99th percentile: prompts are cut so that
    /// steps keep to it. 0: prompts as large as a step holds, however long the streams wait
    #[arg(long, env = "ITL_TARGET_MS", value_name = "MS", default_value_t = 50)]
    pub itl_target_ms: u32,
    /// Prompt tokens in one step; longer prompts are cut into chunks [default: by device]
    #[arg(long, env = "MAX_BATCH_PREFILL_TOKENS", value_name = "N")]
    pub max_batch_prefill_tokens: Option<u32>,
    /// Sequences running at one time [default: 256, on a GPU 512]
    #[arg(long, env = "HEADRACE_MAX_RUNNING", value_name = "N")]
    pub max_running: Option<u32>,
    /// TGI's name for --max-running; the smaller one counts
    #[arg(long, env = "MAX_BATCH_SIZE", value_name = "N")]
    pub max_batch_size: Option<u32>,
    /// Tokens in one block of the KV cache [default: the device's choice]
    #[arg(long, env = "HEADRACE_BLOCK_TOKENS", value_name = "N")]
    pub block_tokens: Option<u32>,
    /// Reuse the KV cache of prompts that begin alike
    #[arg(
        long,
        env = "PREFIX_CACHING",
        value_name = "true|false",
        hide_possible_values = true,
        default_value = "true",
        action = ArgAction::Set,
        value_parser = BoolishValueParser::new()
    )]
    pub prefix_caching: bool,
    /// Steps in flight: while one runs the next is planned
    #[arg(
        long,
        env = "HEADRACE_PIPELINE_DEPTH",
        value_name = "1-3",
        default_value_t = 2
    )]
    pub pipeline_depth: u32,
    /// Milliseconds that a step's sampler waits for what grammars allow; a request that this is too
    /// short for twice in a row fails
    #[arg(
        long,
        env = "HEADRACE_MASK_MS_MAX",
        value_name = "MS",
        default_value_t = 20
    )]
    pub mask_ms_max: u32,
    /// Seconds that one step may take before its group counts as lost
    #[arg(
        long,
        env = "HEADRACE_STEP_TIMEOUT",
        value_name = "SECONDS",
        default_value_t = 300
    )]
    pub step_timeout: u64,
    /// File that every plan is written to, for headrace replay
    #[arg(long, env = "HEADRACE_RECORD_PLANS", value_name = "FILE")]
    pub record_plans: Option<PathBuf>,
}

#[derive(Debug, Clone, PartialEq, Args)]
pub struct TelemetryArgs {
    /// How much is logged: error, warn, info, debug, or by module as in info,headrace_engine=debug
    #[arg(long, env = "LOG_LEVEL", value_name = "LEVEL", default_value = "info")]
    pub log_level: String,
    /// Log JSON objects, one a line
    #[arg(long, env = "JSON_OUTPUT")]
    pub json_output: bool,
    /// OpenTelemetry collector, such as http://host:4317 or https://host:4317
    #[arg(long, env = "OTLP_ENDPOINT", value_name = "URL")]
    pub otlp_endpoint: Option<String>,
    /// Service name of the traces
    #[arg(
        long,
        env = "OTLP_SERVICE_NAME",
        value_name = "NAME",
        default_value = "text-generation-inference.router"
    )]
    pub otlp_service_name: String,
    /// Log what the server runs on (CPU, GPUs, versions) before it starts
    #[arg(short, long)]
    pub env: bool,
}

#[derive(Debug, Clone, PartialEq, Args)]
pub struct ProcessArgs {
    /// Sockets of the shards are PREFIX-0, PREFIX-1, … [default: in a private folder]
    #[arg(long, env = "SHARD_UDS_PATH", value_name = "PREFIX")]
    pub shard_uds_path: Option<PathBuf>,
    /// Address where the shards meet
    #[arg(
        long,
        env = "MASTER_ADDR",
        value_name = "HOST",
        default_value = "localhost"
    )]
    pub master_addr: String,
    /// Port where the shards meet [default: a free one]
    #[arg(long, env = "MASTER_PORT", value_name = "PORT")]
    pub master_port: Option<u16>,
    /// Seconds that loading the model and preparing the device may take
    #[arg(
        long,
        env = "HEADRACE_STARTUP_TIMEOUT",
        value_name = "SECONDS",
        default_value_t = 1800
    )]
    pub startup_timeout: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum DeviceKind {
    Auto,
    Cpu,
    Cuda,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum DialectName {
    Openai,
    Tgi,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Dtype {
    Auto,
    Float32,
    Bfloat16,
    Float16,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum KvCacheDtype {
    Auto,
    #[value(name = "fp8_e4m3fn")]
    Fp8E4m3fn,
    #[value(name = "fp8_e5m2")]
    Fp8E5m2,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Quantize {
    Gptq,
    Awq,
    CompressedTensors,
    Fp8,
    Eetq,
    Bitsandbytes,
    BitsandbytesNf4,
    BitsandbytesFp4,
    /// Refused
    #[value(hide = true)]
    Exl2,
    /// Refused
    #[value(hide = true)]
    Marlin,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LoadFormat {
    Auto,
    Dummy,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ToolCallParser {
    Auto,
    Llama3Json,
    Pythonic,
    Hermes,
    Mistral,
    #[value(name = "qwen3_coder")]
    Qwen3Coder,
    #[value(name = "deepseek_v3")]
    DeepSeekV3,
    #[value(name = "deepseek_v31")]
    DeepSeekV31,
    Json,
    None,
}

// === impl Typed ===

impl Typed {
    /// Reads a command line, the program's name included, and the environment that `env` answers
    /// for. The error is clap's: it knows how to print itself and its exit status.
    pub fn parse<I>(argv: I, env: &dyn Fn(&str) -> Option<OsString>) -> Result<Self, clap::Error>
    where
        I: IntoIterator<Item = OsString>,
    {
        let mut argv: Vec<OsString> = argv.into_iter().collect();
        let env = |name: &str| under_any_name(name, env);
        let twins = twins();
        let command = command();
        let typed = command.clone().try_get_matches_from(&argv)?;
        let mut from_env = Vec::new();
        for twin in twins.iter().filter(|twin| !is_typed(&typed, &twin.id)) {
            let Some(value) = env(&twin.variable) else {
                continue;
            };
            match twin.argument(&command, &value)? {
                None => continue,
                Some(argument) => argv.push(argument),
            }
            from_env.push(twin.variable.as_str());
        }
        let matches = command
            .clone()
            .try_get_matches_from(&argv)
            .map_err(|error| {
                // Only a variable can be wrong here; clap names the flag and the value.
                let text = error.to_string();
                let at_fault = twins.iter().find(|twin| {
                    from_env.contains(&twin.variable.as_str())
                        && text.contains(&format!("--{} ", twin.flag))
                });
                match at_fault {
                    None => error,
                    Some(twin) => invalid(
                        &command,
                        &format!(
                            "environment variable {}: {}",
                            twin.variable,
                            first_line(&text)
                        ),
                    ),
                }
            })?;
        let mut read = Self::from_arg_matches(&matches)?;
        let set = IGNORED_VARIABLES
            .iter()
            .filter(|(name, _)| env(name).is_some());
        read.compat.ignored = set.copied().collect();
        Ok(read)
    }
}

/// What SageMaker's containers call our variables, and OpenTelemetry's for all signals instead of
/// traces alone.
const OTHER_NAMES: [(&str, &str); 13] = [
    ("MODEL_ID", "HF_MODEL_ID"),
    ("REVISION", "HF_MODEL_REVISION"),
    ("NUM_SHARD", "SM_NUM_GPUS"),
    ("QUANTIZE", "HF_MODEL_QUANTIZE"),
    ("TRUST_REMOTE_CODE", "HF_MODEL_TRUST_REMOTE_CODE"),
    ("OTLP_SERVICE_NAME", "OTEL_SERVICE_NAME"),
    (
        "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL",
        "OTEL_EXPORTER_OTLP_PROTOCOL",
    ),
    (
        "OTEL_EXPORTER_OTLP_TRACES_HEADERS",
        "OTEL_EXPORTER_OTLP_HEADERS",
    ),
    (
        "OTEL_EXPORTER_OTLP_TRACES_TIMEOUT",
        "OTEL_EXPORTER_OTLP_TIMEOUT",
    ),
    (
        "OTEL_EXPORTER_OTLP_TRACES_INSECURE",
        "OTEL_EXPORTER_OTLP_INSECURE",
    ),
    (
        "OTEL_EXPORTER_OTLP_TRACES_CERTIFICATE",
        "OTEL_EXPORTER_OTLP_CERTIFICATE",
    ),
    (
        "OTEL_EXPORTER_OTLP_TRACES_CLIENT_CERTIFICATE",
        "OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE",
    ),
    (
        "OTEL_EXPORTER_OTLP_TRACES_CLIENT_KEY",
        "OTEL_EXPORTER_OTLP_CLIENT_KEY",
    ),
];

/// The value of a variable, or of the one that stands for it; empty ones count as unset.
fn under_any_name(name: &str, env: &dyn Fn(&str) -> Option<OsString>) -> Option<OsString> {
    let value = |name: &str| env(name).filter(|value| !value.is_empty());
    value(name).or_else(|| {
        let (_, other) = OTHER_NAMES.iter().find(|(own, _)| *own == name)?;
        // A machine without GPUs has zero of them, and one shard.
        value(other).filter(|value| *other != "SM_NUM_GPUS" || value != "0")
    })
}

/// A flag that also has a variable.
struct Twin {
    id: String,
    flag: String,
    variable: String,
    is_switch: bool,
}

impl Twin {
    /// What one would have typed instead of setting the variable.
    fn argument(&self, command: &Command, value: &OsStr) -> Result<Option<OsString>, clap::Error> {
        if !self.is_switch {
            let mut argument = OsString::from(format!("--{}=", self.flag));
            argument.push(value);
            return Ok(Some(argument));
        }
        let parsed = BoolishValueParser::new().parse_ref(command, None, value);
        let on = parsed.map_err(|_| {
            let (variable, value) = (&self.variable, value.display());
            let message =
                format!("environment variable {variable}: `{value}` is neither true nor false");
            invalid(command, &message)
        })?;
        Ok(on.then(|| OsString::from(format!("--{}", self.flag))))
    }
}

fn twins() -> Vec<Twin> {
    let twin = |arg: &Arg| {
        let (flag, variable) = (arg.get_long()?, arg.get_env()?.to_str()?);
        Some(Twin {
            id: arg.get_id().to_string(),
            flag: flag.to_owned(),
            variable: variable.to_owned(),
            is_switch: matches!(arg.get_action(), ArgAction::SetTrue),
        })
    };
    Typed::command().get_arguments().filter_map(twin).collect()
}

/// The command without clap's own reading of the environment: variables are looked up in one place,
/// where empty ones count as unset and tests bring their own.
fn command() -> Command {
    Typed::command().mut_args(|arg| {
        let Some(variable) = arg.get_env().and_then(OsStr::to_str).map(str::to_owned) else {
            return arg;
        };
        let help = arg.get_help().map(ToString::to_string).unwrap_or_default();
        arg.env(None::<&str>)
            .help(format!("{help} [env: {variable}]"))
    })
}

fn is_typed(matches: &ArgMatches, id: &str) -> bool {
    matches.value_source(id) == Some(ValueSource::CommandLine)
}

fn invalid(command: &Command, message: &str) -> clap::Error {
    command
        .clone()
        .error(clap::error::ErrorKind::InvalidValue, message)
}

fn first_line(text: &str) -> &str {
    text.lines()
        .next()
        .unwrap_or(text)
        .trim_start_matches("error: ")
}
