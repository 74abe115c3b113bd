//! The end of a traced answer, and its waterfall inside it: in the last event of a stream, or in the
//! object that is the body.

use std::pin::Pin;
use std::task::{Context, Poll};

use axum::body::{Body, BodyDataStream, Bytes, to_bytes};
use axum::http::header;
use axum::response::Response;
use futures_util::Stream;
use headrace_otlp::{Span, Value};
use serde_json::{Map, Number, Value as Json, json};

use crate::trace::Guard;

/// A body of events, whose end is the trace's.
struct Events {
    inner: BodyDataStream,
    guard: Guard,
    /// The waterfall is still to be told.
    owes: bool,
}

/// Puts the waterfall where it was asked for; the trace ends when the answer does.
pub(super) async fn finish(guard: Guard, response: Response) -> Response {
    let (inline, streamed) = {
        let notes = guard.trace.lock();
        (guard.trace.origin.inline, notes.line.streamed)
    };
    if streamed {
        return response.map(|body| {
            Body::from_stream(Events {
                inner: body.into_data_stream(),
                guard,
                owes: inline,
            })
        });
    }
    if !inline {
        return response;
    }
    let (mut parts, body) = response.into_parts();
    // Answers are made in memory: there is no error, and no size that could surprise.
    let body = to_bytes(body, usize::MAX).await.unwrap_or_default();
    parts.headers.remove(header::CONTENT_LENGTH);
    let told = put(&body, &waterfall(&guard.trace.spans()));
    Response::from_parts(parts, Body::from(told.unwrap_or(body)))
}

/// What a caller is told: every span with its times since the request came, in milliseconds.
pub(super) fn waterfall(spans: &[Span]) -> Json {
    let begin = spans.first().map_or(0, |span| span.begin);
    let trace = spans.first().map(|span| span.trace.to_string());
    let spans = spans.iter().map(|span| {
        let mut told = Map::new();
        told.insert("name".into(), span.name.as_ref().into());
        told.insert("span_id".into(), span.id.to_string().into());
        let parent = span.parent.map(|parent| parent.to_string());
        told.insert("parent_span_id".into(), parent.into());
        told.insert("start_ms".into(), millis(span.begin, begin));
        told.insert("duration_ms".into(), millis(span.end, span.begin));
        told.insert("attributes".into(), attributes(&span.attributes));
        if !span.events.is_empty() {
            let events = span.events.iter().map(|event| {
                json!({"name": event.name, "at_ms": millis(event.at, begin),
                    "attributes": attributes(&event.attributes)})
            });
            told.insert("events".into(), events.collect());
        }
        if let Some(error) = &span.error {
            told.insert("error".into(), error.as_ref().into());
        }
        Json::Object(told)
    });
    json!({"trace_id": trace, "spans": spans.collect::<Vec<_>>()})
}

/// Adds the waterfall to the last object of a text of JSON; `None` if there is no object at its end.
pub(super) fn put(text: &[u8], waterfall: &Json) -> Option<Bytes> {
    let end = text.trim_ascii_end();
    let end = end.strip_suffix(b"]").unwrap_or(end).trim_ascii_end();
    let before = end.strip_suffix(b"}")?;
    let mut out = Vec::with_capacity(text.len() + 4096);
    out.extend_from_slice(before);
    if !before.trim_ascii_end().ends_with(b"{") {
        out.push(b',');
    }
    out.extend_from_slice(b"\"trace\":");
    serde_json::to_writer(&mut out, waterfall).ok()?;
    out.extend_from_slice(&text[before.len()..]);
    Some(out.into())
}

/// Adds the waterfall to the last of some events that is an object; `None` if none is.
pub(super) fn put_event(events: &[u8], waterfall: &Json) -> Option<Bytes> {
    const DATA: &[u8] = b"data: {";
    let at = events
        .windows(DATA.len())
        .rposition(|bytes| bytes == DATA)?;
    let until = events[at..].windows(2).position(|bytes| bytes == b"\n\n")? + at;
    let told = put(&events[at..until], waterfall)?;
    Some([&events[..at], &told, &events[until..]].concat().into())
}

// === impl Events ===

impl Stream for Events {
    type Item = Result<Bytes, axum::Error>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let item = std::task::ready!(Pin::new(&mut self.inner).poll_next(cx));
        let Some(Ok(events)) = &item else {
            return Poll::Ready(item);
        };
        if self.owes && self.guard.trace.is_settled() {
            let waterfall = waterfall(&self.guard.trace.spans());
            if let Some(told) = put_event(events, &waterfall) {
                self.owes = false;
                return Poll::Ready(Some(Ok(told)));
            }
        }
        Poll::Ready(item)
    }
}

// === free functions ===

fn millis(until: u64, since: u64) -> Json {
    let micros = until.saturating_sub(since) / 1000;
    Number::from_f64(micros as f64 / 1000.0).map_or(Json::Null, Json::Number)
}

fn attributes(attributes: &[(&'static str, Value)]) -> Json {
    let value = |value: &Value| match value {
        Value::Text(text) => text.as_ref().into(),
        Value::Int(number) => (*number).into(),
        Value::Float(number) => Number::from_f64(*number).map_or(Json::Null, Json::Number),
        Value::Bool(is) => (*is).into(),
        Value::Texts(texts) => texts.clone().into(),
    };
    let entries = attributes.iter();
    Json::Object(
        entries
            .map(|(name, told)| ((*name).to_owned(), value(told)))
            .collect(),
    )
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::{put, put_event};

    #[test]
    fn the_waterfall_is_a_key_of_the_last_object() {
        let told = json!({"spans": []});
        for (text, expected) in [
            (r#"{"a":1}"#, r#"{"a":1,"trace":{"spans":[]}}"#),
            (r#"[{"a":"}"}]"#, r#"[{"a":"}","trace":{"spans":[]}}]"#),
            ("{}", r#"{"trace":{"spans":[]}}"#),
        ] {
            let out = put(text.as_bytes(), &told).expect("there is an object");
            assert_eq!(std::str::from_utf8(&out), Ok(expected));
        }
        assert_eq!(put(b"no object", &told), None);
    }

    #[test]
    fn of_events_the_last_object_has_it_and_the_mark_of_the_end_stays() {
        let told = json!(1);
        let events = b"data: {\"a\":1}\n\ndata: {\"b\":2}\n\ndata: [DONE]\n\n";
        let out = put_event(events, &told).expect("there is an event");
        let expected = "data: {\"a\":1}\n\ndata: {\"b\":2,\"trace\":1}\n\ndata: [DONE]\n\n";
        assert_eq!(std::str::from_utf8(&out), Ok(expected));
        assert_eq!(put_event(b":\n\n", &told), None);
    }
}
