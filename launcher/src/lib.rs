//! The launcher: processes, nothing else. It knows command lines, pipes and readiness, and neither
//! HTTP nor gRPC nor scheduling.
//!
//! Reading order: [`run`] is the sequence from the command line to the exit status; `topology`
//! says which processes there are; `child` runs one of them, or `job` a thread in the router's
//! place; `supervisor` keeps the group together until it ends.

mod banner;
mod child;
mod control;
mod download;
mod error;
mod job;
mod lines;
mod machine;
mod output;
mod python;
mod run;
mod secrets;
mod signals;
mod supervisor;
mod topology;

pub use crate::job::{Job, Stage};
pub use crate::python::{PythonNotFound, find_python};
pub use crate::run::{Programs, run, run_job};
