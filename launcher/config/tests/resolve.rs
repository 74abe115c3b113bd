//! Flags and variables → `Serve`, and the texts of what is refused.

use std::ffi::OsString;
use std::os::unix::fs::PermissionsExt;

use headrace_config::{
    DEFAULT_MODEL, Machine, Resolved, Serve, Typed, hub_token, load, resolve, save, without_secrets,
};
use serde_json::Value;

const CPU: Machine = Machine {
    cores: 8,
    gpus: 0,
    gpus_named: None,
    roots: None,
};
const TWO_GPUS: Machine = Machine {
    cores: 16,
    gpus: 2,
    gpus_named: None,
    roots: None,
};

/// Arguments and variables as one would write them: `"PORT=80 --model-id a/b"`.
fn parse(line: &str) -> Result<Typed, String> {
    let words: Vec<&str> = line.split_whitespace().collect();
    let is_variable = |word: &&str| {
        let name = word.split('=').next().unwrap_or_default();
        word.contains('=')
            && name
                .bytes()
                .all(|byte| byte.is_ascii_uppercase() || byte.is_ascii_digit() || byte == b'_')
    };
    let (env, args): (Vec<&str>, Vec<&str>) = words.into_iter().partition(is_variable);
    let words = std::iter::once("headrace").chain(args).map(OsString::from);
    let lookup = |name: &str| {
        let mut pairs = env.iter().filter_map(|pair| pair.split_once('='));
        pairs
            .find(|(key, _)| *key == name)
            .map(|(_, value)| OsString::from(value))
    };
    Typed::parse(words, &lookup).map_err(|error| error.to_string())
}

fn resolved(line: &str, machine: Machine) -> Result<Resolved, String> {
    resolve(&parse(line)?, &machine).map_err(|error| error.to_string())
}

fn serve(line: &str) -> Serve {
    resolved(line, CPU)
        .unwrap_or_else(|error| panic!("{line}: {error}"))
        .serve
}

/// Rows are what is typed, a path into `serve.json`, and what is there.
fn check(table: &str) {
    for row in table.lines().skip(1) {
        let columns: Vec<&str> = row.split(" | ").map(str::trim).collect();
        let [line, path, expected] = columns[..] else {
            panic!("no row: {row}")
        };
        let expected: Value = serde_json::from_str(expected).expect("the third column is json");
        let serve = serde_json::to_value(serve(line)).expect("it is json");
        assert_eq!(serve.pointer(path), Some(&expected), "{line}");
    }
}

#[test]
fn without_flags_the_defaults_are_tgis() {
    let Resolved {
        serve,
        launch,
        warnings,
    } = resolved("", CPU).expect("no flag is fine");
    assert_eq!(serve.model.id, DEFAULT_MODEL);
    assert_eq!(launch.model_id, None);
    assert_eq!(
        (serve.http.hostname.as_str(), serve.http.port),
        ("0.0.0.0", 3000)
    );
    assert_eq!(serve.http.drain_deadline_ms, 90_000);
    let requests = &serve.requests;
    assert_eq!(
        (requests.max_concurrent_requests, requests.max_best_of),
        (128, 2)
    );
    assert_eq!(
        (requests.max_stop_sequences, requests.max_top_n_tokens),
        (4, 5)
    );
    assert_eq!(
        (requests.max_input_tokens, requests.max_total_tokens),
        (None, None)
    );
    assert_eq!(
        (requests.max_client_batch_size, requests.validation_workers),
        (4, 2)
    );
    assert_eq!(requests.payload_limit, 2_000_000);
    let engine = &serve.engine;
    assert_eq!((engine.running_max, engine.step_tokens_max), (256, 1024));
    assert_eq!(
        (engine.prefill_tokens_max, engine.pipeline_depth),
        (1024, 2)
    );
    assert_eq!(engine.itl_target_ms, 50);
    assert_eq!(engine.mask_ms_max, 20);
    assert!(!requests.disable_grammar_support);
    assert_eq!((serve.watermark.gamma, serve.watermark.delta), (0.5, 2.0));
    assert!(engine.prefix_caching && engine.record.is_none());
    assert_eq!(
        (serve.device.kind.as_str(), serve.device.dtype.as_str()),
        ("auto", "auto")
    );
    assert_eq!((serve.device.threads, launch.num_shard), (8, 1));
    assert_eq!(
        serve.telemetry.otlp_service_name,
        "text-generation-inference.router"
    );
    assert!(warnings.is_empty(), "{warnings:?}");
}

