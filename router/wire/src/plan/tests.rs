use super::*;

/// The slow twin: the same message by way of prost.
fn encode_by_prost(plan: &StepPlan) -> Vec<u8> {
    let pack = |column: &[i32]| pack_i32(column.iter().copied());
    let message = pb::StepPlan {
        step: plan.step.0,
        release_slot_i32le: pack(&plan.release_slot),
        bindings: plan.bindings.iter().map(binding_message).collect(),
        zero_block_i32le: pack(&plan.zero_block),
        append_slot_i32le: pack(&plan.append_slot),
        append_at_i32le: pack(&plan.append_at),
        append_len_i32le: pack(&plan.append_len),
        append_block_i32le: pack(&plan.append_block),
        row_slot_i32le: pack(&plan.row_slot),
        row_start_i32le: pack(&plan.row_start),
        row_len_i32le: pack(&plan.row_len),
        row_flags_i32le: pack(&plan.row_flags),
        token_id_i32le: pack(&plan.token_id),
        trace_row_i32le: pack(&plan.trace_row),
        trace_context: plan.trace_context.concat().into(),
    };
    pb::ToShard {
        message: Some(pb::to_shard::Message::Plan(message)),
    }
    .encode_to_vec()
}

fn decode_rows(rows: i32) -> StepPlan {
    StepPlan {
        step: StepId(300),
        row_slot: (0..rows).collect(),
        row_start: (0..rows).map(|row| 1000 + row).collect(),
        row_len: (0..rows).map(|_| 1).collect(),
        row_flags: (0..rows)
            .map(|_| row_flag::SAMPLE | row_flag::FROM_SLOT)
            .collect(),
        ..StepPlan::default()
    }
}

fn mixed() -> StepPlan {
    let binding = SlotBinding {
        slot: SlotId(4),
        generation: Generation(2),
        sampling: Arc::new(Sampling {
            temperature: 0.5,
            bias: vec![(TokenId(3), -1.5), (TokenId(9), 2.0)],
            ..Sampling::default()
        }),
        ending: [TokenId(2)].into(),
        history: vec![TokenId(5), TokenId(6)],
        prompt_len: Tokens(2),
        state_slot: StateSlot(1),
    };
    StepPlan {
        release_slot: vec![3, 1],
        bindings: vec![
            binding.clone(),
            SlotBinding {
                history: vec![],
                ..binding
            },
        ],
        zero_block: vec![12],
        append_slot: vec![4, 0],
        append_at: vec![0, 7],
        append_len: vec![2, 1],
        append_block: vec![12, 13, 14],
        row_slot: vec![0, 4],
        row_start: vec![112, 0],
        row_len: vec![1, 2],
        row_flags: vec![row_flag::SAMPLE | row_flag::FROM_SLOT, row_flag::SAMPLE],
        token_id: vec![5, 6],
        trace_row: vec![1],
        trace_context: vec![[7; 25]],
        ..decode_rows(0)
    }
}

#[test]
fn the_hand_written_bytes_are_those_of_prost_and_decode_to_the_same_plan() {
    let mut buffer = BytesMut::new();
    for plan in [
        StepPlan::default(),
        decode_rows(1),
        decode_rows(256),
        mixed(),
    ] {
        let bytes = encode_plan(&plan, &mut buffer);
        assert_eq!(bytes, encode_by_prost(&plan));
        assert_eq!(decode_plan(bytes), Ok(plan));
    }
}

#[test]
fn contradicting_columns_are_named() {
    let mut buffer = BytesMut::new();
    let mut decode = |plan: &StepPlan| decode_plan(encode_plan(plan, &mut buffer));
    assert_eq!(
        decode(&StepPlan {
            token_id: vec![5],
            ..mixed()
        }),
        Err(WireError::Entries {
            column: "token_id",
            entries: 1,
            expected: 2
        })
    );
    assert_eq!(
        decode(&StepPlan {
            append_len: vec![2, 2],
            ..mixed()
        }),
        Err(WireError::Entries {
            column: "append_block",
            entries: 3,
            expected: 4
        })
    );
    assert_eq!(decode_plan(&[][..]), Err(WireError::NoPlan));
}

#[test]
fn malformed_bytes_are_errors_and_never_panics() {
    let good = encode_plan(&mixed(), &mut BytesMut::new());
    for len in 0..good.len() {
        drop(decode_plan(&good[..len]));
    }
    for at in 0..good.len() {
        let mut bad = good.to_vec();
        bad[at] ^= 0x81;
        drop(decode_plan(&bad[..]));
    }
}
