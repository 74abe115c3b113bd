//! W3C's trace context: `traceparent` and `tracestate`, read and written.

use std::sync::Arc;

use axum::http::{HeaderMap, HeaderName, HeaderValue};
use headrace_otlp::{SpanId, TraceId};

pub(super) const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
pub(super) const TRACESTATE: HeaderName = HeaderName::from_static("tracestate");

/// What of `tracestate` is carried on; longer ones are left out, as the specification allows.
const STATE_BYTES_MAX: usize = 512;

/// The caller's span.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Parent {
    pub(super) trace: TraceId,
    pub(super) span: SpanId,
    pub(super) sampled: bool,
}

/// The caller's span; `None` when none is named, or not as it should be.
pub(super) fn parent(headers: &HeaderMap) -> Option<Parent> {
    let mut all = headers.get_all(TRACEPARENT).iter();
    let (Some(only), None) = (all.next(), all.next()) else {
        return None;
    };
    read(only.to_str().ok()?.trim())
}

/// `tracestate` as it came, of several headers in order.
pub(super) fn state(headers: &HeaderMap) -> Option<Arc<str>> {
    let lists = headers.get_all(TRACESTATE).iter();
    let lists = lists
        .map(HeaderValue::to_str)
        .collect::<Result<Vec<_>, _>>();
    let joined = lists.ok()?.join(",");
    (!joined.is_empty() && joined.len() <= STATE_BYTES_MAX).then(|| joined.into())
}

/// `traceparent` of a span of ours.
pub(super) fn header(trace: TraceId, span: SpanId, sampled: bool) -> HeaderValue {
    let text = format!("00-{trace}-{span}-{:02x}", u8::from(sampled));
    HeaderValue::from_str(&text).expect("hexadecimal digits are a header")
}

fn read(text: &str) -> Option<Parent> {
    let mut parts = text.split('-');
    let version = hex(parts.next()?, 2)?;
    let trace = hex(parts.next()?, 32)?;
    let span = hex(parts.next()?, 16)?;
    let flags = hex(parts.next()?, 2)?;
    // Later versions may have more behind it; version ff is none.
    if version == 0xff || (version == 0 && parts.next().is_some()) || trace == 0 || span == 0 {
        return None;
    }
    Some(Parent {
        trace: TraceId(trace.to_be_bytes()),
        span: SpanId(u64::try_from(span).ok()?),
        sampled: flags & 1 == 1,
    })
}

/// As many digits, in lower case as they must be.
fn hex(text: &str, digits: usize) -> Option<u128> {
    let is_digit = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
    let is_hex = text.len() == digits && text.bytes().all(is_digit);
    is_hex.then(|| u128::from_str_radix(text, 16).ok())?
}

#[cfg(test)]
mod tests {
    use super::{Parent, header, read};

    const TEXT: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

    #[test]
    fn a_header_is_read_and_written_alike() {
        let Parent {
            trace,
            span,
            sampled,
        } = read(TEXT).expect("it is one");
        assert_eq!(header(trace, span, sampled), TEXT);
        assert!(sampled);
    }

    #[test]
    fn what_is_no_traceparent_starts_a_new_trace() {
        for text in [
            "",
            "00-zz-zz-zz",
            "00-00000000000000000000000000000000-b7ad6b7169203331-01",
            "00-0af7651916cd43dd8448eb211c80319c-0000000000000000-01",
            "ff-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
            "00-0AF7651916CD43DD8448EB211C80319C-b7ad6b7169203331-01",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-more",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-1",
        ] {
            assert_eq!(read(text), None, "{text}");
        }
        let later = format!("cc{}-more", &TEXT[2..]);
        assert!(read(&later).is_some(), "a later version has more behind it");
    }
}
