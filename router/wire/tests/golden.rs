//! The golden vectors of `proto/testdata`: each `.binpb` is a message, its `.json` the same
//! message with field names as in the contract and columns as arrays. Both sides decode them.
//! `UPDATE=1 cargo test --release -p headrace-wire --test golden` writes them anew.

use std::path::PathBuf;
use std::sync::Arc;
use std::{env, fs};

use bytes::BytesMut;
use headrace_core::ids::{Generation, SlotId, StateSlot, StepId, TokenId, Tokens};
use headrace_core::plan::{SlotBinding, StepPlan, StepResult, result_flag, row_flag};
use headrace_core::request::Sampling;
use headrace_wire::{
    StepMask, decode_mask, decode_plan, decode_result, encode_mask, encode_plan, encode_result,
};
use serde_json::{Value, json};

fn plans() -> Vec<(&'static str, StepPlan)> {
    vec![
        ("plan_prefill", prefill()),
        ("plan_decode", decode()),
        ("plan_mixed", mixed()),
    ]
}

/// The first step: two sequences, one of them with everything a request can ask for.
fn prefill() -> StepPlan {
    let plain = SlotBinding {
        slot: SlotId(0),
        generation: Generation(1),
        sampling: Arc::new(Sampling::default()),
        ending: [TokenId(2), TokenId(49151)].into(),
        history: vec![],
        prompt_len: Tokens(5),
        state_slot: StateSlot(0),
    };
    let sampling = Sampling {
        temperature: 0.75,
        top_k: 40,
        top_p: 0.9375,
        typical_p: 0.875,
        min_p: 0.0625,
        repetition_penalty: 1.25,
        frequency_penalty: 0.5,
        presence_penalty: -0.5,
        seed: 0xfedc_ba98_7654_3210,
        top_n: 5,
        logprob_raw: true,
        watermark: true,
        tokens_min: Tokens(3),
        bias: vec![(TokenId(7), -100.0), (TokenId(300), 1.5)],
    };
    let full = SlotBinding {
        slot: SlotId(1),
        generation: Generation(4),
        sampling: Arc::new(sampling),
        ending: [TokenId(2)].into(),
        history: (100..119).map(TokenId).collect(),
        prompt_len: Tokens(19),
        state_slot: StateSlot(6),
    };
    StepPlan {
        bindings: vec![plain, full],
        append_slot: vec![0, 1],
        append_at: vec![0, 0],
        append_len: vec![1, 2],
        append_block: vec![1, 2, 3],
        row_slot: vec![0, 1],
        row_start: vec![0, 0],
        row_len: vec![5, 8],
        row_flags: vec![row_flag::SAMPLE, row_flag::PROMPT_LOGPROBS],
        token_id: vec![
            11, 12, 13, 14, 49150, 100, 101, 102, 103, 104, 105, 106, 107,
        ],
        ..StepPlan::default()
    }
}

/// Nothing but decode rows.
fn decode() -> StepPlan {
    StepPlan {
        step: StepId(300),
        row_slot: (0..64).collect(),
        row_start: (0..64).map(|row| 1000 + 3 * row).collect(),
        row_len: vec![1; 64],
        row_flags: vec![row_flag::SAMPLE | row_flag::FROM_SLOT; 64],
        ..StepPlan::default()
    }
}

/// Releases, a rebound slot, blocks to zero, a table that grows, a chunk and traced rows.
fn mixed() -> StepPlan {
    let rebound = SlotBinding {
        slot: SlotId(3),
        generation: Generation(9),
        sampling: Arc::new(Sampling {
            temperature: 1.0,
            seed: 1,
            ..Sampling::default()
        }),
        ending: [].into(),
        history: vec![],
        prompt_len: Tokens(40),
        state_slot: StateSlot(0),
    };
    StepPlan {
        step: StepId(1 << 40),
        release_slot: vec![3, 17],
        bindings: vec![rebound],
        zero_block: vec![21, 22],
        append_slot: vec![5, 3],
        append_at: vec![7, 0],
        append_len: vec![1, 3],
        append_block: vec![9, 4, 21, 22],
        row_slot: vec![5, 6, 3],
        row_start: vec![112, 31, 16],
        row_len: vec![1, 1, 4],
        row_flags: vec![
            row_flag::SAMPLE | row_flag::FROM_SLOT,
            row_flag::SAMPLE | row_flag::FROM_SLOT | row_flag::MASKED,
            row_flag::SAMPLE,
        ],
        token_id: vec![1, 0, 49151, 2],
        trace_row: vec![0, 2],
        trace_context: vec![
            std::array::from_fn(|i| u8::try_from(i).expect("25 bytes")),
            [0xff; 25],
        ],
    }
}

