//! Columns: packed little-endian arrays in `bytes` fields.

use bytes::{BufMut, Bytes, BytesMut};
use prost::encoding::{WireType, encode_key, encode_varint, encoded_len_varint, key_len};

use crate::WireError;

/// Bytes of an `int32` or a `float`.
const WIDTH: usize = 4;

/// Bytes that field `tag` takes with this column; an empty column is absent.
pub(crate) fn field_len(tag: u32, column: &[i32]) -> usize {
    delimited_len(tag, column.len() * WIDTH)
}

/// Bytes that a length-delimited field of `len` bytes takes; an empty one is absent.
pub(crate) fn delimited_len(tag: u32, len: usize) -> usize {
    if len == 0 {
        0
    } else {
        key_len(tag) + encoded_len_varint(len as u64) + len
    }
}

/// Writes one field; an empty column is absent.
pub(crate) fn put_field(tag: u32, column: &[i32], buffer: &mut BytesMut) {
    if column.is_empty() {
        return;
    }
    encode_key(tag, WireType::LengthDelimited, buffer);
    encode_varint((column.len() * WIDTH) as u64, buffer);
    let start = buffer.len();
    buffer.put_bytes(0, column.len() * WIDTH);
    for (cell, value) in buffer[start..].chunks_exact_mut(WIDTH).zip(column) {
        cell.copy_from_slice(&value.to_le_bytes());
    }
}

pub(crate) fn pack_i32(values: impl ExactSizeIterator<Item = i32>) -> Bytes {
    let mut packed = Vec::with_capacity(values.len() * WIDTH);
    values.for_each(|value| packed.extend_from_slice(&value.to_le_bytes()));
    packed.into()
}

pub(crate) fn pack_f32(values: impl ExactSizeIterator<Item = f32>) -> Bytes {
    let mut packed = Vec::with_capacity(values.len() * WIDTH);
    values.for_each(|value| packed.extend_from_slice(&value.to_le_bytes()));
    packed.into()
}

pub(crate) fn unpack_i32(column: &'static str, packed: &[u8]) -> Result<Vec<i32>, WireError> {
    Ok(cells(column, packed)?.map(i32::from_le_bytes).collect())
}

pub(crate) fn unpack_f32(column: &'static str, packed: &[u8]) -> Result<Vec<f32>, WireError> {
    Ok(cells(column, packed)?.map(f32::from_le_bytes).collect())
}

fn cells<'a>(
    column: &'static str,
    packed: &'a [u8],
) -> Result<impl ExactSizeIterator<Item = [u8; WIDTH]> + 'a, WireError> {
    let (cells, rest) = packed.as_chunks::<WIDTH>();
    if rest.is_empty() {
        Ok(cells.iter().copied())
    } else {
        Err(WireError::Ragged {
            column,
            bytes: packed.len(),
            element: WIDTH,
        })
    }
}

/// Checks that a column has as many entries as its siblings.
pub(crate) fn expect_entries(
    column: &'static str,
    entries: usize,
    expected: usize,
) -> Result<(), WireError> {
    if entries == expected {
        Ok(())
    } else {
        Err(WireError::Entries {
            column,
            entries,
            expected,
        })
    }
}

/// The sum of a column of counts.
pub(crate) fn total(column: &'static str, counts: &[i32]) -> Result<usize, WireError> {
    let mut sum = 0_usize;
    for &count in counts {
        let count =
            usize::try_from(count).map_err(|_| WireError::NegativeCount { column, count })?;
        sum += count;
    }
    Ok(sum)
}
