//! What models write, and what becomes of it.

mod bare;
mod constraint;
mod deepseek;
mod hermes;
mod mistral;
mod properties;
mod pythonic;
mod qwen3_coder;
mod style;

use std::sync::Arc;

use serde_json::{Value, json};

use super::{CallsMax, Marker, Signature, ToolCallParser, ToolEvent, ToolFormat};

/// A piece of a text.
#[derive(Debug, Clone, Copy)]
enum Piece<'a> {
    Text(&'a str),
    Token(Marker),
}

/// A call that was found.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Call {
    name: String,
    arguments: String,
    /// Whether it came to its end.
    is_whole: bool,
}

/// What events say together.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
struct Told {
    content: String,
    calls: Vec<Call>,
}

// === impl Told ===

impl Told {
    fn of(events: &[ToolEvent]) -> Self {
        let mut told = Self::default();
        for event in events {
            match event {
                ToolEvent::Content(text) => {
                    assert!(!text.is_empty(), "an event without text");
                    told.content.push_str(text);
                }
                ToolEvent::CallStart { index, name } => {
                    assert_eq!(*index, told.calls.len(), "calls are numbered in order");
                    told.calls.push(Call {
                        name: name.clone(),
                        arguments: String::new(),
                        is_whole: false,
                    });
                }
                ToolEvent::Arguments { index, fragment } => {
                    assert!(!fragment.is_empty(), "an event without text");
                    assert_eq!(*index + 1, told.calls.len(), "of the call that is open");
                    let call = told.calls.last_mut().expect("a call began");
                    assert!(!call.is_whole, "nothing comes after the end");
                    call.arguments.push_str(fragment);
                }
                ToolEvent::CallEnd { index } => {
                    assert_eq!(*index + 1, told.calls.len(), "of the call that is open");
                    let call = told.calls.last_mut().expect("a call began");
                    assert!(!call.is_whole, "a call ends once");
                    call.is_whole = true;
                }
            }
        }
        told
    }
}

// === free functions ===

/// The tools of every test, as functions.
fn functions() -> Vec<Value> {
    let weather = json!({"city": {"type": "string"}, "days": {"type": "integer"},
        "note": {"anyOf": [{"type": "string"}, {"type": "null"}]}});
    let add = json!({"a": {}, "b": {"type": "array"}, "s": {"type": "string"}});
    vec![
        json!({"name": "get_weather", "parameters": {"properties": weather, "required": ["city"]}}),
        json!({"name": "add", "parameters": {"properties": add}}),
        json!({"name": "now"}),
        json!({"name": "get-time.v2"}),
    ]
}

fn tools() -> Arc<[Signature]> {
    let named = |function: &Value| {
        let name = function["name"].as_str().expect("a name");
        Signature::new(name, function)
    };
    functions().iter().map(named).collect()
}

