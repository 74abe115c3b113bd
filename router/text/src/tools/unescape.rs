//! The text of a JSON string, as it comes.

/// Takes the characters between a string's quotes; gives the text they stand for.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Unescape {
    at: At,
    /// The first half of a pair that stands for one character.
    high: Option<u32>,
}

#[derive(Debug, Clone, Copy, Default)]
enum At {
    #[default]
    Plain,
    Escape,
    Unicode {
        digits: u32,
        value: u32,
    },
}

// === impl Unescape ===

impl Unescape {
    /// Appends what `c` completes.
    pub(super) fn step(&mut self, c: char, text: &mut String) {
        match self.at {
            At::Plain if c == '\\' => self.at = At::Escape,
            At::Plain => self.plain(c, text),
            At::Escape if c == 'u' => {
                self.at = At::Unicode {
                    digits: 0,
                    value: 0,
                }
            }
            At::Escape => {
                self.at = At::Plain;
                let meant = match c {
                    'b' => '\u{8}',
                    'f' => '\u{c}',
                    'n' => '\n',
                    'r' => '\r',
                    't' => '\t',
                    other => other,
                };
                self.plain(meant, text);
            }
            At::Unicode { digits, value } => {
                let value = value * 16 + c.to_digit(16).unwrap_or(0);
                if digits < 3 {
                    let digits = digits + 1;
                    self.at = At::Unicode { digits, value };
                } else {
                    self.at = At::Plain;
                    self.unit(value, text);
                }
            }
        }
    }

    fn plain(&mut self, c: char, text: &mut String) {
        if self.high.take().is_some() {
            text.push(char::REPLACEMENT_CHARACTER);
        }
        text.push(c);
    }

    /// A code unit of UTF-16.
    fn unit(&mut self, unit: u32, text: &mut String) {
        if let (Some(high), 0xDC00..0xE000) = (self.high, unit) {
            self.high = None;
            let value = 0x10000 + ((high - 0xD800) << 10) + (unit - 0xDC00);
            text.push(char::from_u32(value).unwrap_or(char::REPLACEMENT_CHARACTER));
        } else if (0xD800..0xDC00).contains(&unit) {
            if self.high.replace(unit).is_some() {
                text.push(char::REPLACEMENT_CHARACTER);
            }
        } else {
            let c = char::from_u32(unit).unwrap_or(char::REPLACEMENT_CHARACTER);
            self.plain(c, text);
        }
    }
}
