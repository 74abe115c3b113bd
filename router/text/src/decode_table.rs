//! The bytes of every token, for decoders that concatenate bytes: byte-level BPE,
//! sentencepiece with byte fallback, Metaspace. Decoding is then a table look-up and an
//! incremental check for UTF-8, instead of a chain of string operations over a window.

use std::collections::HashMap;

use serde_json::Value;

/// How bytes that are not UTF-8 are shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Broken {
    /// One U+FFFD for each maximal broken piece, as lossy decoding of the whole does.
    PerPiece,
    /// One U+FFFD for each byte, as the byte-fallback decoder does.
    PerByte,
}

/// What a decoder takes from the beginning of a text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Start {
    /// Nothing.
    Keep,
    /// Up to `count` leading `content`.
    Strip {
        /// The character stripped.
        content: char,
        /// How many at most.
        count: usize,
    },
    /// Every `replacement` of the first token.
    FirstToken {
        /// The character that stands for a space in the vocabulary.
        replacement: char,
    },
}

/// Token id to bytes.
#[derive(Debug)]
pub(crate) struct DecodeTable {
    bytes: Vec<u8>,
    /// Per id, the end of its bytes; they start at the end of the id before.
    ends: Vec<usize>,
    exists: Vec<bool>,
    pub(crate) broken: Broken,
    pub(crate) start: Start,
}

/// A decoder that is a map of each token by itself.
struct Plan {
    steps: Vec<Step>,
    broken: Broken,
    start: Start,
}

enum Step {
    ByteLevel,
    Replace { pattern: String, content: String },
    ByteFallback,
}

// === impl DecodeTable ===

impl DecodeTable {
    /// Ids above this are a broken file, not a vocabulary: no table is made for them.
    pub(crate) const IDS_MAX: usize = 1 << 22;

    /// `None` where the decoder is not of a kind that this table can express.
    pub(crate) fn build(tokenizer: &tokenizers::Tokenizer, ids: usize) -> Option<Self> {
        if ids > Self::IDS_MAX {
            return None;
        }
        let decoder = serde_json::to_value(tokenizer.get_decoder()?).ok()?;
        let plan = Plan::of(&decoder)?;
        let byte_by_char = byte_by_char();
        let added = tokenizer.get_added_vocabulary();
        let mut table = Self {
            bytes: Vec::new(),
            ends: Vec::with_capacity(ids),
            exists: Vec::with_capacity(ids),
            broken: plan.broken,
            start: plan.start,
        };
        for id in 0..u32::try_from(ids).ok()? {
            let token = added
                .simple_id_to_token(id)
                .or_else(|| tokenizer.id_to_token(id));
            table.exists.push(token.is_some());
            if let Some(token) = token {
                table.bytes.extend(plan.bytes(token, &byte_by_char));
            }
            table.ends.push(table.bytes.len());
        }
        Some(table)
    }

    /// The bytes of a token in the middle of a text; `None` for an id without a token.
    pub(crate) fn bytes(&self, id: u32) -> Option<&[u8]> {
        let id = id as usize;
        if !*self.exists.get(id)? {
            return None;
        }
        let start = if id == 0 { 0 } else { self.ends[id - 1] };
        Some(&self.bytes[start..self.ends[id]])
    }
}

// === impl Plan ===

impl Plan {
    /// Reads the decoder's own JSON.
    fn of(decoder: &Value) -> Option<Self> {
        let mut plan = Self {
            steps: Vec::new(),
            broken: Broken::PerPiece,
            start: Start::Keep,
        };
        let mut list = Vec::new();
        flatten(decoder, &mut list);
        let mut fused = false;
        for (index, step) in list.iter().enumerate() {
            let alone = list.len() == 1;
            match step.get("type")?.as_str()? {
                "ByteLevel" if alone => plan.steps.push(Step::ByteLevel),
                "Metaspace" if alone => plan.metaspace(step)?,
                "Replace" if !fused && plan.broken == Broken::PerPiece => {
                    plan.steps.push(Step::Replace {
                        pattern: step.get("pattern")?.get("String")?.as_str()?.to_owned(),
                        content: step.get("content")?.as_str()?.to_owned(),
                    });
                }
                "ByteFallback" if !fused => {
                    plan.broken = Broken::PerByte;
                    plan.steps.push(Step::ByteFallback);
                }
                "Fuse" => fused = true,
                "Strip" if fused && index + 1 == list.len() => plan.strip(step)?,
                _ => return None,
            }
        }
        (!plan.steps.is_empty()).then_some(plan)
    }

    fn metaspace(&mut self, step: &Value) -> Option<()> {
        let replacement = one_char(step.get("replacement")?)?;
        if step.get("prepend_scheme").and_then(Value::as_str) != Some("never") {
            self.start = Start::FirstToken { replacement };
        }
        self.steps.push(Step::Replace {
            pattern: replacement.into(),
            content: " ".into(),
        });
        Some(())
    }

    fn strip(&mut self, step: &Value) -> Option<()> {
        if step.get("stop")?.as_u64()? != 0 {
            return None;
        }
        let count = usize::try_from(step.get("start")?.as_u64()?).ok()?;
        if count > 0 {
            self.start = Start::Strip {
                content: one_char(step.get("content")?)?,
                count,
            };
        }
        Some(())
    }

    fn bytes(&self, mut token: String, byte_by_char: &HashMap<char, u8>) -> Vec<u8> {
        for step in &self.steps {
            match step {
                Step::ByteLevel => {
                    // A token with any character outside the byte alphabet is taken literally.
                    let bytes: Option<Vec<u8>> = token
                        .chars()
                        .map(|c| byte_by_char.get(&c).copied())
                        .collect();
                    return bytes.unwrap_or_else(|| token.into_bytes());
                }
                Step::Replace { pattern, content } => token = token.replace(pattern, content),
                Step::ByteFallback => {
                    if let Some(byte) = fallback_byte(&token) {
                        return vec![byte];
                    }
                }
            }
        }
        token.into_bytes()
    }
}

fn flatten<'a>(decoder: &'a Value, list: &mut Vec<&'a Value>) {
    match decoder.get("decoders").and_then(Value::as_array) {
        Some(decoders) => decoders.iter().for_each(|decoder| flatten(decoder, list)),
        None => list.push(decoder),
    }
}

fn one_char(value: &Value) -> Option<char> {
    let mut chars = value.as_str()?.chars();
    let first = chars.next()?;
    chars.next().is_none().then_some(first)
}

/// The byte of `<0x41>`.
fn fallback_byte(token: &str) -> Option<u8> {
    let hex = token.strip_prefix("<0x")?.strip_suffix('>')?;
    (hex.len() == 2)
        .then(|| u8::from_str_radix(hex, 16).ok())
        .flatten()
}

/// GPT-2's alphabet: printable Latin-1 stands for itself, the other bytes, in order, for the
/// code points from 256 on.
fn byte_by_char() -> HashMap<char, u8> {
    let printable = |byte: u8| matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    let beyond = (256u32..).filter_map(char::from_u32);
    let plain = (0..=255u8)
        .filter(|byte| printable(*byte))
        .map(|byte| (char::from(byte), byte));
    let moved = beyond.zip((0..=255u8).filter(|byte| !printable(*byte)));
    plain.chain(moved).collect()
}