fn results() -> Vec<(&'static str, StepResult)> {
    let sampled = StepResult {
        step: StepId(1 << 40),
        row_index: vec![0, 1, 2],
        token_id: vec![17, 49151, 0],
        row_flags: vec![0, result_flag::MASK_MISSED, result_flag::NAN],
        logprob: vec![-0.25, -1.5, 0.0],
        top_count: vec![2, 0, 3],
        top_token_id: vec![17, 18, 4, 5, 6],
        top_logprob: vec![-0.25, -2.0, -0.5, -0.5, -3.0],
        prompt_logprob: vec![],
        prompt_best_token: vec![],
        prompt_best_logprob: vec![],
        device_time_us: 4123,
        digest: 0xfedc_ba98_7654_3210,
    };
    let prompt = StepResult {
        step: StepId(0),
        row_index: vec![0],
        token_id: vec![5],
        row_flags: vec![0],
        logprob: vec![-0.125],
        top_count: vec![0],
        prompt_logprob: vec![f32::NAN, -1.0, -2.5, -0.75],
        prompt_best_token: vec![0, 9, 11, 5],
        prompt_best_logprob: vec![f32::NAN, -1.0, -0.5, -0.25],
        device_time_us: 90_000,
        digest: 1,
        ..StepResult::default()
    };
    let follower = StepResult {
        step: StepId(2),
        digest: 77,
        ..StepResult::default()
    };
    vec![
        ("result_sampled", sampled),
        ("result_prompt", prompt),
        ("result_follower", follower),
    ]
}

// === JSON with the contract's field names ===

fn ids(ids: &[TokenId]) -> Value {
    ids.iter().map(|id| id.0).collect()
}

/// JSON has no NaN: null stands for it.
fn floats(values: &[f32]) -> Value {
    values
        .iter()
        .map(|v| if v.is_nan() { Value::Null } else { json!(v) })
        .collect()
}

fn binding_json(binding: &SlotBinding) -> Value {
    let s = &binding.sampling;
    json!({
        "slot": binding.slot.0,
        "generation": binding.generation.0,
        "sampling": {
            "temperature": s.temperature,
            "top_k": s.top_k,
            "top_p": s.top_p,
            "typical_p": s.typical_p,
            "min_p": s.min_p,
            "repetition_penalty": s.repetition_penalty,
            "frequency_penalty": s.frequency_penalty,
            "presence_penalty": s.presence_penalty,
            "seed": s.seed,
            "top_n": s.top_n,
            "logprob_raw": s.logprob_raw,
            "watermark": s.watermark,
            "tokens_min": s.tokens_min.0,
            "ending_token_i32le": ids(&binding.ending),
            "bias_token_i32le": s.bias.iter().map(|(id, _)| id.0).collect::<Value>(),
            "bias_f32le": s.bias.iter().map(|(_, bias)| *bias).collect::<Value>(),
        },
        "history_token_i32le": ids(&binding.history),
        "prompt_len": binding.prompt_len.0,
        "state_slot": binding.state_slot.0,
    })
}

