//! What may happen in a world, out of plain numbers.

use std::collections::VecDeque;

use crate::budget::PromptAllowance;
use crate::ids::{BlockSize, Blocks, TokenId, Tokens};
use crate::limits::Limits;
use crate::request::{RequestSpec, Sampling};
use crate::testing::symbolic::extend;

/// Entries of a world's vocabulary.
pub(super) const VOCAB: u32 = 97;
/// Its ending id.
pub(super) const END: TokenId = TokenId(5);

/// Where decisions come from.
#[derive(Debug)]
pub struct Choices {
    values: VecDeque<u32>,
    state: u64,
}

// === impl Choices ===

impl Choices {
    /// Random and endless.
    #[must_use]
    pub fn random(seed: u64) -> Self {
        Self {
            values: VecDeque::new(),
            state: extend(seed, TokenId(1)) | 1,
        }
    }

    /// These, then zeros: so a shorter list of smaller numbers is a simpler world.
    #[must_use]
    pub fn listed(values: Vec<u32>) -> Self {
        Self {
            values: values.into(),
            state: 0,
        }
    }

    /// A number below `bound`.
    pub fn below(&mut self, bound: u32) -> u32 {
        let value = if self.state == 0 {
            self.values.pop_front().unwrap_or(0)
        } else {
            self.state ^= self.state << 13;
            self.state ^= self.state >> 7;
            self.state ^= self.state << 17;
            u32::try_from(self.state >> 33).expect("31 bits fit")
        };
        value % bound
    }

    pub(super) fn between(&mut self, low: u32, high: u32) -> u32 {
        low + self.below(high - low + 1)
    }

    pub(super) fn one_in(&mut self, n: u32) -> bool {
        self.below(n) == n - 1
    }
}

/// Limits small enough for everything to happen.
#[must_use]
pub fn limits(choices: &mut Choices) -> Limits {
    let block = choices.between(1, 5);
    let blocks = choices.between(3, 28);
    let running_max = choices.between(1, 8);
    let depth = choices.between(1, 3);
    let step_tokens = choices.between(1, 40);
    Limits {
        block_size: BlockSize::new(block).expect("not zero"),
        blocks: Blocks(blocks),
        slots: running_max + choices.below(3 * running_max),
        state_slots: choices.below(3),
        running_max,
        step_tokens_max: Tokens(step_tokens),
        prefill_tokens_max: Tokens(step_tokens - choices.below(step_tokens)),
        prompt_logprob_tokens_max: Tokens(choices.between(1, step_tokens)),
        context_tokens_max: Tokens(choices.between(40, 80)),
        vocab_size: VOCAB,
        queue_max: 64,
        depth,
        watermark: Blocks(choices.below(3)),
        share_within_step: !choices.one_in(3),
        prefix_caching: !choices.one_in(6),
    }
}

/// What prompt tokens may cost, which may be too little for any.
pub(super) fn allowance(choices: &mut Choices) -> PromptAllowance {
    if choices.one_in(3) {
        return PromptAllowance::UNLIMITED;
    }
    PromptAllowance {
        cost_max: f64::from(choices.below(100)),
        per_token: f64::from(choices.below(12)),
        per_pair: f64::from(choices.below(3)) / 4.0,
        tokens_max: Tokens(choices.between(1, 20)),
        tokens_min: Tokens(choices.below(6)),
    }
}

/// A request that may share a prefix with others.
#[must_use]
pub fn request(choices: &mut Choices) -> RequestSpec {
    let family = choices.below(3);
    let shared = choices.below(24);
    let own = choices.between(1, 12);
    let mut prompt: Vec<TokenId> = (0..shared)
        .map(|i| TokenId((family * 31 + i) % VOCAB))
        .collect();
    let salt = choices.below(4);
    prompt.extend((0..own).map(|i| TokenId((family + salt * 17 + i * 3) % VOCAB)));
    RequestSpec {
        prompt,
        sampling: Sampling {
            temperature: if choices.one_in(3) { 1.0 } else { 0.0 },
            seed: u64::from(choices.below(2)),
            repetition_penalty: if choices.one_in(6) { 1.5 } else { 1.0 },
            top_n: choices.below(3),
            ..Sampling::default()
        },
        ending: if choices.one_in(4) {
            Vec::new()
        } else {
            vec![END]
        },
        tokens_max: Some(Tokens(choices.between(1, 20))),
        prompt_logprobs: choices.one_in(7),
        masked: choices.one_in(3),
        trace: choices.one_in(5).then_some([7; 25]),
    }
}
