//! Incremental detokenizing: each token gives the text it completes, never half a character.

use std::sync::Arc;

use crate::decode_table::{Broken, DecodeTable, Start};
use crate::tokenizer::Tokenizer;

/// What becomes of special tokens in the text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SpecialTokens {
    /// Written out.
    Keep,
    /// Left out.
    Skip,
}

/// Turns a sequence's tokens into text as they come. Whatever the split, the pieces and
/// [`Detokenizer::finish`] together are the text of decoding all tokens at once.
#[derive(Debug)]
pub struct Detokenizer {
    tokenizer: Arc<Tokenizer>,
    special: SpecialTokens,
    state: State,
}

#[derive(Debug)]
enum State {
    Table(Bytes),
    Window(Window),
}

/// A stream of bytes on its way to UTF-8.
#[derive(Debug)]
struct Bytes {
    /// The beginning of a character whose rest has not come: at most three bytes.
    pending: Vec<u8>,
    /// What is still to be taken from the beginning of the text.
    start: Start,
}

/// For decoders that need their neighbours: the tokens from `0` to `read` are shown already and
/// give the context, those from `read` on are not.
#[derive(Debug, Default)]
struct Window {
    ids: Vec<u32>,
    read: usize,
}

/// Tokens of a window that may wait for the rest of a character. A character has four bytes at
/// most; more waiting tokens are broken text, which is shown as it is.
const WAITING_MAX: usize = 8;

/// Tokens already shown that give a window its context.
const CONTEXT_TOKENS: usize = 6;

// === impl Detokenizer ===

impl Detokenizer {
    /// For a text that begins with the first token pushed.
    pub fn new(tokenizer: Arc<Tokenizer>, special: SpecialTokens) -> Self {
        let state = match tokenizer.table() {
            Some(table) => State::Table(Bytes {
                pending: Vec::new(),
                start: table.start,
            }),
            None => State::Window(Window::default()),
        };
        Self {
            tokenizer,
            special,
            state,
        }
    }

    /// For a text that goes on after `prompt`: a leading space of the first token is kept, as
    /// it separates words. An empty prompt is the same as [`Detokenizer::new`].
    pub fn continuing(tokenizer: Arc<Tokenizer>, special: SpecialTokens, prompt: &[u32]) -> Self {
        let mut detokenizer = Self::new(tokenizer, special);
        if prompt.is_empty() {
            return detokenizer;
        }
        match &mut detokenizer.state {
            State::Table(bytes) => bytes.start = Start::Keep,
            State::Window(window) => {
                let from = prompt.len().saturating_sub(CONTEXT_TOKENS);
                window.ids.extend_from_slice(&prompt[from..]);
                window.read = window.ids.len();
            }
        }
        detokenizer
    }

    /// The text that this token made available: whole characters, possibly none.
    pub fn push(&mut self, id: u32) -> String {
        let mut out = String::new();
        self.push_into(id, &mut out);
        out
    }

    /// [`Detokenizer::push`] that appends to a buffer of the caller's.
    pub fn push_into(&mut self, id: u32, out: &mut String) {
        if self.special == SpecialTokens::Skip && self.tokenizer.is_special(id) {
            return;
        }
        match (&mut self.state, self.tokenizer.table()) {
            (State::Table(bytes), Some(table)) => {
                bytes.push_token(&self.tokenizer, table, id, out);
            }
            (State::Window(window), _) => window.push(&self.tokenizer, id, out),
            (State::Table(_), None) => {
                unreachable!("the state was made from this tokenizer's table")
            }
        }
    }

    /// The rest: U+FFFD for bytes that never became a character. Begins anew afterwards, as a
    /// text that goes on.
    pub fn finish(&mut self) -> String {
        let mut out = String::new();
        match (&mut self.state, self.tokenizer.table()) {
            (State::Table(bytes), Some(table)) => bytes.flush(table.broken, &mut out),
            (State::Window(window), _) => window.release(&self.tokenizer, &mut out, Ending::Now),
            (State::Table(_), None) => {
                unreachable!("the state was made from this tokenizer's table")
            }
        }
        out
    }
}

