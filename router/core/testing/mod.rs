//! What tests of this and of other crates run a scheduler against.
//!
//! [`symbolic`] is a shard made of hashes; [`world`] drives a scheduler against it through random
//! operations; [`script`] through written ones.

pub mod script;
pub mod symbolic;
pub mod world;
