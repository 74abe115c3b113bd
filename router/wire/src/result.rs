//! `StepResult` from bytes, and back for whoever plays the shard.

use bytes::{Buf, Bytes};
use headrace_core::ids::StepId;
use headrace_core::plan::StepResult;
use prost::Message;

use crate::column::{expect_entries, pack_f32, pack_i32, total, unpack_f32, unpack_i32};
use crate::{WireError, pb};

/// Decodes a result and checks that its columns agree with each other. Whether it fits the plan
/// is the scheduler's question.
pub fn decode_result(message: impl Buf) -> Result<StepResult, WireError> {
    let result = pb::StepResult::decode(message)?;
    let result = StepResult {
        step: StepId(result.step),
        row_index: unpack_i32("row_index", &result.row_index_i32le)?,
        token_id: unpack_i32("token_id", &result.token_id_i32le)?,
        row_flags: unpack_i32("row_flags", &result.row_flags_i32le)?,
        logprob: unpack_f32("logprob", &result.logprob_f32le)?,
        top_count: unpack_i32("top_count", &result.top_count_i32le)?,
        top_token_id: unpack_i32("top_token_id", &result.top_token_id_i32le)?,
        top_logprob: unpack_f32("top_logprob", &result.top_logprob_f32le)?,
        prompt_logprob: unpack_f32("prompt_logprob", &result.prompt_logprob_f32le)?,
        prompt_best_token: unpack_i32("prompt_best_token", &result.prompt_best_token_i32le)?,
        prompt_best_logprob: unpack_f32("prompt_best_logprob", &result.prompt_best_logprob_f32le)?,
        device_time_us: result.device_time_us,
        digest: result.digest,
    };
    check(&result)?;
    Ok(result)
}

/// Encodes a result: the shard's side, for stand-ins and tests.
pub fn encode_result(result: &StepResult) -> Bytes {
    let message = pb::StepResult {
        step: result.step.0,
        row_index_i32le: pack_i32(result.row_index.iter().copied()),
        token_id_i32le: pack_i32(result.token_id.iter().copied()),
        row_flags_i32le: pack_i32(result.row_flags.iter().copied()),
        logprob_f32le: pack_f32(result.logprob.iter().copied()),
        top_count_i32le: pack_i32(result.top_count.iter().copied()),
        top_token_id_i32le: pack_i32(result.top_token_id.iter().copied()),
        top_logprob_f32le: pack_f32(result.top_logprob.iter().copied()),
        prompt_logprob_f32le: pack_f32(result.prompt_logprob.iter().copied()),
        prompt_best_token_i32le: pack_i32(result.prompt_best_token.iter().copied()),
        prompt_best_logprob_f32le: pack_f32(result.prompt_best_logprob.iter().copied()),
        device_time_us: result.device_time_us,
        digest: result.digest,
    };
    message.encode_to_vec().into()
}

fn check(result: &StepResult) -> Result<(), WireError> {
    let rows = result.row_index.len();
    if !result.row_index.is_sorted_by(|a, b| a < b) {
        return Err(WireError::NotAscending {
            column: "row_index",
        });
    }
    expect_entries("token_id", result.token_id.len(), rows)?;
    expect_entries("row_flags", result.row_flags.len(), rows)?;
    expect_entries("logprob", result.logprob.len(), rows)?;
    expect_entries("top_count", result.top_count.len(), rows)?;
    let prompt = result.prompt_logprob.len();
    expect_entries("prompt_best_token", result.prompt_best_token.len(), prompt)?;
    expect_entries(
        "prompt_best_logprob",
        result.prompt_best_logprob.len(),
        prompt,
    )?;
    let alternatives = total("top_count", &result.top_count)?;
    expect_entries("top_token_id", result.top_token_id.len(), alternatives)?;
    expect_entries("top_logprob", result.top_logprob.len(), alternatives)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn result() -> StepResult {
        StepResult {
            step: StepId(7),
            row_index: vec![0, 2],
            token_id: vec![11, 12],
            row_flags: vec![0, 1],
            logprob: vec![-0.5, -1.25],
            top_count: vec![2, 0],
            top_token_id: vec![11, 13],
            top_logprob: vec![-0.5, -2.0],
            prompt_logprob: vec![-3.0],
            prompt_best_token: vec![17],
            prompt_best_logprob: vec![-0.25],
            device_time_us: 900,
            digest: u64::MAX,
        }
    }

    #[test]
    fn a_result_survives_the_wire() {
        assert_eq!(decode_result(encode_result(&result())), Ok(result()));
        let silent = StepResult {
            step: StepId(1),
            digest: 5,
            ..StepResult::default()
        };
        assert_eq!(decode_result(encode_result(&silent)), Ok(silent));
    }

    #[test]
    fn contradicting_columns_are_named() {
        let short = StepResult {
            logprob: vec![0.0],
            ..result()
        };
        assert_eq!(
            decode_result(encode_result(&short)),
            Err(WireError::Entries {
                column: "logprob",
                entries: 1,
                expected: 2
            })
        );
        let negative = StepResult {
            top_count: vec![3, -1],
            ..result()
        };
        assert_eq!(
            decode_result(encode_result(&negative)),
            Err(WireError::NegativeCount {
                column: "top_count",
                count: -1
            })
        );
        let unsorted = StepResult {
            row_index: vec![2, 2],
            ..result()
        };
        assert_eq!(
            decode_result(encode_result(&unsorted)),
            Err(WireError::NotAscending {
                column: "row_index"
            })
        );
    }

    #[test]
    fn malformed_bytes_are_errors_and_never_panics() {
        let good = encode_result(&result());
        for len in 0..good.len() {
            drop(decode_result(&good[..len]));
        }
        for at in 0..good.len() {
            for bit in 0..8 {
                let mut bad = good.to_vec();
                bad[at] ^= 1 << bit;
                drop(decode_result(&bad[..]));
            }
        }
        assert!(decode_result(&b"\xff\xff\xff"[..]).is_err());
        // A column of five bytes.
        assert_eq!(
            decode_result(&[0x12, 5, 0, 0, 0, 0, 0][..]),
            Err(WireError::Ragged {
                column: "row_index",
                bytes: 5,
                element: 4
            })
        );
    }
}
