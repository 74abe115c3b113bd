//! What is left of one step: query tokens, and how many of them may be prompt tokens.

use crate::ids::{BlockSize, Tokens};
use crate::limits::Limits;
use crate::mutation::{Mutation, Seeded};

/// The tokens left in the step that is being planned.
#[derive(Debug)]
pub(crate) struct StepBudget {
    tokens: u32,
    prefill: u32,
    block_size: BlockSize,
    chunked: bool,
}

// === impl StepBudget ===

impl StepBudget {
    pub(crate) fn new(limits: &Limits, seeded: Seeded) -> Self {
        Self {
            tokens: limits.step_tokens_max.0 + u32::from(seeded.is(Mutation::BudgetIgnored)),
            prefill: limits.prefill_tokens_max.0,
            block_size: limits.block_size,
            chunked: false,
        }
    }

    /// Takes one decode token; `false` when none is left.
    pub(crate) fn decode(&mut self) -> bool {
        let left = self.tokens > 0;
        self.tokens -= u32::from(left);
        left
    }

    /// Whether a prompt chunk could still be taken.
    pub(crate) fn has_prefill(&self) -> bool {
        self.tokens.min(self.prefill) > 0
    }

    /// Takes a chunk of the tokens `start..end` and gives its length, 0 for none.
    ///
    /// A chunk that does not reach `end` stops at a block boundary when it can, because only whole
    /// blocks are shared and only a sequence without a private block may match again (R5); and less
    /// than a block is taken only for the first chunk of a step.
    pub(crate) fn chunk(&mut self, start: Tokens, end: Tokens) -> u32 {
        let room = self.tokens.min(self.prefill);
        let wanted = end.0 - start.0;
        let mut len = wanted.min(room);
        if len < wanted {
            let aligned = self
                .block_size
                .span(self.block_size.floor(Tokens(start.0 + len)))
                .0;
            if aligned > start.0 {
                len = aligned - start.0;
            } else if self.chunked {
                len = 0;
            }
        }
        self.chunked |= len > 0;
        self.tokens -= len;
        self.prefill -= len;
        len
    }
}
