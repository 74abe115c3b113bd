//! Spans as values, and their way to an OpenTelemetry collector: the messages of OTLP ([`pb`]), the
//! calls by gRPC and by HTTP ([`client`]), and the queue in front of them ([`exporter`]), which never
//! makes anybody wait.

mod client;
mod exporter;
mod pb;
mod span;
mod tls;

pub use client::{Protocol, Target, TargetError};
pub use exporter::{Counts, Exporter, Limits, Worker, exporter};
pub use span::{Event, Kind, Link, Span, SpanId, TraceId, Value};
pub use tls::{ClientCertificate, Tls};
