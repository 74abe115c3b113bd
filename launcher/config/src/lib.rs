//! The one place where knobs exist. `serve.json` is this file's [`Serve`], written once by the
//! launcher and read by the router and by every shard (`server/headrace/config.py` mirrors it and
//! refuses unknown keys). Nobody else reads flags or the environment.

mod cli;
mod compat;
mod file;
mod machine;
mod resolve;
mod size;
mod traces;

use std::fmt;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

pub use crate::cli::Typed;
pub use crate::file::{FileError, load, save, without_secrets};
pub use crate::machine::Machine;
pub use crate::resolve::{
    ConfigError, DEFAULT_MODEL, Launch, Resolved, SECRET_VARIABLES, TIMEOUT_MAX_S, hub_token,
    resolve,
};

/// Everything a server needs to know, resolved.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Serve {
    /// What is served.
    pub model: Model,
    /// What it runs on and in which precision.
    pub device: Device,
    /// What requests may ask for.
    pub requests: Requests,
    /// How steps are made.
    pub engine: Engine,
    /// What watermarks are made of.
    pub watermark: Watermark,
    /// Where HTTP listens.
    pub http: Http,
    /// One entry a rank, in rank order.
    pub shards: Vec<Shard>,
    /// Logs, metrics and traces.
    pub telemetry: Telemetry,
}

/// What is served.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Model {
    /// As typed: a Hub id or a folder. Reported by `/info` and `/v1/models`.
    pub id: String,
    /// Branch, tag or commit, when given.
    pub revision: Option<String>,
    /// Commit of the snapshot, when known.
    pub sha: Option<String>,
    /// Folder with `config.json`, `tokenizer.json` and safetensors.
    pub path: PathBuf,
    /// `auto` reads safetensors, `dummy` makes random weights of the right shapes.
    pub load_format: String,
    /// Format of the weights, in TGI's word; empty for whatever the checkpoint is.
    pub quantize: String,
    /// Whether activations are rounded to eight bits where weights are integers of four.
    pub quantize_activations: bool,
    /// Replaces the folder's `tokenizer_config.json`, when given.
    pub tokenizer_config_path: Option<PathBuf>,
    /// `auto`, the name of a format of tool calls, or `none`.
    pub tool_call_parser: String,
}

/// What it runs on and in which precision.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Device {
    /// `auto`, `cpu` or `cuda`; `auto` is decided by the shard and reported by `Describe`.
    pub kind: String,
    /// `auto`, `float32`, `bfloat16` or `float16`.
    pub dtype: String,
    /// `float8_e4m3fn` or `float8_e5m2`; empty for the model's dtype.
    pub kv_dtype: String,
    /// Of the free memory, for the KV pool; 0 for the device's default.
    pub memory_fraction: f32,
    /// Bytes of the KV pool at most; 0 for the device's default.
    pub kv_bytes_max: u64,
    /// Threads of one shard; 0 shares the machine's cores among the shards.
    pub threads: u32,
    /// Only reference operations: the slow twins of every fast path.
    pub reference_ops: bool,
    /// Whether steps are recorded as graphs, where the device records any.
    pub graphs: bool,
}

/// What requests may ask for. Names and meanings are TGI's.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Requests {
    pub max_concurrent_requests: usize,
    pub max_best_of: usize,
    pub max_stop_sequences: usize,
    pub max_top_n_tokens: u32,
    /// `None`: whatever leaves room for one new token.
    pub max_input_tokens: Option<u32>,
    /// `None`: the model's context or the KV pool, whichever is smaller.
    pub max_total_tokens: Option<u32>,
    pub max_client_batch_size: usize,
    /// Bytes of a request body.
    pub payload_limit: usize,
    /// Threads that tokenize; as many compile grammars, and as many compute masks.
    pub validation_workers: usize,
    /// Whether requests for a grammar are refused.
    pub disable_grammar_support: bool,
    /// What a request may take that does not say itself; `None` for any time.
    pub timeout_ms: Option<u64>,
}

/// How steps are made.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Engine {
    /// Tokens in a KV block; 0 takes the shard's first choice.
    pub block_tokens: u32,
    /// Blocks at most; 0 takes what fits.
    pub blocks_max: u32,
    /// Sequences running at one time.
    pub running_max: u32,
    /// Query tokens in one step.
    pub step_tokens_max: u32,
    /// Prompt tokens in one step (`--max-batch-prefill-tokens`).
    pub prefill_tokens_max: u32,
    /// What the 99th percentile of the gaps between a stream's tokens is to be; 0 bounds nothing.
    pub itl_target_ms: u32,
    /// Plans in flight.
    pub pipeline_depth: u32,
    pub prefix_caching: bool,
    /// A file that every plan is written to, for `headrace replay`.
    pub record: Option<PathBuf>,
    /// What a step's sampler waits for the masks of its constrained rows.
    pub mask_ms_max: u32,
    /// A step that takes longer than this takes the group down.
    pub step_deadline_ms: u64,
    /// Loading and `Prepare` together may take this long.
    pub prepare_deadline_ms: u64,
}