#[test]
fn a_flag_means_what_it_says() {
    check(
        r#"
        --model-id a/b | /model/id | "a/b"
        --revision refs/pr/1 | /model/revision | "refs/pr/1"
        --load-format dummy | /model/load_format | "dummy"
        --quantize bitsandbytes-nf4 | /model/quantize | "bitsandbytes-nf4"
        HF_MODEL_QUANTIZE=compressed-tensors | /model/quantize | "compressed-tensors"
        QUANTIZE= | /model/quantize | ""
        --quantize-activations | /model/quantize_activations | true
        HEADRACE_QUANTIZE_ACTIVATIONS=false | /model/quantize_activations | false
        --tool-call-parser llama3-json | /model/tool_call_parser | "llama3-json"
        --tool-call-parser qwen3_coder | /model/tool_call_parser | "qwen3_coder"
        --tool-call-parser deepseek_v3 | /model/tool_call_parser | "deepseek_v3"
        --tool-call-parser deepseek_v31 | /model/tool_call_parser | "deepseek_v31"
        --tool-call-parser none | /model/tool_call_parser | "none"
        -p 8080 | /http/port | 8080
        -g 5 | /http/drain_deadline_ms | 5000
        --hostname ::1 | /http/hostname | "::1"
        --hostname localhost | /http/hostname | "127.0.0.1"
        --hostname 3f2a9c | /http/hostname | "0.0.0.0"
        --cors-allow-origin a --cors-allow-origin b | /http/cors_allow_origin/1 | "b"
        --dtype bfloat16 | /device/dtype | "bfloat16"
        --device cpu | /device/kind | "cpu"
        --threads 3 | /device/threads | 3
        --num-shard 3 | /device/threads | 2
        --num-shard 16 | /device/threads | 1
        --kv-memory 1GiB | /device/kv_bytes_max | 1073741824
        --cuda-memory-fraction 1.0 | /device/memory_fraction | 0.0
        --cuda-memory-fraction 0.5 | /device/memory_fraction | 0.5
        --reference-ops | /device/reference_ops | true
        --kv-cache-dtype fp8_e4m3fn | /device/kv_dtype | "float8_e4m3fn"
        KV_CACHE_DTYPE=fp8_e5m2 | /device/kv_dtype | "float8_e5m2"
        --kv-cache-dtype auto | /device/kv_dtype | ""
        --request-timeout 2.5 | /requests/timeout_ms | 2500
        HEADRACE_REQUEST_TIMEOUT=0.0001 | /requests/timeout_ms | 1
        --max-best-of 2 | /requests/timeout_ms | null
        --v1-dialect tgi | /http/v1_dialect | "tgi"
        HEADRACE_V1_DIALECT=openai | /http/v1_dialect | "openai"
        --cuda-graphs 1,2 | /device/graphs | true
        --cuda-graphs 0 | /device/graphs | false
        --max-concurrent-requests 9 | /requests/max_concurrent_requests | 9
        --max-input-tokens 7 | /requests/max_input_tokens | 7
        --max-input-length 7 | /requests/max_input_tokens | 7
        --max-total-tokens 9 | /requests/max_total_tokens | 9
        --payload-limit 10 | /requests/payload_limit | 10
        --max-batch-prefill-tokens 64 | /engine/prefill_tokens_max | 64
        --max-batch-prefill-tokens 64 | /engine/step_tokens_max | 256
        --max-batch-prefill-tokens 4096 | /engine/step_tokens_max | 4096
        --itl-target-ms 15 | /engine/itl_target_ms | 15
        --itl-target-ms 0 | /engine/itl_target_ms | 0
        --mask-ms-max 5 | /engine/mask_ms_max | 5
        --disable-grammar-support | /requests/disable_grammar_support | true
        --watermark-gamma 0.25 | /watermark/gamma | 0.25
        --watermark-delta 1.5 | /watermark/delta | 1.5
        --watermark-delta -1.5 | /watermark/delta | -1.5
        --max-running 64 | /engine/running_max | 64
        --max-batch-size 32 | /engine/running_max | 32
        --max-batch-size 999 | /engine/running_max | 256
        --block-tokens 32 | /engine/block_tokens | 32
        --pipeline-depth 1 | /engine/pipeline_depth | 1
        --record-plans p | /engine/record | "p"
        --step-timeout 2 | /engine/step_deadline_ms | 2000
        --startup-timeout 2 | /engine/prepare_deadline_ms | 2000
        --prefix-caching 0 | /engine/prefix_caching | false
        --json-output | /telemetry/json_output | true"#,
    );
}

