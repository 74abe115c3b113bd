//! The routes, called without a socket, over a scripted engine and a byte-level tokenizer.

#![expect(
    clippy::unwrap_used,
    clippy::float_cmp,
    reason = "a test fails by panicking"
)]

mod cloud;
mod forms;
mod golden;
mod grammar;
mod malformed;
mod page;
mod parameters;
mod routes;
pub(crate) mod script;
mod terms;
mod tools;
mod trace;

use std::sync::{Arc, OnceLock};

use axum::body::{Body, Bytes, to_bytes};
use axum::http::{HeaderMap, Request, StatusCode, header};
use headrace_config::Serve;
use headrace_engine::{
    BlockSize, Blocks, Describe, EngineState, Facts, FinishReason, Limits, SampledToken,
    TokenEvent, TokenId, Tokens,
};
use headrace_text::{ChatTemplate, EncodePool, ParserAsked, Tokenizer, ToolStyle};
use prometheus::Registry;
use serde_json::{Value, json};
use tower::ServiceExt;

use crate::app::{App, Text, router};
use crate::backend::Backend;
use crate::metrics::Metrics;
use script::{Script, Wakes};

/// Ends a text.
const END: u32 = 258;
/// ` world` as one token.
const WORLD: u32 = 256;
/// A special token that templates may name.
const THIRD: u32 = 259;
const VOCAB: u32 = 260;

/// A server and its engine.
struct Stack {
    app: Arc<App>,
    script: Script,
}

/// A whole response.
struct Reply {
    status: StatusCode,
    headers: HeaderMap,
    body: Bytes,
}

// === impl Stack ===

impl Stack {
    fn new() -> Self {
        Self::with(|_| {})
    }

    /// A server with other knobs.
    fn with(change: impl FnOnce(&mut Serve)) -> Self {
        Self::of(text(), change)
    }

    /// A server of another model.
    fn of(text: Text, change: impl FnOnce(&mut Serve)) -> Self {
        let mut serve = serve();
        change(&mut serve);
        let script = Script::new(ready());
        let metrics = Arc::new(Metrics::new(Registry::new()));
        metrics.set_limits(64, 128);
        let app = Arc::new(App::new(serve, Backend::Script(script.clone()), metrics));
        app.text.set(Arc::new(text)).unwrap();
        Self { app, script }
    }

    async fn call(&self, request: Request<Body>) -> axum::response::Response {
        router(Arc::clone(&self.app))
            .oneshot(request)
            .await
            .unwrap()
    }

    async fn send(&self, request: Request<Body>) -> Reply {
        let (parts, body) = self.call(request).await.into_parts();
        let body = to_bytes(body, usize::MAX).await.unwrap();
        Reply {
            status: parts.status,
            headers: parts.headers,
            body,
        }
    }

    async fn get(&self, path: &str) -> Reply {
        self.send(Request::get(path).body(Body::empty()).unwrap())
            .await
    }

    async fn post(&self, path: &str, body: &Value) -> Reply {
        self.send(post(path, body.to_string())).await
    }
}

// === impl Reply ===

impl Reply {
    fn text(&self) -> &str {
        std::str::from_utf8(&self.body).unwrap()
    }

    fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap()
    }

    fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(|value| value.to_str().unwrap())
    }
}

// === free functions ===

fn post(path: &str, body: impl Into<Body>) -> Request<Body> {
    Request::post(path)
        .header(header::CONTENT_TYPE, "application/json")
        .body(body.into())
        .unwrap()
}

/// A request that starts, draws these tokens one a wake, and ends.
fn drawn(ids: &[u32], reason: FinishReason) -> Wakes {
    let mut wakes = vec![vec![TokenEvent::Started { cached_tokens: 0 }]];
    wakes.extend(ids.iter().map(|id| vec![token(*id)]));
    wakes.last_mut().unwrap().push(TokenEvent::Finished(reason));
    wakes
}

/// The bytes of `text` as tokens.
fn ids(text: &str) -> Vec<u32> {
    text.bytes().map(u32::from).collect()
}

fn token(id: u32) -> TokenEvent {
    TokenEvent::Token(SampledToken {
        id: TokenId(id),
        logprob: -0.5,
        top: Vec::new(),
    })
}