/// What watermarks are made of, of the requests that ask for one.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Watermark {
    /// The probability that a token is green; between 0 and 1.
    pub gamma: f32,
    /// What the logits of green tokens are raised by.
    pub delta: f32,
}

/// Where HTTP listens. Its `Debug` output hides the key.
#[derive(Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Http {
    pub hostname: String,
    pub port: u16,
    /// A second port, of metrics alone.
    pub prometheus_port: Option<u16>,
    pub api_key: Option<String>,
    /// Origins allowed; empty for any.
    pub cors_allow_origin: Vec<String>,
    /// What `x-compute-type` says; absent, how many of which device.
    pub compute_type: Option<String>,
    /// Another path of the predictions of `/vertex`, and another one of `/health`.
    pub predict_route: Option<String>,
    pub health_route: Option<String>,
    /// Whose habits `/v1` has, unless a request says itself.
    pub v1_dialect: Dialect,
    /// From the stop signal to the last byte of the last stream.
    pub drain_deadline_ms: u64,
}

/// Whose habits answers of OpenAI's routes have where OpenAI's types and TGI disagree.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Dialect {
    Openai,
    Tgi,
}

/// One rank.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Shard {
    pub rank: u32,
    /// Unix socket its gRPC service listens on.
    pub socket: PathBuf,
    /// Index of its device, for CUDA.
    pub device_index: u32,
    /// `host:port` where the ranks of the group meet (`torch.distributed`).
    pub rendezvous: String,
}

/// Logs, metrics and traces.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Telemetry {
    /// EnvFilter syntax, `info` by default.
    pub log_level: String,
    pub json_output: bool,
    /// Where spans go, in full: `http://host:port`, or `https`, for gRPC; with the path for HTTP.
    /// `None`: nowhere.
    pub otlp_endpoint: Option<String>,
    pub otlp_service_name: String,
    pub traces: Traces,
}

/// Which requests are traced and how their spans travel. Its `Debug` output hides the headers.
#[derive(Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Traces {
    /// `grpc` or `http/protobuf`.
    pub protocol: String,
    /// What a connection by `https` is made with; `None` where the endpoint is another.
    pub tls: Option<Tls>,
    /// Sent with every batch of spans.
    pub headers: Vec<Pair>,
    /// Attributes of the process, beside its service name.
    pub resource: Vec<Pair>,
    /// In the words of `OTEL_TRACES_SAMPLER`.
    pub sampler: String,
    /// Of the traces that begin here, where the sampler asks for a ratio.
    pub sampler_ratio: f64,
    /// What a collector may take to answer.
    pub timeout_ms: u64,
    /// Spans that may wait; more are dropped.
    pub queue_max: usize,
    /// Spans sent together at most.
    pub batch_max: usize,
    /// What a span waits for company at most.
    pub delay_ms: u64,
}

/// TLS to the collector: files of PEM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tls {
    /// Root certificates that are trusted; no others are.
    pub roots: PathBuf,
    /// What a collector that asks for one is shown.
    pub client: Option<ClientCertificate>,
}

/// A certificate of the server's own.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClientCertificate {
    /// It, and those between it and a root.
    pub certificate: PathBuf,
    /// Its private key.
    pub key: PathBuf,
}

/// A name and what it stands for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Pair {
    pub name: String,
    pub value: String,
}

// === impl Traces ===

impl fmt::Debug for Traces {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let headers: Vec<&str> = self.headers.iter().map(|pair| pair.name.as_str()).collect();
        f.debug_struct("Traces")
            .field("protocol", &self.protocol)
            .field("tls", &self.tls)
            .field("headers (values hidden)", &headers)
            .field("resource", &self.resource)
            .field("sampler", &self.sampler)
            .field("sampler_ratio", &self.sampler_ratio)
            .field("timeout_ms", &self.timeout_ms)
            .field("queue_max", &self.queue_max)
            .field("batch_max", &self.batch_max)
            .field("delay_ms", &self.delay_ms)
            .finish()
    }
}

// === impl Http ===

impl fmt::Debug for Http {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Http")
            .field("hostname", &self.hostname)
            .field("port", &self.port)
            .field("api_key", &self.api_key.as_ref().map(|_| "(hidden)"))
            .field("cors_allow_origin", &self.cors_allow_origin)
            .field("compute_type", &self.compute_type)
            .field("predict_route", &self.predict_route)
            .field("prometheus_port", &self.prometheus_port)
            .field("health_route", &self.health_route)
            .field("v1_dialect", &self.v1_dialect)
            .field("drain_deadline_ms", &self.drain_deadline_ms)
            .finish()
    }
}
