//! What a shard is and how it is prepared, as plain values.

use bytes::{Buf, Bytes};
use headrace_core::ids::StepId;
use prost::Message;

use crate::codec::Plain;
use crate::{WireError, pb};

/// Asks a shard what it is.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct DescribeRequest;

/// What a shard says about itself.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Describe {
    /// As in the checkpoint's `config.json`.
    pub architecture: String,
    /// `cpu`, or the accelerator's name.
    pub device: String,
    /// The precision of weights and activations.
    pub dtype: String,
    /// This shard's place in the group.
    pub rank: u32,
    /// Shards in the group.
    pub ranks: u32,
    /// Positions the model was made for.
    pub context_tokens_max: u32,
    /// Entries of the vocabulary.
    pub vocab_size: u32,
    /// Bytes of KV cache that one token takes on this rank.
    pub kv_bytes_per_token: u64,
    /// Block sizes the attention can work with, best first.
    pub block_tokens_supported: Vec<u32>,
    /// Whether the attention kernel writes KV itself (R5).
    pub kv_written_in_attention: bool,
}

/// What a shard is asked to get ready for.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Prepare {
    /// The number of the first plan.
    pub first_step: StepId,
    /// Tokens in a block.
    pub block_tokens: u32,
    /// Running sequences and what quarantine holds.
    pub slots_max: u32,
    /// Side-pool entries for vocabulary-sized sampling state.
    pub state_slots_max: u32,
    /// Query tokens in one step.
    pub step_tokens_max: u32,
    /// Rows in one step.
    pub step_rows_max: u32,
    /// Prompt tokens in one step whose log-probabilities are told.
    pub prompt_logprob_tokens_max: u32,
    /// Empty for the model's dtype.
    pub kv_dtype: String,
    /// Of the device's free memory; 0 for the device's default.
    pub memory_fraction: f32,
    /// 0 for as many as fit.
    pub blocks_max: u32,
}

/// What a prepared shard has.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Prepared {
    /// Blocks of the pool, scrap block 0 included; the minimum over ranks.
    pub blocks: u32,
    /// The memory plan: what, and how many bytes.
    pub memory: Vec<(String, u64)>,
}

/// For the record of a run.
pub fn encode_describe(describe: &Describe) -> Bytes {
    describe.clone().into_message().encode_to_vec().into()
}

/// For the record of a run.
pub fn encode_prepare(prepare: &Prepare) -> Bytes {
    prepare.clone().into_message().encode_to_vec().into()
}

/// Reads what [`encode_prepare`] wrote.
pub fn decode_prepare(message: impl Buf) -> Result<Prepare, WireError> {
    Ok(Prepare::from_message(pb::PrepareRequest::decode(message)?))
}

// === conversions ===

impl Plain for DescribeRequest {
    type Message = pb::DescribeRequest;

    fn into_message(self) -> Self::Message {
        pb::DescribeRequest {}
    }

    fn from_message(_: Self::Message) -> Self {
        Self
    }
}

impl Plain for Describe {
    type Message = pb::DescribeReply;

    fn into_message(self) -> Self::Message {
        pb::DescribeReply {
            architecture: self.architecture,
            device: self.device,
            dtype: self.dtype,
            rank: self.rank,
            ranks: self.ranks,
            context_tokens_max: self.context_tokens_max,
            vocab_size: self.vocab_size,
            kv_bytes_per_token: self.kv_bytes_per_token,
            block_tokens_supported: self.block_tokens_supported,
            kv_written_in_attention: self.kv_written_in_attention,
        }
    }

    fn from_message(message: Self::Message) -> Self {
        Self {
            architecture: message.architecture,
            device: message.device,
            dtype: message.dtype,
            rank: message.rank,
            ranks: message.ranks,
            context_tokens_max: message.context_tokens_max,
            vocab_size: message.vocab_size,
            kv_bytes_per_token: message.kv_bytes_per_token,
            block_tokens_supported: message.block_tokens_supported,
            kv_written_in_attention: message.kv_written_in_attention,
        }
    }
}

impl Plain for Prepare {
    type Message = pb::PrepareRequest;

    fn into_message(self) -> Self::Message {
        pb::PrepareRequest {
            first_step: self.first_step.0,
            block_tokens: self.block_tokens,
            slots_max: self.slots_max,
            state_slots_max: self.state_slots_max,
            step_tokens_max: self.step_tokens_max,
            step_rows_max: self.step_rows_max,
            prompt_logprob_tokens_max: self.prompt_logprob_tokens_max,
            kv_dtype: self.kv_dtype,
            memory_fraction: self.memory_fraction,
            blocks_max: self.blocks_max,
        }
    }

    fn from_message(message: Self::Message) -> Self {
        Self {
            first_step: StepId(message.first_step),
            block_tokens: message.block_tokens,
            slots_max: message.slots_max,
            state_slots_max: message.state_slots_max,
            step_tokens_max: message.step_tokens_max,
            step_rows_max: message.step_rows_max,
            prompt_logprob_tokens_max: message.prompt_logprob_tokens_max,
            kv_dtype: message.kv_dtype,
            memory_fraction: message.memory_fraction,
            blocks_max: message.blocks_max,
        }
    }
}

impl Plain for Prepared {
    type Message = pb::PrepareReply;

    fn into_message(self) -> Self::Message {
        let item = |(what, bytes)| pb::MemoryItem { what, bytes };
        pb::PrepareReply {
            blocks: self.blocks,
            memory: self.memory.into_iter().map(item).collect(),
        }
    }

    fn from_message(message: Self::Message) -> Self {
        let item = |item: pb::MemoryItem| (item.what, item.bytes);
        Self {
            blocks: message.blocks,
            memory: message.memory.into_iter().map(item).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn round_trip<T: Plain + Clone>(value: &T) -> T {
        let message = value.clone().into_message().encode_to_vec();
        T::from_message(T::Message::decode(&message[..]).expect("what was just encoded"))
    }

    #[test]
    fn plain_values_survive_the_wire() {
        let describe = Describe {
            architecture: "LlamaForCausalLM".into(),
            device: "cpu".into(),
            dtype: "bfloat16".into(),
            rank: 1,
            ranks: 2,
            context_tokens_max: 8192,
            vocab_size: 49152,
            kv_bytes_per_token: 23040,
            block_tokens_supported: vec![16, 32],
            kv_written_in_attention: true,
        };
        assert_eq!(round_trip(&describe), describe);
        let prepare = Prepare {
            first_step: StepId(3),
            block_tokens: 16,
            slots_max: 512,
            state_slots_max: 128,
            step_tokens_max: 4096,
            step_rows_max: 256,
            prompt_logprob_tokens_max: 512,
            kv_dtype: "bfloat16".into(),
            memory_fraction: 0.5,
            blocks_max: 100,
        };
        assert_eq!(round_trip(&prepare), prepare);
        assert_eq!(decode_prepare(encode_prepare(&prepare)), Ok(prepare));
        let prepared = Prepared {
            blocks: 100,
            memory: vec![("KV pool".into(), 1 << 30)],
        };
        assert_eq!(round_trip(&prepared), prepared);
    }
}
