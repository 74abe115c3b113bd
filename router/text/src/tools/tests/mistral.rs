//! `[TOOL_CALLS]`.

use super::Piece::{Text, Token};
use super::{Marker, ToolFormat, calls, says, says_cut, says_nothing, told_with};

const MISTRAL: ToolFormat = ToolFormat::Mistral;

#[test]
fn a_list_of_calls() {
    says(
        MISTRAL,
        "[TOOL_CALLS] [{\"name\": \"add\", \"arguments\": {\"a\": 1}, \"id\": \"abcdefghi\"}, \
         {\"name\": \"now\", \"arguments\": {}}]",
        "",
        &[("add", "{\"a\": 1}"), ("now", "{}")],
    );
    let bare = "[TOOL_CALLS]{\"name\": \"now\", \"arguments\": {}}";
    says(MISTRAL, bare, "", &[("now", "{}")]);
}

#[test]
fn names_with_arguments_after_them() {
    let both = [("add", "{\"a\": [1, 2]}"), ("now", "{}")];
    for text in [
        "[TOOL_CALLS]add[ARGS]{\"a\": [1, 2]}[TOOL_CALLS]now[ARGS]{}",
        "[TOOL_CALLS]add[CALL_ID]abcdefghi[ARGS]{\"a\": [1, 2]}[TOOL_CALLS]now[CALL_ID]b[ARGS]{}",
        "[TOOL_CALLS]add{\"a\": [1, 2]}[TOOL_CALLS] now {}",
    ] {
        says(MISTRAL, text, "", &both);
    }
    let text = "[TOOL_CALLS]get-time.v2[ARGS]{ \"a\":1e400}";
    says(MISTRAL, text, "", &[("get-time.v2", "{ \"a\":1e400}")]);
}

#[test]
fn text_before_between_and_after_is_content() {
    says(
        MISTRAL,
        "Sure. [TOOL_CALLS][{\"name\": \"now\", \"arguments\": {}}] then [TOOL_CALLS]now[ARGS]{} end",
        "Sure.  then  end",
        &[("now", "{}"), ("now", "{}")],
    );
}

#[test]
fn what_is_no_call_is_content() {
    for text in [
        "[TOOL_CALLS]",
        "[TOOL_CALLS",
        "[TOOL_[TOOL_CALL [INST]",
        "[TOOL_CALLS] text",
        "[TOOL_CALLS][]",
        "[TOOL_CALLS][1]",
        "[TOOL_CALLS]unknown[ARGS]{\"a\": \"[TOOL_CALLS]now[ARGS]{}\"}",
        "[TOOL_CALLS]add[ARGS]5",
        "[TOOL_CALLS]add[OTHER]",
        "[TOOL_CALLS]add[CALL_ID]x[OTHER]",
        "[TOOL_CALLS]add",
        "{\"name\": \"now\", \"arguments\": {}}",
        "[TOOL_CALLS][{\"name\": \"unknown\", \"arguments\": {}}]",
    ] {
        says_nothing(MISTRAL, text);
    }
    let text = "[TOOL_CALLS] no [TOOL_CALLS]now[ARGS]{}";
    says(MISTRAL, text, "[TOOL_CALLS] no ", &[("now", "{}")]);
}

#[test]
fn a_call_that_is_cut_is_told_as_far_as_it_came() {
    says_cut(
        MISTRAL,
        "[TOOL_CALLS]add[ARGS]{\"a\": ",
        "",
        "add",
        "{\"a\": ",
    );
    says_cut(MISTRAL, "[TOOL_CALLS]add[ARGS]", "", "add", "");
    let text = "[TOOL_CALLS][{\"name\": \"add\", \"arguments\": {\"a\"";
    says_cut(MISTRAL, text, "", "add", "{\"a\"");
}

#[test]
fn marks_that_are_tokens_have_no_text() {
    let [open, arguments, id] = [Marker::Open, Marker::Arguments, Marker::CallId].map(Token);
    let pieces = [
        open,
        Text("add"),
        id,
        Text("abcdefghi"),
        arguments,
        Text("{\"a\": 1}"),
        open,
        Text("now"),
        arguments,
        Text("{}"),
    ];
    let told = told_with(MISTRAL, &pieces);
    assert_eq!(told.calls, calls(&[("add", "{\"a\": 1}"), ("now", "{}")]));
    assert_eq!(told.content, "");
    let told = told_with(
        MISTRAL,
        &[Text("a "), open, Text("unknown"), arguments, Text("{}")],
    );
    assert_eq!(
        (told.content.as_str(), told.calls.len()),
        ("a unknown{}", 0)
    );
    let list = "[{\"name\": \"now\", \"arguments\": {}}";
    let told = told_with(
        MISTRAL,
        &[open, Text(list), open, Text("now"), arguments, Text("{}")],
    );
    assert_eq!(told.calls, calls(&[("now", "{}"), ("now", "{}")]));
}