fn plan_json(plan: &StepPlan) -> Value {
    let hex = |byte: &u8| format!("{byte:02x}");
    json!({"plan": {
        "step": plan.step.0,
        "release_slot_i32le": plan.release_slot,
        "bindings": plan.bindings.iter().map(binding_json).collect::<Value>(),
        "zero_block_i32le": plan.zero_block,
        "append_slot_i32le": plan.append_slot,
        "append_at_i32le": plan.append_at,
        "append_len_i32le": plan.append_len,
        "append_block_i32le": plan.append_block,
        "row_slot_i32le": plan.row_slot,
        "row_start_i32le": plan.row_start,
        "row_len_i32le": plan.row_len,
        "row_flags_i32le": plan.row_flags,
        "token_id_i32le": plan.token_id,
        "trace_row_i32le": plan.trace_row,
        "trace_context": plan.trace_context.as_flattened().iter().map(hex).collect::<String>(),
    }})
}

fn result_json(result: &StepResult) -> Value {
    json!({
        "step": result.step.0,
        "row_index_i32le": result.row_index,
        "token_id_i32le": result.token_id,
        "row_flags_i32le": result.row_flags,
        "logprob_f32le": floats(&result.logprob),
        "top_count_i32le": result.top_count,
        "top_token_id_i32le": result.top_token_id,
        "top_logprob_f32le": floats(&result.top_logprob),
        "prompt_logprob_f32le": floats(&result.prompt_logprob),
        "prompt_best_token_i32le": result.prompt_best_token,
        "prompt_best_logprob_f32le": floats(&result.prompt_best_logprob),
        "device_time_us": result.device_time_us,
        "digest": result.digest,
    })
}

// === files ===

fn path(name: &str, extension: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("../../proto/testdata")
        .join(name)
        .with_extension(extension)
}

/// Compares a message with its files, or writes them.
fn check(name: &str, bytes: &[u8], json: &Value) {
    if env::var_os("UPDATE").is_some() {
        let text = serde_json::to_string_pretty(json).expect("a value is JSON");
        fs::write(path(name, "json"), text + "\n").expect("proto/testdata is writable");
        fs::write(path(name, "binpb"), bytes).expect("proto/testdata is writable");
    }
    let golden = fs::read(path(name, "binpb")).expect("UPDATE=1 writes it");
    assert_eq!(bytes, golden, "{name}.binpb is the message");
    let text = fs::read_to_string(path(name, "json")).expect("UPDATE=1 writes it");
    let golden: Value = serde_json::from_str(&text).expect("it is JSON");
    assert_eq!(*json, golden, "{name}.json is the message");
}

#[test]
fn plans_are_their_golden_vectors() {
    for (name, plan) in plans() {
        let bytes = encode_plan(&plan, &mut BytesMut::new());
        check(name, &bytes, &plan_json(&plan));
        assert_eq!(decode_plan(bytes), Ok(plan));
    }
}

/// Two rows of a vocabulary of 70 tokens, whose last word is not full.
fn mask() -> StepMask {
    StepMask {
        step: StepId(301),
        row: vec![1, 4],
        bits: vec![[1, 0x8000_0000, 0x3f].into(), [0xdead_beef, 0, 2].into()],
    }
}

#[test]
fn masks_are_their_golden_vector() {
    let mask = mask();
    let bytes = encode_mask(&mask);
    let hex = |word: &u32| {
        word.to_le_bytes()
            .map(|byte| format!("{byte:02x}"))
            .concat()
    };
    let bits: String = mask
        .bits
        .iter()
        .flat_map(|row| row.iter().map(hex))
        .collect();
    let json = json!({"mask": {"step": mask.step.0, "row_i32le": mask.row, "bits": bits}});
    check("mask_two_rows", &bytes, &json);
    assert_eq!(decode_mask(bytes), Ok(Some(mask)));
    let plan = encode_plan(&decode(), &mut BytesMut::new());
    assert_eq!(decode_mask(plan), Ok(None));
}

#[test]
fn results_are_their_golden_vectors() {
    for (name, result) in results() {
        let bytes = encode_result(&result);
        check(name, &bytes, &result_json(&result));
        // Compared as JSON, where NaN equals itself.
        let decoded = decode_result(bytes).expect("what was just encoded");
        assert_eq!(result_json(&decoded), result_json(&result));
    }
}
