//! HTTP: what clients see of the server.
//!
//! Reading order: the process (`run`), the routes and what they share (`app`), the way in (`body`,
//! `access`, `validate`, `intake`, `backend`), the way out (`respond`, `answer`, `sse`, `error`),
//! the APIs (`tgi`, `openai`, `ops`, `openapi`, `page`), and what is counted and logged (`meter`,
//! `metrics`, `telemetry`, `trace`).

mod access;
mod answer;
mod app;
mod backend;
mod body;
mod calls;
mod cloud;
mod docs;
mod error;
mod grammar;
mod intake;
mod meter;
mod metrics;
mod openai;
mod openapi;
mod ops;
mod page;
mod respond;
mod run;
mod sse;
mod telemetry;
mod terms;
mod tgi;
mod trace;
mod validate;

#[cfg(test)]
mod tests;

pub use openapi::schema;
pub use run::{engine_config, run};
