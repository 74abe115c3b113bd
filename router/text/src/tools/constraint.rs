//! What a text may be that has to be calls: a grammar, as a value.
//!
//! The grammar is Lark's dialect of llguidance: rules in lower case, `%json` for the values of a
//! JSON schema, `<[7]>` for a token by its id. A tool's schema is the root of a `%json` of its own,
//! so that `$ref` and `$defs` in it mean what they meant where the caller wrote them.

use std::fmt::Write;

use serde_json::{Value, json};

use super::{CallsMax, Marker, ToolFormat, ToolStyle};

/// A grammar of calls.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ToolConstraint {
    /// In Lark's notation, from `start`.
    pub lark: String,
}

/// Which functions must be called.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CallsAsked<'a> {
    /// Any of them.
    Any,
    /// The one of this name.
    Named(&'a str),
}

/// Python's values. They are not held to a schema, only to the language.
const PYTHON: &str = r#"value: STRING | NUMBER | "True" | "False" | "None" | list | dict
list: "[" (value (", " value)*)? "]"
dict: "{" (entry (", " entry)*)? "}"
entry: STRING ": " value
STRING: /"([^"\\\n]|\\.)*"/
NUMBER: /-?[0-9]+(\.[0-9]+)?/
NAME: /[A-Za-z_][A-Za-z0-9_]*/
"#;

// === impl ToolStyle ===

impl ToolStyle {
    /// The grammar of a text that is calls of these tools and nothing else, in this model's
    /// format. `None` if calls are not looked for, or there is no tool of that name.
    pub fn constraint(
        &self,
        tools: &[Value],
        asked: CallsAsked<'_>,
        calls_max: CallsMax,
    ) -> Option<ToolConstraint> {
        let format = self.format?;
        let functions = tools.iter().map(|tool| &tool["function"]);
        let functions: Vec<&Value> = functions
            .filter(|function| match asked {
                CallsAsked::Any => true,
                CallsAsked::Named(name) => function["name"] == name,
            })
            .collect();
        if functions.is_empty() {
            return None;
        }
        let mut lark = self.start(format, calls_max);
        let names: Vec<String> = (0..functions.len()).map(|n| format!("f{n}")).collect();
        line(&mut lark, &format!("function: {}", names.join(" | ")));
        for (rule, function) in names.iter().zip(functions) {
            match format {
                ToolFormat::Pythonic => python(&mut lark, rule, function),
                ToolFormat::Mistral if self.marker_id(Marker::Arguments).is_some() => {
                    let name = function["name"].as_str().unwrap_or_default();
                    let arguments = self.mark(format, Marker::Arguments);
                    let before = format!("{} {arguments}", quoted(name));
                    schema(&mut lark, rule, function, &before, "");
                }
                ToolFormat::Llama3Json | ToolFormat::Json => {
                    object(&mut lark, rule, function, "parameters");
                }
                ToolFormat::Hermes | ToolFormat::Mistral => {
                    object(&mut lark, rule, function, "arguments");
                }
            }
        }
        if format == ToolFormat::Pythonic {
            lark.push_str(PYTHON);
        }
        Some(ToolConstraint { lark })
    }

    /// The rule of the whole text, made of `function`.
    fn start(&self, format: ToolFormat, calls_max: CallsMax) -> String {
        let listed = || match calls_max {
            CallsMax::One => r#""[" function "]""#.to_owned(),
            CallsMax::Many => r#""[" function (", " function)* "]""#.to_owned(),
        };
        let repeated = |one: String, between: &str| match calls_max {
            CallsMax::One => one,
            CallsMax::Many => format!("{one} ({between}{one})*"),
        };
        let open = self.mark(format, Marker::Open);
        let start = match format {
            ToolFormat::Llama3Json => repeated("function".to_owned(), "\"; \" "),
            ToolFormat::Json if calls_max == CallsMax::One => "function".to_owned(),
            ToolFormat::Json | ToolFormat::Pythonic => listed(),
            ToolFormat::Hermes => {
                let close = self.mark(format, Marker::Close);
                let one = format!(r#"{open} "\n" function "\n" {close}"#);
                repeated(one, "\"\\n\" ")
            }
            ToolFormat::Mistral if self.marker_id(Marker::Arguments).is_some() => {
                repeated(format!("{open} function"), "")
            }
            ToolFormat::Mistral => format!("{open} {}", listed()),
        };
        format!("start: {start}\n")
    }

    /// A marker in a rule: its token, or its text.
    fn mark(&self, format: ToolFormat, marker: Marker) -> String {
        if let Some(id) = self.marker_id(marker) {
            return format!("<[{id}]>");
        }
        let found = format.markers().iter().find(|(_, known)| *known == marker);
        found.map_or_else(String::new, |(text, _)| quoted(text))
    }
}

// === free functions ===

fn line(lark: &mut String, text: &str) {
    writeln!(lark, "{text}").expect("writing to a string cannot fail");
}

/// A literal; Lark's strings have JSON's escapes.
fn quoted(text: &str) -> String {
    Value::from(text).to_string()
}

/// `{"name": "f", "<key>": …}`.
fn object(lark: &mut String, rule: &str, function: &Value, key: &str) {
    let before = format!(r#"{{"name": {}, "{key}": "#, function["name"]);
    schema(lark, rule, function, &quoted(&before), "\"}\"");
}

/// A rule of arguments by their schema, with something around them.
fn schema(lark: &mut String, rule: &str, function: &Value, before: &str, after: &str) {
    line(
        lark,
        format!("{rule}: {before} {rule}_arguments {after}").trim_end(),
    );
    let any = json!({"type": "object"});
    let schema = function
        .get("parameters")
        .filter(|schema| !schema.is_null());
    line(
        lark,
        &format!("{rule}_arguments: %json {}", schema.unwrap_or(&any)),
    );
}

/// `f(a=…, b=…)`.
fn python(lark: &mut String, rule: &str, function: &Value) {
    let name = function["name"].as_str().unwrap_or_default();
    let open = quoted(&format!("{name}("));
    let argument = format!("{rule}_argument");
    line(
        lark,
        &format!("{rule}: {open} ({argument} (\", \" {argument})*)? \")\""),
    );
    let properties = function["parameters"]["properties"].as_object();
    let keys: Vec<String> = properties
        .into_iter()
        .flatten()
        .map(|(key, _)| quoted(key))
        .collect();
    let keys = if keys.is_empty() {
        "NAME".to_owned()
    } else {
        format!("({})", keys.join(" | "))
    };
    line(lark, &format!("{argument}: {keys} \"=\" value"));
}
