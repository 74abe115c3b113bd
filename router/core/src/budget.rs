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

#[cfg(test)]
mod tests {
    use super::*;

    fn budget(tokens: u32, prefill: u32) -> StepBudget {
        let block_size = BlockSize::new(4).expect("not zero");
        StepBudget {
            tokens,
            prefill,
            block_size,
            chunked: false,
        }
    }

    #[test]
    fn a_chunk_that_is_not_the_last_ends_with_a_block() {
        let mut budget = budget(100, 11);
        assert_eq!(budget.chunk(Tokens(4), Tokens(40)), 8);
        // Less than a block is left, and a row for that is not worth it.
        assert_eq!(budget.chunk(Tokens(4), Tokens(40)), 0);
        // Unless it is all that the prompt needs.
        assert_eq!(budget.chunk(Tokens(4), Tokens(7)), 3);
        assert!(!budget.has_prefill());
    }

    #[test]
    fn a_budget_smaller_than_a_block_still_moves_on() {
        assert_eq!(budget(3, 9).chunk(Tokens(4), Tokens(40)), 3);
        assert_eq!(budget(9, 3).chunk(Tokens(5), Tokens(40)), 3);
    }

    #[test]
    fn decode_tokens_do_not_count_as_prompt_tokens() {
        let mut budget = budget(2, 8);
        assert!(budget.decode() && budget.decode() && !budget.decode());
        assert!(!budget.has_prefill());
    }
}