/// Decoding at once.
pub(crate) fn decode_with(tokenizer: &Tokenizer, ids: &[u32], skip_special: bool) -> String {
    let Some(table) = tokenizer.table() else {
        return tokenizer.decode_generic(ids, skip_special);
    };
    let mut out = String::new();
    let mut bytes = Bytes {
        pending: Vec::new(),
        start: table.start,
    };
    for &id in ids {
        if !(skip_special && tokenizer.is_special(id)) {
            bytes.push_token(tokenizer, table, id, &mut out);
        }
    }
    bytes.flush(table.broken, &mut out);
    out
}

// === impl Bytes ===

impl Bytes {
    fn push_token(
        &mut self,
        tokenizer: &Tokenizer,
        table: &DecodeTable,
        id: u32,
        out: &mut String,
    ) {
        let Some(bytes) = table.bytes(id) else {
            return;
        };
        match self.start {
            Start::Keep => self.push(bytes, table.broken, out),
            Start::FirstToken { replacement } => {
                self.start = Start::Keep;
                let entry = tokenizer.vocabulary_entry(id).unwrap_or_default();
                out.extend(entry.chars().filter(|c| *c != replacement));
            }
            Start::Strip { .. } => {
                let mut text = String::new();
                self.push(bytes, table.broken, &mut text);
                out.push_str(self.strip(&text));
            }
        }
    }

    /// Takes what is still to be stripped from the beginning of the text.
    fn strip<'a>(&mut self, mut text: &'a str) -> &'a str {
        while let Start::Strip { content, count } = self.start {
            if text.is_empty() {
                break;
            }
            let stripped = text.strip_prefix(content);
            text = stripped.unwrap_or(text);
            self.start = match stripped {
                Some(_) if count > 1 => Start::Strip {
                    content,
                    count: count - 1,
                },
                Some(_) | None => Start::Keep,
            };
        }
        text
    }

    fn push(&mut self, bytes: &[u8], broken: Broken, out: &mut String) {
        if self.pending.is_empty() {
            // The common case: a token of whole characters.
            if let Ok(text) = std::str::from_utf8(bytes) {
                out.push_str(text);
                return;
            }
        }
        self.pending.extend_from_slice(bytes);
        let waiting = std::mem::take(&mut self.pending);
        let mut rest = waiting.as_slice();
        loop {
            match std::str::from_utf8(rest) {
                Ok(text) => return out.push_str(text),
                Err(error) => {
                    let (valid, after) = rest.split_at(error.valid_up_to());
                    out.push_str(std::str::from_utf8(valid).unwrap_or_default());
                    let Some(length) = error.error_len() else {
                        self.pending.extend_from_slice(after);
                        return;
                    };
                    push_broken(length, broken, out);
                    rest = &after[length..];
                }
            }
        }
    }

    fn flush(&mut self, broken: Broken, out: &mut String) {
        if !self.pending.is_empty() {
            push_broken(self.pending.len(), broken, out);
            self.pending.clear();
        }
    }
}

fn push_broken(bytes: usize, broken: Broken, out: &mut String) {
    let count = match broken {
        Broken::PerPiece => 1,
        Broken::PerByte => bytes,
    };
    out.extend(std::iter::repeat_n(char::REPLACEMENT_CHARACTER, count));
}

// === impl Window ===

#[derive(Clone, Copy, PartialEq, Eq)]
enum Ending {
    /// More tokens may complete the last character.
    Later,
    Now,
}

impl Window {
    fn push(&mut self, tokenizer: &Tokenizer, id: u32, out: &mut String) {
        self.ids.push(id);
        let waiting = self.ids.len() - self.read;
        self.release(
            tokenizer,
            out,
            if waiting > WAITING_MAX {
                Ending::Now
            } else {
                Ending::Later
            },
        );
    }

    /// Shows what the waiting tokens add to the context's text, unless its end is half a
    /// character that later tokens may complete.
    fn release(&mut self, tokenizer: &Tokenizer, out: &mut String, ending: Ending) {
        let shown = tokenizer.decode_generic(&self.ids[..self.read], false);
        let text = tokenizer.decode_generic(&self.ids, false);
        if ending == Ending::Later && text.ends_with(char::REPLACEMENT_CHARACTER) {
            return;
        }
        // A decoder may rewrite the context's last characters; what was shown stays shown.
        let from = (0..=shown.len().min(text.len()))
            .rev()
            .find(|at| text.is_char_boundary(*at))
            .unwrap_or(0);
        out.push_str(&text[from..]);
        self.ids
            .drain(..self.ids.len().saturating_sub(CONTEXT_TOKENS));
        self.read = self.ids.len();
    }
}

#[cfg(test)]
mod tests;