fn parser(format: ToolFormat, pieces: &[Piece<'_>]) -> ToolCallParser {
    let special: Vec<Marker> = pieces
        .iter()
        .filter_map(|piece| match piece {
            Piece::Token(marker) => Some(*marker),
            Piece::Text(_) => None,
        })
        .collect();
    ToolCallParser::new(format, &special, tools(), CallsMax::Many)
}

fn feed(mut parser: ToolCallParser, pieces: &[Piece<'_>]) -> Vec<ToolEvent> {
    let mut events = Vec::new();
    for piece in pieces {
        events.extend(match piece {
            Piece::Text(text) => parser.push(text),
            Piece::Token(marker) => parser.marker(*marker),
        });
    }
    events.extend(parser.finish());
    events
}

/// What a text says, pushed at once and character by character.
fn told(format: ToolFormat, text: &str) -> Told {
    let whole = Told::of(&feed(parser(format, &[]), &[Piece::Text(text)]));
    let characters: Vec<String> = text.chars().map(String::from).collect();
    let pieces: Vec<Piece<'_>> = characters.iter().map(|c| Piece::Text(c)).collect();
    let parts = Told::of(&feed(parser(format, &[]), &pieces));
    assert_eq!(parts, whole, "{text}");
    whole
}

/// What a text with special tokens in it says.
fn told_with(format: ToolFormat, pieces: &[Piece<'_>]) -> Told {
    Told::of(&feed(parser(format, pieces), pieces))
}

fn calls(told: &[(&str, &str)]) -> Vec<Call> {
    let call = |(name, arguments): &(&str, &str)| Call {
        name: (*name).to_owned(),
        arguments: (*arguments).to_owned(),
        is_whole: true,
    };
    told.iter().map(call).collect()
}

/// The text is content and these calls, all of them whole.
#[track_caller]
fn says(format: ToolFormat, text: &str, content: &str, expected: &[(&str, &str)]) {
    let told = told(format, text);
    assert_eq!(told.calls, calls(expected), "{text}");
    assert_eq!(told.content, content, "{text}");
}

/// The text is content and one call that was cut.
#[track_caller]
fn says_cut(format: ToolFormat, text: &str, content: &str, name: &str, arguments: &str) {
    let told = told(format, text);
    let call = Call {
        name: name.to_owned(),
        arguments: arguments.to_owned(),
        is_whole: false,
    };
    assert_eq!(told.calls, [call], "{text}");
    assert_eq!(told.content, content, "{text}");
}

/// The text is content, all of it.
#[track_caller]
fn says_nothing(format: ToolFormat, text: &str) {
    says(format, text, text, &[]);
}

#[test]
fn a_single_call_is_the_end_of_the_text() {
    let format = ToolFormat::Hermes;
    let mut parser = ToolCallParser::new(format, &[], tools(), CallsMax::One);
    let call = "<tool_call>{\"name\": \"now\", \"arguments\": {}}</tool_call>";
    let mut events = parser.push(&format!("So: {call}{call} and more"));
    assert!(parser.is_over());
    events.extend(parser.push(" and more"));
    events.extend(parser.marker(Marker::Open));
    events.extend(parser.finish());
    let told = Told::of(&events);
    assert_eq!(told.calls, calls(&[("now", "{}")]));
    assert_eq!(told.content, "So: ");
}

#[test]
fn what_is_held_is_bounded() {
    for (format, text) in [
        (ToolFormat::Hermes, "<tool_call>{\"arguments\": {\"a\": \""),
        (ToolFormat::Hermes, "<tool_call>{\"name\": \""),
        (ToolFormat::Mistral, "[TOOL_CALLS]a"),
        (ToolFormat::Mistral, "[TOOL_CALLS]add[CALL_ID]"),
        (ToolFormat::Json, "{\"name\": \""),
        (ToolFormat::Llama3Json, "<|python_tag|> "),
        (ToolFormat::Pythonic, "[add("),
        (ToolFormat::Pythonic, "["),
    ] {
        let mut parser = ToolCallParser::new(format, &[], tools(), CallsMax::Many);
        let mut shown = parser.push(text);
        assert!(shown.is_empty(), "{text}");
        for _ in 0..=super::HELD_BYTES_MAX {
            shown.extend(parser.push("a"));
        }
        let before = Told::of(&shown).content;
        assert!(before.starts_with(text), "{format:?} {text} {before:?}");
        // What follows is read as usual.
        shown.extend(parser.push("\n"));
        shown.extend(parser.finish());
        let told = Told::of(&shown);
        assert_eq!(told.content.len(), text.len() + super::HELD_BYTES_MAX + 2);
    }
    let space = " ".repeat(super::HELD_BYTES_MAX + 2);
    says_nothing(ToolFormat::Json, &space);
    says_nothing(ToolFormat::Json, &format!("{space}a"));
}

#[test]
fn a_call_is_told_as_it_comes() {
    let mut parser = ToolCallParser::new(ToolFormat::Hermes, &[], tools(), CallsMax::Many);
    let index = 0;
    assert_eq!(parser.push("<tool_call>{\"name\": \"add\""), []);
    assert_eq!(parser.push(", \"argu"), []);
    let start = ToolEvent::CallStart {
        index,
        name: "add".to_owned(),
    };
    let fragment = |text: &str| ToolEvent::Arguments {
        index,
        fragment: text.to_owned(),
    };
    assert_eq!(parser.push("ments\": {\"a\""), [start, fragment("{\"a\"")]);
    assert_eq!(parser.push(": 1"), [fragment(": 1")]);
    assert_eq!(
        parser.push("}}"),
        [fragment("}"), ToolEvent::CallEnd { index }]
    );
    assert_eq!(parser.push("</tool_"), []);
    assert_eq!(parser.push("call>"), []);
    assert_eq!(
        parser.push("\nok"),
        [ToolEvent::Content("\nok".to_owned())],
        "white space is content when text follows"
    );
    assert_eq!(parser.finish(), []);
}
