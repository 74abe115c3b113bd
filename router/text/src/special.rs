//! What the files beside a tokenizer say of its special tokens, in the spellings of
//! transformers 4 and 5.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::Value;

use crate::tokenizer::{LoadError, Tokenizer};

/// The special tokens by name: `bos_token`, `eos_token`, `unk_token`, `pad_token`, ….
#[derive(Debug, Clone, Default)]
pub(crate) struct SpecialNames(BTreeMap<String, String>);

// === impl SpecialNames ===

impl SpecialNames {
    /// From `tokenizer_config.json`, and for names it lacks from `special_tokens_map.json`.
    pub(crate) fn load(dir: &Path) -> Result<Self, LoadError> {
        let mut names = BTreeMap::new();
        for file in ["tokenizer_config.json", "special_tokens_map.json"] {
            let Some(Value::Object(config)) = read_json(&dir.join(file))? else {
                continue;
            };
            for (name, value) in config {
                if name.ends_with("_token")
                    && let Some(content) = token_content(&value)
                {
                    names.entry(name).or_insert_with(|| content.to_owned());
                }
            }
        }
        Ok(Self(names))
    }

    pub(crate) fn by_name(&self) -> &BTreeMap<String, String> {
        &self.0
    }
}

/// The ids that end a generation: `generation_config.json`, else `config.json` (at its top or
/// in `text_config`), else the tokenizer's end-of-sequence token.
pub(crate) fn ending_ids(dir: &Path, tokenizer: &Tokenizer) -> Result<Vec<u32>, LoadError> {
    for file in ["generation_config.json", "config.json"] {
        let Some(config) = read_json(&dir.join(file))? else {
            continue;
        };
        for holder in [Some(&config), config.get("text_config")]
            .into_iter()
            .flatten()
        {
            let ids = holder.get("eos_token_id").map(ids_of).unwrap_or_default();
            if !ids.is_empty() {
                return Ok(ids);
            }
        }
    }
    let eos = tokenizer.special_names().get("eos_token");
    Ok(eos
        .and_then(|token| tokenizer.token_id(token))
        .into_iter()
        .collect())
}

/// Tokens at most that a text of this tokenizer is meant to have: `model_max_length` of
/// `tokenizer_config.json`. Files without a bound of their own have a number there that is none.
pub(crate) fn tokens_max(dir: &Path) -> Result<Option<u32>, LoadError> {
    let config = read_json(&dir.join("tokenizer_config.json"))?;
    let given = config.as_ref().and_then(|c| c.get("model_max_length"));
    let given = given.and_then(Value::as_u64).filter(|given| *given > 0);
    Ok(given.and_then(|given| u32::try_from(given).ok()))
}

/// One id or a list of them; anything else is no id.
fn ids_of(value: &Value) -> Vec<u32> {
    let list = value
        .as_array()
        .map_or(std::slice::from_ref(value), Vec::as_slice);
    let mut ids = Vec::with_capacity(list.len());
    for id in list
        .iter()
        .filter_map(Value::as_u64)
        .filter_map(|id| u32::try_from(id).ok())
    {
        if !ids.contains(&id) {
            ids.push(id);
        }
    }
    ids
}

/// A token as a string, or as the dict of a serialized `AddedToken`.
fn token_content(value: &Value) -> Option<&str> {
    value
        .as_str()
        .or_else(|| value.get("content").and_then(Value::as_str))
}

/// `None` for a file that does not exist.
pub(crate) fn read_optional(path: &Path) -> Result<Option<Vec<u8>>, LoadError> {
    match std::fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(LoadError::Read {
            path: path.to_owned(),
            source,
        }),
    }
}

/// `None` for a file that does not exist.
pub(crate) fn read_json(path: &Path) -> Result<Option<Value>, LoadError> {
    let Some(bytes) = read_optional(path)? else {
        return Ok(None);
    };
    let value = serde_json::from_slice(&bytes).map_err(|source| LoadError::Json {
        path: path.to_owned(),
        source,
    })?;
    Ok(Some(value))
}
