//! The contract with the shards, and the only Rust that knows protobuf: plans, results and masks to
//! bytes and back ([`plan`], [`result`], [`mask`]), what a shard is and how it is prepared ([`describe`]), and the
//! tonic service that carries them ([`codec`]).

mod codec;
mod column;
mod describe;
mod error;
mod mask;
mod plan;
mod result;
#[expect(
    unreachable_pub,
    clippy::pedantic,
    clippy::allow_attributes,
    clippy::default_constructed_unit_structs,
    reason = "generated code, public wherever it is included"
)]
mod service;

pub use describe::{
    Describe, DescribeRequest, Prepare, Prepared, decode_prepare, encode_describe, encode_prepare,
};
pub use error::WireError;
pub use mask::{StepMask, decode_mask, encode_mask};
pub use plan::{decode_plan, encode_plan};
pub use result::{decode_result, encode_result};
pub use service::{Shard, ShardClient, ShardServer};

/// The descriptor set of `shard.proto`, as written for the Python side.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/shard.binpb"));

#[expect(
    unreachable_pub,
    clippy::large_enum_variant,
    reason = "generated code, public wherever it is included"
)]
mod pb {
    include!(concat!(env!("OUT_DIR"), "/headrace.v1.rs"));
}
