//! Bad input: a status that says so, a sentence that names the field, and never a 5xx.

use axum::body::Body;
use axum::http::{Request, header};

use super::{Stack, post};

const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";

/// A chat body with one more field.
fn chat(field: &str) -> String {
    format!(r#"{{"messages": [{{"role": "user", "content": "Hi"}}], {field}}}"#)
}

/// A generate body with one parameter.
fn generate(parameter: &str) -> String {
    format!(r#"{{"inputs": "Hi", "parameters": {{{parameter}}}}}"#)
}

/// Path, body, status, and what the answer must say.
fn table() -> Vec<(&'static str, String, u16, &'static str)> {
    let nested = |field| format!(r#"{{"inputs": "a", "{field}": {}"#, "[".repeat(5000));
    let grammar = format!(r#"{{"inputs": "a", "parameters": {{"grammar": {}"#, "[".repeat(5000));
    let bias = (0..1025).map(|id| format!("\"{id}\": 1")).collect::<Vec<_>>().join(",");
    let mut rows = vec![
        ("/generate", String::new(), 400, "JSON"),
        ("/generate", "{".into(), 400, "JSON"),
        ("/generate", "[]".into(), 422, "struct GenerateRequest"),
        ("/generate", "{}".into(), 422, "inputs"),
        ("/generate", r#"{"inputs": 5}"#.into(), 422, "inputs"),
        ("/generate", r#"{"inputs": null}"#.into(), 422, "inputs"),
        ("/generate", r#"{"inputs": "\ud800"}"#.into(), 400, "JSON"),
        ("/generate", nested("unknown"), 400, "EOF"),
        ("/generate", nested("inputs"), 422, "inputs: invalid type: sequence"),
        ("/generate", grammar, 400, "recursion limit"),
        ("/generate", r#"{"inputs": ""}"#.into(), 422, "`inputs` cannot be empty"),
        ("/tokenize", r#"{"inputs": ""}"#.into(), 422, "`inputs` cannot be empty"),
        (CHAT, "{}".into(), 422, "messages"),
        (CHAT, r#"{"messages": []}"#.into(), 422, "`messages` cannot be empty"),
        (CHAT, r#"{"messages": [{"content": "a"}]}"#.into(), 422, "messages[0]"),
        (CHAT, r#"{"messages": [{"role": "user", "content": 5}]}"#.into(), 422, "a string or"),
        (
            CHAT,
            r#"{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}"#.into(),
            422,
            "`messages[0].content[0]` is \"image_url\"",
        ),
        (CHAT, chat(r#""tools": [{}]"#), 422, "`tools`"),
        (CHAT, chat(r#""response_format": {"type": "json_object"}"#), 422, "`response_format`"),
        (CHAT, chat(r#""n": 5"#), 422, "at most 4"),
        (CHAT, chat(r#""n": 0"#), 422, "at most 4"),
        (CHAT, chat(r#""n": 18446744073709551615"#), 422, "at most 4"),
        (CHAT, chat(r#""top_logprobs": 6"#), 422, "`top_logprobs` must be >= 0 and <= 5. Given: 6"),
        (CHAT, chat(r#""logit_bias": {"260": 1}"#), 422, "< 260"),
        (CHAT, chat(r#""logit_bias": {"a": 1}"#), 422, "\"a\""),
        (CHAT, chat(r#""logit_bias": {"1": 101}"#), 422, "<= 100.0. Given: 101"),
        (CHAT, chat(&format!(r#""logit_bias": {{{bias}}}"#)), 422, "at most 1024"),
        (CHAT, chat(r#""stop": 5"#), 422, "stop: expected a string or an array"),
        (CHAT, chat(r#""stop": ["a", "b", "c", "d", "e"]"#), 422, "up to 4 stop sequences. Given: 5"),
        (CHAT, chat(r#""temperature": -1"#), 422, "`temperature` must be strictly positive. Given: -1"),
        (CHAT, chat(r#""max_tokens": 0"#), 422, "`max_new_tokens` must be strictly positive"),
        (CHAT, chat(r#""seed": "x""#), 422, "seed"),
        (COMPLETIONS, r#"{"prompt": []}"#.into(), 422, "at most 4"),
        (COMPLETIONS, r#"{"prompt": ["a", "b", "c", "d", "e"]}"#.into(), 422, "5 sequences; at most 4"),
        (COMPLETIONS, r#"{"prompt": [1, 2]}"#.into(), 422, "prompt: expected a string or"),
        (COMPLETIONS, r#"{"prompt": ["a", ""]}"#.into(), 422, "cannot be empty"),
        (COMPLETIONS, r#"{"prompt": "a", "suffix": "b"}"#.into(), 422, "suffix not supported"),
        (COMPLETIONS, r#"{"prompt": "a", "logprobs": 6}"#.into(), 422, "`logprobs` must be >= 0 and <= 5"),
    ];
    let parameters = [
        (r#""temperature": 0"#, 422, "`temperature` must be strictly positive. Given: 0"),
        (r#""temperature": 1e39"#, 422, "`temperature`"),
        (r#""temperature": 1e999"#, 400, "out of range"),
        (r#""temperature": NaN"#, 400, "JSON"),
        (r#""temperature": "hot""#, 422, "parameters.temperature"),
        (r#""repetition_penalty": 0"#, 422, "`repetition_penalty` must be strictly positive"),
        (r#""frequency_penalty": 2.5"#, 422, ">= -2.0 and <= 2.0. Given: 2.5"),
        (r#""presence_penalty": -2.5"#, 422, ">= -2.0 and <= 2.0. Given: -2.5"),
        (r#""top_p": 0"#, 422, "`top_p` must be > 0.0 and <= 1.0. Given: 0"),
        (r#""top_p": 1.5"#, 422, "`top_p`"),
        (r#""typical_p": 2"#, 422, "`typical_p`"),
        (r#""min_p": -0.1"#, 422, "`min_p` must be >= 0.0 and <= 1.0. Given: -0.1"),
        (r#""top_k": 0"#, 422, "`top_k` must be strictly positive. Given: 0"),
        (r#""top_k": 1.5"#, 422, "parameters.top_k"),
        (r#""max_new_tokens": 0"#, 422, "`max_new_tokens` must be strictly positive"),
        (r#""max_new_tokens": -1"#, 422, "parameters.max_new_tokens"),
        (r#""max_new_tokens": 99999999999999999999"#, 422, "parameters.max_new_tokens"),
        (
            r#""max_new_tokens": 127"#,
            422,
            "`inputs` tokens + `max_new_tokens` must be <= 128. \
             Given: 2 `inputs` tokens and 127 `max_new_tokens`",
        ),
        (r#""stop": ["a", "b", "c", "d", "e"]"#, 422, "up to 4 stop sequences. Given: 5"),
        (r#""best_of": 3, "do_sample": true"#, 422, "`best_of` must be > 0 and <= 2. Given: 3"),
        (r#""best_of": 0"#, 422, "`best_of` must be > 0 and <= 2. Given: 0"),
        (r#""best_of": 2"#, 422, "sampling when `best_of` is > 1"),
        (r#""best_of": 2, "do_sample": true, "seed": 7"#, 422, "`seed` must not be set"),
        (r#""top_n_tokens": 6"#, 422, "`top_n_tokens` must be >= 0 and <= 5. Given: 6"),
        (r#""truncate": 0"#, 422, "`truncate` must be strictly positive and <= 64. Given: 0"),
        (r#""truncate": 65"#, 422, "`truncate` must be strictly positive and <= 64. Given: 65"),
        (r#""watermark": true"#, 422, "`watermark` is not supported yet"),
        (r#""grammar": {"type": "regex", "value": "a"}"#, 422, "`grammar`"),
        (r#""seed": -1"#, 422, "parameters.seed"),
    ];
    rows.extend(parameters.map(|(body, status, says)| ("/generate", generate(body), status, says)));
    rows
}

#[tokio::test]
async fn bad_input_is_refused_with_the_field_and_its_limit() {
    let stack = Stack::new();
    for (path, body, status, says) in table() {
        let shown = body.chars().take(120).collect::<String>();
        let reply = stack.send(post(path, body)).await;
        assert_eq!(reply.status.as_u16(), status, "{path} {shown}: {}", reply.text());
        assert!(reply.text().contains(says), "{path} {shown}: {}", reply.text());
    }
    assert!(stack.script.log().requests.is_empty(), "nothing of it reached the engine");
}

#[tokio::test]
async fn refusals_of_fields_are_tgi_s_error_object() {
    let stack = Stack::new();
    let reply = stack.send(post("/generate", generate(r#""top_k": 0"#))).await;
    let error = reply.json();
    assert_eq!(error["error_type"], "validation");
    let text = error["error"].as_str().unwrap();
    assert!(text.starts_with("Input validation error: "), "{text}");
}

#[tokio::test]
async fn what_a_stream_cannot_do_is_refused_before_it_starts() {
    let stack = Stack::new();
    let best_of = r#""best_of": 2, "do_sample": true"#;
    for parameter in [best_of, r#""decoder_input_details": true"#] {
        let reply = stack.send(post("/generate_stream", generate(parameter))).await;
        assert_eq!(reply.status, 422, "{}", reply.text());
        assert!(reply.text().contains("streaming"), "{}", reply.text());
    }
}

#[tokio::test]
async fn prompts_beyond_the_limit_are_refused_with_both_numbers() {
    let stack = Stack::new();
    let body = format!(r#"{{"inputs": "{}"}}"#, "a".repeat(65));
    let reply = stack.send(post("/generate", body)).await;
    assert_eq!(reply.status, 422);
    assert!(reply.text().contains("at most 64 tokens. Given: 65"), "{}", reply.text());
}

#[tokio::test]
async fn bodies_beyond_the_limit_are_413_announced_or_not() {
    let stack = Stack::new();
    let large = format!(r#"{{"inputs": "{}"}}"#, "a".repeat(10_000_000));
    for announced in [true, false] {
        let mut request = Request::post("/generate").header(header::CONTENT_TYPE, "application/json");
        if announced {
            request = request.header(header::CONTENT_LENGTH, large.len());
        }
        let reply = stack.send(request.body(Body::from(large.clone())).unwrap()).await;
        assert_eq!(reply.status, 413);
        assert!(reply.text().contains("20000 bytes"), "{}", reply.text());
    }
}

#[tokio::test]
async fn bodies_of_another_type_are_415() {
    let stack = Stack::new();
    for kind in [None, Some("text/plain"), Some("application/jsonx")] {
        let mut request = Request::post("/generate");
        if let Some(kind) = kind {
            request = request.header(header::CONTENT_TYPE, kind);
        }
        let reply = stack.send(request.body(Body::from("{}")).unwrap()).await;
        assert_eq!(reply.status, 415);
    }
}

#[tokio::test]
async fn unknown_paths_and_methods_are_empty() {
    let stack = Stack::new();
    let missing = stack.get("/nothing").await;
    assert_eq!((missing.status.as_u16(), missing.text()), (404, ""));
    let method = stack.get("/generate").await;
    assert_eq!((method.status.as_u16(), method.text()), (405, ""));
}
