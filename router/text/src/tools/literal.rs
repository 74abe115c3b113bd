//! Python's literals as JSON, as they come: the values of a call's arguments.

use super::output::Output;

/// The words that JSON spells otherwise.
const WORDS: [(&str, &str); 3] = [("True", "true"), ("False", "false"), ("None", "null")];

/// Digits of `\U0001F600`.
const LONG_ESCAPE_DIGITS: usize = 8;

/// Writes one value. Digits are passed on as they are, and so is what is no literal.
#[derive(Debug)]
pub(super) struct Literal {
    /// Brackets around.
    depth: usize,
    at: At,
    /// What there is of a word that may be one of [`WORDS`], or of a character's number.
    word: String,
}

#[derive(Debug, Clone, Copy)]
enum At {
    Between,
    /// A word that may be one of [`WORDS`].
    Word,
    /// Another one, or a number.
    Passing,
    Text {
        quote: char,
    },
    Escape {
        quote: char,
    },
    /// In the number of a character.
    LongEscape {
        quote: char,
    },
}

/// Where a character is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reach {
    Within,
    /// The value ended before it, a `,` or `)` that is in no bracket.
    Past,
}

// === impl Literal ===

impl Literal {
    pub(super) fn new() -> Self {
        Self {
            depth: 0,
            at: At::Between,
            word: String::new(),
        }
    }

    pub(super) fn step(&mut self, c: char, out: &mut Output) -> Reach {
        match self.at {
            At::Between => return self.between(c, out),
            At::Word => return self.word(c, out),
            At::Passing => return self.passing(c, out),
            At::Text { quote } => self.text(quote, c, out),
            At::Escape { quote } => self.escape(quote, c, out),
            At::LongEscape { quote } => self.long_escape(quote, c, out),
        }
        Reach::Within
    }

    /// Writes what it has of an unfinished value.
    pub(super) fn finish(&mut self, out: &mut Output) {
        out.arguments(&std::mem::take(&mut self.word));
    }

    fn between(&mut self, c: char, out: &mut Output) -> Reach {
        match c {
            ',' | ')' if self.depth == 0 => return Reach::Past,
            '\'' | '"' => {
                self.at = At::Text { quote: c };
                out.argument('"');
            }
            '[' | '{' | '(' => {
                self.depth += 1;
                out.argument(if c == '(' { '[' } else { c });
            }
            ']' | '}' | ')' => {
                self.depth = self.depth.saturating_sub(1);
                out.argument(if c == ')' { ']' } else { c });
            }
            c if is_in_word(c) => {
                self.at = At::Word;
                return self.word(c, out);
            }
            // Around a value of its own.
            c if c.is_whitespace() && self.depth == 0 => {}
            c => out.argument(c),
        }
        Reach::Within
    }

    /// A word is held only as long as it may be one that is spelled otherwise.
    fn word(&mut self, c: char, out: &mut Output) -> Reach {
        if is_in_word(c) {
            self.word.push(c);
            if !WORDS.iter().any(|(word, _)| word.starts_with(&self.word)) {
                out.arguments(&std::mem::take(&mut self.word));
                self.at = At::Passing;
            }
            return Reach::Within;
        }
        let spelled = WORDS.iter().find(|(word, _)| *word == self.word);
        out.arguments(spelled.map_or(self.word.as_str(), |(_, json)| json));
        self.word.clear();
        self.passing(c, out)
    }

    fn passing(&mut self, c: char, out: &mut Output) -> Reach {
        if is_in_word(c) {
            out.argument(c);
            return Reach::Within;
        }
        self.at = At::Between;
        self.between(c, out)
    }

    fn text(&mut self, quote: char, c: char, out: &mut Output) {
        match c {
            c if c == quote => {
                self.at = At::Between;
                out.argument('"');
            }
            '\\' => self.at = At::Escape { quote },
            c => character(c, out),
        }
    }

    fn escape(&mut self, quote: char, c: char, out: &mut Output) {
        self.at = At::Text { quote };
        match c {
            '\'' | '"' | '\\' => character(c, out),
            'n' | 'r' | 't' | 'b' | 'f' => {
                out.argument('\\');
                out.argument(c);
            }
            'a' => character('\u{7}', out),
            'v' => character('\u{b}', out),
            // The digits follow.
            'x' => out.arguments("\\u00"),
            'u' => out.arguments("\\u"),
            'U' => self.at = At::LongEscape { quote },
            // The line goes on.
            '\n' => {}
            // Python keeps the backslash of what is no escape.
            c => {
                out.arguments("\\\\");
                character(c, out);
            }
        }
    }

    fn long_escape(&mut self, quote: char, c: char, out: &mut Output) {
        self.word.push(c);
        if self.word.chars().count() < LONG_ESCAPE_DIGITS {
            return;
        }
        self.at = At::Text { quote };
        let value = u32::from_str_radix(&self.word, 16).ok();
        self.word.clear();
        let meant = value.and_then(char::from_u32);
        character(meant.unwrap_or(char::REPLACEMENT_CHARACTER), out);
    }
}

// === free functions ===

fn is_in_word(c: char) -> bool {
    c.is_alphanumeric() || matches!(c, '_' | '.')
}

/// A character of a JSON string.
pub(super) fn character(c: char, out: &mut Output) {
    match c {
        '"' | '\\' => {
            out.argument('\\');
            out.argument(c);
        }
        '\n' => out.arguments("\\n"),
        '\r' => out.arguments("\\r"),
        '\t' => out.arguments("\\t"),
        c if c < ' ' => out.arguments(&format!("\\u{:04x}", u32::from(c))),
        c => out.argument(c),
    }
}
