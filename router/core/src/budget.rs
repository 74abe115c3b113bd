//! What is left of one step: query tokens, how many of them may be prompt tokens, and what those
//! may cost.

use crate::ids::{BlockSize, Tokens};
use crate::limits::Limits;
use crate::mutation::{Mutation, Seeded};

/// What the prompt tokens of one step may cost, within the limits of tokens. The unit of cost is
/// the caller's: nothing is known of it here but that it adds up.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PromptAllowance {
    /// All prompt tokens of the step together; infinite for no bound.
    pub cost_max: f64,
    /// One token, wherever it stands.
    pub per_token: f64,
    /// One token and one token before it, which it attends to.
    pub per_pair: f64,
    /// Tokens at most, whatever they cost.
    pub tokens_max: Tokens,
    /// Tokens that are allowed whatever they cost, so that prompts end; at least one is.
    pub tokens_min: Tokens,
}

// === impl PromptAllowance ===

impl PromptAllowance {
    /// As much as the limits allow.
    pub const UNLIMITED: Self = Self {
        cost_max: f64::INFINITY,
        per_token: 0.0,
        per_pair: 0.0,
        tokens_max: Tokens(u32::MAX),
        tokens_min: Tokens(1),
    };

    /// What `len` tokens from position `start` on cost.
    pub fn cost(&self, start: Tokens, len: Tokens) -> f64 {
        let (start, len) = (f64::from(start.0), f64::from(len.0));
        len * (self.per_token + self.per_pair * (start + len / 2.0))
    }

    /// Tokens from position `start` on that `cost` is enough for.
    fn affordable(&self, start: Tokens, cost: f64) -> u32 {
        if cost.is_infinite() {
            return u32::MAX;
        }
        // `len` solves cost(start, len) = cost, in the form that subtracts nothing.
        let slope = self.per_token + self.per_pair * f64::from(start.0);
        let root = (slope * slope + 2.0 * self.per_pair * cost).sqrt();
        let len = 2.0 * cost / (slope + root);
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "whole tokens are meant, and what is no number becomes 0"
        )]
        let len = len as u32;
        len
    }
}

/// The tokens left in the step that is being planned.
#[derive(Debug)]
pub(crate) struct StepBudget {
    tokens: u32,
    prefill: u32,
    /// Of those, what is left for prompts whose log-probabilities are told.
    told: u32,
    block_size: BlockSize,
    chunked: bool,
    allowance: PromptAllowance,
    /// What is left of the allowance's cost,
    cost: f64,
    /// and of the tokens that are allowed at any cost.
    granted: u32,
}

// === impl StepBudget ===

