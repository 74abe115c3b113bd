//! Sets the stage: a folder with a tokenizer and a `serve.json`, the stub, the router; and runs
//! the waves.

use std::error::Error;
use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use headrace_config as config;
use serde_json::{Map, Value, json};
use tokio::io::BufReader;

use crate::Load;
use crate::client::{Watched, Wave, wave};
use crate::process::{Part, Usage, wait_for};
use crate::stamp::{FIRST_WORD, VOCAB};
use crate::stub::BLOCK_TOKENS;

/// What one measurement found.
#[derive(Debug)]
pub(crate) struct Figures {
    /// Tokens of each stream.
    pub(crate) tokens: u32,
    /// What a step takes on the stub.
    pub(crate) step: Duration,
    pub(crate) waves: Vec<Wave>,
    /// The router, ready and without a request so far.
    pub(crate) idle: Usage,
    /// The router after each wave.
    pub(crate) after: Vec<Usage>,
}

/// A folder that goes when it is dropped.
struct Folder(PathBuf);

/// Starts everything, runs the waves, stops everything.
pub(crate) async fn measure(
    load: &Load,
    tokens: u32,
    step: Duration,
) -> Result<Figures, Box<dyn Error>> {
    let folder = Folder::new()?;
    let (socket, config) = (folder.0.join("0.sock"), folder.0.join("serve.json"));
    fs::write(folder.0.join("tokenizer.json"), tokenizer().to_string())?;
    fs::write(
        folder.0.join("generation_config.json"),
        r#"{"eos_token_id": 0}"#,
    )?;
    config::save(&serve(load, &folder.0, &socket), &config)?;

    let step_us = step.as_micros().to_string();
    let blocks = blocks(load.streams, tokens).to_string();
    let socket = socket
        .to_str()
        .ok_or("the temporary folder has a plain name")?;
    let (stub, _) = Part::start(&[
        "stub",
        "--socket",
        socket,
        "--step-us",
        &step_us,
        "--blocks",
        &blocks,
    ])?;
    let config = config
        .to_str()
        .ok_or("the temporary folder has a plain name")?;
    let (router, stdout) = Part::start(&["router", "--config", config])?;
    let mut lines = BufReader::new(stdout);
    let listening = wait_for("listening", &mut lines).await?;
    let port = listening["port"]
        .as_u64()
        .and_then(|port| u16::try_from(port).ok());
    let address = SocketAddr::from(([127, 0, 0, 1], port.ok_or("the port is a number")?));
    wait_for("ready", &mut lines).await?;

    let watched = Watched {
        router: router.pid,
        stub: stub.pid,
    };
    let idle = router.usage()?;
    let (mut waves, mut after) = (Vec::new(), Vec::new());
    for _ in 0..load.waves {
        waves.push(wave(address, (load.streams, tokens), watched).await);
        after.push(router.usage()?);
    }
    router.stop().await?;
    stub.stop().await?;
    Ok(Figures {
        tokens,
        step,
        waves,
        idle,
        after,
    })
}

/// A pool in which all streams fit, prompts and a quarter to spare: it is full after a wave, so that
/// the router's memory has nothing more to grow with.
fn blocks(streams: u32, tokens: u32) -> u32 {
    let each = tokens.div_ceil(BLOCK_TOKENS) + 2;
    streams * each / 4 * 5
}

/// A byte-level vocabulary: an ending, the bytes, and words that say their number.
fn tokenizer() -> Value {
    let mut vocab = Map::new();
    vocab.insert("<|end|>".into(), 0.into());
    for (byte, id) in (0..=255).zip(1..) {
        vocab.insert(byte_char(byte).to_string(), Value::from(id));
    }
    for id in FIRST_WORD..VOCAB {
        vocab.insert(format!("Ġw{id:x}"), id.into());
    }
    let bytes = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    let ending = json!({
        "id": 0, "content": "<|end|>", "single_word": false, "lstrip": false, "rstrip": false,
        "normalized": false, "special": true,
    });
    json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": [ending],
        "normalizer": null,
        "pre_tokenizer": bytes,
        "post_processor": null,
        "decoder": bytes,
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
            "vocab": vocab, "merges": [],
        },
    })
}

/// The printable character that byte-level vocabularies write for a byte.
fn byte_char(byte: u8) -> char {
    let printable = |byte: u8| matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    if printable(byte) {
        return char::from(byte);
    }
    let before = (0..byte).filter(|&other| !printable(other)).count();
    let code = u32::try_from(256 + before).expect("there are 68 of them");
    char::from_u32(code).expect("it is below the surrogates")
}

fn serve(load: &Load, folder: &Path, socket: &Path) -> config::Serve {
    let streams = load.streams as usize;
    config::Serve {
        model: config::Model {
            id: "stub".into(),
            revision: None,
            sha: None,
            path: folder.into(),
            load_format: "dummy".into(),
            quantize: String::new(),
            tokenizer_config_path: None,
            quantize_activations: false,
            tool_call_parser: "auto".into(),
        },
        device: config::Device {
            kind: "cpu".into(),
            dtype: "float32".into(),
            kv_dtype: String::new(),
            memory_fraction: 0.0,
            kv_bytes_max: 0,
            threads: 1,
            reference_ops: false,
            graphs: true,
        },
        requests: config::Requests {
            max_concurrent_requests: streams,
            max_best_of: 1,
            max_stop_sequences: 4,
            max_top_n_tokens: 5,
            max_input_tokens: None,
            max_total_tokens: None,
            max_client_batch_size: 1,
            payload_limit: 1 << 20,
            validation_workers: 1,
            disable_grammar_support: false,
            timeout_ms: None,
        },
        engine: config::Engine {
            block_tokens: 0,
            blocks_max: 0,
            running_max: load.streams,
            step_tokens_max: 16_384,
            prefill_tokens_max: 8192,
            itl_target_ms: 0,
            mask_ms_max: 20,
            pipeline_depth: 2,
            prefix_caching: true,
            record: None,
            step_deadline_ms: 60_000,
            prepare_deadline_ms: 60_000,
        },
        watermark: config::Watermark {
            gamma: 0.5,
            delta: 2.0,
        },
        http: config::Http {
            hostname: "127.0.0.1".into(),
            port: 0,
            api_key: None,
            cors_allow_origin: Vec::new(),
            compute_type: None,
            predict_route: None,
            health_route: None,
            v1_dialect: config::Dialect::Openai,
            prometheus_port: None,
            drain_deadline_ms: 1000,
        },
        shards: vec![config::Shard {
            rank: 0,
            socket: socket.into(),
            device_index: 0,
            rendezvous: String::new(),
        }],
        telemetry: telemetry(load),
    }
}

fn telemetry(load: &Load) -> config::Telemetry {
    config::Telemetry {
        log_level: "warn".into(),
        json_output: false,
        otlp_endpoint: load.otlp_endpoint.clone(),
        otlp_service_name: "ceiling".into(),
        traces: config::Traces {
            protocol: "grpc".into(),
            tls: None,
            headers: Vec::new(),
            resource: Vec::new(),
            sampler: "traceidratio".into(),
            sampler_ratio: load.traced,
            timeout_ms: 10_000,
            queue_max: 32_768,
            batch_max: 512,
            delay_ms: 1000,
        },
    }
}

// === impl Folder ===

impl Folder {
    fn new() -> Result<Self, Box<dyn Error>> {
        let name = format!("headrace-ceiling-{}", std::process::id());
        let path = std::env::temp_dir().join(name);
        fs::create_dir_all(&path)?;
        Ok(Self(path))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        drop(fs::remove_dir_all(&self.0));
    }
}
