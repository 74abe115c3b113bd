//! `StepMask` to a `ToShard` message and back (R7).

use std::sync::Arc;

use bytes::{Buf, Bytes};
use headrace_core::ids::StepId;
use prost::Message;

use crate::column::{pack_i32, unpack_i32};
use crate::{WireError, pb};

/// The masks of a step's constrained rows. A row that waits for a mask and is not among them misses
/// it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct StepMask {
    /// The step.
    pub step: StepId,
    /// Rows, ascending.
    pub row: Vec<i32>,
    /// As many words a row as the vocabulary needs: of word `i`, bit `j` is token `32 i + j`.
    pub bits: Vec<Arc<[u32]>>,
}

/// Encodes masks as the `ToShard` message that rank 0 receives.
pub fn encode_mask(mask: &StepMask) -> Bytes {
    let words = mask.bits.iter().flat_map(|row| row.iter());
    let bits: Vec<u8> = words.flat_map(|word| word.to_le_bytes()).collect();
    let mask = pb::StepMask {
        step: mask.step.0,
        row_i32le: pack_i32(mask.row.iter().copied()),
        bits: bits.into(),
    };
    let message = Some(pb::to_shard::Message::Mask(mask));
    pb::ToShard { message }.encode_to_vec().into()
}

/// Decodes what [`encode_mask`] wrote; `None` for a message that carries a plan.
pub fn decode_mask(message: impl Buf) -> Result<Option<StepMask>, WireError> {
    let Some(pb::to_shard::Message::Mask(mask)) = pb::ToShard::decode(message)?.message else {
        return Ok(None);
    };
    let row = unpack_i32("row", &mask.row_i32le)?;
    let words = unpack_i32("bits", &mask.bits)?;
    if !row.is_empty() && !words.len().is_multiple_of(row.len()) {
        return Err(WireError::Ragged {
            column: "bits",
            bytes: mask.bits.len(),
            element: size_of::<u32>() * row.len(),
        });
    }
    let width = (words.len() / row.len().max(1)).max(1);
    let words: Vec<u32> = words.into_iter().map(i32::cast_unsigned).collect();
    Ok(Some(StepMask {
        step: StepId(mask.step),
        bits: words.chunks(width).map(Into::into).collect(),
        row,
    }))
}
