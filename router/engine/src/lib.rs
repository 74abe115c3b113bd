//! The tasks around the scheduler: a handle that requests come in by ([`EngineHandle`]), one driver
//! that owns the scheduler, the shard group it sends plans to, and the sinks it leaves tokens in.
//!
//! Reading order: what a caller sees (`handle`, `sink`), what the driver is told (`message`), the
//! loop (`driver`), how large its steps may be (`pace`), what constrained rows wait for (`grammar`), the group and its streams (`group`), and the
//! facts kept for later (`record`, `metrics`, `trace`).

mod config;
mod driver;
mod error;
mod grammar;
mod group;
mod handle;
mod message;
mod metrics;
mod pace;
mod record;
mod sink;
mod trace;

pub use config::{EngineConfig, Record};
pub use error::{EngineError, ShardError, SubmitError};
pub use handle::{Attached, EngineHandle, EngineState, Facts, TokenStream, start};
pub use metrics::Load;
pub use sink::TokenEvent;
pub use trace::{CHUNKS_MAX, Chunk, Decode, SENT_BACK_MAX, SeqNotes, SeqTrace, SpanOf, Started};

pub use headrace_core::event::{FinishReason, PromptToken, SampledToken, WaitReason};
pub use headrace_core::ids::{BlockSize, Blocks, TokenId, Tokens};
pub use headrace_core::limits::Limits;
pub use headrace_core::request::{Request, RequestError, RequestSpec, Sampling, TraceContext};
pub use headrace_wire::Describe;

#[cfg(test)]
mod tests;
