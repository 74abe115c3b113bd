//! What can be seen of a grammar without compiling it: whatever the compiler itself does not bound.

use regex_syntax::hir::{Hir, HirKind};
use serde_json::Value;

use crate::bounds::{Bounds, GrammarError};
use crate::spec::GrammarSpec;

/// What a Lark grammar embeds a schema by.
const EMBEDDED_SCHEMA: &str = "%json";

// === impl Bounds ===

impl Bounds {
    /// Refuses what is too long, too deep or would have too many states. `text` is its own.
    pub(crate) fn check(&self, spec: &GrammarSpec, text: &str) -> Result<(), GrammarError> {
        if text.len() > self.source_bytes_max {
            let (max, given) = (self.source_bytes_max, text.len());
            return Err(GrammarError::TooLong { max, given });
        }
        match spec {
            GrammarSpec::JsonSchema(schema) => self.check_schema(schema),
            GrammarSpec::AnyJsonObject => Ok(()),
            GrammarSpec::Regex(pattern) => {
                self.check_depth(brackets(pattern))?;
                self.check_pattern(pattern)
            }
            GrammarSpec::Lark(text) => {
                self.check_depth(brackets(text))?;
                embedded(text).try_for_each(|schema| self.check_schema(&schema))
            }
        }
    }

    fn check_depth(&self, given: usize) -> Result<(), GrammarError> {
        let max = self.depth_max;
        if given > max {
            return Err(GrammarError::TooDeep { max, given });
        }
        Ok(())
    }

    fn check_schema(&self, schema: &Value) -> Result<(), GrammarError> {
        self.check_depth(depth(schema))?;
        let (max, mut given) = (self.multiple_max, 1);
        self.check_keywords(schema, &mut given)?;
        if given > max {
            return Err(GrammarError::Multiples { max, given });
        }
        Ok(())
    }

    /// Takes every key that is called as a keyword for one: a property of that name with such a
    /// value is rare, and refused at worst.
    fn check_keywords(&self, schema: &Value, multiple: &mut u64) -> Result<(), GrammarError> {
        match schema {
            Value::Array(items) => items
                .iter()
                .try_for_each(|item| self.check_keywords(item, multiple)),
            Value::Object(fields) => fields.iter().try_for_each(|(key, value)| {
                match (key.as_str(), value) {
                    ("multipleOf", Value::Number(of)) => {
                        *multiple = common_multiple(*multiple, digits(&of.to_string()));
                    }
                    ("pattern", Value::String(pattern)) => self.check_pattern(pattern)?,
                    ("patternProperties", Value::Object(patterns)) => {
                        patterns
                            .keys()
                            .try_for_each(|pattern| self.check_pattern(pattern))?;
                    }
                    _ => {}
                }
                self.check_keywords(value, multiple)
            }),
            Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => Ok(()),
        }
    }

    /// A pattern that does not parse is left to the compiler, which says why.
    fn check_pattern(&self, pattern: &str) -> Result<(), GrammarError> {
        self.check_depth(brackets(pattern))?;
        let parsed = regex_syntax::ParserBuilder::new()
            .nest_limit(u32::try_from(self.depth_max).unwrap_or(u32::MAX))
            .build()
            .parse(pattern);
        let (max, given) = (self.repeats_max, parsed.as_ref().map_or(1, repeats));
        if given > max {
            return Err(GrammarError::Repeats { max, given });
        }
        Ok(())
    }
}

// === free functions ===

/// The schemas that a Lark grammar embeds. One that does not parse is left to the compiler.
fn embedded(text: &str) -> impl Iterator<Item = Value> {
    text.match_indices(EMBEDDED_SCHEMA)
        .filter_map(|(at, mark)| {
            let rest = &text[at + mark.len()..];
            serde_json::Deserializer::from_str(rest)
                .into_iter::<Value>()
                .next()?
                .ok()
        })
}

/// Objects and arrays within each other. A value that was parsed is nested a hundred levels or so at
/// most, so that this recursion ends.
fn depth(value: &Value) -> usize {
    let deepest = match value {
        Value::Array(items) => items.iter().map(depth).max(),
        Value::Object(fields) => fields.values().map(depth).max(),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => return 0,
    };
    1 + deepest.unwrap_or(0)
}

/// Brackets within brackets, those in quotes included.
fn brackets(text: &str) -> usize {
    let (mut open, mut deepest) = (0usize, 0);
    for byte in text.bytes() {
        match byte {
            b'(' | b'[' | b'{' => open += 1,
            b')' | b']' | b'}' => open = open.saturating_sub(1),
            _ => {}
        }
        deepest = deepest.max(open);
    }
    deepest
}

/// How often the innermost of repetitions within each other may occur, where that is bounded.
fn repeats(pattern: &Hir) -> u64 {
    match pattern.kind() {
        HirKind::Repetition(repetition) => {
            let times = repetition.max.unwrap_or(repetition.min).max(1);
            repeats(&repetition.sub).saturating_mul(times.into())
        }
        HirKind::Capture(capture) => repeats(&capture.sub),
        HirKind::Concat(parts) | HirKind::Alternation(parts) => {
            parts.iter().map(repeats).max().unwrap_or(1)
        }
        HirKind::Empty | HirKind::Literal(_) | HirKind::Class(_) | HirKind::Look(_) => 1,
    }
}

/// The digits of a number, without its point; more than there could be states for one with an
/// exponent.
fn digits(number: &str) -> u64 {
    let digits: String = number.chars().filter(|c| !matches!(c, '.' | '-')).collect();
    digits.parse().unwrap_or(u64::MAX)
}

fn common_multiple(a: u64, b: u64) -> u64 {
    let (mut x, mut y) = (a, b);
    while y != 0 {
        (x, y) = (y, x % y);
    }
    a.checked_div(x).unwrap_or(0).saturating_mul(b)
}
