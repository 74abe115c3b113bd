//! Grammars in every shape that clients send them in, on every route that generates.

use headrace_engine::FinishReason;
use headrace_grammar::Matcher;
use serde_json::{Value, json};

use super::{END, Stack, drawn};

const ROUTES: [&str; 5] = [
    "/generate",
    "/generate_stream",
    "/",
    "/v1/completions",
    "/v1/chat/completions",
];

/// A request with some fields, where the route has them.
fn body(route: &str, fields: &Value) -> Value {
    let mut body = match route {
        "/v1/completions" => json!({"prompt": "Hi"}),
        "/v1/chat/completions" => json!({"messages": [{"role": "user", "content": "Hi"}]}),
        _ => return json!({"inputs": "Hi", "parameters": fields}),
    };
    let object = body.as_object_mut().unwrap();
    object.extend(fields.as_object().unwrap().clone());
    body
}

/// What the engine is given for a request.
async fn matchers(route: &str, fields: &Value) -> Vec<Option<Matcher>> {
    let stack = Stack::new();
    stack
        .script
        .otherwise(drawn(&[END], FinishReason::EndOfText));
    let reply = stack.post(route, &body(route, fields)).await;
    assert_eq!(reply.status, 200, "{route} {fields}: {}", reply.text());
    let log = stack.script.log();
    for (request, matcher) in log.requests.iter().zip(&log.matchers) {
        assert_eq!(request.masked(), matcher.is_some());
        assert_eq!(request.sampling().tokens_min.0, 0, "the matcher's part");
    }
    log.matchers
}

/// Whether a text is one of the grammar's.
fn takes(matcher: &Matcher, text: &str) -> bool {
    let mut matcher = matcher.clone();
    let mut mask = matcher.first_mask();
    for byte in text.bytes() {
        if !mask.allows(byte.into()) {
            return false;
        }
        matcher.accept(byte.into()).unwrap();
        mask = matcher.mask().unwrap();
    }
    mask.allows(END)
}

async fn check(route: &str, fields: &Value, yes: &str, no: &str) {
    let matchers = matchers(route, fields).await;
    let matcher = matchers[0].as_ref().expect("it is constrained");
    assert!(takes(matcher, yes), "{route} {fields} {yes}");
    assert!(!takes(matcher, no), "{route} {fields} {no}");
}

fn schema() -> Value {
    json!({"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"],
        "additionalProperties": false})
}

