//! tonic codecs: one that carries bytes which are already encoded, so that a plan is encoded once
//! however many ranks receive it, and one that turns plain values into their messages.

use std::fmt;
use std::marker::PhantomData;

use bytes::{Buf, BufMut, Bytes};
use prost::Message;
use tonic::Status;
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};

/// A plain value that has a message.
pub(crate) trait Plain: Send + 'static {
    type Message: Message + Default;

    fn into_message(self) -> Self::Message;
    fn from_message(message: Self::Message) -> Self;
}

/// Bytes out, bytes in.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct BytesCodec;

/// Plain values out and in.
pub(crate) struct PlainCodec<T, U>(PhantomData<fn(T) -> U>);

/// One direction of it.
pub(crate) struct PlainHalf<T>(PhantomData<fn(T) -> T>);

// === impl BytesCodec ===

impl Codec for BytesCodec {
    type Encode = Bytes;
    type Decode = Bytes;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        Self
    }

    fn decoder(&mut self) -> Self {
        Self
    }
}

impl Encoder for BytesCodec {
    type Item = Bytes;
    type Error = Status;

    fn encode(&mut self, item: Bytes, buffer: &mut EncodeBuf<'_>) -> Result<(), Status> {
        buffer.put(item);
        Ok(())
    }
}

impl Decoder for BytesCodec {
    type Item = Bytes;
    type Error = Status;

    fn decode(&mut self, buffer: &mut DecodeBuf<'_>) -> Result<Option<Bytes>, Status> {
        // Takes the message out of tonic's buffer without copying it.
        Ok(Some(buffer.copy_to_bytes(buffer.remaining())))
    }
}

// === impl PlainCodec ===

impl<T, U> Default for PlainCodec<T, U> {
    fn default() -> Self {
        Self(PhantomData)
    }
}

impl<T, U> fmt::Debug for PlainCodec<T, U> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PlainCodec")
    }
}

impl<T: Plain, U: Plain> Codec for PlainCodec<T, U> {
    type Encode = T;
    type Decode = U;
    type Encoder = PlainHalf<T>;
    type Decoder = PlainHalf<U>;

    fn encoder(&mut self) -> Self::Encoder {
        PlainHalf(PhantomData)
    }

    fn decoder(&mut self) -> Self::Decoder {
        PlainHalf(PhantomData)
    }
}

// === impl PlainHalf ===

impl<T> fmt::Debug for PlainHalf<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PlainHalf")
    }
}

impl<T: Plain> Encoder for PlainHalf<T> {
    type Item = T;
    type Error = Status;

    fn encode(&mut self, item: T, buffer: &mut EncodeBuf<'_>) -> Result<(), Status> {
        item.into_message()
            .encode(buffer)
            .map_err(|error| Status::internal(format!("the buffer does not grow: {error}")))
    }
}

impl<T: Plain> Decoder for PlainHalf<T> {
    type Item = T;
    type Error = Status;

    fn decode(&mut self, buffer: &mut DecodeBuf<'_>) -> Result<Option<T>, Status> {
        let message = T::Message::decode(buffer)
            .map_err(|error| Status::internal(format!("not the expected message: {error}")))?;
        Ok(Some(T::from_message(message)))
    }
}
