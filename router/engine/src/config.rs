//! What the engine is told once.

use std::path::PathBuf;
use std::time::Duration;

use bytes::Bytes;
use prometheus::Registry;

/// A file for replay, and what the server was told, which the record begins with.
#[derive(Debug, Clone)]
pub struct Record {
    /// The file; it is made anew.
    pub path: PathBuf,
    /// `serve.json` without secrets. The engine only passes it on.
    pub serve: Bytes,
}

/// Everything the engine needs to know; values of `serve.json`.
#[derive(Debug, Clone)]
pub struct EngineConfig {
    /// Unix sockets of the shards, in rank order.
    pub sockets: Vec<PathBuf>,
    /// Tokens in a KV block; 0 takes the shard's first choice.
    pub block_tokens: u32,
    /// Blocks at most; 0 takes what fits.
    pub blocks_max: u32,
    /// Sequences running at one time.
    pub running_max: u32,
    /// Query tokens in one step.
    pub step_tokens_max: u32,
    /// Prompt tokens in one step.
    pub prefill_tokens_max: u32,
    /// What the 99th percentile of the gaps between a stream's tokens is to be; `None` bounds
    /// nothing.
    pub itl_target: Option<Duration>,
    /// Plans in flight, 1 to 3.
    pub depth: u32,
    /// Whether finished prefixes are kept for later requests.
    pub prefix_caching: bool,
    /// Sequences that may wait.
    pub queue_max: usize,
    /// Lowers the model's context, when given.
    pub context_tokens_max: Option<u32>,
    /// Empty for the model's dtype.
    pub kv_dtype: String,
    /// Of the device's free memory; 0 for the device's default.
    pub memory_fraction: f32,
    /// Where every plan and result is written, for replay.
    pub record: Option<Record>,
    /// A step that takes longer takes the group down.
    pub step_deadline: Duration,
    /// What the shard waits for the masks of a step (R7).
    pub mask_max: Duration,
    /// Threads that compute masks.
    pub mask_threads: usize,
    /// Connecting to the shards, loading and preparing may take this long together.
    pub prepare_deadline: Duration,
    /// Where the engine's series are registered.
    pub metrics: Registry,
}
