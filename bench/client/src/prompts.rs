//! Random prompts of exact lengths, the same for every server that is given the same seed.

use std::path::Path;

use headrace_text::Tokenizer;
use serde_json::Value;

/// Ids below are often special tokens, and beyond, past the end of small vocabularies.
const IDS: std::ops::Range<u32> = 100..100_000;
/// Texts that are tried until one has the length that is wanted.
const TRIES: usize = 50;
/// Words are drawn from so many ids at most; enough that no two prompts begin alike.
const WORDS_MAX: usize = 20_000;

/// The generator `SplitMix64` (Steele, Lea, Flood: Fast splittable pseudorandom number generators,
/// 2014): any seed is good.
#[derive(Debug, Clone)]
pub(crate) struct Random(u64);

/// Makes prompts as a body wants them.
#[derive(Debug)]
pub(crate) enum Prompts {
    /// Arrays of ids.
    Ids { vocab: u32, random: Random },
    /// Texts that a tokenizer makes exactly so many tokens of, its own special tokens counted.
    Texts {
        tokenizer: Box<Tokenizer>,
        words: Vec<String>,
        random: Random,
    },
}

// === impl Random ===

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// At least 0 and below `end`, which is not 0.
    pub(crate) fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    /// A place in a list of so many, which are not none.
    pub(crate) fn index(&mut self, len: usize) -> usize {
        usize::try_from(self.below(len as u64)).unwrap_or(0)
    }

    /// Above 0 and at most 1.
    pub(crate) fn unit(&mut self) -> f64 {
        ((self.next() >> 11) + 1) as f64 / (1_u64 << 53) as f64
    }

    /// So many ids of a vocabulary.
    pub(crate) fn ids(&mut self, count: usize, vocab: u32) -> Vec<u32> {
        let end = IDS.end.min(vocab).max(1);
        let start = if end > 2 * IDS.start { IDS.start } else { 0 };
        let mut id = || {
            let id = u64::from(start) + self.below(u64::from(end - start));
            u32::try_from(id).unwrap_or(start)
        };
        (0..count).map(|_| id()).collect()
    }
}

// === impl Prompts ===

impl Prompts {
    pub(crate) fn ids(vocab: u32, seed: u64) -> Self {
        let random = Random::new(seed);
        Self::Ids { vocab, random }
    }

    pub(crate) fn texts(folder: &Path, seed: u64) -> Result<Self, String> {
        let tokenizer = Tokenizer::load(folder).map_err(|error| error.to_string())?;
        let words = words(&tokenizer);
        if words.is_empty() {
            return Err(format!(
                "{}: no token of this vocabulary is a word that can be put into a prompt",
                folder.display()
            ));
        }
        Ok(Self::Texts {
            tokenizer: Box::new(tokenizer),
            words,
            random: Random::new(seed),
        })
    }

    /// The next prompt.
    pub(crate) fn next(&mut self, tokens: usize) -> Result<Value, String> {
        match self {
            Self::Ids { vocab, random } => Ok(random.ids(tokens, *vocab).into()),
            Self::Texts {
                tokenizer,
                words,
                random,
            } => text(tokenizer, words, random, tokens).map(Into::into),
        }
    }
}

/// Tokens that stand for themselves between two spaces.
fn words(tokenizer: &Tokenizer) -> Vec<String> {
    let ids = 0..u32::try_from(tokenizer.vocab_size()).unwrap_or(u32::MAX);
    let word = |id: u32| {
        let text = tokenizer.decode(&[id], false);
        let word = text.strip_prefix(' ')?;
        let is_plain = word.len() > 1 && word.bytes().all(|byte| byte.is_ascii_alphabetic());
        let is_alone = || {
            let found = tokenizer.encode(&text, false).ok();
            found.is_some_and(|found| found.ids == [id])
        };
        (is_plain && is_alone()).then_some(text)
    };
    ids.filter_map(word).take(WORDS_MAX).collect()
}

/// Words, then as many fewer or more as the tokenizer's count is off.
fn text(
    tokenizer: &Tokenizer,
    words: &[String],
    random: &mut Random,
    tokens: usize,
) -> Result<String, String> {
    let mut chosen: Vec<usize> = Vec::new();
    let mut wanted = tokens;
    for _ in 0..TRIES {
        chosen.truncate(wanted);
        while chosen.len() < wanted {
            chosen.push(random.index(words.len()));
        }
        let text: String = chosen.iter().map(|&at| words[at].as_str()).collect();
        let found = tokenizer
            .encode(&text, true)
            .map_err(|error| error.to_string())?
            .ids
            .len();
        if found == tokens {
            return Ok(text);
        }
        wanted = (wanted + tokens).saturating_sub(found).max(1);
        // The end is drawn anew, or a count that jumps by two would never fit.
        chosen.truncate(wanted.saturating_sub(2));
    }
    Err(format!(
        "no text of exactly {tokens} tokens was found in {TRIES} tries"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_generator_is_the_published_one() {
        // First values of the seed 1234567 in the reference implementation.
        let mut random = Random::new(1_234_567);
        assert_eq!(random.next(), 6_457_827_717_110_365_317);
        assert_eq!(random.next(), 3_203_168_211_198_807_973);
    }

    #[test]
    fn ids_stay_inside_the_vocabulary() {
        for (vocab, start, end) in [(128_256, 100, 100_000), (49_152, 100, 49_152), (64, 0, 64)] {
            let ids = Random::new(3).ids(1000, vocab);
            assert_eq!(ids.len(), 1000);
            assert!(ids.iter().all(|id| (start..end).contains(id)), "{vocab}");
        }
        assert_ne!(Random::new(1).ids(8, 1000), Random::new(2).ids(8, 1000));
    }
}
