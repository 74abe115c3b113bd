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
    /// The grammar's text and what kind it is: equal ones mean the same.
    pub(crate) fn key(&self) -> String {
        match self {
            Self::JsonSchema(schema) => format!("schema {schema}"),
            Self::AnyJsonObject => "object".to_owned(),
            Self::Regex(pattern) => format!("regex {pattern}"),
            Self::Lark(text) => format!("lark {text}"),
        }
    }
}
