//! The formats that models write calls in.

use std::str::FromStr;

use serde_json::{Map, Value};

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
    /// `<tool_call><function=f><parameter=a>…</parameter></function></tool_call>`, repeated.
    Qwen3Coder,
    /// `<｜tool▁call▁begin｜>function<｜tool▁sep｜>f`, arguments in a fence of JSON,
    /// `<｜tool▁call▁end｜>`; all calls in a pair of marks.
    DeepSeekV3,
    /// `<｜tool▁call▁begin｜>f<｜tool▁sep｜>{…}<｜tool▁call▁end｜>`; all calls in a pair of marks.
    DeepSeekV31,
    /// JSON objects or arrays of them, among text.
    Json,
}

const NAMES: [(&str, ToolFormat); 8] = [
    ("llama3-json", ToolFormat::Llama3Json),
    ("pythonic", ToolFormat::Pythonic),
    ("hermes", ToolFormat::Hermes),
    ("mistral", ToolFormat::Mistral),
    ("qwen3_coder", ToolFormat::Qwen3Coder),
    ("deepseek_v3", ToolFormat::DeepSeekV3),
    ("deepseek_v31", ToolFormat::DeepSeekV31),
    ("json", ToolFormat::Json),
];

/// What in a template's text tells a format. The first that is there counts.
const SIGNS: [(&str, ToolFormat); 7] = [
    ("<｜tool▁call▁begin｜>", ToolFormat::DeepSeekV31),
    ("[TOOL_CALLS]", ToolFormat::Mistral),
    ("<tool_call>", ToolFormat::Hermes),
    ("<|python_start|>", ToolFormat::Pythonic),
    ("func_name1(", ToolFormat::Pythonic),
    ("<|python_tag|>", ToolFormat::Llama3Json),
    ("\"parameters\": ", ToolFormat::Llama3Json),
];

/// Inside the marks of Hermes' form: no JSON, but tags; and if these are there, too, Qwen3-Coder's.
const FUNCTION_TAG: &str = "<function=";
const PARAMETER_TAG: &str = "<parameter=";

/// Inside DeepSeek's marks, what its older form has around arguments.
const FENCE: &str = "```json";

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
            Some(Self::Hermes) if source.contains(FUNCTION_TAG) => {
                if source.contains(PARAMETER_TAG) {
                    Self::Qwen3Coder
                } else {
                    Self::Json
                }
            }
            Some(Self::DeepSeekV31) if source.contains(FENCE) => Self::DeepSeekV3,
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
            Self::Hermes | Self::Qwen3Coder => &[
                ("<tool_call>", Marker::Open),
                ("</tool_call>", Marker::Close),
            ],
            Self::Mistral => &[
                ("[TOOL_CALLS]", Marker::Open),
                ("[ARGS]", Marker::Arguments),
                ("[CALL_ID]", Marker::CallId),
            ],
            Self::DeepSeekV3 | Self::DeepSeekV31 => &[
                ("<｜tool▁calls▁begin｜>", Marker::ListOpen),
                ("<｜tool▁call▁begin｜>", Marker::Open),
                ("<｜tool▁sep｜>", Marker::Arguments),
                ("<｜tool▁call▁end｜>", Marker::Close),
                ("<｜tool▁calls▁end｜>", Marker::ListClose),
            ],
            Self::Json => &[],
        }
    }

    /// A call of a function, written in this format; `arguments` is the text of a JSON object.
    pub(super) fn write(self, name: &str, arguments: &str) -> String {
        match self {
            Self::Llama3Json | Self::Json => object(name, "parameters", arguments),
            Self::Hermes => {
                let object = object(name, "arguments", arguments);
                format!("<tool_call>\n{object}\n</tool_call>")
            }
            Self::Mistral => format!("[TOOL_CALLS][{}]", object(name, "arguments", arguments)),
            Self::Qwen3Coder => {
                let argument = |(key, value): (&String, &Value)| {
                    let text = value.as_str().map(str::to_owned);
                    let text = text.unwrap_or_else(|| value.to_string());
                    format!("<parameter={key}>\n{text}\n</parameter>\n")
                };
                let arguments: String = parsed(arguments).iter().map(argument).collect();
                format!("<tool_call>\n<function={name}>\n{arguments}</function>\n</tool_call>")
            }
            Self::DeepSeekV3 => in_list(&format!(
                "<｜tool▁call▁begin｜>function<｜tool▁sep｜>{name}\n```json\n{arguments}\n```\
                 <｜tool▁call▁end｜>"
            )),
            Self::DeepSeekV31 => in_list(&format!(
                "<｜tool▁call▁begin｜>{name}<｜tool▁sep｜>{arguments}<｜tool▁call▁end｜>"
            )),
            Self::Pythonic => {
                let arguments = parsed(arguments);
                let argument = |(key, value): (&String, &Value)| format!("{key}={}", python(value));
                let arguments: Vec<String> = arguments.iter().map(argument).collect();
                format!("[{name}({})]", arguments.join(", "))
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

// === free functions ===

fn parsed(arguments: &str) -> Map<String, Value> {
    serde_json::from_str(arguments).unwrap_or_default()
}

/// DeepSeek's marks around calls.
fn in_list(calls: &str) -> String {
    format!("<｜tool▁calls▁begin｜>{calls}<｜tool▁calls▁end｜>")
}

fn object(name: &str, key: &str, arguments: &str) -> String {
    let name = Value::from(name);
    format!("{{\"name\": {name}, \"{key}\": {arguments}}}")
}

/// A value as a Python literal.
fn python(value: &Value) -> String {
    match value {
        Value::Null => "None".to_owned(),
        Value::Bool(true) => "True".to_owned(),
        Value::Bool(false) => "False".to_owned(),
        Value::Number(_) | Value::String(_) => value.to_string(),
        Value::Array(items) => {
            let items: Vec<String> = items.iter().map(python).collect();
            format!("[{}]", items.join(", "))
        }
        Value::Object(map) => {
            let item = |(key, value): (&String, &Value)| {
                format!("{}: {}", Value::from(key.as_str()), python(value))
            };
            let items: Vec<String> = map.iter().map(item).collect();
            format!("{{{}}}", items.join(", "))
        }
    }
}
