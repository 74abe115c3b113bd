//! What the "model" says: a pure function, shared by the referee and the oracle.

use crate::event::{FinishReason, PromptToken};
use crate::ids::{TokenId, Tokens};
use crate::request::{RequestSpec, Sampling};

/// The hash of no tokens.
pub(super) const EMPTY: u64 = 0x9E37_79B9_7F4A_7C15;

/// The hash of a prefix that is one token longer.
#[must_use]
pub fn extend(hash: u64, token: TokenId) -> u64 {
    mix(hash.rotate_left(23) ^ u64::from(token.0).wrapping_mul(0xD6E8_FEB8_6659_FD93))
}

/// What the "model" says after a prefix. A pure function, shared by the referee and the oracle.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Model {
    /// Ids are below this.
    pub vocab_size: u32,
    /// When set: that token, and one draw in how many is it.
    pub end_of_text: Option<(TokenId, u32)>,
}

// === impl Model ===

impl Model {
    /// No end of text.
    #[must_use]
    pub fn new(vocab_size: u32) -> Self {
        Self {
            vocab_size,
            end_of_text: None,
        }
    }

    /// Draws `token` once in `one_in` draws.
    #[must_use]
    pub fn with_end_of_text(self, token: TokenId, one_in: u32) -> Self {
        Self {
            end_of_text: Some((token, one_in)),
            ..self
        }
    }

    /// The token after a prefix: greedy depends on the prefix alone, else on the seed too.
    #[must_use]
    pub fn draw(&self, prefix: u64, sampling: &Sampling) -> TokenId {
        let seed = if sampling.temperature == 0.0 {
            0
        } else {
            sampling.seed.wrapping_add(1)
        };
        let bits = mix(prefix ^ seed.wrapping_mul(0x2545_F491_4F6C_DD1D));
        match self.end_of_text {
            Some((token, one_in)) if (bits >> 32).is_multiple_of(u64::from(one_in)) => token,
            Some(_) | None => TokenId(below(bits, self.vocab_size)),
        }
    }

    /// The log-probability of the token that a prefix ends with.
    #[must_use]
    pub fn logprob(&self, prefix: u64) -> f32 {
        -(below(mix(!prefix), 1024) as f32) / 64.0
    }

    /// What a request generates, computed without cache, batch or schedule: the oracle.
    #[must_use]
    pub fn generate(&self, spec: &RequestSpec, tokens_max: Tokens) -> (Vec<TokenId>, FinishReason) {
        let mut prefix = spec
            .prompt
            .iter()
            .fold(EMPTY, |hash, &token| extend(hash, token));
        let mut tokens = Vec::new();
        loop {
            let token = self.draw(prefix, &spec.sampling);
            tokens.push(token);
            if tokens.len() == tokens_max.0 as usize {
                return (tokens, FinishReason::Length);
            }
            if spec.ending.contains(&token) {
                return (tokens, FinishReason::EndOfText);
            }
            prefix = extend(prefix, token);
        }
    }

    /// What is told of a prompt's first token.
    pub const FIRST: PromptToken = PromptToken {
        logprob: f32::NAN,
        best: TokenId(0),
        best_logprob: f32::NAN,
    };

    /// What is told of a prompt's token at the end of a prefix.
    #[must_use]
    pub fn prompt_token(&self, prefix: u64) -> PromptToken {
        PromptToken {
            logprob: self.logprob(prefix),
            best: TokenId(u32::try_from(prefix % 1000).unwrap_or_default()),
            best_logprob: self.logprob(prefix) / 2.0,
        }
    }

    /// What is told of a prompt's tokens.
    #[must_use]
    pub fn prompt_logprobs(&self, prompt: &[TokenId]) -> Vec<PromptToken> {
        let mut prefix = EMPTY;
        let mut logprobs = Vec::with_capacity(prompt.len());
        for &token in prompt {
            prefix = extend(prefix, token);
            logprobs.push(if logprobs.is_empty() {
                Self::FIRST
            } else {
                self.prompt_token(prefix)
            });
        }
        logprobs
    }
}

/// A good 64-bit mix (the finalizer of splitmix64).
pub(super) fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ (x >> 31)
}

fn below(bits: u64, bound: u32) -> u32 {
    u32::try_from(bits % u64::from(bound)).expect("smaller than the bound")
}
