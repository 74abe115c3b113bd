//! What can go wrong, by who hears of it: a caller, or whoever runs the engine.

use std::path::PathBuf;
use std::sync::Arc;
use std::{io, time::Duration};

use headrace_core::ids::StepId;
use headrace_core::scheduler::CommitError;
use headrace_wire::WireError;

/// Why a request was not admitted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SubmitError {
    /// The shards are still loading.
    #[error("the model is still loading")]
    NotReady,
    /// As many sequences wait as may wait.
    #[error("{waiting} requests are waiting; at most {queue_max} may")]
    QueueFull {
        /// Sequences that wait.
        waiting: usize,
        /// How many may.
        queue_max: usize,
    },
    /// No new requests are taken before the end.
    #[error("the server is shutting down")]
    Draining,
    /// The engine has stopped.
    #[error("the engine is down: {reason}")]
    Down {
        /// Why.
        reason: Arc<str>,
    },
}

/// Why the engine ended other than by a drain.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// The shard group failed (R8).
    #[error(transparent)]
    Group(#[from] ShardError),
    /// The record of plans cannot be created.
    #[error("cannot record plans to {path}: {source}", path = path.display())]
    Record {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// What a shard or the group of them did wrong. All of them end the group: it is one failure
/// domain (R8).
#[derive(Debug, thiserror::Error)]
pub enum ShardError {
    /// The group was not ready in time.
    #[error("the shards were not ready within {deadline:?}: {phase} took too long")]
    PrepareDeadline {
        /// What was allowed.
        deadline: Duration,
        /// What it was at.
        phase: &'static str,
    },
    /// A call failed.
    #[error("{call} failed on rank {rank}: {message}")]
    Call {
        /// The rank.
        rank: usize,
        /// Which call.
        call: &'static str,
        /// The shard's message.
        message: String,
    },
    /// A shard is not what its group is.
    #[error("rank {rank} disagrees with rank 0 about {what}: {theirs} instead of {ours}")]
    Disagreement {
        /// The rank.
        rank: usize,
        /// About what.
        what: &'static str,
        /// What rank 0, or the configuration, says.
        ours: String,
        /// What this one says.
        theirs: String,
    },
    /// A block size that the attention cannot work with.
    #[error("blocks of {wanted} tokens are not supported; supported are {supported:?}")]
    BlockTokens {
        /// What was asked for.
        wanted: u32,
        /// What there is, best first.
        supported: Vec<u32>,
    },
    /// A pool without a usable block.
    #[error("the KV pool has {blocks} blocks, scrap included; at least 2 are needed")]
    PoolTooSmall {
        /// Blocks of the pool.
        blocks: u32,
    },
    /// A stream ended although nobody asked it to.
    #[error("the stream of rank {rank} ended: {message}")]
    StreamEnded {
        /// The rank.
        rank: usize,
        /// The status, when there was one.
        message: String,
    },
    /// Bytes that are no result.
    #[error("rank {rank} sent a malformed result: {source}")]
    Malformed {
        /// The rank.
        rank: usize,
        /// What is wrong with it.
        source: WireError,
    },
    /// A result for another step than the next.
    #[error("rank {rank} sent the result of step {step}; {expected} was next")]
    OutOfOrder {
        /// The rank.
        rank: usize,
        /// What came.
        step: StepId,
        /// What was due.
        expected: StepId,
    },
    /// Ranks computed different things.
    #[error(
        "rank {rank} disagrees with rank 0 about step {step}: digest {theirs:#x}, not {ours:#x}"
    )]
    DigestMismatch {
        /// The rank.
        rank: usize,
        /// The step.
        step: StepId,
        /// Rank 0's digest.
        ours: u64,
        /// This one's.
        theirs: u64,
    },
    /// A step took too long.
    #[error("step {step} took longer than {deadline:?}")]
    StepDeadline {
        /// The step.
        step: StepId,
        /// What was allowed.
        deadline: Duration,
    },
    /// A result that contradicts its plan.
    #[error("a result contradicts its plan: {0}")]
    Contradiction(#[from] CommitError),
}
