//! The tokenizer of a model folder: text to ids with byte offsets, ids to text.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use crate::decode_table::DecodeTable;
use crate::detok::decode_with;
use crate::special::{self, SpecialNames};

/// Why a model folder gave no tokenizer.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The folder has no `tokenizer.json`.
    #[error(
        "{} has no tokenizer.json; a tokenizer that exists only in Python or as a sentencepiece \
         model must be saved once with transformers' save_pretrained", .dir.display()
    )]
    Missing {
        /// The model folder.
        dir: PathBuf,
    },
    /// A file exists and cannot be read.
    #[error("{} cannot be read: {source}", .path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// `tokenizer.json` is not a tokenizer the `tokenizers` crate knows.
    #[error("{} is not a tokenizer this version can load: {source}", .path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// The crate's reason.
        source: tokenizers::Error,
    },
    /// A configuration file beside the tokenizer is not JSON.
    #[error("{} is not valid JSON: {source}", .path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// Where and why.
        source: serde_json::Error,
    },
}

/// Why a text gave no ids.
#[derive(Debug, thiserror::Error)]
pub enum EncodeError {
    /// The tokenizer refused the text (an unknown symbol without an unknown token, for one).
    #[error("the tokenizer cannot encode this text: {source}")]
    Refused {
        /// The crate's reason.
        source: tokenizers::Error,
    },
    /// The tokenizer panicked on the text; the worker lives on.
    #[error("the tokenizer failed on this text; this is a fault of the server, not of the text")]
    Panicked,
    /// The pool was dropped before the text's turn came.
    #[error("the server stopped before this text was encoded")]
    Stopped,
}

/// The ids of a text.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Encoding {
    /// Vocabulary ids, special tokens included where they were asked for.
    pub ids: Vec<u32>,
    /// Per id, the bytes `[start, end)` of the text it stands for; empty for added specials.
    pub offsets: Vec<(usize, usize)>,
}

/// A model's tokenizer. Immutable: shared by reference count among all requests.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    /// Bytes of every token, where the decoder is a plain concatenation of such bytes.
    table: Option<DecodeTable>,
    special: Vec<bool>,
    vocab_size: usize,
    ending_ids: Vec<u32>,
    names: SpecialNames,
    tokens_max: Option<u32>,
}

// === impl Tokenizer ===

impl Tokenizer {
    /// Reads `tokenizer.json` of a model folder, and beside it the ids that end a generation, the
    /// names of the special tokens and the length of a text (`generation_config.json`,
    /// `config.json`, `tokenizer_config.json`, `special_tokens_map.json`, each optional).
    pub fn load(dir: &Path) -> Result<Self, LoadError> {
        let path = dir.join("tokenizer.json");
        let Some(bytes) = special::read_optional(&path)? else {
            return Err(LoadError::Missing {
                dir: dir.to_owned(),
            });
        };
        let names = SpecialNames::load(dir)?;
        let mut tokenizer =
            Self::build(&bytes, names).map_err(|source| LoadError::Parse { path, source })?;
        tokenizer.ending_ids = special::ending_ids(dir, &tokenizer)?;
        tokenizer.tokens_max = special::tokens_max(dir)?;
        Ok(tokenizer)
    }

    /// A tokenizer from the bytes of a `tokenizer.json` alone: no ending ids, no special names.
    pub fn from_json(bytes: &[u8]) -> Result<Self, LoadError> {
        let path = PathBuf::from("tokenizer.json");
        Self::build(bytes, SpecialNames::default())
            .map_err(|source| LoadError::Parse { path, source })
    }

