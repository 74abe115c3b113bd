//! What SageMaker, Vertex AI and KServe call.

use axum::body::Body;
use axum::http::Request;
use headrace_engine::{EngineState, FinishReason, SubmitError};
use serde_json::{Value, json};

use super::{Stack, drawn, ids, post};

const MODEL: &str = "/v2/models/tiny/versions/1";

/// A server whose requests are answered with these texts, in order.
fn answering(texts: &[&str]) -> Stack {
    let stack = Stack::new();
    for text in texts {
        stack.script.push(drawn(&ids(text), FinishReason::Length));
    }
    stack
}

// === SageMaker (contract 2.2, 2.17) ===

#[tokio::test]
async fn invocations_are_the_route_whose_body_they_have() {
    let stack = answering(&["a", "b", "c"]);
    let texts = json!({"inputs": "Hi", "parameters": {"max_new_tokens": 1}});
    let reply = stack.post("/invocations", &texts).await;
    assert_eq!(reply.json(), json!([{"generated_text": "Hia"}]));
    assert!(reply.header("x-generated-tokens").is_some());
    let chat = json!({"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1});
    let reply = stack.post("/invocations", &chat).await.json();
    assert_eq!(reply["object"], "chat.completion");
    assert_eq!(reply["choices"][0]["message"]["content"], "b");
    let completion = json!({"prompt": "Hi", "max_tokens": 1});
    let reply = stack.post("/invocations", &completion).await.json();
    assert_eq!(reply["object"], "text_completion");
    assert_eq!(reply["choices"][0]["text"], "c");
}

#[tokio::test]
async fn invocations_stream_as_that_route_does() {
    let stack = answering(&["a", "b"]);
    let texts = json!({"inputs": "Hi", "stream": true});
    let reply = stack.post("/invocations", &texts).await;
    assert_eq!(reply.header("content-type"), Some("text/event-stream"));
    assert!(reply.text().starts_with("data: {\"index\":1,"));
    assert!(!reply.text().contains("[DONE]"));
    let chat = json!({"messages": [{"role": "user", "content": "Hi"}], "stream": true});
    let reply = stack.post("/invocations", &chat).await;
    assert!(
        reply.text().ends_with("data: [DONE]\n\n"),
        "{}",
        reply.text()
    );
}

#[tokio::test]
async fn a_bad_invocation_is_told_what_its_own_body_lacks() {
    let stack = Stack::new();
    for (body, named) in [
        (
            json!({}),
            "one of `inputs`, `messages` and `prompt` is needed",
        ),
        (
            json!([1]),
            "one of `inputs`, `messages` and `prompt` is needed",
        ),
        (
            json!({"inputs": 1}),
            "invalid type: integer `1`, expected a string",
        ),
        (json!({"messages": [{}]}), "missing field `role`"),
        (
            json!({"inputs": "Hi", "parameters": {"temperature": "x"}}),
            "invalid type: string \"x\", expected f32",
        ),
    ] {
        let reply = stack.post("/invocations", &body).await;
        assert_eq!(reply.status, 422, "{body}");
        assert!(reply.text().contains(named), "{}", reply.text());
    }
    let body = json!({"inputs": "Hi", "parameters": {"temperature": 0}});
    let reply = stack.post("/invocations", &body).await;
    assert_eq!(reply.status, 422);
    assert_eq!(reply.json()["error_type"], "validation");
}

// === Vertex AI (contract 2.2, 2.6, 2.17, 7.3) ===

#[tokio::test]
async fn vertex_predicts_every_instance_in_order() {
    let stack = answering(&["one", "two"]);
    let body = json!({"instances": [
        {"inputs": "Hi", "parameters": {"max_new_tokens": 3, "seed": 7}},
        {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3},
    ]});
    let reply = stack.post("/vertex", &body).await;
    assert_eq!(reply.json(), json!({"predictions": ["one", "two"]}));
    assert!(reply.header("x-compute-type").is_some());
    let log = stack.script.log();
    let drawn: Vec<bool> = log
        .requests
        .iter()
        .map(|request| request.sampling().temperature > 0.0)
        .collect();
    assert_eq!(
        drawn,
        [true, true],
        "tokens are drawn unless it says otherwise"
    );
}

#[tokio::test]
async fn vertex_honours_what_tgi_ignored() {
    let stack = answering(&["one"]);
    let body = json!({"instances": [
        {"inputs": "Hi", "parameters": {"max_new_tokens": 3, "do_sample": false}},
    ]});
    assert_eq!(stack.post("/vertex", &body).await.status, 200);
    let log = stack.script.log();
    assert!(log.requests[0].sampling().temperature == 0.0);
}

#[tokio::test]
async fn vertex_refuses_with_the_status_of_the_cause() {
    let stack = Stack::new();
    let reply = stack.post("/vertex", &json!({"instances": []})).await;
    assert_eq!(reply.status, 422);
    assert_eq!(reply.json()["error_type"], "Input validation error");
    let hi = json!({"inputs": "Hi"});
    let reply = stack
        .post("/vertex", &json!({"instances": vec![hi.clone(); 9]}))
        .await;
    assert_eq!(reply.status, 422);
    let expected = "`instances` has 9 entries; at most 8 are allowed";
    assert!(reply.text().contains(expected), "{}", reply.text());
    let reply = stack.post("/vertex", &json!({"instances": [{}]})).await;
    assert_eq!(reply.status, 422);
    assert!(reply.text().contains("an instance is"), "{}", reply.text());
    let empty = json!({"instances": [hi, {"inputs": ""}]});
    let reply = stack.post("/vertex", &empty).await;
    assert_eq!(
        (reply.status.as_u16(), reply.json()["error_type"].clone()),
        (422, "validation".into())
    );
    stack.script.refuse(SubmitError::QueueFull {
        waiting: 8,
        queue_max: 8,
    });
    let reply = stack
        .post("/vertex", &json!({"instances": [{"inputs": "Hi"}]}))
        .await;
    assert_eq!(reply.status, 429);
}

#[tokio::test]
async fn routes_that_vertex_names_are_served_and_guarded() {
    let stack = Stack::with(|serve| {
        serve.http.predict_route = Some("/generate".to_owned());
        serve.http.health_route = Some("/alive".to_owned());
        serve.http.api_key = Some("secret".to_owned());
    });
    stack.script.push(drawn(&ids("one"), FinishReason::Length));
    assert_eq!(stack.get("/alive").await.status, 200);
    let hi = json!({"inputs": "Hi", "parameters": {"max_new_tokens": 3}});
    let body = json!({"instances": [hi]});
    assert_eq!(stack.post("/generate", &body).await.status, 401);
    let mut request = post("/generate?x=1", body.to_string());
    let key = "Bearer secret".parse().unwrap();
    request.headers_mut().insert("authorization", key);
    let reply = stack.send(request).await;
    assert_eq!(reply.json(), json!({"predictions": ["one"]}));
    stack.script.set_state(EngineState::Draining);
    assert_eq!(stack.get("/alive").await.status, 503);
    assert_eq!(Stack::new().get("/alive").await.status, 404);
}

// === KServe (contract 2.2, 2.6, 2.17) ===

#[tokio::test]
async fn kserve_infers_from_bytes_and_from_strings() {
    let stack = answering(&["abc", "def", "ghi"]);
    let input = |data: Value| json!({"name": "text_input", "shape": [1], "datatype": "BYTES", "data": data});
    let body = json!({
        "id": "7",
        "parameters": {"max_new_tokens": 3},
        "inputs": [input(json!([72, 105])), input(json!(["Hi", "you"]))],
        "outputs": [{"name": "first"}, {"name": "second"}],
    });
    let reply = stack.post(&format!("{MODEL}/infer"), &body).await.json();
    assert_eq!(reply["id"], "7");
    assert_eq!(reply["model_name"], "tiny");
    let bytes = json!({"name": "first", "shape": [3], "datatype": "BYTES", "data": [97, 98, 99]});
    assert_eq!(reply["outputs"][0], bytes);
    let texts =
        json!({"name": "second", "shape": [2], "datatype": "BYTES", "data": ["def", "ghi"]});
    assert_eq!(reply["outputs"][1], texts);
}

#[tokio::test]
async fn kserve_refuses_with_tgi_s_kinds() {
    let stack = Stack::new();
    let input = |data: Value| json!({"name": "a", "shape": [1], "datatype": "BYTES", "data": data});
    let other = json!({"name": "a", "shape": [1], "datatype": "FP32", "data": [1]});
    let many = vec!["Hi"; 9];
    for (inputs, outputs, kind, told) in [
        (
            json!([input(json!([255, 254]))]),
            json!([]),
            "utf8",
            "`inputs[0].data`",
        ),
        (
            json!([input(json!(["Hi"]))]),
            json!([{"name": "a"}, {"name": "b"}]),
            "length mismatch",
            "1 `inputs` and 2 `outputs`",
        ),
        (json!([other]), json!([]), "validation", "\"FP32\""),
        (
            json!([]),
            json!([]),
            "validation",
            "`inputs` cannot be empty",
        ),
        (
            json!([input(json!(many))]),
            json!([]),
            "validation",
            "9 entries; at most 8",
        ),
    ] {
        let body = json!({"inputs": inputs, "outputs": outputs});
        let reply = stack.post(&format!("{MODEL}/infer"), &body).await;
        assert_eq!(reply.status, 422, "{body}");
        assert_eq!(reply.json()["error_type"], kind, "{body}");
        assert!(
            reply.text().replace("\\\"", "\"").contains(told),
            "{}",
            reply.text()
        );
    }
    let reply = stack
        .post(
            &format!("{MODEL}/infer"),
            &json!({"inputs": [input(json!([256]))]}),
        )
        .await;
    assert_eq!(reply.status, 422);
    assert!(reply.text().contains("array of bytes"), "{}", reply.text());
}

#[tokio::test]
async fn kserve_probes_and_metadata() {
    let stack = Stack::new();
    assert_eq!(stack.get("/v2").await.json()["name"], "headrace");
    let ready = ["/v2/health/ready".to_owned(), format!("{MODEL}/ready")];
    for path in &ready {
        let reply = stack.get(path).await;
        assert_eq!(
            (reply.status.as_u16(), reply.json()),
            (200, json!({"ready": true}))
        );
    }
    let model = stack.get(MODEL).await.json();
    assert_eq!(model["name"], "tiny");
    assert_eq!(model["versions"], json!(["1"]));
    assert_eq!(model["inputs"][0]["datatype"], "BYTES");
    stack.script.set_state(EngineState::Loading);
    for path in &ready {
        assert_eq!(stack.get(path).await.status, 503);
    }
    let live = stack.get("/v2/health/live").await;
    assert_eq!(
        (live.status.as_u16(), live.json()),
        (200, json!({"live": true}))
    );
    let infer = Request::get(format!("{MODEL}/infer")).body(Body::empty());
    assert_eq!(stack.send(infer.unwrap()).await.status, 405);
}
