//! What a text may be that has to be calls: a grammar, as a value.
//!
//! The grammar is Lark's dialect of llguidance: rules in lower case, `%json` for the values of a
//! JSON schema, `<[7]>` for a token by its id. A tool's schema is the root of a `%json` of its own,
//! so that `$ref` and `$defs` in it mean what they meant where the caller wrote them.

use std::fmt::Write;

use serde_json::{Map, Value, json};

use super::signature::{Kind, Signature};
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

/// Whatever ends with the tag that ends an argument, on a line of its own.
const TAGGED: &str = r"tagged[lazy]: /(.|\n)*\n<\/parameter>\n/
KEY: /[A-Za-z_][A-Za-z0-9_.-]*/
";

/// Where a schema keeps what it refers to.
const DEFINITIONS: [&str; 2] = ["$defs", "definitions"];

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
                ToolFormat::Qwen3Coder => tags(&mut lark, rule, function),
                ToolFormat::DeepSeekV3 | ToolFormat::DeepSeekV31 => {
                    let name = function["name"].as_str().unwrap_or_default();
                    let arguments = self.mark(format, Marker::Arguments);
                    let (before, after) = if format == ToolFormat::DeepSeekV3 {
                        let name = quoted(&format!("{name}\n```json\n"));
                        (format!("\"function\" {arguments} {name}"), "\"\\n```\"")
                    } else {
                        (format!("{} {arguments}", quoted(name)), "")
                    };
                    schema(&mut lark, rule, function, &before, after);
                }
            }
        }
        match format {
            ToolFormat::Pythonic => lark.push_str(PYTHON),
            ToolFormat::Qwen3Coder => lark.push_str(TAGGED),
            ToolFormat::Llama3Json
            | ToolFormat::Hermes
            | ToolFormat::Mistral
            | ToolFormat::DeepSeekV3
            | ToolFormat::DeepSeekV31
            | ToolFormat::Json => {}
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
            ToolFormat::Hermes | ToolFormat::Qwen3Coder => {
                let close = self.mark(format, Marker::Close);
                let one = format!(r#"{open} "\n" function "\n" {close}"#);
                repeated(one, "\"\\n\" ")
            }
            ToolFormat::Mistral if self.marker_id(Marker::Arguments).is_some() => {
                repeated(format!("{open} function"), "")
            }
            ToolFormat::Mistral => format!("{open} {}", listed()),
            ToolFormat::DeepSeekV3 | ToolFormat::DeepSeekV31 => {
                let mark = |marker| self.mark(format, marker);
                let one = format!("{open} function {}", mark(Marker::Close));
                let between = if format == ToolFormat::DeepSeekV3 {
                    "\"\\n\" "
                } else {
                    ""
                };
                let calls = repeated(one, between);
                format!(
                    "{} {calls} {}",
                    mark(Marker::ListOpen),
                    mark(Marker::ListClose)
                )
            }
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

/// `<function=f>` and an argument after the other, in the schema's order, the required ones at
/// least. Texts are free, whatever else the schema says of them.
fn tags(lark: &mut String, rule: &str, function: &Value) {
    let name = function["name"].as_str().unwrap_or_default();
    let signature = Signature::new(name, function);
    let root = &function["parameters"];
    let properties = root["properties"].as_object();
    let properties: Vec<(&String, &Value)> = properties.into_iter().flatten().collect();
    let required = root["required"].as_array();
    let is_required = |key: &str| required.is_some_and(|keys| keys.iter().any(|own| own == key));
    let mut arguments = String::new();
    for (index, (key, _)) in properties.iter().enumerate() {
        let often = if is_required(key) { "" } else { "?" };
        write!(arguments, " {rule}_a{index}{often}").expect("writing to a string cannot fail");
    }
    if properties.is_empty() {
        write!(arguments, " {rule}_any*").expect("writing to a string cannot fail");
        let any = format!("{rule}_any: \"<parameter=\" KEY \">\\n\" tagged");
        line(lark, &any);
    }
    let open = quoted(&format!("<function={name}>\n"));
    line(lark, &format!("{rule}: {open}{arguments} \"</function>\""));
    for (index, (key, value)) in properties.into_iter().enumerate() {
        let open = quoted(&format!("<parameter={key}>\n"));
        match signature.kind(key) {
            Kind::Text | Kind::TextOrNull => {
                line(lark, &format!("{rule}_a{index}: {open} tagged"));
            }
            Kind::Json => {
                let close = quoted("\n</parameter>\n");
                line(
                    lark,
                    &format!("{rule}_a{index}: {open} {rule}_v{index} {close}"),
                );
                line(
                    lark,
                    &format!("{rule}_v{index}: %json {}", alone(value, root)),
                );
            }
        }
    }
}

/// A schema out of the one it stands in, with what it may refer to; any JSON where it refers to
/// anything else.
fn alone(schema: &Value, root: &Value) -> Value {
    let refers = schema.to_string();
    let within = |key: &&str| refers.matches(&format!("\"#/{key}/")).count();
    let known: usize = DEFINITIONS.iter().map(within).sum();
    if refers.matches("\"$ref\"").count() > known {
        return json!({});
    }
    let mut alone = schema.as_object().cloned().unwrap_or_else(Map::new);
    for key in DEFINITIONS {
        if let (true, Some(definitions)) = (known > 0, root.get(key)) {
            alone.insert(key.to_owned(), definitions.clone());
        }
    }
    Value::Object(alone)
}
