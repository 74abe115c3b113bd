//! The formats that models write calls in.

use std::str::FromStr;

use super::Marker;

/// How a model writes its calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ToolFormat {
    /// `{"name": …, "parameters": {…}}`, several with `;` between, `<|python_tag|>` before or not.
    Llama3Json,
    /// `[f(a=1), g()]`.
    Pythonic,
    /// `<tool_call>{"name": …, "arguments": {…}}</tool_call>`, repeated.
    Hermes,
    /// `[TOOL_CALLS][{"name": …, "arguments": {…}}, …]` or `[TOOL_CALLS]name[ARGS]{…}`, repeated.
    Mistral,
    /// JSON objects or arrays of them, among text.
    Json,
}

const NAMES: [(&str, ToolFormat); 5] = [
    ("llama3-json", ToolFormat::Llama3Json),
    ("pythonic", ToolFormat::Pythonic),
    ("hermes", ToolFormat::Hermes),
    ("mistral", ToolFormat::Mistral),
    ("json", ToolFormat::Json),
];

/// What in a template's text tells a format. The first that is there counts.
const SIGNS: [(&str, ToolFormat); 6] = [
    ("[TOOL_CALLS]", ToolFormat::Mistral),
    ("<tool_call>", ToolFormat::Hermes),
    ("<|python_start|>", ToolFormat::Pythonic),
    ("func_name1(", ToolFormat::Pythonic),
    ("<|python_tag|>", ToolFormat::Llama3Json),
    ("\"parameters\": ", ToolFormat::Llama3Json),
];

/// A call is not JSON, although one of [`SIGNS`] is around it.
const NOT_JSON: &str = "<function=";

// === impl ToolFormat ===

impl ToolFormat {
    /// What `--tool-call-parser` calls it.
    pub fn name(self) -> &'static str {
        NAMES
            .iter()
            .find(|(_, format)| *format == self)
            .map_or("json", |(name, _)| name)
    }

    /// The format that a chat template teaches; JSON where it teaches none that is known.
    pub fn of_template(source: &str) -> Self {
        let sign = |(sign, format): &(&str, Self)| source.contains(sign).then_some(*format);
        match SIGNS.iter().find_map(sign) {
            Some(Self::Hermes) if source.contains(NOT_JSON) => Self::Json,
            Some(format) => format,
            None => Self::Json,
        }
    }

    /// The marks that this format has, as text.
    pub(super) fn markers(self) -> &'static [(&'static str, Marker)] {
        match self {
            Self::Llama3Json => &[("<|python_tag|>", Marker::Open)],
            Self::Pythonic => &[
                ("<|python_start|>", Marker::Open),
                ("<|python_end|>", Marker::Close),
            ],
            Self::Hermes => &[
                ("<tool_call>", Marker::Open),
                ("</tool_call>", Marker::Close),
            ],
            Self::Mistral => &[
                ("[TOOL_CALLS]", Marker::Open),
                ("[ARGS]", Marker::Arguments),
                ("[CALL_ID]", Marker::CallId),
            ],
            Self::Json => &[],
        }
    }

    /// How to write a call, for models whose template does not say.
    pub(super) fn example(self) -> &'static str {
        match self {
            Self::Llama3Json | Self::Json => {
                r#"{"name": "the function", "parameters": {"an argument": "its value"}}"#
            }
            Self::Pythonic => r#"[the_function(an_argument="its value")]"#,
            Self::Hermes => {
                "<tool_call>\n{\"name\": \"the function\", \
                 \"arguments\": {\"an argument\": \"its value\"}}\n</tool_call>"
            }
            Self::Mistral => {
                "[TOOL_CALLS][{\"name\": \"the function\", \
                 \"arguments\": {\"an argument\": \"its value\"}}]"
            }
        }
    }
}

impl FromStr for ToolFormat {
    type Err = ();

    fn from_str(name: &str) -> Result<Self, ()> {
        let known = NAMES.iter().find(|(known, _)| *known == name);
        known.map(|(_, format)| *format).ok_or(())
    }
}