#[test]
fn a_variable_stands_in_for_its_flag() {
    check(
        r#"
        MODEL_ID=a/b PORT=80 | /model/id | "a/b"
        MODEL_ID=a/b PORT=80 | /http/port | 80
        PORT=80 --port 81 | /http/port | 81
        PORT= MODEL_ID= QUANTIZE= | /http/port | 3000
        PORT= MODEL_ID= QUANTIZE= | /model/id | "HuggingFaceTB/SmolLM2-135M-Instruct"
        JSON_OUTPUT=yes | /telemetry/json_output | true
        JSON_OUTPUT=1 | /telemetry/json_output | true
        JSON_OUTPUT=false | /telemetry/json_output | false
        JSON_OUTPUT=0 --json-output | /telemetry/json_output | true
        ITL_TARGET_MS=20 | /engine/itl_target_ms | 20
        PREFIX_CACHING=no | /engine/prefix_caching | false
        CORS_ALLOW_ORIGIN=x | /http/cors_allow_origin | ["x"]
        CORS_ALLOW_ORIGIN=x --cors-allow-origin y | /http/cors_allow_origin | ["y"]
        LOG_LEVEL=debug | /telemetry/log_level | "debug"
        HEADRACE_DEVICE=cpu | /device/kind | "cpu"
        WATERMARK_GAMMA=0.75 | /watermark/gamma | 0.75
        WATERMARK_DELTA=-0.5 | /watermark/delta | -0.5
        WATERMARK_DELTA=4 --watermark-delta 3 | /watermark/delta | 3.0
        API_KEY=k | /http/api_key | "k"
        AIP_HTTP_PORT=8081 PORT=80 --port 82 | /http/port | 8081
        AIP_PREDICT_ROUTE=/predict | /http/predict_route | "/predict"
        AIP_HEALTH_ROUTE=/alive | /http/health_route | "/alive"
        PROMETHEUS_PORT=9000 | /http/prometheus_port | 9000
        HF_MODEL_ID=a/b HF_MODEL_REVISION=x | /model/id | "a/b"
        HF_MODEL_ID=a/b HF_MODEL_REVISION=x | /model/revision | "x"
        HF_MODEL_ID=a/b MODEL_ID=c/d | /model/id | "c/d"
        HF_MODEL_ID=a/b MODEL_ID= | /model/id | "a/b"
        HF_MODEL_ID=a/b --model-id c/d | /model/id | "c/d"
        SM_NUM_GPUS=4 | /device/threads | 2
        SM_NUM_GPUS=0 | /device/threads | 8
        COMPUTE_TYPE=8-h100 | /http/compute_type | "8-h100"
        AIP_HEALTH_ROUTE= | /http/health_route | null
        CUDA_GRAPHS=1,2,4 USAGE_STATS=off | /http/port | 3000
        HOSTNAME=3f2a9c | /http/hostname | "0.0.0.0""#,
    );
}

