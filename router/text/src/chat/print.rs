//! Values as Python prints them.

#![expect(
    clippy::wildcard_enum_match_arm,
    reason = "the kinds of values are the engine's list, which may grow"
)]

use std::fmt::Write;

use minijinja::value::{Value as Jinja, ValueKind};
use minijinja::{Error, Output, State, escape_formatter};

/// Printing, as Python's `str`.
pub(super) fn write(out: &mut Output, state: &mut State, value: &Jinja) -> Result<(), Error> {
    match value.kind() {
        ValueKind::Number | ValueKind::Seq | ValueKind::Map => {
            out.write_str(&repr(value)?).map_err(Error::from)
        }
        _ => escape_formatter(out, state, value),
    }
}

/// The `string` filter.
pub(super) fn string(value: &Jinja) -> Result<String, Error> {
    match value.kind() {
        ValueKind::Number | ValueKind::Seq | ValueKind::Map => repr(value),
        _ => Ok(value.to_string()),
    }
}

/// Python's `repr`. The engine's own differs in floats.
fn repr(value: &Jinja) -> Result<String, Error> {
    let list = |open: &str, close: &str| -> Result<String, Error> {
        let items: Result<Vec<_>, _> = value.try_iter()?.map(|item| repr(&item)).collect();
        Ok(format!("{open}{}{close}", items?.join(", ")))
    };
    match value.kind() {
        ValueKind::Number if !value.is_integer() => {
            Ok(f64::try_from(value.clone()).map_or_else(|_| value.to_string(), float_repr))
        }
        ValueKind::Seq if value.is_tuple() => {
            list("(", if value.len() == Some(1) { ",)" } else { ")" })
        }
        ValueKind::Seq => list("[", "]"),
        ValueKind::Map => {
            let mut items = Vec::new();
            for key in value.try_iter()? {
                items.push(format!(
                    "{}: {}",
                    repr(&key)?,
                    repr(&value.get_item(&key)?)?
                ));
            }
            Ok(format!("{{{}}}", items.join(", ")))
        }
        ValueKind::String => Ok(string_repr(value.as_str().unwrap_or_default())),
        _ => Ok(format!("{value:?}")),
    }
}

fn string_repr(text: &str) -> String {
    let quote = if text.contains('\'') && !text.contains('"') {
        '"'
    } else {
        '\''
    };
    let mut out = String::with_capacity(text.len() + 2);
    out.push(quote);
    for c in text.chars() {
        match c {
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            c if c == quote => out.extend(['\\', c]),
            c if is_printable(c) => out.push(c),
            c => {
                let code = u32::from(c);
                let (letter, width) = match code {
                    0..=0xFF => ('x', 2),
                    0x100..=0xFFFF => ('u', 4),
                    _ => ('U', 8),
                };
                write!(out, "\\{letter}{code:0width$x}").expect("writing to a string cannot fail");
            }
        }
    }
    out.push(quote);
    out
}

/// Python's `str.isprintable`: no controls, formats, or spaces but the ASCII one. The standard
/// library knows the same categories and shows it by escaping; a letter before keeps it from
/// escaping combining marks, too.
fn is_printable(c: char) -> bool {
    let mut pair = [b'a'; 5];
    let length = c.encode_utf8(&mut pair[1..]).len();
    let text = std::str::from_utf8(&pair[..=length]).unwrap_or_default();
    matches!(c, '\'' | '"') || text.escape_debug().count() == 2
}

/// The shortest digits that read back as `number`, as Python's `repr` lays them out: with an
/// exponent below 1e-4 and from 1e16 on.
pub(super) fn float_repr(number: f64) -> String {
    let scientific = format!("{number:e}");
    if !number.is_finite() {
        return if number.is_nan() {
            "nan".into()
        } else {
            scientific
        };
    }
    let Some((digits, exponent)) = scientific.split_once('e') else {
        return scientific;
    };
    let exponent: i32 = exponent.parse().unwrap_or_default();
    if number == 0.0 || (-4..16).contains(&exponent) {
        let plain = number.to_string();
        return if plain.contains('.') {
            plain
        } else {
            plain + ".0"
        };
    }
    let sign = if exponent < 0 { '-' } else { '+' };
    format!("{digits}e{sign}{:02}", exponent.abs())
}
