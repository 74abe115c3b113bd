//! Bad input: a status that says so, a sentence that names the field, and never a 5xx.

use axum::body::Body;
use axum::http::{Request, header};

use headrace_engine::FinishReason;

use super::{END, Stack, drawn, post};

/// One case a line; the head of the file says how.
const TABLE: &str = include_str!("malformed.txt");

/// A chat body with one more field.
fn chat(field: &str) -> String {
    format!(r#"{{"messages": [{{"role": "user", "content": "Hi"}}], {field}}}"#)
}

/// A generate body with one parameter.
fn generate(parameter: &str) -> String {
    format!(r#"{{"inputs": "Hi", "parameters": {{{parameter}}}}}"#)
}

async fn refused(stack: &Stack, path: &str, body: String, status: &str, says: &str) {
    let shown = body.chars().take(120).collect::<String>();
    let reply = stack.send(post(path, body)).await;
    assert_eq!(
        reply.status.as_str(),
        status,
        "{path} {shown}: {}",
        reply.text()
    );
    assert!(
        reply.text().contains(says),
        "{path} {shown}: {}",
        reply.text()
    );
}

#[tokio::test]
async fn bad_input_is_refused_with_the_field_and_its_limit() {
    let stack = Stack::new();
    for line in TABLE.lines().filter(|line| !line.starts_with('#')) {
        let row: Vec<&str> = line.split(" | ").collect();
        let [status, path, body, says] = row[..] else {
            panic!("four columns: {line}")
        };
        let (path, body) = match path {
            "generate" => ("/generate", generate(body)),
            "chat" => ("/v1/chat/completions", chat(body)),
            path => (path, body.to_owned()),
        };
        refused(&stack, path, body, status, says).await;
    }
    assert!(
        stack.script.log().requests.is_empty(),
        "nothing of it reached the engine"
    );
}

#[tokio::test]
async fn refusals_are_what_the_table_of_compatibility_says() {
    const DOCUMENT: &str = include_str!("../../../docs/tgi-compatibility.md");
    let stack = Stack::new();
    let (_, table) = DOCUMENT.split_once("## Validation\n").unwrap();
    let table = table.split("\n## ").next().unwrap();
    let mut tried = 0;
    for line in table.lines().filter(|line| line.starts_with("| ")).skip(1) {
        let row: Vec<&str> = line.split('|').map(str::trim).collect();
        let (path, body, says) = (row[3], row[4], row[5]);
        if path == "-" {
            continue;
        }
        let (path, body) = match path {
            "generate" => ("/generate", generate(body)),
            path => (path, body.to_owned()),
        };
        refused(&stack, path, body, "422", says).await;
        tried += 1;
    }
    assert!(tried > 15, "{tried} refusals were provoked");
}

#[tokio::test]
async fn what_is_deep_or_long_is_refused_like_anything_else() {
    let stack = Stack::new();
    let deep = "[".repeat(5000);
    for (body, status, says) in [
        (String::new(), "400", "EOF"),
        (format!(r#"{{"unknown": {deep}"#), "400", "EOF"),
        (
            format!(r#"{{"inputs": {deep}"#),
            "422",
            "inputs: invalid type: sequence",
        ),
        (
            format!(r#"{{"inputs": "a", "parameters": {{"grammar": {deep}"#),
            "400",
            "recursion limit",
        ),
    ] {
        refused(&stack, "/generate", body, status, says).await;
    }
    let bias: Vec<_> = (0..1025).map(|id| format!("\"{id}\": 1")).collect();
    let body = chat(&format!(r#""logit_bias": {{{}}}"#, bias.join(",")));
    refused(&stack, "/v1/chat/completions", body, "422", "at most 1024").await;
}

#[tokio::test]
async fn refusals_of_fields_are_tgi_s_error_object() {
    let stack = Stack::new();
    let reply = stack
        .send(post("/generate", generate(r#""top_k": 0"#)))
        .await;
    let error = reply.json();
    assert_eq!(error["error_type"], "validation");
    let text = error["error"].as_str().unwrap();
    assert!(text.starts_with("Input validation error: "), "{text}");
}

#[tokio::test]
async fn a_model_without_a_template_refuses_chats_and_nothing_else() {
    let mut text = super::text();
    text.template = None;
    let stack = Stack::of(text, |_| {});
    let body = chat(r#""max_tokens": 1"#);
    let reply = stack.send(post("/v1/chat/completions", body)).await;
    assert_eq!(reply.status, 422);
    assert_eq!(reply.json()["error_type"], "template_error");
    assert!(
        reply.text().contains("no chat template"),
        "{}",
        reply.text()
    );
    stack.script.push(drawn(&[END], FinishReason::EndOfText));
    let body = generate(r#""max_new_tokens": 1"#);
    assert_eq!(stack.send(post("/generate", body)).await.status, 200);
}

#[tokio::test]
async fn what_a_stream_cannot_do_is_refused_before_it_starts() {
    let stack = Stack::new();
    let best_of = r#""best_of": 2, "do_sample": true"#;
    for parameter in [best_of, r#""decoder_input_details": true"#] {
        let reply = stack
            .send(post("/generate_stream", generate(parameter)))
            .await;
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
    assert!(
        reply.text().contains("at most 64 tokens. Given: 65"),
        "{}",
        reply.text()
    );
}

#[tokio::test]
async fn bodies_beyond_the_limit_are_413_announced_or_not() {
    let stack = Stack::new();
    let large = format!(r#"{{"inputs": "{}"}}"#, "a".repeat(10_000_000));
    for announced in [true, false] {
        let mut request =
            Request::post("/generate").header(header::CONTENT_TYPE, "application/json");
        if announced {
            request = request.header(header::CONTENT_LENGTH, large.len());
        }
        let reply = stack
            .send(request.body(Body::from(large.clone())).unwrap())
            .await;
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

/// Values that some parser or check has not thought of.
const ODD: [&str; 26] = [
    "null",
    "true",
    "-1",
    "0",
    "1",
    "1.5",
    "-0.0",
    "1e39",
    "-1e308",
    "1e-320",
    "4294967296",
    "18446744073709551615",
    "18446744073709551616",
    "\"\"",
    "\"x\"",
    "\"\\u0000\"",
    "\"\\ud83d\\ude00\"",
    "\"\\ud83d\"",
    "[]",
    "[null]",
    "[\"\"]",
    "[[1]]",
    "{}",
    "{\"type\": \"x\"}",
    "{\"\": 0}",
    "{\"1\": 1e39}",
];

#[tokio::test]
async fn no_value_of_any_field_is_a_fault_of_ours() {
    let stack = Stack::new();
    stack
        .script
        .otherwise(drawn(&[END], FinishReason::EndOfText));
    let document = stack.get("/api-doc/openapi.json").await.json();
    let fields = |schema: &str| {
        let properties = &document["components"]["schemas"][schema]["properties"];
        properties
            .as_object()
            .unwrap()
            .keys()
            .cloned()
            .collect::<Vec<_>>()
    };
    let hi = r#"{"role": "user", "content": "Hi"}"#;
    let bodies = [
        (
            "/generate",
            "GenerateParameters",
            r#"{"inputs": "Hi", "parameters": {@}}"#.to_owned(),
        ),
        (
            "/generate_stream",
            "GenerateParameters",
            r#"{"inputs": "Hi", "parameters": {@}}"#.to_owned(),
        ),
        ("/", "CompatGenerateRequest", "{@}".to_owned()),
        (
            "/v1/completions",
            "CompletionRequest",
            r#"{"prompt": "Hi", @}"#.to_owned(),
        ),
        (
            "/v1/chat/completions",
            "ChatRequest",
            format!(r#"{{"messages": [{hi}], @}}"#),
        ),
        (
            "/v1/chat/completions",
            "Message",
            format!(r#"{{"messages": [{hi}, {{"role": "user", @}}]}}"#),
        ),
    ];
    let mut sent = 0;
    for (path, schema, body) in &bodies {
        // The script ends with an ending token, whatever is ignored.
        for field in fields(schema)
            .into_iter()
            .filter(|field| field != "ignore_eos")
        {
            for odd in ODD {
                let body = body.replace('@', &format!("\"{field}\": {odd}"));
                let reply = stack.send(post(path, body.clone())).await;
                assert!(
                    reply.status.as_u16() < 500,
                    "{path} {body}: {}",
                    reply.text()
                );
                assert!(!reply.text().is_empty(), "{path} {body}: {}", reply.status);
                sent += 1;
            }
        }
    }
    assert!(sent > 2000, "{sent} bodies were sent");
}