fn serve() -> Serve {
    let value = json!({
        "model": {"id": "org/tiny", "revision": null, "sha": "abc", "path": "/nowhere",
            "load_format": "auto", "quantize": "", "tokenizer_config_path": null,
            "quantize_activations": false, "tool_call_parser": "auto"},
        "device": {"kind": "cpu", "dtype": "float32", "kv_dtype": "", "memory_fraction": 0.0,
            "kv_bytes_max": 0, "threads": 1, "reference_ops": false, "graphs": true},
        "requests": {"max_concurrent_requests": 8, "max_best_of": 2, "max_stop_sequences": 4,
            "max_top_n_tokens": 5, "max_input_tokens": 64, "max_total_tokens": 128,
            "max_client_batch_size": 4, "payload_limit": 20000, "validation_workers": 1,
            "disable_grammar_support": false, "timeout_ms": null},
        "engine": {"block_tokens": 16, "blocks_max": 0, "running_max": 8, "step_tokens_max": 64,
            "prefill_tokens_max": 64, "itl_target_ms": 50, "pipeline_depth": 2,
            "prefix_caching": true, "mask_ms_max": 20, "record": null,
            "step_deadline_ms": 1000, "prepare_deadline_ms": 1000},
        "watermark": {"gamma": 0.5, "delta": 2.0},
        "http": {"hostname": "127.0.0.1", "port": 0, "api_key": null, "cors_allow_origin": [],
            "prometheus_port": null, "compute_type": null, "predict_route": null, "health_route": null,
            "v1_dialect": "openai", "drain_deadline_ms": 1000},
        "shards": [{"rank": 0, "socket": "/nowhere/0", "device_index": 0, "rendezvous": ""}],
        "telemetry": {"log_level": "info", "json_output": false, "otlp_endpoint": null,
            "otlp_service_name": "router",
            "traces": {"protocol": "grpc", "tls": null, "headers": [], "resource": [],
                "sampler": "parentbased_always_on", "sampler_ratio": 1.0, "timeout_ms": 1000,
                "queue_max": 100, "batch_max": 10, "delay_ms": 10}},
    });
    serde_json::from_value(value).unwrap()
}

fn ready() -> EngineState {
    let limits = Limits {
        block_size: BlockSize::new(16).unwrap(),
        blocks: Blocks(257),
        slots: 16,
        state_slots: 16,
        running_max: 8,
        step_tokens_max: Tokens(64),
        prefill_tokens_max: Tokens(64),
        prompt_logprob_tokens_max: Tokens(64),
        context_tokens_max: Tokens(4096),
        vocab_size: VOCAB,
        queue_max: 8,
        depth: 2,
        watermark: Blocks(1),
        share_within_step: true,
        prefix_caching: true,
    };
    let describe = Describe {
        architecture: "llama".to_owned(),
        device: "cpu".to_owned(),
        dtype: "float32".to_owned(),
        rank: 0,
        ranks: 1,
        context_tokens_max: 4096,
        vocab_size: VOCAB,
        kv_bytes_per_token: 1,
        block_tokens_supported: vec![16],
        kv_written_in_attention: false,
    };
    EngineState::Ready(Arc::new(Facts {
        limits,
        describe,
        memory: Vec::new(),
    }))
}

/// One token a byte, ids as the bytes; three special tokens, and one of several letters.
fn text() -> Text {
    let template = "{% for m in messages %}<|im_start|>{{ m.role }}:{{ m.content }}<|im_end|>\
                    {% endfor %}{% if add_generation_prompt %}<|im_start|>assistant:{% endif %}";
    text_of(template, "<|third|>")
}

/// The same with another template, and what the third special token is called.
fn text_of(template: &str, third: &str) -> Text {
    let mut vocab: serde_json::Map<String, Value> = (0..=255_u8)
        .map(|byte| (byte_letter(byte).to_string(), byte.into()))
        .collect();
    vocab.insert("Ġworld".to_owned(), WORLD.into());
    let special = |id: u32, content: &str| {
        json!({"id": id, "content": content, "single_word": false, "lstrip": false,
            "rstrip": false, "normalized": false, "special": true})
    };
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": [special(257, "<|im_start|>"), special(END, "<|im_end|>"),
            special(THIRD, third)],
        "normalizer": null,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true,
            "use_regex": false},
        "post_processor": null,
        "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true,
            "use_regex": false},
        "model": {"type": "BPE", "dropout": null, "unk_token": null,
            "continuing_subword_prefix": null, "end_of_word_suffix": null, "fuse_unk": false,
            "byte_fallback": false, "ignore_merges": false, "vocab": vocab, "merges": []},
    });
    let tokenizer = Arc::new(Tokenizer::from_json(tokenizer.to_string().as_bytes()).unwrap());
    let template = ChatTemplate::from_source(template).unwrap();
    Text {
        tools: ToolStyle::decide(Some(&template), &tokenizer, ParserAsked::Auto),
        template: Some(template),
        pool: EncodePool::new(Arc::clone(&tokenizer), 1, 8),
        ending: vec![TokenId(END)],
        tokens_max: None,
        grammars: OnceLock::new(),
        tokenizer,
    }
}

/// The letter that stands for a byte in a byte-level vocabulary.
fn byte_letter(byte: u8) -> char {
    let printable = |byte: u8| matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    if printable(byte) {
        return char::from(byte);
    }
    let before = (0..byte).filter(|other| !printable(*other)).count();
    char::from_u32(256 + u32::try_from(before).unwrap()).unwrap()
}
