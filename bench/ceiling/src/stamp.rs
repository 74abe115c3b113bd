//! Tokens that say when they were drawn. An id above the bytes is a time of day in ticks, modulo
//! the words of the vocabulary: it wraps after a second, far beyond any latency of interest.

use std::time::{SystemTime, UNIX_EPOCH};

/// The ending token and the bytes come first.
pub(crate) const FIRST_WORD: u32 = 257;
/// Words of the vocabulary.
pub(crate) const WORDS: u32 = 1 << 16;
/// All entries.
pub(crate) const VOCAB: u32 = FIRST_WORD + WORDS;

const TICK_US: u64 = 16;

/// Ticks since the epoch.
fn ticks() -> u64 {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    (u64::from(now.subsec_micros()) + now.as_secs() * 1_000_000) / TICK_US
}

/// The token of this moment.
pub(crate) fn token_now() -> u32 {
    let word = ticks() % u64::from(WORDS);
    FIRST_WORD + u32::try_from(word).expect("a remainder is smaller than its divisor")
}

/// Microseconds since a token was drawn.
pub(crate) fn age_us(token: u32) -> u32 {
    let words = u64::from(WORDS);
    let drawn = u64::from(token.saturating_sub(FIRST_WORD));
    let age = (ticks() % words + words - drawn % words) % words * TICK_US;
    u32::try_from(age).expect("it is below the wrap of a second")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fresh_token_is_young() {
        assert!(age_us(token_now()) < 100_000);
        let earlier = FIRST_WORD + (token_now() - FIRST_WORD + WORDS - 1000) % WORDS;
        let age = age_us(earlier);
        assert!((16_000..116_000).contains(&age), "{age}");
    }
}
