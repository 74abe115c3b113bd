//! Python's methods on strings, dicts and lists, where the engine's own set lacks them or
//! differs.

#![expect(
    clippy::wildcard_enum_match_arm,
    reason = "the kinds of values are the engine's list, which may grow"
)]

use minijinja::value::{Kwargs, Rest, Tuple, Value as Jinja, ValueKind, from_args};
use minijinja::{Error, ErrorKind, State};
use minijinja_contrib::pycompat::unknown_method_callback;

/// A template has no use for a wider column.
const WIDTH_MAX: usize = 1 << 16;

pub(super) fn call_method(
    state: &mut State,
    value: &Jinja,
    method: &str,
    args: &[Jinja],
) -> Result<Jinja, Error> {
    let own = match value.kind() {
        ValueKind::String => string_method(value.as_str().unwrap_or_default(), method, args)?,
        ValueKind::Map => map_method(value, method, args)?,
        ValueKind::Seq => list_method(value, method, args)?,
        _ => None,
    };
    match own {
        Some(result) => Ok(result),
        None => unknown_method_callback(state, value, method, args),
    }
}

fn string_method(text: &str, method: &str, args: &[Jinja]) -> Result<Option<Jinja>, Error> {
    let value = match method {
        "strip" | "lstrip" | "rstrip" => {
            let (set,): (Option<&str>,) = from_args(args)?;
            let cut = |c: char| set.map_or_else(|| is_space(c), |set| set.contains(c));
            Jinja::from(match method {
                "strip" => text.trim_matches(cut),
                "lstrip" => text.trim_start_matches(cut),
                _ => text.trim_end_matches(cut),
            })
        }
        "split" | "rsplit" => split(text, method == "rsplit", args)?,
        "splitlines" => {
            let (keep, kwargs): (Option<bool>, Kwargs) = from_args(args)?;
            let keep = keep.or(kwargs.get("keepends")?).unwrap_or(false);
            list(splitlines(text, keep))
        }
        "title" => {
            let () = from_args(args)?;
            Jinja::from(title(text))
        }
        "removeprefix" => {
            let (prefix,): (&str,) = from_args(args)?;
            Jinja::from(text.strip_prefix(prefix).unwrap_or(text))
        }
        "removesuffix" => {
            let (suffix,): (&str,) = from_args(args)?;
            Jinja::from(text.strip_suffix(suffix).unwrap_or(text))
        }
        "partition" => {
            let (separator,): (&str,) = from_args(args)?;
            let parts = text.split_once(separator).map(|(a, b)| [a, separator, b]);
            tuple(parts.unwrap_or([text, "", ""]))
        }
        "rpartition" => {
            let (separator,): (&str,) = from_args(args)?;
            let parts = text.rsplit_once(separator).map(|(a, b)| [a, separator, b]);
            tuple(parts.unwrap_or(["", "", text]))
        }
        "find" | "rfind" | "index" | "rindex" => find(text, method, args)?,
        "ljust" | "rjust" | "center" | "zfill" => pad(text, method, args)?,
        "swapcase" => {
            let () = from_args(args)?;
            Jinja::from(text.chars().map(swap_case).collect::<String>())
        }
        "casefold" => {
            let () = from_args(args)?;
            Jinja::from(text.to_lowercase())
        }
        _ => return Ok(None),
    };
    Ok(Some(value))
}

fn map_method(value: &Jinja, method: &str, args: &[Jinja]) -> Result<Option<Jinja>, Error> {
    match method {
        "copy" => {
            let () = from_args(args)?;
            Ok(Some(value.clone()))
        }
        "update" | "pop" | "popitem" | "clear" | "setdefault" => Err(immutable(method, "dict")),
        _ => Ok(None),
    }
}