    fn build(bytes: &[u8], names: SpecialNames) -> Result<Self, tokenizers::Error> {
        let mut inner = tokenizers::Tokenizer::from_bytes(bytes)?;
        // Some files carry the truncation and padding of their training; a prompt's length is
        // the router's decision.
        inner.with_truncation(None)?;
        inner.with_padding(None);
        let size = inner
            .get_vocab(true)
            .values()
            .max()
            .map_or(0, |id| *id as usize + 1);
        let table = DecodeTable::build(&inner, size);
        let added = inner.get_added_vocabulary();
        // An id far beyond any vocabulary is a broken file's.
        let ids = 0..u32::try_from(size.min(DecodeTable::IDS_MAX)).unwrap_or(u32::MAX);
        let special = ids
            .map(|id| {
                let token = added
                    .simple_id_to_token(id)
                    .or_else(|| inner.id_to_token(id));
                token.is_some_and(|token| added.is_special_token(&token))
            })
            .collect();
        Ok(Self {
            vocab_size: size,
            inner,
            table,
            special,
            ending_ids: Vec::new(),
            names,
            tokens_max: None,
        })
    }

    /// The ids of `text`. Special tokens written out in the text become their ids in any case;
    /// `add_special_tokens` asks for those the model's post-processor puts around a text (a
    /// beginning-of-sequence token, say). Chat templates write them out themselves: `false`.
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Encoding, EncodeError> {
        let encoding = self
            .inner
            .encode(text, add_special_tokens)
            .map_err(|source| EncodeError::Refused { source })?;
        Ok(Encoding {
            ids: encoding.get_ids().to_vec(),
            offsets: encoding.get_offsets().to_vec(),
        })
    }

    /// The text of `ids` decoded at once; U+FFFD stands for bytes that are not UTF-8.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> String {
        decode_with(self, ids, skip_special)
    }

    /// Whether `id` is a special (control) token.
    pub fn is_special(&self, id: u32) -> bool {
        self.special.get(id as usize).copied().unwrap_or(false)
    }

    /// One more than the largest id. A model's logits may be wider (padding).
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// The text one token adds in the middle of a text, special tokens written out. U+FFFD for
    /// a token that is a piece of a character; see [`Self::token_bytes`].
    pub fn token_text(&self, id: u32) -> String {
        match &self.table {
            Some(table) => table.bytes(id).map_or_else(String::new, |bytes| {
                String::from_utf8_lossy(bytes).into_owned()
            }),
            None => self.decode(&[id], false),
        }
    }

    /// The bytes one token adds in the middle of a text; `None` where the decoder's output is
    /// not a concatenation of them (WordPiece, say) or the id has no token.
    pub fn token_bytes(&self, id: u32) -> Option<&[u8]> {
        self.table.as_ref().and_then(|table| table.bytes(id))
    }

    /// The entry of the vocabulary as it is spelled there (`Ġthe`, `▁the`, `<0x0A>`).
    pub fn vocabulary_entry(&self, id: u32) -> Option<String> {
        let added = self.inner.get_added_vocabulary();
        added
            .simple_id_to_token(id)
            .or_else(|| self.inner.id_to_token(id))
    }

    /// The id of a vocabulary entry or added token, spelled exactly.
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// The ids that end a generation, in the order of the model's files; may be empty.
    pub fn ending_ids(&self) -> &[u32] {
        &self.ending_ids
    }

    /// Tokens at most that a text is meant to have (`model_max_length`), if the files tell.
    pub fn tokens_max(&self) -> Option<u32> {
        self.tokens_max
    }

    /// The model's special tokens by name (`bos_token`, `eos_token`, …), as templates see them.
    pub fn special_names(&self) -> &BTreeMap<String, String> {
        self.names.by_name()
    }

    pub(crate) fn table(&self) -> Option<&DecodeTable> {
        self.table.as_ref()
    }

    /// Decoding by the crate, for decoders that are no concatenation of bytes.
    pub(crate) fn decode_generic(&self, ids: &[u32], skip_special: bool) -> String {
        // An error here is a decoder's own pattern that failed; there is no text to show.
        self.inner
            .decode(ids, skip_special)
            .unwrap_or_else(|error| {
                tracing::warn!(%error, "the tokenizer's decoder failed");
                String::new()
            })
    }
}

impl fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tokenizer")
            .field("vocab_size", &self.vocab_size)
            .field("table", &self.table.is_some())
            .field("ending_ids", &self.ending_ids)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
