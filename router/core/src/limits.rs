//! What the shard group can do. Learnt once, when the group is prepared.

use crate::ids::{BlockSize, Blocks, Tokens};

/// The group's capacities and the scheduler's bounds. Set once; every admission and every plan
/// is measured against it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// Tokens in a block.
    pub block_size: BlockSize,
    /// Blocks of the pool, scrap block 0 included.
    pub blocks: Blocks,
    /// Slots on the shards: `running_max` and what quarantine can hold at this depth.
    pub slots: u32,
    /// Entries of the side pool for vocabulary-sized sampling state.
    pub state_slots: u32,
    /// Sequences that hold a slot at one time.
    pub running_max: u32,
    /// Query tokens in one step.
    pub step_tokens_max: Tokens,
    /// Prompt tokens in one step; at most `step_tokens_max`.
    pub prefill_tokens_max: Tokens,
    /// Prompt tokens in one step whose log-probabilities are told, at least one: their logits are
    /// kept for as long as the step runs.
    pub prompt_logprob_tokens_max: Tokens,
    /// Positions the model was made for.
    pub context_tokens_max: Tokens,
    /// Entries of the vocabulary; a prompt id or a result beyond it is refused.
    pub vocab_size: u32,
    /// Sequences that may wait.
    pub queue_max: usize,
    /// Plans in flight, 1 to 3.
    pub depth: u32,
    /// Blocks kept free for the growth of running sequences when a prompt is admitted.
    pub watermark: Blocks,
    /// Whether two rows of one step may share a block that one of them writes (R5).
    pub share_within_step: bool,
    /// Whether finished prefixes are kept for later requests.
    pub prefix_caching: bool,
}

impl Limits {
    /// The watermark unless told: 5 % of the blocks.
    pub fn default_watermark(blocks: Blocks) -> Blocks {
        Blocks(blocks.0.div_ceil(20))
    }

    /// Blocks a sequence can own: all but scrap.
    pub fn blocks_usable(&self) -> Blocks {
        Blocks(self.blocks.0.saturating_sub(1))
    }

    /// Prompt and new tokens that one sequence can finish with in an empty pool.
    pub fn sequence_tokens_max(&self) -> Tokens {
        let pool = self.block_size.span(self.blocks_usable());
        Tokens(self.context_tokens_max.0.min(pool.0))
    }
}