#[test]
fn what_cannot_work_is_refused_with_its_number() {
    let table = "
        --num-shard 0 | --num-shard must be at least 1, it is 0
        --aip-predict-route x | AIP_PREDICT_ROUTE must be a path that begins with `/`, it is \"x\"
        --num-shard 65 | --num-shard must be at most 64, it is 65
        --sharded true --num-shard 1 | --sharded true with --num-shard 1: a model is split over 2 \
            shards or more
        --sharded true | --sharded true needs --num-shard when there is no GPU to count
        --device cuda | 1 CUDA devices are needed, 0 are visible
        --validation-workers 0 | --validation-workers must be at least 1, it is 0
        --max-concurrent-requests 0 | --max-concurrent-requests must be at least 1, it is 0
        --max-batch-size 0 | --max-batch-size must be at least 1, it is 0
        --max-input-tokens 8 --max-total-tokens 8 | --max-input-tokens (8) must be less than \
            --max-total-tokens (8)
        --max-input-tokens 8 --max-input-length 9 | --max-input-tokens (8) and \
            --max-input-length (9) are two names of one limit: give one
        --block-tokens 24 | --block-tokens must be a power of two, it is 24
        --block-tokens 0 | --block-tokens must be at least 1, it is 0
        --pipeline-depth 4 | --pipeline-depth must be at most 3, it is 4
        --max-running 5000 | --max-running must be at most 4096, it is 5000
        --itl-target-ms 60001 | --itl-target-ms must be at most 60000, it is 60001
        --cuda-memory-fraction 1.5 | --cuda-memory-fraction must lie above 0 and at most at 1, it \
            is 1.5
        --cuda-memory-fraction nan | --cuda-memory-fraction must lie above 0 and at most at 1, it \
            is NaN
        --watermark-gamma 0 | --watermark-gamma must lie above 0 and below 1, it is 0
        --watermark-gamma 1 | --watermark-gamma must lie above 0 and below 1, it is 1
        --watermark-gamma nan | --watermark-gamma must lie above 0 and below 1, it is NaN
        WATERMARK_DELTA=inf | --watermark-delta must be a finite number, it is inf
        --watermark-delta 1e39 | --watermark-delta must be a finite number, it is inf
        --watermark-delta nan | --watermark-delta must be a finite number, it is NaN
        --kv-memory 0 | --kv-memory must be at least 1, it is 0
        --request-timeout 0 | --request-timeout must lie above 0 and at most at 604800 seconds, it is 0
        --request-timeout 604801 | --request-timeout must lie above 0 and at most at 604800 seconds, it is 604801
        --request-timeout nan | --request-timeout must lie above 0 and at most at 604800 seconds, it is NaN
        --startup-timeout 9999999 | --startup-timeout must be at most 604800, it is 9999999
        --tokenizer-config-path /no/such | --tokenizer-config-path: /no/such is no file
        --model-id= | --model-id is empty
        --quantize exl2 | --quantize exl2 is not served: take a checkpoint in the format of gptq, \
            awq, compressed-tensors or fp8, or quantize one of 16 bits when it is loaded, by \
            --quantize fp8, eetq, bitsandbytes, bitsandbytes-nf4 or bitsandbytes-fp4
        HF_MODEL_QUANTIZE=marlin | --quantize marlin is not served: take a checkpoint in the format \
            of gptq, awq, compressed-tensors or fp8, or quantize one of 16 bits when it is loaded, \
            by --quantize fp8, eetq, bitsandbytes, bitsandbytes-nf4 or bitsandbytes-fp4
        LORA_ADAPTERS=x | --lora-adapters: LoRA adapters are not supported yet; start without it
        --rope-factor 2 | --rope-factor: a rope scaling other than the model's own is not \
            supported yet; start without it
        --speculate 2 | --speculate: speculation, by n-grams or by a Medusa head, is not \
            supported yet; start without it
        --ngrok | --ngrok: a tunnel to the internet is not supported yet; start without it";
    for row in table.lines().skip(1) {
        let (line, expected) = row.split_once(" | ").expect("a row has two columns");
        assert_eq!(
            resolved(line, CPU).expect_err("refused"),
            expected,
            "{line}"
        );
    }
}

