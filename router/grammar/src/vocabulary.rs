//! The bytes of every token, as the matcher takes them.

use std::fmt;
use std::sync::Arc;

use llguidance::toktrie::{ApproximateTokEnv, TokEnv, TokRxInfo, TokTrie};

/// Why no grammar works with a model.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum VocabularyError {
    /// A grammar's end could not be told.
    #[error("grammars need a token that ends the text, and this model has none")]
    NoEnding,
    /// A tokenizer whose tokens are not pieces of a text.
    #[error("grammars need tokens that are bytes of the text, and this model's are not")]
    NoBytes,
    /// An ending id has no logit.
    #[error("the ending token {id} is outside the vocabulary of {vocab_size}")]
    EndingOutside {
        /// The id.
        id: u32,
        /// Logits.
        vocab_size: u32,
    },
}

/// A model's vocabulary in one trie. Cheap to clone.
#[derive(Clone)]
pub struct Vocabulary {
    pub(crate) env: TokEnv,
    pub(crate) ending: Arc<[u32]>,
    pub(crate) size: u32,
}

/// Before the name of a token that no bytes of a text are.
const MARKER: u8 = TokTrie::SPECIAL_TOKEN_MARKER;

// === impl Vocabulary ===

impl Vocabulary {
    /// Takes some 0.2 s and 20 MB for 100,000 tokens.
    ///
    /// # Arguments
    ///
    /// `size`: logits of the model, padding included.
    /// `ending`: ids that end a text, of which at least one.
    /// `bytes_of`: the bytes that a token adds in the middle of a text; `None` or nothing for one
    /// that adds no text of its own, such as a special token, and that no grammar allows.
    pub fn new<'a>(
        size: u32,
        ending: &[u32],
        bytes_of: impl Fn(u32) -> Option<&'a [u8]>,
    ) -> Result<Self, VocabularyError> {
        let first = *ending.first().ok_or(VocabularyError::NoEnding)?;
        if let Some(&id) = ending.iter().find(|id| **id >= size) {
            let vocab_size = size;
            return Err(VocabularyError::EndingOutside { id, vocab_size });
        }
        let word = |id: u32| {
            if ending.contains(&id) {
                // A name that no other token has, and that no text can spell.
                let name = format!("<ending{id}>");
                return [&[MARKER], name.as_bytes()].concat();
            }
            // A byte that UTF-8 does not know is the matcher's marker; no text of a grammar has it.
            let bytes = bytes_of(id).filter(|bytes| !bytes.contains(&MARKER));
            bytes.unwrap_or_default().to_vec()
        };
        let words: Vec<Vec<u8>> = (0..size).map(word).collect();
        let is_text = |word: &Vec<u8>| !word.is_empty() && word[0] != MARKER;
        if !words.iter().any(is_text) {
            return Err(VocabularyError::NoBytes);
        }
        let trie = TokTrie::from(&TokRxInfo::new(size, first), &words).with_eos_tokens(ending);
        Ok(Self {
            env: Arc::new(ApproximateTokEnv::new(trie)),
            ending: ending.into(),
            size,
        })
    }

    /// Logits of the model.
    pub fn size(&self) -> u32 {
        self.size
    }
}

impl fmt::Debug for Vocabulary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Vocabulary")
            .field("size", &self.size)
            .field("ending", &self.ending)
            .finish_non_exhaustive()
    }
}
