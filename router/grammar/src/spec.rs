//! What a request asks for, before it is compiled.

use serde_json::Value;

/// The form that a text is to have. Every API translates its own fields to this.
#[derive(Debug, Clone, PartialEq)]
pub enum GrammarSpec {
    /// JSON that validates against a schema (draft 2020-12), an object.
    JsonSchema(Value),
    /// Any JSON object.
    AnyJsonObject,
    /// A regular expression that the whole text matches.
    Regex(String),
    /// A grammar in llguidance's dialect of Lark; its rule `start` is the whole text.
    Lark(String),
}

// === impl GrammarSpec ===

impl GrammarSpec {
    /// What kind of grammar it is, and its text: equal ones mean the same.
    pub(crate) fn key(&self) -> (&'static str, String) {
        match self {
            Self::JsonSchema(schema) => ("schema", schema.to_string()),
            Self::AnyJsonObject => ("object", String::new()),
            Self::Regex(pattern) => ("regex", pattern.clone()),
            Self::Lark(text) => ("lark", text.clone()),
        }
    }
}