#[test]
fn what_cannot_be_read_names_the_flag_or_the_variable() {
    let table = [
        ("--port x", "invalid value 'x' for '--port <PORT>'"),
        ("--dtype int3", "invalid value 'int3' for '--dtype"),
        ("--no-such-flag", "unexpected argument '--no-such-flag'"),
        (
            "PORT=70000",
            "environment variable PORT: invalid value '70000'",
        ),
        (
            // What Kubernetes sets beside a service of that name.
            "PORT=tcp://10.0.0.1:80",
            "environment variable PORT: invalid value 'tcp://10.0.0.1:80'",
        ),
        (
            "JSON_OUTPUT=maybe",
            "environment variable JSON_OUTPUT: `maybe` is neither",
        ),
        (
            "--kv-cache-dtype fp8",
            "[possible values: auto, fp8_e4m3fn, fp8_e5m2]",
        ),
        ("--v1-dialect vllm", "[possible values: openai, tgi]"),
        ("--kv-memory 4parsecs", "unknown unit `parsecs`"),
    ];
    for (line, expected) in table {
        let error = parse(line).expect_err("unreadable");
        assert!(error.contains(expected), "{error}");
    }
}

#[test]
fn shards_are_counted_as_tgi_counts_them() {
    let named = |n| Machine {
        gpus_named: Some(n),
        ..TWO_GPUS
    };
    let table = [
        ("", CPU, Ok(1)),
        ("--num-shard 4", CPU, Ok(4)),
        ("--sharded false", CPU, Ok(1)),
        ("--sharded false --num-shard 2", CPU, Ok(2)),
        ("", TWO_GPUS, Ok(1)),
        ("", named(2), Ok(2)),
        ("--device cpu", named(2), Ok(1)),
        ("--sharded true", TWO_GPUS, Ok(2)),
        (
            "--sharded true",
            named(1),
            Err("2 CUDA devices are needed, 1 are visible (--sharded true)"),
        ),
        (
            "--num-shard 4",
            TWO_GPUS,
            Err("4 CUDA devices are needed, 2 are visible"),
        ),
        ("", named(0), Ok(1)),
    ];
    for (line, machine, expected) in table {
        let shards = resolved(line, machine).map(|resolved| resolved.launch.num_shard);
        assert_eq!(
            shards,
            expected.map_err(str::to_owned),
            "{line} {machine:?}"
        );
    }
}

#[test]
fn a_gpu_gets_larger_steps() {
    let serve = resolved("", TWO_GPUS).expect("fine").serve;
    assert_eq!(serve.engine.step_tokens_max, 8192);
    assert_eq!(serve.engine.running_max, 512);
    let line = "--max-batch-size 999 --max-running 700";
    let serve = resolved(line, TWO_GPUS).expect("fine").serve;
    assert_eq!(serve.engine.running_max, 700);
}

#[test]
fn what_is_ignored_is_said() {
    let line = "--speculate 0 --max-batch-total-tokens 9 --num-shard 9 HOSTNAME=3f2a9c \
                ATTENTION=paged TGI_WIGGLE_ROOM=0.9 EXLLAMA_VERSION=";
    let warnings = resolved(line, CPU).expect("harmless").warnings;
    let expected = [
        "--max-batch-total-tokens is without effect: the KV cache is as large as memory allows; --kv-memory bounds it",
        "ATTENTION is without effect: the attention backend is chosen by device and model",
        "TGI_WIGGLE_ROOM is without effect: --cuda-memory-fraction bounds the GPU's memory",
        "9 shards share 8 cores: fewer shards are faster",
        "hostname `3f2a9c` is not an IP address: listening on 0.0.0.0",
    ];
    assert_eq!(warnings, expected);
}

