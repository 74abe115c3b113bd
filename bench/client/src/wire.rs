//! Server-sent events of the servers that are measured, and the bodies that ask for them.

use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::{Value, json};

use crate::args::Api;

/// What one event means to the clock.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Meaning {
    /// Tokens came, with the server's count of all so far if it tells.
    Chunk { tokens: Option<u64> },
    /// Only the count.
    Count { tokens: u64 },
    /// `[DONE]`, or what says nothing about tokens.
    Nothing,
    /// The answer broke off.
    Error(String),
}

/// The fields that matter, of both APIs.
#[derive(Deserialize)]
struct Event {
    choices: Option<Vec<IgnoredAny>>,
    usage: Option<Usage>,
    token: Option<IgnoredAny>,
    details: Option<Details>,
    error: Option<Value>,
}

#[derive(Deserialize)]
struct Usage {
    completion_tokens: Option<u64>,
}

#[derive(Deserialize)]
struct Details {
    generated_tokens: Option<u64>,
}

/// Cuts a body into the payloads of its `data:` lines.
#[derive(Debug, Default)]
pub(crate) struct Lines {
    rest: Vec<u8>,
}

/// Path and body of a request.
pub(crate) fn request(api: Api, model: &str, prompt: &Value, osl: u32) -> (&'static str, Value) {
    match api {
        Api::Completions => (
            "/v1/completions",
            json!({
                "model": model, "prompt": prompt, "max_tokens": osl, "temperature": 0,
                "ignore_eos": true, "stream": true, "stream_options": {"include_usage": true},
            }),
        ),
        Api::Tgi => (
            "/generate_stream",
            json!({
                "inputs": prompt,
                "parameters": {
                    "max_new_tokens": osl, "do_sample": false, "details": true, "ignore_eos": true,
                },
            }),
        ),
    }
}

/// Reads one payload.
pub(crate) fn meaning(payload: &[u8]) -> Meaning {
    if payload == b"[DONE]" {
        return Meaning::Nothing;
    }
    let event: Event = match serde_json::from_slice(payload) {
        Ok(event) => event,
        Err(error) => return Meaning::Error(format!("an event is no JSON object: {error}")),
    };
    if let Some(error) = event.error {
        return Meaning::Error(error.to_string());
    }
    let by_usage = event.usage.and_then(|usage| usage.completion_tokens);
    let by_details = event.details.and_then(|details| details.generated_tokens);
    let tokens = by_usage.or(by_details);
    let has_choices = event.choices.is_some_and(|choices| !choices.is_empty());
    match tokens {
        tokens if has_choices || event.token.is_some() => Meaning::Chunk { tokens },
        Some(tokens) => Meaning::Count { tokens },
        None => Meaning::Nothing,
    }
}

// === impl Lines ===

impl Lines {
    /// Takes a piece of the body and calls `each` with every payload that is complete.
    pub(crate) fn push(&mut self, bytes: &[u8], mut each: impl FnMut(&[u8])) {
        self.rest.extend_from_slice(bytes);
        let mut read = 0;
        while let Some(len) = self.rest[read..].iter().position(|&byte| byte == b'\n') {
            let line = self.rest[read..read + len].trim_ascii();
            read += len + 1;
            if let Some(payload) = line.strip_prefix(b"data:") {
                each(payload.trim_ascii_start());
            }
        }
        self.rest.drain(..read);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_read_however_the_body_is_cut() {
        let body = "data: {\"choices\":[{\"text\":\"a\"}]}\n\n: alive\n\ndata:{\"choices\":[{\"text\":\"ü\"}],\
            \"usage\":null}\r\n\r\ndata: {\"choices\":[],\"usage\":{\"completion_tokens\":2}}\n\ndata: [DONE]\n\n";
        let chunk = Meaning::Chunk { tokens: None };
        let expected = [
            chunk.clone(),
            chunk,
            Meaning::Count { tokens: 2 },
            Meaning::Nothing,
        ];
        for size in 1..body.len() {
            let (mut lines, mut found) = (Lines::default(), Vec::new());
            for piece in body.as_bytes().chunks(size) {
                lines.push(piece, |payload| found.push(meaning(payload)));
            }
            assert_eq!(found, expected, "in pieces of {size}");
        }
    }

    #[test]
    fn each_api_says_how_many_tokens_there_were() {
        let table = [
            (
                r#"{"token":{"id":1,"text":"a"},"details":null}"#,
                Meaning::Chunk { tokens: None },
            ),
            (
                r#"{"token":{"id":1},"details":{"generated_tokens":7}}"#,
                Meaning::Chunk { tokens: Some(7) },
            ),
            (
                r#"{"choices":[{"text":""}],"usage":{"completion_tokens":9}}"#,
                Meaning::Chunk { tokens: Some(9) },
            ),
            (
                r#"{"error":"full","error_type":"overloaded"}"#,
                Meaning::Error("\"full\"".into()),
            ),
            (r#"{"choices":[]}"#, Meaning::Nothing),
        ];
        for (payload, expected) in table {
            assert_eq!(meaning(payload.as_bytes()), expected, "{payload}");
        }
        assert!(matches!(meaning(b"oops"), Meaning::Error(_)));
    }
}