fn list_method(value: &Jinja, method: &str, args: &[Jinja]) -> Result<Option<Jinja>, Error> {
    match method {
        "copy" => {
            let () = from_args(args)?;
            Ok(Some(value.clone()))
        }
        "index" => {
            let (wanted,): (&Jinja,) = from_args(args)?;
            let position = value.try_iter()?.position(|item| item == *wanted);
            position
                .map(|position| Some(Jinja::from(position)))
                .ok_or_else(|| invalid(format!("{wanted} is not in list")))
        }
        "append" | "extend" | "insert" | "pop" | "remove" | "clear" | "sort" | "reverse" => {
            Err(immutable(method, "list"))
        }
        _ => Ok(None),
    }
}

/// The `indent` filter: lines after the first, blank ones only where asked.
#[expect(
    clippy::needless_pass_by_value,
    reason = "the engine passes arguments so"
)]
pub(super) fn indent(text: &str, args: Rest<Jinja>, kwargs: Kwargs) -> Result<String, Error> {
    let given = |index: usize, name: &str| -> Result<Option<Jinja>, Error> {
        let keyword: Option<Jinja> = kwargs.get(name)?;
        Ok(args.get(index).cloned().or(keyword))
    };
    let indention = match given(0, "width")? {
        Some(width) => match width.as_usize() {
            Some(width) => " ".repeat(width.min(WIDTH_MAX)),
            None => width.to_string(),
        },
        None => " ".repeat(4),
    };
    let first = given(1, "first")?.is_some_and(|first| first.is_true());
    let blank = given(2, "blank")?.is_some_and(|blank| blank.is_true());
    kwargs.assert_all_used()?;
    // With the newline added, an empty last line counts.
    let text = format!("{text}\n");
    let mut out = String::with_capacity(text.len());
    for (index, line) in splitlines(&text, false).into_iter().enumerate() {
        if index > 0 {
            out.push('\n');
        }
        if if index == 0 {
            first
        } else {
            blank || !line.is_empty()
        } {
            out.push_str(&indention);
        }
        out.push_str(line);
    }
    Ok(out)
}

/// The `trim` filter: Python's idea of white space, or the characters given.
pub(super) fn trim(value: &Jinja, set: Option<&str>) -> String {
    let text = value.to_string();
    match set {
        Some(set) => text.trim_matches(|c| set.contains(c)).to_owned(),
        None => strip(&text).to_owned(),
    }
}

pub(super) fn strip(text: &str) -> &str {
    text.trim_matches(is_space)
}

pub(super) fn rstrip(text: &str) -> &str {
    text.trim_end_matches(is_space)
}

/// Python's `str.isspace`: Unicode white space and the four separators of ASCII.
fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c)
}

fn list<'a>(items: impl IntoIterator<Item = &'a str>) -> Jinja {
    Jinja::from(items.into_iter().map(Jinja::from).collect::<Vec<_>>())
}

fn tuple(items: [&str; 3]) -> Jinja {
    Jinja::from(Tuple::from(items.map(Jinja::from)))
}

fn split(text: &str, from_right: bool, args: &[Jinja]) -> Result<Jinja, Error> {
    let (rest, kwargs): (Rest<Jinja>, Kwargs) = from_args(args)?;
    let separator = rest
        .first()
        .cloned()
        .or(kwargs.get("sep")?)
        .filter(|sep| !sep.is_none());
    let most: Option<i64> = match rest.get(1) {
        Some(most) => Some(i64::try_from(most.clone())?),
        None => kwargs.get("maxsplit")?,
    };
    kwargs.assert_all_used()?;
    let most = most.map_or(usize::MAX, |most| {
        usize::try_from(most).unwrap_or(usize::MAX)
    });
    let parts = match &separator {
        Some(separator) => {
            let separator = separator
                .as_str()
                .filter(|separator| !separator.is_empty())
                .ok_or_else(|| invalid("split needs a non-empty string as separator"))?;
            let pieces = most.saturating_add(1);
            if from_right {
                text.rsplitn(pieces, separator).collect()
            } else {
                text.splitn(pieces, separator).collect()
            }
        }
        None => split_space(text, most, from_right),
    };
    if from_right {
        Ok(list(parts.into_iter().rev()))
    } else {
        Ok(list(parts))
    }
}

