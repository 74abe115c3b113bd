//! `<tool_call>{…}</tool_call>`.

use super::Piece::{Text, Token};
use super::{Marker, ToolFormat, calls, says, says_cut, says_nothing, told_with};

const HERMES: ToolFormat = ToolFormat::Hermes;

#[test]
fn one_call_and_several() {
    says(
        HERMES,
        "<tool_call>\n{\"name\": \"get_weather\", \"arguments\": {\"city\": \"Zürich\"}}\n</tool_call>",
        "",
        &[("get_weather", "{\"city\": \"Zürich\"}")],
    );
    says(
        HERMES,
        "\n<tool_call>\n{\"name\": \"add\", \"arguments\": {\"a\": 1}}\n</tool_call>\n<tool_call>\n\
         {\"name\": \"now\", \"arguments\": {}}\n</tool_call>\n",
        "",
        &[("add", "{\"a\": 1}"), ("now", "{}")],
    );
}

#[test]
fn text_before_between_and_after_is_content() {
    let call = "<tool_call>{\"name\": \"now\", \"arguments\": {}}</tool_call>";
    says(
        HERMES,
        &format!("Let me see.\n{call}\nAnd {call} done <b>"),
        "Let me see.\n\nAnd  done <b>",
        &[("now", "{}"), ("now", "{}")],
    );
    let call = call.replace("</", "\n</");
    says(HERMES, &format!("a{call}b"), "ab", &[("now", "{}")]);
}

#[test]
fn arguments_are_passed_on_byte_for_byte() {
    let arguments = "{ \"b\":12345678901234567890 ,\"a\" : 1e400,\"s\":\"\\u00e9\\n\\\"}{ </tool_call> é\" ,\
         \"n\":[ -0.10,[ ] ],\t\"b\":null}";
    says(
        HERMES,
        &format!("<tool_call>{{\"arguments\":{arguments},\"name\":\"add\"}}</tool_call>"),
        "",
        &[("add", arguments)],
    );
    says(
        HERMES,
        &format!("<tool_call>{{\"name\":\"add\",\"arguments\":{arguments}}}</tool_call>"),
        "",
        &[("add", arguments)],
    );
}

#[test]
fn what_is_no_call_is_content() {
    for text in [
        "",
        " ",
        "\n\n",
        "a < b <tool <tool_call <<tool_call",
        "<tool_call>",
        "<tool_call>\n",
        "<tool_call>text</tool_call>",
        "<tool_call>{\"name\": 5}</tool_call>",
        "<tool_call>{}</tool_call>",
        "<tool_call>{\"name\": \"unknown\", \"arguments\": {\"a\": \"<tool_call>\"}}</tool_call> é",
        "<tool_call>{\"name\": \"get_wea",
        "</tool_call>",
        "<tool_call>{\"arguments\": {\"a\": 1}",
        "<tool_call>[{\"name\": \"add\", \"arguments\": {}}]</tool_call>",
    ] {
        says_nothing(HERMES, text);
    }
}

#[test]
fn a_call_follows_what_is_no_call() {
    let call = "<tool_call>{\"name\": \"now\", \"arguments\": {}}</tool_call>";
    for text in [
        "<tool_call>",
        "<tool_call>{",
        "<tool_",
        "<tool_call>{\"name\": \"unknown\", \"arguments\": {}}</tool_call>",
        "<tool_call>{\"name\": \"unknown\", \"arguments\": {",
    ] {
        says(HERMES, &format!("{text}{call}"), text, &[("now", "{}")]);
    }
}

#[test]
fn a_call_that_is_cut_is_told_as_far_as_it_came() {
    let text = "ok <tool_call>\n{\"name\": \"add\", \"arguments\": {\"a\": [1, \"é";
    says_cut(HERMES, text, "ok ", "add", "{\"a\": [1, \"é");
    says_cut(HERMES, "<tool_call>{\"name\": \"add\"", "", "add", "");
    says_cut(
        HERMES,
        "<tool_call>{\"name\": \"add\", \"argu",
        "",
        "add",
        "",
    );
}

