//! JSON objects among text, Llama's mark before them or not.

use super::Piece::{Text, Token};
use super::{Marker, ToolFormat, calls, says, says_cut, says_nothing, told_with};

const LLAMA: ToolFormat = ToolFormat::Llama3Json;
const JSON: ToolFormat = ToolFormat::Json;

const ADD: &str = r#"{"name": "add", "parameters": {"a": 1}}"#;
const NOW: &str = r#"{"name": "now", "parameters": {}}"#;

#[test]
fn one_call_with_the_mark_and_without() {
    for text in [
        ADD.to_owned(),
        format!("<|python_tag|>{ADD}"),
        format!(" {ADD}\n"),
    ] {
        says(LLAMA, &text, "", &[("add", "{\"a\": 1}")]);
    }
    says(JSON, ADD, "", &[("add", "{\"a\": 1}")]);
}

#[test]
fn several_calls() {
    let both = [("add", "{\"a\": 1}"), ("now", "{}")];
    for text in [
        format!("{ADD}; {NOW}"),
        format!("<|python_tag|>{ADD};{NOW}"),
        format!("{ADD}\n{NOW}"),
        format!("{ADD}; {NOW};"),
        format!("[{ADD}, {NOW}]"),
        format!("[\n  {ADD},\n  {NOW}\n]\n"),
    ] {
        says(LLAMA, &text, "", &both);
    }
}

#[test]
fn text_before_between_and_after_is_content() {
    says(
        LLAMA,
        &format!("I call {ADD} and {NOW}; that's it."),
        "I call  and ; that's it.",
        &[("add", "{\"a\": 1}"), ("now", "{}")],
    );
    says(
        JSON,
        &format!("```json\n{ADD}\n```"),
        "```json\n\n```",
        &[("add", "{\"a\": 1}")],
    );
}

#[test]
fn arguments_are_passed_on_byte_for_byte() {
    let arguments = "{\"z\":1e400,  \"a\":[12345678901234567890,\"\\u0041 \\\\\"], \"z\" :{}}";
    let text = format!("{{\"type\":\"function\",\"name\":\"add\",\"parameters\":{arguments}}}");
    says(LLAMA, &text, "", &[("add", arguments)]);
    let text = format!("{{\"parameters\":{arguments},\"name\":\"add\"}}");
    says(LLAMA, &text, "", &[("add", arguments)]);
}

#[test]
fn json_that_is_no_call_is_content() {
    for text in [
        "{}",
        "[]",
        "[1, 2]",
        "{{{ [[[",
        "{ \"name\": \"Bob\", \"age\": 5 }",
        "{\"name\": \"add\", \"age\": 5}",
        "{\"name\": \"add\"}",
        "{\"name\": \"add\", \"param",
        "{\"name\": \"unknown\", \"parameters\": {\"name\": \"add\", \"parameters\": {}}}",
        "[{\"name\": \"unknown\", \"parameters\": {}}]",
        "if (x) { return [1]; }",
        "<|python_tag|>print({\"a\": 1})",
        "<|python_tag|>",
        "<|python",
    ] {
        says_nothing(LLAMA, text);
    }
    says_nothing(JSON, "<|python_tag|>print(1)");
}

#[test]
fn a_call_follows_what_is_no_call() {
    let unknown = "{\"name\": \"unknown\", \"parameters\": {\"a\": \"}\"}}";
    for text in ["{", "{ {", "[1", "{\"a\": ", "<|python_", unknown] {
        says(LLAMA, &format!("{text}{NOW}"), text, &[("now", "{}")]);
    }
    let list = format!("[{ADD}, {unknown}, {NOW}]");
    says(
        JSON,
        &list,
        &format!(", {unknown}"),
        &[("add", "{\"a\": 1}"), ("now", "{}")],
    );
}

#[test]
fn a_call_that_is_cut_is_told_as_far_as_it_came() {
    let text = r#"{"name": "add", "parameters": {"a": "on"#;
    says_cut(LLAMA, text, "", "add", "{\"a\": \"on");
    says_cut(JSON, &format!("[{text}"), "", "add", "{\"a\": \"on");
    says_cut(LLAMA, "<|python_tag|>{\"name\": \"add\", ", "", "add", "");
}

#[test]
fn the_mark_as_a_token_has_no_text() {
    let open = Token(Marker::Open);
    let told = told_with(LLAMA, &[open, Text(ADD), Text("; "), open, Text(NOW)]);
    assert_eq!(told.calls, calls(&[("add", "{\"a\": 1}"), ("now", "{}")]));
    assert_eq!(told.content, "");
    let told = told_with(LLAMA, &[open, Text("print(1)")]);
    assert_eq!((told.content.as_str(), told.calls.len()), ("print(1)", 0));
}
