//! The messages of OTLP's trace service, as far as a server fills them. Field numbers are the
//! protocol's (`opentelemetry/proto/trace/v1`, stable since 1.0).

use bytes::Bytes;
use prost::{Message, Oneof};

use crate::span;

#[derive(Clone, PartialEq, Message)]
pub(crate) struct ExportRequest {
    #[prost(message, repeated, tag = "1")]
    pub(crate) resource_spans: Vec<ResourceSpans>,
}

/// What a collector says of a batch.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct ExportReply {
    #[prost(message, optional, tag = "1")]
    pub(crate) partial_success: Option<PartialSuccess>,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct PartialSuccess {
    #[prost(int64, tag = "1")]
    pub(crate) rejected_spans: i64,
    #[prost(string, tag = "2")]
    pub(crate) error_message: String,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct ResourceSpans {
    #[prost(message, optional, tag = "1")]
    pub(crate) resource: Option<Resource>,
    #[prost(message, repeated, tag = "2")]
    pub(crate) scope_spans: Vec<ScopeSpans>,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct Resource {
    #[prost(message, repeated, tag = "1")]
    pub(crate) attributes: Vec<KeyValue>,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct ScopeSpans {
    #[prost(message, optional, tag = "1")]
    pub(crate) scope: Option<Scope>,
    #[prost(message, repeated, tag = "2")]
    pub(crate) spans: Vec<Span>,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct Scope {
    #[prost(string, tag = "1")]
    pub(crate) name: String,
    #[prost(string, tag = "2")]
    pub(crate) version: String,
}

#[derive(Clone, PartialEq, Message)]
#[expect(
    clippy::struct_field_names,
    reason = "as OpenTelemetry's messages call them"
)]
pub(crate) struct Span {
    #[prost(bytes = "bytes", tag = "1")]
    pub(crate) trace_id: Bytes,
    #[prost(bytes = "bytes", tag = "2")]
    pub(crate) span_id: Bytes,
    #[prost(string, tag = "3")]
    pub(crate) trace_state: String,
    #[prost(bytes = "bytes", tag = "4")]
    pub(crate) parent_span_id: Bytes,
    #[prost(string, tag = "5")]
    pub(crate) name: String,
    #[prost(int32, tag = "6")]
    pub(crate) kind: i32,
    #[prost(fixed64, tag = "7")]
    pub(crate) start_time_unix_nano: u64,
    #[prost(fixed64, tag = "8")]
    pub(crate) end_time_unix_nano: u64,
    #[prost(message, repeated, tag = "9")]
    pub(crate) attributes: Vec<KeyValue>,
    #[prost(message, repeated, tag = "11")]
    pub(crate) events: Vec<Event>,
    #[prost(message, repeated, tag = "13")]
    pub(crate) links: Vec<Link>,
    #[prost(message, optional, tag = "15")]
    pub(crate) status: Option<Status>,
    #[prost(fixed32, tag = "16")]
    pub(crate) flags: u32,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct Event {
    #[prost(fixed64, tag = "1")]
    pub(crate) time_unix_nano: u64,
    #[prost(string, tag = "2")]
    pub(crate) name: String,
    #[prost(message, repeated, tag = "3")]
    pub(crate) attributes: Vec<KeyValue>,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct Link {
    #[prost(bytes = "bytes", tag = "1")]
    pub(crate) trace_id: Bytes,
    #[prost(bytes = "bytes", tag = "2")]
    pub(crate) span_id: Bytes,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct Status {
    #[prost(string, tag = "2")]
    pub(crate) message: String,
    #[prost(int32, tag = "3")]
    pub(crate) code: i32,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct KeyValue {
    #[prost(string, tag = "1")]
    pub(crate) key: String,
    #[prost(message, optional, tag = "2")]
    pub(crate) value: Option<AnyValue>,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct AnyValue {
    #[prost(oneof = "Any", tags = "1, 2, 3, 4, 5")]
    pub(crate) value: Option<Any>,
}

#[derive(Clone, PartialEq, Oneof)]
pub(crate) enum Any {
    #[prost(string, tag = "1")]
    Text(String),
    #[prost(bool, tag = "2")]
    Bool(bool),
    #[prost(int64, tag = "3")]
    Int(i64),
    #[prost(double, tag = "4")]
    Float(f64),
    #[prost(message, tag = "5")]
    List(ArrayValue),
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct ArrayValue {
    #[prost(message, repeated, tag = "1")]
    pub(crate) values: Vec<AnyValue>,
}

/// `Status.code` of a span that failed.
const ERROR: i32 = 2;

/// W3C's flags of a span that is sampled.
const SAMPLED: u32 = 1;

/// One batch as a message.
pub(crate) fn request(resource: &Resource, spans: Vec<span::Span>) -> ExportRequest {
    let scope = Scope {
        name: "headrace".to_owned(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
    };
    let scope_spans = ScopeSpans {
        scope: Some(scope),
        spans: spans.into_iter().map(Span::from).collect(),
    };
    ExportRequest {
        resource_spans: vec![ResourceSpans {
            resource: Some(resource.clone()),
            scope_spans: vec![scope_spans],
        }],
    }
}

// === impl Resource ===

impl Resource {
    pub(crate) fn new(attributes: Vec<(String, String)>) -> Self {
        let attributes = attributes.into_iter();
        let attributes = attributes.map(|(key, value)| KeyValue {
            key,
            value: Some(AnyValue {
                value: Some(Any::Text(value)),
            }),
        });
        Self {
            attributes: attributes.collect(),
        }
    }
}

// === impl Span ===

impl From<span::Span> for Span {
    fn from(span: span::Span) -> Self {
        let kind = match span.kind {
            span::Kind::Internal => 1,
            span::Kind::Server => 2,
        };
        let events = span.events.into_iter().map(|event| Event {
            time_unix_nano: event.at,
            name: event.name.to_owned(),
            attributes: attributes(event.attributes),
        });
        let links = span.links.into_iter().map(|link| Link {
            trace_id: trace_id(link.trace),
            span_id: span_id(link.span),
        });
        Self {
            trace_id: trace_id(span.trace),
            span_id: span_id(span.id),
            trace_state: span.state.as_deref().unwrap_or_default().to_owned(),
            parent_span_id: span.parent.map_or_else(Bytes::new, span_id),
            name: span.name.into_owned(),
            kind,
            start_time_unix_nano: span.begin,
            end_time_unix_nano: span.end,
            attributes: attributes(span.attributes),
            events: events.collect(),
            links: links.collect(),
            status: span.error.map(|message| Status {
                message: message.into_owned(),
                code: ERROR,
            }),
            flags: SAMPLED,
        }
    }
}

// === free functions ===

fn trace_id(id: span::TraceId) -> Bytes {
    Bytes::copy_from_slice(&id.0)
}

fn span_id(id: span::SpanId) -> Bytes {
    Bytes::copy_from_slice(&id.0.to_be_bytes())
}

fn attributes(attributes: Vec<(&'static str, span::Value)>) -> Vec<KeyValue> {
    let attributes = attributes.into_iter();
    let attributes = attributes.map(|(key, value)| KeyValue {
        key: key.to_owned(),
        value: Some(any(value)),
    });
    attributes.collect()
}

fn any(value: span::Value) -> AnyValue {
    let value = match value {
        span::Value::Text(text) => Any::Text(text.into_owned()),
        span::Value::Int(number) => Any::Int(number),
        span::Value::Float(number) => Any::Float(number),
        span::Value::Bool(is) => Any::Bool(is),
        span::Value::Texts(texts) => {
            let texts = texts.into_iter().map(|text| any(text.into()));
            Any::List(ArrayValue {
                values: texts.collect(),
            })
        }
    };
    AnyValue { value: Some(value) }
}