/// Splits at runs of white space, in the order found; the remainder keeps its inner spaces.
fn split_space(text: &str, most: usize, from_right: bool) -> Vec<&str> {
    let mut parts = Vec::new();
    let mut rest = text;
    loop {
        rest = if from_right {
            rest.trim_end_matches(is_space)
        } else {
            rest.trim_start_matches(is_space)
        };
        if rest.is_empty() {
            return parts;
        }
        let at = if from_right {
            rest.rfind(is_space)
        } else {
            rest.find(is_space)
        };
        let Some(at) = at.filter(|_| parts.len() < most) else {
            parts.push(rest);
            return parts;
        };
        let width = rest[at..].chars().next().map_or(1, char::len_utf8);
        let (left, right) = (&rest[..at], &rest[at + width..]);
        parts.push(if from_right { right } else { left });
        rest = if from_right { left } else { right };
    }
}

fn splitlines(text: &str, keep: bool) -> Vec<&str> {
    let mut lines = Vec::new();
    let mut start = 0;
    let mut chars = text.char_indices().peekable();
    while let Some((at, c)) = chars.next() {
        let is_break = matches!(
            c,
            '\n' | '\r' | '\u{b}' | '\u{c}' | '\u{1c}'
                ..='\u{1e}' | '\u{85}' | '\u{2028}' | '\u{2029}'
        );
        if !is_break {
            continue;
        }
        let mut end = at + c.len_utf8();
        if c == '\r' && chars.next_if(|(_, next)| *next == '\n').is_some() {
            end += 1;
        }
        lines.push(&text[start..if keep { end } else { at }]);
        start = end;
    }
    if start < text.len() {
        lines.push(&text[start..]);
    }
    lines
}

/// Upper case after anything that is not cased, lower case after a cased character.
fn title(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut inside = false;
    for c in text.chars() {
        if inside {
            out.extend(c.to_lowercase());
        } else {
            out.extend(c.to_uppercase());
        }
        inside = c.is_lowercase() || c.is_uppercase();
    }
    out
}

fn swap_case(c: char) -> char {
    let (upper, lower) = (c.to_uppercase().next(), c.to_lowercase().next());
    if c.is_lowercase() {
        upper.unwrap_or(c)
    } else {
        lower.unwrap_or(c)
    }
}

/// Positions in characters, as Python counts.
fn find(text: &str, method: &str, args: &[Jinja]) -> Result<Jinja, Error> {
    let (wanted, from): (&str, Option<usize>) = from_args(args)?;
    let skipped = from.unwrap_or(0);
    let start = text
        .char_indices()
        .nth(skipped)
        .map_or(text.len(), |(at, _)| at);
    let found = if method.starts_with('r') {
        text[start..].rfind(wanted)
    } else {
        text[start..].find(wanted)
    };
    match found {
        Some(at) => Ok(Jinja::from(text[..start + at].chars().count())),
        None if method.ends_with("find") => Ok(Jinja::from(-1)),
        None => Err(invalid("substring not found")),
    }
}

fn pad(text: &str, method: &str, args: &[Jinja]) -> Result<Jinja, Error> {
    let (width, fill): (usize, Option<&str>) = from_args(args)?;
    let missing = width.min(WIDTH_MAX).saturating_sub(text.chars().count());
    let fill = if method == "zfill" {
        "0"
    } else {
        fill.unwrap_or(" ")
    };
    let (left, right) = match method {
        "ljust" => (0, missing),
        "center" => {
            let left = missing / 2 + (missing & width & 1);
            (left, missing - left)
        }
        _ => (missing, 0),
    };
    // zfill pads after a sign.
    let signed = method == "zfill" && text.starts_with(['+', '-']);
    let (sign, digits) = text.split_at(usize::from(signed));
    Ok(Jinja::from(format!(
        "{sign}{}{digits}{}",
        fill.repeat(left),
        fill.repeat(right)
    )))
}

fn invalid(detail: impl Into<std::borrow::Cow<'static, str>>) -> Error {
    Error::new(ErrorKind::InvalidOperation, detail)
}

fn immutable(method: &str, kind: &str) -> Error {
    invalid(format!(
        "a template cannot change its input: {kind}.{method} is not available"
    ))
}