#[test]
fn a_forgotten_brace_or_mark_costs_no_call() {
    let (add, now) = (("add", "{\"a\": 1}"), ("now", "{}"));
    let second = "<tool_call>{\"name\": \"now\", \"arguments\": {}}</tool_call>";
    // The outer brace, the mark, one brace too many.
    let text = "<tool_call>{\"name\": \"add\", \"arguments\": {\"a\": 1}\n</tool_call>\n";
    says(HERMES, &format!("{text}{second}"), "", &[add, now]);
    let text = "<tool_call>{\"name\": \"add\", \"arguments\": {\"a\": 1}}\n";
    says(HERMES, &format!("{text}{second}"), "", &[add, now]);
    let text = "<tool_call>{\"name\": \"add\", \"arguments\": {\"a\": 1}}}\n</tool_call>";
    says(HERMES, &format!("{text}{second}"), "}\n", &[add, now]);
    // The inner brace: the arguments are what the model wrote.
    let text = "<tool_call>{\"name\": \"add\", \"arguments\": {\"a\": {\"b\": 1}\n</tool_call>";
    let cut = ("add", "{\"a\": {\"b\": 1}\n");
    says(HERMES, &format!("{text}{second}"), "", &[cut, now]);
    // The outer brace, and nothing follows: the arguments are whole.
    let text = "<tool_call>{\"name\": \"add\", \"arguments\": {\"a\": 1}";
    says(HERMES, text, "", &[add]);
    says(HERMES, &format!("{text}, \"id\": \"x"), "", &[add]);
}

#[test]
fn other_spellings_of_a_call() {
    let add = [("add", "{\"a\": 1}")];
    for body in [
        r#"{"name": "add", "parameters": {"a": 1}}"#,
        r#"{"id": "x", "name": "add", "arguments": {"a": 1}, "more": [{"name": "now"}]}"#,
        r#"{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}"#,
        r#"{"function": "add", "arguments": {"a": 1}}"#,
        r#"{"name": "\u0061dd", "arguments": "{\"a\": 1}"}"#,
        r#"{"arguments": "{\"a\": 1}", "name": "add"}"#,
        r#"{"thought": "say \"so\"", "name": "add", "arguments": {"a": 1}}"#,
    ] {
        says(HERMES, &format!("<tool_call>{body}</tool_call>"), "", &add);
    }
    let now = [("now", "{}")];
    for body in [
        r#"{"name": "now"}"#,
        r#"{"name": "now", "arguments": null}"#,
        r#"{"arguments": null, "name": "now"}"#,
    ] {
        says(HERMES, &format!("<tool_call>{body}</tool_call>"), "", &now);
    }
    let arguments = "{\"s\": \"\\ud83d\\ude00\", \"t\": \"\\\\\\\"\"}";
    let told = super::told(
        HERMES,
        "<tool_call>{\"name\": \"add\", \"arguments\": \"\\ud83d\\ude00\\ud83d \\u00e9\\n\"}",
    );
    assert_eq!(told.calls[0].arguments, "😀\u{fffd} é\n");
    let text = format!(
        "<tool_call>{{\"name\": \"add\", \"arguments\": {}}}</tool_call>",
        serde_json::Value::from(arguments)
    );
    says(HERMES, &text, "", &[("add", arguments)]);
}

#[test]
fn marks_that_are_tokens_have_no_text() {
    let (open, close) = (Token(Marker::Open), Token(Marker::Close));
    let call = "\n{\"name\": \"now\", \"arguments\": {}}\n";
    let pieces = [
        Text("So: "),
        open,
        Text(call),
        close,
        Text("\n"),
        open,
        Text(call),
        close,
    ];
    let told = told_with(HERMES, &pieces);
    assert_eq!(told.calls, calls(&[("now", "{}"), ("now", "{}")]));
    assert_eq!(told.content, "So: ");
    // Text that only looks like a mark is text.
    let text = "<tool_call>{\"name\": \"now\", \"arguments\": {}}</tool_call>";
    let told = told_with(HERMES, &[Text(text), open, Text("a"), close]);
    assert_eq!((told.content, told.calls), (format!("{text}a"), Vec::new()));
    // A mark ends what it comes into.
    let cut = "{\"name\": \"add\", \"arguments\": {\"a\": \"";
    let told = told_with(HERMES, &[open, Text(cut), open, Text(call), close]);
    assert_eq!(told.calls, calls(&[("add", "{\"a\": \""), ("now", "{}")]));
}