#[test]
fn spans_go_where_opentelemetry_s_variables_say() {
    check(
        r#"
        --port 1 | /telemetry/otlp_endpoint | null
        --otlp-endpoint http://a:4317/ | /telemetry/otlp_endpoint | "http://a:4317"
        OTLP_ENDPOINT=a:4317 | /telemetry/otlp_endpoint | "http://a:4317"
        OTEL_EXPORTER_OTLP_ENDPOINT=http://a:1 | /telemetry/otlp_endpoint | "http://a:1"
        OTEL_EXPORTER_OTLP_ENDPOINT=http://a:1 OTEL_EXPORTER_OTLP_TRACES_ENDPOINT=http://b:2/x | /telemetry/otlp_endpoint | "http://b:2/x"
        --otlp-endpoint c:3 OTEL_EXPORTER_OTLP_TRACES_ENDPOINT=http://b:2/x | /telemetry/otlp_endpoint | "http://c:3"
        --otlp-endpoint c:3 OTEL_TRACES_EXPORTER=none | /telemetry/otlp_endpoint | null
        --otlp-endpoint c:3 OTEL_SDK_DISABLED=true | /telemetry/otlp_endpoint | null
        --otlp-endpoint c:3 OTEL_EXPORTER_OTLP_PROTOCOL=http/protobuf | /telemetry/otlp_endpoint | "http://c:3/v1/traces"
        --otlp-endpoint c:3/v1/traces --otlp-protocol http/protobuf | /telemetry/otlp_endpoint | "http://c:3/v1/traces"
        OTEL_EXPORTER_OTLP_TRACES_ENDPOINT=http://b:2/x --otlp-protocol http/protobuf | /telemetry/otlp_endpoint | "http://b:2/x"
        OTEL_EXPORTER_OTLP_PROTOCOL=http/protobuf OTEL_EXPORTER_OTLP_TRACES_PROTOCOL=grpc | /telemetry/traces/protocol | "grpc"
        OTEL_EXPORTER_OTLP_HEADERS=a=b%20c,d=e= | /telemetry/traces/headers | [{"name": "a", "value": "b c"}, {"name": "d", "value": "e="}]
        OTEL_RESOURCE_ATTRIBUTES=k=v, | /telemetry/traces/resource | [{"name": "k", "value": "v"}]
        OTEL_SERVICE_NAME=llm | /telemetry/otlp_service_name | "llm"
        OTEL_SERVICE_NAME=llm OTLP_SERVICE_NAME=tgi | /telemetry/otlp_service_name | "tgi"
        --port 1 | /telemetry/traces/sampler | "parentbased_always_on"
        OTEL_TRACES_SAMPLER=traceidratio OTEL_TRACES_SAMPLER_ARG=0.25 | /telemetry/traces/sampler_ratio | 0.25
        OTEL_TRACES_SAMPLER=always_off | /telemetry/traces/sampler | "always_off"
        OTEL_EXPORTER_OTLP_TIMEOUT=5 | /telemetry/traces/timeout_ms | 5
        OTEL_BSP_SCHEDULE_DELAY=7 | /telemetry/traces/delay_ms | 7"#,
    );
}

#[test]
fn what_no_span_can_be_sent_to_is_refused() {
    for (line, why) in [
        (
            "--otlp-endpoint https://a:4317",
            "this system has no root certificates to trust",
        ),
        (
            "--otlp-endpoint https://:4317",
            "--otlp-endpoint is `http://host:port`",
        ),
        (
            "--otlp-endpoint ftp://a",
            "--otlp-endpoint is `http://host:port`",
        ),
        (
            "OTEL_EXPORTER_OTLP_ENDPOINT=http://:4317",
            "OTEL_EXPORTER_OTLP_ENDPOINT is `http://host:port`",
        ),
        (
            "--traces-sampler-arg 1.5",
            "--traces-sampler-arg must lie between 0 and 1, it is 1.5",
        ),
        (
            "--traces-sampler sometimes",
            "invalid value 'sometimes' for '--traces-sampler",
        ),
        (
            "OTEL_EXPORTER_OTLP_HEADERS=sesame",
            "OTEL_EXPORTER_OTLP_HEADERS is a list of name=value, with commas between; it has \"(hidden)\"",
        ),
        (
            "OTEL_EXPORTER_OTLP_TIMEOUT=0",
            "OTEL_EXPORTER_OTLP_TIMEOUT must be at least 1, it is 0",
        ),
        (
            "OTEL_BSP_MAX_EXPORT_BATCH_SIZE=9 OTEL_BSP_MAX_QUEUE_SIZE=8",
            "OTEL_BSP_MAX_EXPORT_BATCH_SIZE must be at most 8, it is 9",
        ),
        (
            "OTEL_EXPORTER_OTLP_PROTOCOL=http/json",
            "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL: invalid value 'http/json'",
        ),
    ] {
        let error = resolved(line, CPU).expect_err(line);
        assert!(error.contains(why), "{line}: {error}");
    }
}

