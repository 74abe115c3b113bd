//! Calls of earlier turns, as a chat template wants them.

use serde_json::{Value, json};

use crate::chat::{ChatInput, ChatTemplate};

/// What a template makes of a call's arguments. OpenAI's API has them as a text, most templates
/// as the object that the text stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ArgumentsAs {
    /// The template puts the text where it belongs: byte for byte what the model wrote.
    Text,
    /// The template writes the object itself.
    Object,
}

/// Arguments that are found again in a rendered text.
const PROBE: &str = r#"{"headrace_probe": "1"}"#;
const PROBE_TOOL: &str = "headrace_probe";

// === impl ArgumentsAs ===

impl ArgumentsAs {
    /// Renders a call whose arguments are a text, to see whether they stay one. A template that
    /// takes both gets the text, so that it repeats the model's own tokens.
    pub(super) fn of_template(template: &ChatTemplate) -> Self {
        let function = json!({"name": PROBE_TOOL, "arguments": PROBE});
        let messages = json!([
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "",
                "tool_calls": [{"id": "abcdefghi", "type": "function", "function": function}]},
            {"role": "tool", "content": "b", "name": PROBE_TOOL, "tool_call_id": "abcdefghi"},
        ]);
        let input = ChatInput {
            messages,
            tools: Some(json!([probe_tool()])),
            add_generation_prompt: true,
            ..ChatInput::default()
        };
        match template.render(&input) {
            Ok(text) if text.contains(PROBE) => Self::Text,
            Ok(_) | Err(_) => Self::Object,
        }
    }

    /// Puts the arguments of a message's calls into this form. Text that is not JSON, such as
    /// that of a call that was cut, stays text.
    pub fn apply(self, calls: &mut [Value]) {
        for call in calls {
            let holder = match call.get_mut("function") {
                Some(function) => function.get_mut("arguments"),
                None => call.get_mut("arguments"),
            };
            let Some(arguments) = holder else {
                continue;
            };
            match (self, &*arguments) {
                (Self::Object, Value::String(text)) if text.trim().is_empty() => {
                    *arguments = json!({});
                }
                (Self::Object, Value::String(text)) => {
                    if let Ok(parsed) = serde_json::from_str(text) {
                        *arguments = parsed;
                    }
                }
                (Self::Text, Value::Object(_)) => *arguments = arguments.to_string().into(),
                (Self::Object | Self::Text, _) => {}
            }
        }
    }
}

// === free functions ===

/// Whether a template shows the tools it is given.
pub(super) fn shows_tools(template: &ChatTemplate) -> bool {
    let input = ChatInput {
        messages: json!([{"role": "user", "content": "a"}]),
        tools: Some(json!([probe_tool()])),
        add_generation_prompt: true,
        ..ChatInput::default()
    };
    match template.render(&input) {
        Ok(text) => text.contains(PROBE_TOOL),
        // It wants another conversation than the shortest.
        Err(_) => template
            .source(true)
            .is_some_and(|source| source.contains("tools")),
    }
}

fn probe_tool() -> Value {
    let parameters = json!({"type": "object", "properties": {}});
    let function = json!({"name": PROBE_TOOL, "description": "c", "parameters": parameters});
    json!({"type": "function", "function": function})
}
