//! The generated client and server of the `Shard` service.

include!(concat!(env!("OUT_DIR"), "/headrace.v1.Shard.rs"));

pub use shard_client::ShardClient;
pub use shard_server::{Shard, ShardServer};
