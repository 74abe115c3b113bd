//! Calls of earlier turns, as a chat template wants them.

use serde_json::{Map, Value, json};

use super::{ToolFormat, ToolStyle};
use crate::chat::{ChatInput, ChatTemplate, TemplateError};

/// What a template makes of a message's calls. OpenAI's API has their arguments as a text, most
/// templates as the object that the text stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CallsAs {
    /// The template puts the arguments' text where it belongs: byte for byte what the model wrote.
    Text,
    /// The template writes the arguments' object itself.
    Object,
    /// The template does not show calls: they are written into the message's content.
    Content,
}

const PROBE_TOOL: &str = "headrace_probe";

/// Arguments that are found again in a rendered text, and their key.
const PROBE: &str = r#"{"headrace_key": "1"}"#;
const PROBE_KEY: &str = "headrace_key";

// === impl CallsAs ===

impl CallsAs {
    /// Renders a call whose arguments are a text, to see whether they stay one, and if not, one
    /// whose arguments are an object. A template that takes both gets the text, so that it repeats
    /// the model's own tokens.
    pub(super) fn of_template(template: &ChatTemplate) -> Self {
        let as_text = rendered(template, &PROBE.into());
        let as_object = rendered(template, &json!({PROBE_KEY: "1"}));
        match (as_text, as_object) {
            (Ok(text), _) if text.contains(PROBE) => Self::Text,
            (Ok(text), Ok(object)) if !shows(&text) && !shows(&object) => Self::Content,
            // One that wants another conversation is most likely to know about calls.
            (Ok(_) | Err(_), Ok(_) | Err(_)) => Self::Object,
        }
    }
}

// === impl ToolStyle ===

impl ToolStyle {
    /// Puts the calls of a message where the template looks for them. Arguments that are not JSON,
    /// such as those of a call that was cut, stay text.
    pub fn place_calls(&self, message: &mut Map<String, Value>) {
        let Some(Value::Array(calls)) = message.get_mut("tool_calls") else {
            return;
        };
        if calls.is_empty() {
            message.shift_remove("tool_calls");
            return;
        }
        match self.calls {
            CallsAs::Text => calls.iter_mut().filter_map(arguments).for_each(into_text),
            CallsAs::Object => calls.iter_mut().filter_map(arguments).for_each(into_object),
            CallsAs::Content => {
                let text = self.written(calls);
                message.shift_remove("tool_calls");
                let before = message.get("content").and_then(Value::as_str);
                let content = match before {
                    Some(before) if !before.is_empty() => format!("{before}\n{text}"),
                    Some(_) | None => text,
                };
                message.insert("content".to_owned(), content.into());
            }
        }
    }

    /// Calls as the model would have written them.
    fn written(&self, calls: &mut [Value]) -> String {
        let format = self.format.unwrap_or(ToolFormat::Json);
        let call = |call: &mut Value| {
            let function = call.get("function").unwrap_or(call);
            let name = function["name"].as_str().unwrap_or_default().to_owned();
            let arguments = arguments(call).map_or(Value::Null, |arguments| {
                into_text(arguments);
                arguments.take()
            });
            format.write(&name, arguments.as_str().unwrap_or("{}"))
        };
        let calls: Vec<String> = calls.iter_mut().map(call).collect();
        calls.join("\n")
    }
}

// === free functions ===

/// Whether a template shows the tools it is given.
pub(super) fn shows_tools(template: &ChatTemplate) -> bool {
    let input = ChatInput {
        messages: json!([{"role": "user", "content": "a"}]),
        tools: Some(probe_tools()),
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

/// A conversation with a call in it.
fn rendered(template: &ChatTemplate, arguments: &Value) -> Result<String, TemplateError> {
    let function = json!({"name": PROBE_TOOL, "arguments": arguments});
    let call = json!({"id": "abcdefghi", "type": "function", "function": function});
    let messages = json!([
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "b", "name": PROBE_TOOL, "tool_call_id": "abcdefghi"},
    ]);
    template.render(&ChatInput {
        messages,
        tools: Some(probe_tools()),
        add_generation_prompt: true,
        ..ChatInput::default()
    })
}

fn shows(text: &str) -> bool {
    text.contains(PROBE_KEY)
}

fn probe_tools() -> Value {
    let parameters = json!({"type": "object", "properties": {}});
    let function = json!({"name": PROBE_TOOL, "description": "c", "parameters": parameters});
    json!([{"type": "function", "function": function}])
}

/// Where a call has its arguments: with its function, or beside its name.
fn arguments(call: &mut Value) -> Option<&mut Value> {
    if call.get("function").is_some() {
        call.get_mut("function")?.get_mut("arguments")
    } else {
        call.get_mut("arguments")
    }
}

fn into_text(arguments: &mut Value) {
    if !arguments.is_string() {
        *arguments = arguments.to_string().into();
    }
}

fn into_object(arguments: &mut Value) {
    let Some(text) = arguments.as_str() else {
        return;
    };
    if text.trim().is_empty() {
        *arguments = json!({});
    } else if let Ok(parsed) = serde_json::from_str(text) {
        *arguments = parsed;
    }
}
