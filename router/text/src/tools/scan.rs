//! Where a JSON value ends.

/// Follows a JSON value to its end. It only counts brackets and quotes: what is between them is
/// the reader's business.
#[derive(Debug, Clone, Copy)]
pub(super) enum Scan {
    /// An object or array, and whatever is in it.
    Nested {
        depth: usize,
        quoted: Quoted,
    },
    Text {
        escaped: bool,
    },
    /// A number or a word.
    Scalar,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Quoted {
    No,
    Yes,
    Escaped,
}

/// Where a character is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reach {
    Within,
    /// It is the value's last.
    Last,
    /// The value ended before it.
    Past,
}

// === impl Scan ===

impl Scan {
    /// A value that begins with `first`, if one can.
    pub(super) fn begin(first: char) -> Option<Self> {
        match first {
            '{' | '[' => Some(Self::open(1)),
            '"' => Some(Self::Text { escaped: false }),
            '-' => Some(Self::Scalar),
            first if first.is_ascii_alphanumeric() => Some(Self::Scalar),
            _ => None,
        }
    }

    /// Inside of so many brackets.
    pub(super) fn open(depth: usize) -> Self {
        Self::Nested {
            depth,
            quoted: Quoted::No,
        }
    }

    pub(super) fn step(&mut self, c: char) -> Reach {
        match self {
            Self::Nested { depth, quoted } => nested(depth, quoted, c),
            Self::Text { escaped } => {
                let last = c == '"' && !*escaped;
                *escaped = c == '\\' && !*escaped;
                if last { Reach::Last } else { Reach::Within }
            }
            Self::Scalar if c.is_ascii_alphanumeric() || matches!(c, '+' | '-' | '.') => {
                Reach::Within
            }
            Self::Scalar => Reach::Past,
        }
    }
}

fn nested(depth: &mut usize, quoted: &mut Quoted, c: char) -> Reach {
    match (*quoted, c) {
        (Quoted::Yes, '\\') => *quoted = Quoted::Escaped,
        (Quoted::Yes, '"') => *quoted = Quoted::No,
        (Quoted::Escaped, _) | (Quoted::No, '"') => *quoted = Quoted::Yes,
        (Quoted::No, '{' | '[') => *depth += 1,
        (Quoted::No, '}' | ']') => {
            *depth -= 1;
            if *depth == 0 {
                return Reach::Last;
            }
        }
        // Never in JSON, but the beginning of a marker after a bracket that was forgotten.
        (Quoted::No, '<') => return Reach::Past,
        (Quoted::Yes | Quoted::No, _) => {}
    }
    Reach::Within
}
