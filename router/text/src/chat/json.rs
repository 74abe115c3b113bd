//! JSON into the template engine's values, and `tojson` as Python's `json.dumps` writes it.

#![expect(
    clippy::wildcard_enum_match_arm,
    reason = "the kinds of values are the engine's list, which may grow"
)]

use std::fmt::Write;

use minijinja::value::{Kwargs, Rest, Value as Jinja, ValueKind};
use minijinja::{Error, ErrorKind};
use serde_json::{Map, Value};

use super::print::float_repr;

/// How deep a value may nest in `tojson`; the JSON that comes in is bounded the same way.
const DEPTH_MAX: usize = 200;

pub(super) fn to_jinja(value: &Value) -> Jinja {
    match value {
        Value::Null => Jinja::from(()),
        Value::Bool(value) => Jinja::from(*value),
        Value::Number(number) => number_to_jinja(number),
        Value::String(text) => Jinja::from(text.as_str()),
        Value::Array(list) => list.iter().map(to_jinja).collect(),
        Value::Object(map) => object_to_jinja(map),
    }
}

pub(super) fn object_to_jinja(map: &Map<String, Value>) -> Jinja {
    Jinja::from_pairs(
        map.iter()
            .map(|(key, value)| (key.as_str(), to_jinja(value))),
    )
}

fn number_to_jinja(number: &serde_json::Number) -> Jinja {
    if let Some(value) = number.as_i64() {
        Jinja::from(value)
    } else if let Some(value) = number.as_u64() {
        Jinja::from(value)
    } else {
        Jinja::from(number.as_f64().unwrap_or(f64::NAN))
    }
}

/// The arguments of `tojson` in `transformers`.
struct Style {
    ensure_ascii: bool,
    indent: Option<String>,
    item_separator: String,
    key_separator: String,
    sort_keys: bool,
}

#[expect(
    clippy::needless_pass_by_value,
    reason = "the engine passes arguments so"
)]
pub(super) fn tojson(value: &Jinja, args: Rest<Jinja>, kwargs: Kwargs) -> Result<Jinja, Error> {
    let style = Style::new(&args, &kwargs)?;
    kwargs.assert_all_used()?;
    let mut out = String::new();
    style.write(&mut out, value, 0)?;
    Ok(Jinja::from(out))
}

// === impl Style ===

impl Style {
    fn new(args: &[Jinja], kwargs: &Kwargs) -> Result<Self, Error> {
        let given = |index: usize, name: &str| -> Result<Option<Jinja>, Error> {
            let keyword: Option<Jinja> = kwargs.get(name)?;
            let given = args.get(index).cloned().or(keyword);
            Ok(given.filter(|value| !value.is_none() && !value.is_undefined()))
        };
        let ensure_ascii = given(0, "ensure_ascii")?.is_some_and(|value| value.is_true());
        let indent = given(1, "indent")?.map(|value| match value.as_usize() {
            Some(spaces) => " ".repeat(spaces),
            None => value.as_str().unwrap_or_default().to_owned(),
        });
        let sort_keys = given(3, "sort_keys")?.is_some_and(|value| value.is_true());
        let item = if indent.is_some() { "," } else { ", " };
        let mut separators = [item.to_owned(), ": ".to_owned()];
        if let Some(pair) = given(2, "separators")? {
            for (index, separator) in separators.iter_mut().enumerate() {
                let text = pair.get_item_by_index(index)?;
                text.as_str()
                    .ok_or_else(|| invalid("separators must be two strings"))?
                    .clone_into(separator);
            }
        }
        let [item_separator, key_separator] = separators;
        Ok(Self {
            ensure_ascii,
            indent,
            item_separator,
            key_separator,
            sort_keys,
        })
    }

    fn write(&self, out: &mut String, value: &Jinja, depth: usize) -> Result<(), Error> {
        if depth > DEPTH_MAX {
            return Err(invalid("the value nests too deep for JSON"));
        }
        match value.kind() {
            ValueKind::None => out.push_str("null"),
            ValueKind::Bool => out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => out.push_str(&number(value)),
            ValueKind::String => self.write_string(out, value.as_str().unwrap_or_default()),
            ValueKind::Seq | ValueKind::Iterable => {
                let items = value.try_iter()?.map(|item| (None, item)).collect();
                self.write_items(out, items, ['[', ']'], depth)?;
            }
            ValueKind::Map => {
                let mut items = Vec::new();
                for key in value.try_iter()? {
                    let item = value.get_item(&key)?;
                    items.push((Some(key_text(&key)?), item));
                }
                if self.sort_keys {
                    items.sort_by(|left, right| left.0.cmp(&right.0));
                }
                self.write_items(out, items, ['{', '}'], depth)?;
            }
            other => return Err(invalid(format!("{other} is not JSON serializable"))),
        }
        Ok(())
    }

    fn write_items(
        &self,
        out: &mut String,
        items: Vec<(Option<String>, Jinja)>,
        [open, close]: [char; 2],
        depth: usize,
    ) -> Result<(), Error> {
        out.push(open);
        let empty = items.is_empty();
        for (index, (key, item)) in items.into_iter().enumerate() {
            if index > 0 {
                out.push_str(&self.item_separator);
            }
            self.new_line(out, depth + 1);
            if let Some(key) = key {
                self.write_string(out, &key);
                out.push_str(&self.key_separator);
            }
            self.write(out, &item, depth + 1)?;
        }
        if !empty {
            self.new_line(out, depth);
        }
        out.push(close);
        Ok(())
    }

    fn new_line(&self, out: &mut String, depth: usize) {
        if let Some(indent) = &self.indent {
            out.push('\n');
            out.extend(std::iter::repeat_n(indent.as_str(), depth));
        }
    }

    fn write_string(&self, out: &mut String, text: &str) {
        out.push('"');
        for c in text.chars() {
            match c {
                '"' => out.push_str("\\\""),
                '\\' => out.push_str("\\\\"),
                '\n' => out.push_str("\\n"),
                '\r' => out.push_str("\\r"),
                '\t' => out.push_str("\\t"),
                '\u{8}' => out.push_str("\\b"),
                '\u{c}' => out.push_str("\\f"),
                c if c < ' ' || (self.ensure_ascii && !(' '..='~').contains(&c)) => {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        write!(out, "\\u{unit:04x}").expect("writing to a string cannot fail");
                    }
                }
                c => out.push(c),
            }
        }
        out.push('"');
    }
}

fn key_text(key: &Jinja) -> Result<String, Error> {
    match key.kind() {
        ValueKind::String => Ok(key.as_str().unwrap_or_default().to_owned()),
        ValueKind::None => Ok("null".into()),
        ValueKind::Bool => Ok(if key.is_true() { "true" } else { "false" }.into()),
        ValueKind::Number => Ok(number(key)),
        other => Err(invalid(format!(
            "keys must be strings, numbers, booleans or none, not {other}"
        ))),
    }
}

fn number(value: &Jinja) -> String {
    if value.is_integer() {
        return value.to_string();
    }
    match f64::try_from(value.clone()) {
        Ok(number) if number.is_nan() => "NaN".into(),
        Ok(number) if number.is_infinite() => {
            if number > 0.0 {
                "Infinity".into()
            } else {
                "-Infinity".into()
            }
        }
        Ok(number) => float_repr(number),
        Err(_) => value.to_string(),
    }
}

fn invalid(detail: impl Into<std::borrow::Cow<'static, str>>) -> Error {
    Error::new(ErrorKind::InvalidOperation, detail)
}