impl StepBudget {
    pub(crate) fn new(limits: &Limits, allowance: &PromptAllowance, seeded: Seeded) -> Self {
        let granted = allowance.tokens_min.0.max(1);
        Self {
            tokens: limits.step_tokens_max.0 + u32::from(seeded.is(Mutation::BudgetIgnored)),
            prefill: limits
                .prefill_tokens_max
                .0
                .min(allowance.tokens_max.0.max(granted)),
            told: if seeded.is(Mutation::ToldIgnored) {
                u32::MAX
            } else {
                limits.prompt_logprob_tokens_max.0
            },
            block_size: limits.block_size,
            chunked: false,
            allowance: *allowance,
            cost: allowance.cost_max,
            granted,
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
        self.tokens.min(self.prefill) > 0 && (self.cost > 0.0 || self.granted > 0)
    }

    /// Takes a chunk of the tokens `start..end` and gives its length, 0 for none.
    /// `told`: whether their log-probabilities are told.
    ///
    /// A chunk that does not reach `end` stops at a block boundary when it can, because only whole
    /// blocks are shared and only a sequence without a private block may match again (R5); and less
    /// than a block is taken only for the first chunk of a step.
    pub(crate) fn chunk(&mut self, start: Tokens, end: Tokens, told: bool) -> u32 {
        let affordable = self.allowance.affordable(start, self.cost);
        let room = self
            .tokens
            .min(self.prefill)
            .min(affordable.max(self.granted))
            .min(if told { self.told } else { u32::MAX });
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
        self.told -= if told { len } else { 0 };
        self.granted = self.granted.saturating_sub(len);
        self.cost = (self.cost - self.allowance.cost(start, Tokens(len))).max(0.0);
        len
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn budget(tokens: u32, prefill: u32) -> StepBudget {
        let allowance = PromptAllowance::UNLIMITED;
        StepBudget {
            tokens,
            prefill,
            told: 20,
            block_size: BlockSize::new(4).expect("not zero"),
            chunked: false,
            allowance,
            cost: allowance.cost_max,
            granted: 1,
        }
    }

    fn allowed(cost_max: f64, per_pair: f64, tokens_min: u32) -> StepBudget {
        let allowance = PromptAllowance {
            cost_max,
            per_token: 2.0,
            per_pair,
            tokens_max: Tokens(500),
            tokens_min: Tokens(tokens_min),
        };
        StepBudget {
            allowance,
            cost: cost_max,
            granted: tokens_min.max(1),
            ..budget(1000, 500)
        }
    }

    #[test]
    fn a_chunk_that_is_not_the_last_ends_with_a_block() {
        let mut budget = budget(100, 11);
        assert_eq!(budget.chunk(Tokens(4), Tokens(40), false), 8);
        // Less than a block is left, and a row for that is not worth it.
        assert_eq!(budget.chunk(Tokens(4), Tokens(40), false), 0);
        // Unless it is all that the prompt needs.
        assert_eq!(budget.chunk(Tokens(4), Tokens(7), false), 3);
        assert!(!budget.has_prefill());
    }

    #[test]
    fn fewer_tokens_are_told_than_computed() {
        let mut budget = budget(100, 60);
        assert_eq!(budget.chunk(Tokens(0), Tokens(14), true), 14);
        // Six are left to be told, and a chunk that is not the last ends with a block.
        assert_eq!(budget.chunk(Tokens(0), Tokens(30), true), 4);
        assert_eq!(budget.chunk(Tokens(8), Tokens(10), true), 2);
        assert_eq!(budget.chunk(Tokens(0), Tokens(1), true), 0);
        assert!(budget.has_prefill());
        assert_eq!(budget.chunk(Tokens(0), Tokens(40), false), 40);
    }

    #[test]
    fn a_budget_smaller_than_a_block_still_moves_on() {
        assert_eq!(budget(3, 9).chunk(Tokens(4), Tokens(40), false), 3);
        assert_eq!(budget(9, 3).chunk(Tokens(5), Tokens(40), false), 3);
    }

    #[test]
    fn decode_tokens_do_not_count_as_prompt_tokens() {
        let mut budget = budget(2, 8);
        assert!(budget.decode() && budget.decode() && !budget.decode());
        assert!(!budget.has_prefill());
    }

    #[test]
    fn chunks_cost_no_more_than_they_may() {
        let mut budget = allowed(100.0, 0.0, 0);
        assert_eq!(budget.chunk(Tokens(0), Tokens(30), false), 30);
        // Twenty are paid for, and they end with a block.
        assert_eq!(budget.chunk(Tokens(0), Tokens(90), false), 20);
        assert!(!budget.has_prefill());
        assert_eq!(budget.chunk(Tokens(0), Tokens(90), false), 0);
    }

    #[test]
    fn a_token_costs_more_the_later_it_stands() {
        for start in [0, 400, 4000] {
            let mut budget = allowed(1000.0, 0.01, 0);
            let len = budget.chunk(Tokens(start), Tokens(9000), false);
            let [cost, more] =
                [len, len + 4].map(|len| budget.allowance.cost(Tokens(start), Tokens(len)));
            assert!(
                cost <= 1000.0 && more > 1000.0,
                "{len} at {start}: {cost}, {more}"
            );
        }
    }

    #[test]
    fn some_tokens_are_allowed_at_any_cost() {
        let mut budget = allowed(3.0, 1.0, 40);
        assert_eq!(budget.chunk(Tokens(100), Tokens(116), false), 16);
        assert_eq!(budget.chunk(Tokens(100), Tokens(900), false), 24);
        assert!(!budget.has_prefill());
        assert_eq!(
            allowed(0.0, 0.0, 0).chunk(Tokens(8), Tokens(90), false),
            1,
            "never none"
        );
    }

    #[test]
    fn what_costs_nothing_or_is_no_number_stays_within_the_limits() {
        for (cost_max, per_token) in [(0.0, 0.0), (5.0, 0.0), (f64::NAN, 1.0), (1.0, f64::NAN)] {
            let mut budget = allowed(cost_max, 0.0, 8);
            budget.allowance.per_token = per_token;
            let len = budget.chunk(Tokens(0), Tokens(9000), false);
            assert!((8..=500).contains(&len), "{cost_max} {per_token}: {len}");
        }
    }
}
