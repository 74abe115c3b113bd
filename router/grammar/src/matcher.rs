//! A text as far as it has come, and what may come next.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Why a matcher cannot go on.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the grammar cannot be followed any further: {0}")]
pub struct MatchError(pub String);

/// The tokens that may come next, a bit each: of word `i`, bit `j` is token `32 i + j`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenMask(pub Arc<[u32]>);

/// One text. Cloning one that has seen no token is cheap: clones share what is known of the grammar.
#[derive(Clone)]
pub struct Matcher {
    inner: llguidance::Matcher,
    vocabulary: crate::Vocabulary,
    /// Told to the cache when the matcher fails: what clones share may be broken then.
    spoilt: Arc<AtomicBool>,
    /// The mask before any token.
    first: TokenMask,
    /// Tokens before which the text does not end where it need not.
    tokens_min: u32,
    accepted: u32,
}

// === impl TokenMask ===

impl TokenMask {
    /// Whether a token may come next.
    pub fn allows(&self, token: u32) -> bool {
        let word = self.0.get(token as usize / 32).copied().unwrap_or(0);
        word >> (token % 32) & 1 == 1
    }

    /// Tokens that may come next.
    pub fn count(&self) -> u32 {
        self.0.iter().map(|word| word.count_ones()).sum()
    }
}

// === impl Matcher ===

impl Matcher {
    /// Computes the first mask, so that a grammar that allows nothing is known.
    pub(crate) fn new(
        inner: llguidance::Matcher,
        vocabulary: crate::Vocabulary,
        spoilt: Arc<AtomicBool>,
    ) -> Result<Self, MatchError> {
        let mut fresh = Self {
            inner,
            vocabulary,
            spoilt,
            first: TokenMask([].into()),
            tokens_min: 0,
            accepted: 0,
        };
        fresh.first = fresh.mask()?;
        Ok(fresh)
    }

    /// The same, with an end before so many tokens only where nothing else may come.
    #[must_use]
    pub fn with_tokens_min(self, tokens_min: u32) -> Self {
        let mut made = Self { tokens_min, ..self };
        made.first = made.not_ended(&made.first.0);
        made
    }

    /// The mask before any token; computed when the grammar was compiled.
    pub fn first_mask(&self) -> TokenMask {
        self.first.clone()
    }

    /// Tokens seen.
    pub fn accepted(&self) -> u32 {
        self.accepted
    }

    /// Takes the next token of the text, one that the last mask allowed. After the end of the text
    /// nothing more is looked at.
    pub fn accept(&mut self, token: u32) -> Result<(), MatchError> {
        self.accepted += 1;
        if self.inner.is_stopped() && !self.inner.is_error() {
            return Ok(());
        }
        let outcome = self.inner.consume_token(token);
        outcome.map_err(|error| self.failed(&error.to_string()))
    }

    /// What may come next: an ending token alone, where the text is complete and cannot go on.
    pub fn mask(&mut self) -> Result<TokenMask, MatchError> {
        let mask = self.inner.compute_mask_or_eos();
        let mask = mask.map_err(|error| self.failed(&error.to_string()))?;
        let words = self.vocabulary.size.div_ceil(32) as usize;
        Ok(self.not_ended(&mask.as_slice()[..words]))
    }

    /// A mask without ending tokens, while the text is to go on and can.
    fn not_ended(&self, mask: &[u32]) -> TokenMask {
        if self.accepted >= self.tokens_min {
            return TokenMask(mask.into());
        }
        let mut without = mask.to_vec();
        for id in self.vocabulary.ending.iter() {
            without[*id as usize / 32] &= !(1 << (id % 32));
        }
        let can = without.iter().any(|word| *word != 0);
        TokenMask(if can { without.into() } else { mask.into() })
    }

    fn failed(&self, message: &str) -> MatchError {
        self.spoilt.store(true, Ordering::Relaxed);
        MatchError(reason(message))
    }
}

impl fmt::Debug for Matcher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Matcher")
            .field("accepted", &self.accepted)
            .field("tokens_min", &self.tokens_min)
            .finish_non_exhaustive()
    }
}

/// What llguidance calls a grammar, or a place in one, that nothing follows.
const NO_TEXT: &str = "NoExtensionBias";

/// What llguidance says, without its own state: the first line, and what a list of causes ends with.
pub(crate) fn reason(message: &str) -> String {
    let mut lines = message
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty());
    let first = lines.next().unwrap_or("no reason was given");
    if first == NO_TEXT {
        return "the grammar allows no text".to_owned();
    }
    match lines.rfind(|line| line.starts_with("error:")) {
        Some(last) if first.ends_with(':') => format!("{first} {last}"),
        _ => first.trim_end_matches(':').to_owned(),
    }
}