#[tokio::test]
async fn tgi_s_grammar_is_taken_in_all_its_shapes_on_every_route() {
    let schema = schema();
    for route in ROUTES {
        for (kind, value) in [
            ("json", schema.clone()),
            ("json", schema.to_string().into()),
            ("json_object", schema.clone()),
            ("json_schema", json!({"name": "a", "schema": schema})),
        ] {
            let fields = json!({"grammar": {"type": kind, "value": value}});
            check(route, &fields, r#"{"a":1}"#, r#"{"a": "1"}"#).await;
        }
        let fields = json!({"grammar": {"type": "regex", "value": "[0-9]{2}"}});
        check(route, &fields, "42", "4").await;
    }
}

#[tokio::test]
async fn response_formats_are_taken_in_all_their_shapes() {
    let schema = schema();
    for route in ["/v1/completions", "/v1/chat/completions"] {
        for format in [
            json!({"type": "json_schema", "json_schema": {"name": "a", "schema": schema, "strict": true}}),
            json!({"type": "json_schema", "json_schema": schema}),
            json!({"type": "json_schema", "value": schema}),
            json!({"type": "json_schema", "value": {"name": "a", "schema": schema}}),
            json!({"type": "json_object", "value": schema}),
            json!({"type": "json_object", "schema": schema}),
            json!({"type": "json", "value": schema}),
            json!({"type": "json", "value": schema.to_string()}),
        ] {
            let fields = json!({"response_format": format});
            check(route, &fields, r#"{"a": 1}"#, r#"{"b": 1}"#).await;
        }
        let fields = json!({"response_format": {"type": "json_object"}});
        check(route, &fields, r#"{"b": [null]}"#, "[1]").await;
        let fields = json!({"response_format": {"type": "regex", "value": "ab?"}});
        check(route, &fields, "ab", "b").await;
        let fields = json!({"grammar": "start: \"a\" start | \"b\""});
        check(route, &fields, "aab", "aa").await;
        // A schema needs no properties here.
        let one_of = json!({"anyOf": [{"const": 1}, {"const": 2}]});
        let fields = json!({"response_format": {"type": "json_schema", "value": one_of}});
        check(route, &fields, "2", "3").await;
        let fields = json!({"response_format": {"type": "text"}, "grammar": null});
        assert!(matchers(route, &fields).await[0].is_none());
    }
}

#[tokio::test]
async fn every_sequence_of_a_request_has_a_matcher_of_its_own() {
    let format = json!({"type": "regex", "value": "[ab]+"});
    let fields = json!({"response_format": format, "n": 3, "min_tokens": 2});
    let matchers = matchers("/v1/chat/completions", &fields).await;
    assert_eq!(matchers.len(), 3);
    for matcher in &matchers {
        let matcher = matcher.as_ref().unwrap();
        assert!(!takes(matcher, "a") && takes(matcher, "aa"), "min_tokens");
    }
    let fields =
        json!({"grammar": {"type": "regex", "value": "a"}, "best_of": 2, "do_sample": true});
    assert_eq!(self::matchers("/generate", &fields).await.len(), 2);
}

#[tokio::test]
async fn what_is_no_grammar_is_refused_before_anything_is_submitted() {
    let schema = json!({"type": "object"});
    let large: Vec<String> = (0..1200).map(|i| format!("value {i}")).collect();
    for (grammar, says) in [
        (
            json!({"type": "json", "value": schema}),
            "Grammar must have a 'properties' field",
        ),
        (json!({"type": "json", "value": "{"}), "EOF while parsing"),
        (json!({"type": "json"}), "`grammar` needs a `value`"),
        (json!("a"), "`grammar` needs a `type`"),
        (
            json!({"type": "regex", "value": 1}),
            "a regex must be a string",
        ),
        (json!({"type": "regex", "value": "("}), "unclosed group"),
        (
            json!({"type": "flower", "value": "a"}),
            "unknown type \"flower\"",
        ),
        (
            json!({"type": "json", "value": {"properties": {"a": {"type": "flower"}}}}),
            "flower",
        ),
        (
            json!({"type": "json", "value": {"properties": {"a": {"allOf": large.iter()
            .map(|v| json!({"not": {"const": v}})).collect::<Value>()}}}}),
            "not",
        ),
        (
            json!({"type": "regex", "value": "(((a{1,1000}){1,1000}){1,1000})"}),
            "1000000000 times; at most 100000 are allowed (repeats_max)",
        ),
    ] {
        for route in ["/generate", "/generate_stream", "/"] {
            let stack = Stack::with(|serve| serve.requests.payload_limit = 1 << 20);
            let fields = json!({"grammar": grammar});
            let reply = stack.post(route, &body(route, &fields)).await;
            assert_eq!(reply.status, 422, "{grammar}: {}", reply.text());
            let error = reply.json();
            assert_eq!(error["error_type"], "validation");
            let message = error["error"].as_str().unwrap();
            assert!(
                message.starts_with("Input validation error: grammar is not valid: "),
                "{message}"
            );
            assert!(message.contains(says), "{message}");
            assert!(
                stack.script.log().requests.is_empty(),
                "nothing is submitted"
            );
        }
    }
    let stack = Stack::new();
    let fields = json!({"grammar": {"type": "json", "value": 1}});
    let reply = stack.post("/generate", &body("/generate", &fields)).await;
    assert_eq!(
        reply.json()["error"],
        "Input validation error: grammar is not supported"
    );
}

#[tokio::test]
async fn a_grammar_beyond_a_bound_is_refused_with_both_numbers() {
    let stack = Stack::with(|serve| serve.requests.payload_limit = 4 << 20);
    let values: Vec<String> = (0..100_000).map(|i| format!("value {i}")).collect();
    let schema = json!({"type": "object", "properties": {"a": {"enum": values}}});
    let fields = json!({"response_format": {"type": "json_schema", "value": schema}});
    for stream in [false, true] {
        let mut body = body("/v1/chat/completions", &fields);
        body["stream"] = stream.into();
        let reply = stack.post("/v1/chat/completions", &body).await;
        assert_eq!(reply.status, 422, "{}", reply.text());
        let text = reply.text();
        assert!(
            text.contains("at most 262144 are allowed (source_bytes_max)"),
            "{text}"
        );
    }
}

#[tokio::test]
async fn what_excludes_or_lacks_something_is_refused() {
    let format = json!({"type": "json_object"});
    for (fields, says) in [
        (
            json!({"response_format": format, "grammar": "start: \"a\""}),
            "exclude each other",
        ),
        (
            json!({"response_format": {"type": "json_schema"}}),
            "needs a `value`",
        ),
        (
            json!({"response_format": {"type": "flower"}}),
            "unknown type \"flower\"",
        ),
        (json!({"grammar": "start: b"}), "b"),
    ] {
        for route in ["/v1/completions", "/v1/chat/completions"] {
            let reply = Stack::new().post(route, &body(route, &fields)).await;
            assert_eq!(reply.status, 422, "{fields}: {}", reply.text());
            let error = reply.json()["error"].to_string();
            assert!(error.replace('\\', "").contains(says), "{fields}: {error}");
        }
    }
}

#[tokio::test]
async fn a_server_without_grammars_refuses_them_as_tgi_does() {
    let stack = Stack::with(|serve| serve.requests.disable_grammar_support = true);
    stack
        .script
        .otherwise(drawn(&[END], FinishReason::EndOfText));
    let fields = json!({"grammar": {"type": "regex", "value": "a"}});
    let format = json!({"response_format": {"type": "json_object"}});
    for (route, fields) in [("/generate", &fields), ("/v1/chat/completions", &format)] {
        let reply = stack.post(route, &body(route, fields)).await;
        assert_eq!(reply.status, 422);
        let error = "Input validation error: grammar is not supported";
        assert_eq!(
            reply.json(),
            json!({"error": error, "error_type": "validation"})
        );
    }
    let text = json!({"response_format": {"type": "text"}});
    let route = "/v1/chat/completions";
    assert_eq!(stack.post(route, &body(route, &text)).await.status, 200);
}

#[tokio::test]
async fn a_grammar_that_fails_while_it_is_followed_is_an_error_of_generation() {
    for (reason, says) in [
        (FinishReason::MaskMissed, "twice for one token"),
        (FinishReason::GrammarFailed, "within its bounds"),
    ] {
        let stack = Stack::new();
        stack.script.otherwise(drawn(&[u32::from(b'a')], reason));
        let fields = json!({"grammar": {"type": "regex", "value": "a+b"}});
        let reply = stack.post("/generate", &body("/generate", &fields)).await;
        assert_eq!(reply.status, 424, "{}", reply.text());
        assert_eq!(reply.json()["error_type"], "generation");
        assert!(reply.text().contains(says), "{}", reply.text());
    }
}
