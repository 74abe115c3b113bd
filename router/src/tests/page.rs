//! The page for a browser, and the health check that everybody else gets at its address.

use std::collections::BTreeSet;
use std::sync::Arc;

use axum::body::Body;
use axum::http::{Request, header};
use headrace_engine::{EngineState, FinishReason};
use serde_json::json;

use super::{END, Reply, Stack, drawn, post};

/// What browsers send when a person opens an address.
const BROWSERS: [&str; 4] = [
    "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,image/webp,*/*;q=0.8",
    "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8",
    "Text/HTML",
    "application/json;q=0.5, text/html;level=1;q=0.6",
];

/// What probes and programs send.
const OTHERS: [&str; 9] = [
    "*/*",
    "",
    "application/json",
    "application/json, text/plain, */*",
    "application/json, text/html",
    "text/*",
    "text/html;q=0, */*;q=0.1",
    "*/*, text/html;q=0.9",
    "text/html;q=much",
];

async fn root(stack: &Stack, accept: Option<&str>) -> Reply {
    let mut request = Request::get("/");
    if let Some(accept) = accept {
        request = request.header(header::ACCEPT, accept);
    }
    stack.send(request.body(Body::empty()).unwrap()).await
}

#[tokio::test]
async fn a_browser_gets_the_page_under_the_status_of_a_probe() {
    let stack = Stack::new();
    for accept in BROWSERS {
        let reply = root(&stack, Some(accept)).await;
        assert_eq!(reply.status, 200, "{accept}");
        assert_eq!(
            reply.header("content-type"),
            Some("text/html; charset=utf-8"),
            "{accept}"
        );
        assert_eq!(reply.header("vary"), Some("accept"));
        assert!(reply.text().starts_with("<!doctype html>"));
    }
    stack.script.set_state(EngineState::Loading);
    let reply = root(&stack, Some(BROWSERS[0])).await;
    assert_eq!(reply.status, 503);
    assert!(reply.text().starts_with("<!doctype html>"));
}

#[tokio::test]
async fn everybody_else_gets_tgi_s_health_byte_for_byte() {
    let stack = Stack::new();
    for state in [stack.script.state(), EngineState::Loading] {
        stack.script.set_state(state);
        let health = stack.get("/health").await;
        for accept in OTHERS.map(Some).into_iter().chain([None]) {
            let reply = root(&stack, accept).await;
            assert_eq!(reply.status, health.status, "{accept:?}");
            assert_eq!(reply.headers, health.headers, "{accept:?}");
            assert_eq!(reply.body, health.body, "{accept:?}");
        }
    }
}

#[tokio::test]
async fn the_page_needs_nobody_else_and_may_ask_nobody_else() {
    let stack = Stack::new();
    let page = root(&stack, Some(BROWSERS[0])).await;
    let policy = page.header("content-security-policy").unwrap();
    assert!(policy.starts_with("default-src 'none';"), "{policy}");
    assert!(!policy.contains("unsafe"), "{policy}");
    assert!(!policy.contains("//"), "{policy}");
    let mut parts = vec![page.text().to_owned()];
    for (path, kind) in [
        ("page/style.css", "text/css; charset=utf-8"),
        ("page/script.js", "text/javascript; charset=utf-8"),
    ] {
        assert!(page.text().contains(&format!("=\"{path}\"")), "{path}");
        let part = stack.get(&format!("/{path}")).await;
        assert_eq!(part.status, 200);
        assert_eq!(part.header("content-type"), Some(kind));
        assert_eq!(part.header("x-content-type-options"), Some("nosniff"));
        parts.push(part.text().to_owned());
    }
    for part in &parts {
        assert!(!part.contains("://"), "an address of somebody");
        assert!(!part.contains("@import"));
    }
    // What the policy would not run or show.
    for inline in [" style=", "<style", "onclick=", "<script>", "javascript:"] {
        assert!(!parts[0].contains(inline), "{inline}");
    }
    for link in names(&parts[0], "<a href=\"", '"') {
        let reply = stack.get(&format!("/{link}")).await;
        assert_eq!(reply.status, 200, "{link}");
    }
}

#[tokio::test]
async fn the_script_names_only_what_the_page_and_the_server_have() {
    let stack = Stack::new();
    let page = root(&stack, Some(BROWSERS[0])).await;
    let script = stack.get("/page/script.js").await;
    let ids = names(page.text(), " id=\"", '"');
    let used = names(script.text(), "$(\"", '"');
    assert!(used.len() > 20, "{used:?}");
    assert_eq!(used.difference(&ids).count(), 0, "{used:?} of {ids:?}");
    for (object, path) in [("status.", "/status"), ("info.", "/info")] {
        let answer = stack.get(path).await.json();
        let fields = names(script.text(), object, ' ')
            .into_iter()
            .map(|field| {
                let end = field.find(|c: char| !c.is_ascii_lowercase() && c != '_');
                field[..end.unwrap_or(field.len())].to_owned()
            })
            .filter(|field| !field.is_empty());
        let fields: BTreeSet<String> = fields.collect();
        assert!(fields.len() > 3, "{fields:?}");
        for field in fields {
            assert!(answer.get(&field).is_some(), "{path} has no {field}");
        }
    }
}

#[tokio::test]
async fn the_status_says_how_busy_the_server_is() {
    let stack = Stack::with(|serve| serve.http.api_key = Some("secret".to_owned()));
    stack
        .script
        .push(drawn(&[97, END], FinishReason::EndOfText));
    let with_key = |body: &str| {
        let mut request = post("/generate", body.to_owned());
        let headers = request.headers_mut();
        headers.insert(header::AUTHORIZATION, "Bearer secret".parse().unwrap());
        request
    };
    let served = stack.send(with_key("{\"inputs\": \"Hi\"}")).await;
    assert_eq!(served.status, 200);
    for body in ["{", "{\"inputs\": \"\"}"] {
        assert!(stack.send(with_key(body)).await.status.is_client_error());
    }
    let reply = stack.get("/status").await;
    let expected = json!({
        "state": "ready", "api_key": true, "waiting": 1, "running": 2, "kv_blocks": 256,
        "kv_blocks_used": 3, "kv_blocks_cached": 4, "prefill_tokens": 5, "cached_tokens": 6,
        "generated_tokens": 7, "requests": 3, "succeeded": 1, "failed": 2,
    });
    assert_eq!(reply.json(), expected);
    let states = [
        (EngineState::Loading, "loading"),
        (EngineState::Draining, "draining"),
        (
            EngineState::Down {
                reason: Arc::from("it is"),
            },
            "down",
        ),
    ];
    for (state, word) in states {
        stack.script.set_state(state);
        assert_eq!(stack.get("/status").await.json()["state"], word);
    }
}

/// Whatever stands between `before` and the next `end`.
fn names(text: &str, before: &str, end: char) -> BTreeSet<String> {
    let found = text.split(before).skip(1);
    found
        .filter_map(|rest| rest.split(end).next())
        .map(str::to_owned)
        .collect()
}