/// Files of PEM as tests need them.
const FILES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../router/otlp/testdata");

#[test]
fn a_collector_is_trusted_by_the_system_s_roots_or_by_those_that_are_named() {
    let system = Machine {
        roots: Some("/etc/roots.pem"),
        ..CPU
    };
    let roots = |line: &str| {
        let serve = resolved(line, system).expect(line).serve;
        let tls = serve.telemetry.traces.tls?;
        let roots = tls.roots.to_str().map(str::to_owned);
        Some((serve.telemetry.otlp_endpoint?, roots?))
    };
    let ca = format!("{FILES}/ca.pem");
    let other = format!("{FILES}/other.pem");
    let by_https = "https://a:1".to_owned();
    for (line, expected) in [
        ("--otlp-endpoint http://a:1", None),
        ("--otlp-endpoint a:1", None),
        (
            "--otlp-endpoint http://a:1 OTEL_EXPORTER_OTLP_CERTIFICATE=missing",
            None,
        ),
        ("--otlp-endpoint https://a:1 OTEL_SDK_DISABLED=true", None),
        ("--otlp-endpoint a:1 OTEL_EXPORTER_OTLP_INSECURE=true", None),
        (
            "--otlp-endpoint http://a:1 OTEL_EXPORTER_OTLP_INSECURE=false",
            None,
        ),
        (
            "--otlp-endpoint a:1 OTEL_EXPORTER_OTLP_INSECURE=false --otlp-protocol http/protobuf",
            None,
        ),
        ("--otlp-endpoint https://a:1/", Some("/etc/roots.pem")),
        (
            "--otlp-endpoint a:1 OTEL_EXPORTER_OTLP_INSECURE=false",
            Some("/etc/roots.pem"),
        ),
        (
            "--otlp-endpoint https://a:1 SSL_CERT_FILE=CA",
            Some(ca.as_str()),
        ),
        (
            "--otlp-endpoint https://a:1 SSL_CERT_FILE=missing OTEL_EXPORTER_OTLP_CERTIFICATE=CA",
            Some(ca.as_str()),
        ),
        (
            "--otlp-endpoint https://a:1 OTEL_EXPORTER_OTLP_CERTIFICATE=CA \
             OTEL_EXPORTER_OTLP_TRACES_CERTIFICATE=OTHER",
            Some(other.as_str()),
        ),
    ] {
        let line = line.replace("=CA", &format!("={ca}"));
        let line = line.replace("=OTHER", &format!("={other}"));
        let expected = expected.map(|roots| (by_https.clone(), roots.to_owned()));
        assert_eq!(roots(&line), expected, "{line}");
    }
    let line = "--otlp-endpoint https://a:1 --otlp-protocol http/protobuf";
    assert_eq!(
        roots(line).expect("it has roots").0,
        "https://a:1/v1/traces"
    );
}

#[test]
fn a_certificate_for_the_collector_comes_with_its_key() {
    let endpoint = format!(
        "--otlp-endpoint https://a:1 OTEL_EXPORTER_OTLP_CERTIFICATE={FILES}/ca.pem \
         OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE={FILES}/client.pem"
    );
    let line = format!("{endpoint} OTEL_EXPORTER_OTLP_TRACES_CLIENT_KEY={FILES}/client.key");
    let client = serve(&line).telemetry.traces.tls.expect("TLS").client;
    let client = client.expect("a certificate");
    assert!(client.certificate.is_absolute() && client.certificate.ends_with("client.pem"));
    assert!(client.key.is_absolute() && client.key.ends_with("client.key"));
    let error = resolved(&endpoint, CPU).expect_err("half a pair");
    assert_eq!(
        error,
        "OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE is set and OTEL_EXPORTER_OTLP_CLIENT_KEY is not: \
         a certificate and its key go together"
    );
}

