//! Where a model's templates are: the files of transformers 4 and 5.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::Value;

use super::{DEFAULT, TemplateError};
use crate::special::{read_json, read_optional};
use crate::tokenizer::LoadError;

/// A template's name and its text.
type Source = (String, String);

/// Files that may hold a template under `chat_template`; the first that does counts.
const JSON_FILES: [&str; 3] = [
    "chat_template.json",
    "tokenizer_config.json",
    "processor_config.json",
];

pub(super) fn from_file(path: &Path) -> Result<Vec<Source>, TemplateError> {
    let bytes = std::fs::read(path).map_err(|source| TemplateError::Override {
        path: path.to_owned(),
        source,
    })?;
    // A JSON file with the key is taken as such; everything else is the template itself.
    if path
        .extension()
        .is_some_and(|extension| extension == "json")
        && let Ok(config) = serde_json::from_slice::<Value>(&bytes)
        && let Some(template) = config.get("chat_template")
    {
        return json_sources(template, path);
    }
    Ok(vec![(DEFAULT.to_owned(), utf8(bytes, path)?)])
}

pub(super) fn from_folder(dir: &Path) -> Result<Vec<Source>, TemplateError> {
    let path = dir.join("chat_template.jinja");
    let mut sources = Vec::new();
    if let Some(bytes) = read_optional(&path)? {
        sources.push((DEFAULT.to_owned(), utf8(bytes, &path)?));
    }
    sources.extend(additional_sources(&dir.join("additional_chat_templates"))?);
    if !sources.is_empty() {
        return Ok(sources);
    }
    for file in JSON_FILES {
        let path = dir.join(file);
        let config = read_json(&path)?;
        if let Some(template) = config
            .as_ref()
            .and_then(|config| config.get("chat_template"))
            && !template.is_null()
        {
            return json_sources(template, &path);
        }
    }
    Ok(Vec::new())
}

/// The named templates beside `chat_template.jinja`, in the order of their names.
fn additional_sources(dir: &Path) -> Result<Vec<Source>, TemplateError> {
    let entries = match std::fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(source) => {
            return Err(LoadError::Read {
                path: dir.to_owned(),
                source,
            }
            .into());
        }
    };
    let mut sources = BTreeMap::new();
    for path in entries.filter_map(Result::ok).map(|entry| entry.path()) {
        if path
            .extension()
            .is_some_and(|extension| extension == "jinja")
            && let Some(name) = path.file_stem().and_then(|stem| stem.to_str())
            && let Some(bytes) = read_optional(&path)?
        {
            sources.insert(name.to_owned(), utf8(bytes, &path)?);
        }
    }
    Ok(sources.into_iter().collect())
}

/// A string, or a list of `{name, template}`.
fn json_sources(template: &Value, path: &Path) -> Result<Vec<Source>, TemplateError> {
    let named = |entry: &Value| {
        let text = |key| entry.get(key).and_then(Value::as_str).map(str::to_owned);
        text("name").zip(text("template"))
    };
    let sources = match template {
        Value::String(source) => Some(vec![(DEFAULT.to_owned(), source.clone())]),
        Value::Array(list) => list.iter().map(named).collect(),
        Value::Object(map) => map
            .iter()
            .map(|(name, source)| Some((name.clone(), source.as_str()?.to_owned())))
            .collect(),
        Value::Null | Value::Bool(_) | Value::Number(_) => None,
    };
    sources.ok_or_else(|| TemplateError::Shape {
        path: path.to_owned(),
    })
}

fn utf8(bytes: Vec<u8>, path: &Path) -> Result<String, TemplateError> {
    String::from_utf8(bytes).map_err(|_| TemplateError::NotUtf8 {
        path: path.to_owned(),
    })
}

/// `{% generation %}` marks the assistant's tokens for training. It renders its body in a scope
/// of its own, which is what an empty `with` does.
pub(super) fn without_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(at) = rest.find("{%") {
        let (before, tag) = rest.split_at(at + 2);
        out.push_str(before);
        rest = tag;
        let Some(end) = tag.find("%}") else {
            break;
        };
        let inside = &tag[..end];
        let word = inside
            .trim_start_matches(['-', '+'])
            .trim_end_matches(['-', '+'])
            .trim();
        let other = match word {
            "generation" => "with",
            "endgeneration" => "endwith",
            _ => continue,
        };
        out.push_str(&inside.replacen(word, other, 1));
        rest = &tag[end..];
    }
    out.push_str(rest);
    out
}
