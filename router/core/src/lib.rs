//! The scheduler: a pure value machine. It owns sequences, block tables, the prefix tree and the
//! slots. It never awaits, never reads a clock, never sees a device or a string of text.
//!
//! Reading order: [`ids`] and [`limits`], what is asked ([`request`]), what is decided ([`plan`]),
//! what happened ([`event`]); then who decides ([`scheduler`]) over `sequence`, `queue`, `budget`,
//! `slots` and `kv`.

pub mod event;
pub mod ids;
pub mod limits;
pub mod plan;
pub mod request;

mod budget;
mod kv;
pub mod mutation;
mod queue;
pub mod scheduler;
mod sequence;
mod slots;

pub use crate::budget::PromptAllowance;
pub use crate::scheduler::{AdmitError, CommitError, Load, Scheduler, Stats};

#[cfg(feature = "testing")]
#[path = "../testing/mod.rs"]
pub mod testing;