#[test]
fn a_file_without_what_it_should_have_is_refused_by_its_name() {
    let ca = format!("OTEL_EXPORTER_OTLP_CERTIFICATE={FILES}/ca.pem");
    let client = "OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE";
    for (line, why) in [
        (
            "OTEL_EXPORTER_OTLP_CERTIFICATE=/nowhere/ca.pem".to_owned(),
            "OTEL_EXPORTER_OTLP_CERTIFICATE: /nowhere/ca.pem cannot be read: No such file",
        ),
        (
            format!("OTEL_EXPORTER_OTLP_TRACES_CERTIFICATE={FILES}/client.key"),
            "testdata/client.key has no certificate in PEM",
        ),
        (
            "SSL_CERT_FILE=/nowhere/ca.pem".to_owned(),
            "SSL_CERT_FILE: /nowhere/ca.pem cannot be read",
        ),
        (
            format!("{ca} {client}={FILES}/client.key OTEL_EXPORTER_OTLP_CLIENT_KEY=key"),
            "OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE: ",
        ),
        (
            format!(
                "{ca} {client}={FILES}/client.pem OTEL_EXPORTER_OTLP_CLIENT_KEY={FILES}/ca.pem"
            ),
            "testdata/ca.pem has no private key in PEM that needs no password",
        ),
    ] {
        let line = format!("--otlp-endpoint https://a:1 {line}");
        let error = resolved(&line, CPU).expect_err(&line);
        assert!(error.contains(why), "{line}: {error}");
    }
}

#[test]
fn the_hub_s_token_goes_by_three_names() {
    let token = |set: &[(&str, &str)]| {
        let env = |name: &str| {
            let found = set.iter().find(|(key, _)| *key == name);
            found.map(|(_, value)| OsString::from(value))
        };
        hub_token(&env).map(|token| token.to_string_lossy().into_owned())
    };
    assert_eq!(token(&[]), None);
    assert_eq!(token(&[("HF_API_TOKEN", "c")]).as_deref(), Some("c"));
    let older = [("HUGGING_FACE_HUB_TOKEN", "b"), ("HF_API_TOKEN", "c")];
    assert_eq!(token(&older).as_deref(), Some("b"));
    let all = [("HF_TOKEN", "a"), older[0], older[1]];
    assert_eq!(token(&all).as_deref(), Some("a"));
    let empty = [("HF_TOKEN", ""), older[1]];
    assert_eq!(token(&empty).as_deref(), Some("c"));
}

#[test]
fn serve_json_is_private_and_survives_the_trip() {
    let folder = std::env::temp_dir().join(format!("hr-config-{}", std::process::id()));
    std::fs::create_dir_all(&folder).expect("a folder");
    let path = folder.join("serve.json");
    let written = serve("--api-key sesame");
    save(&written, &path).expect("it is written");
    let mode = std::fs::metadata(&path)
        .expect("it is there")
        .permissions()
        .mode();
    assert_eq!(mode & 0o777, 0o600);
    assert_eq!(load(&path).expect("it is read"), written);
    assert!(
        save(&written, &path).is_err(),
        "an existing file may have another mode"
    );
    std::fs::write(&path, "{\"model\": 1}").expect("it is spoilt");
    let error = load(&path).expect_err("not ours").to_string();
    assert!(
        error.contains("is no serve.json of this version"),
        "{error}"
    );
    std::fs::remove_dir_all(&folder).expect("the folder goes");
}

#[test]
fn secrets_do_not_show_in_debug_output() {
    let secret = "--api-key sesame OTEL_EXPORTER_OTLP_HEADERS=key=sesame";
    let serve = serve(secret);
    let typed = parse(secret).expect("it is well-formed");
    let text = format!("{serve:?} {:?}", typed.traces);
    assert!(
        !text.contains("sesame") && text.contains("hidden"),
        "{text}"
    );
    let open = String::from_utf8(without_secrets(&serve)).expect("it is JSON");
    assert!(!open.contains("sesame"), "{open}");
}
