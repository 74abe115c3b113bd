//! `[f(a=1), g()]`.

use super::Piece::{Text, Token};
use super::{Marker, ToolFormat, calls, says, says_cut, says_nothing, told_with};

const PYTHONIC: ToolFormat = ToolFormat::Pythonic;

/// The value of a call's only argument, as JSON.
#[track_caller]
fn value(python: &str, json: &str) {
    let arguments = format!("{{\"a\": {json}}}");
    says(
        PYTHONIC,
        &format!("[add(a={python})]"),
        "",
        &[("add", &arguments)],
    );
}

#[test]
fn one_call_and_several() {
    says(
        PYTHONIC,
        "[get_weather(city='Paris', days=3), now()]",
        "",
        &[
            ("get_weather", "{\"city\": \"Paris\", \"days\": 3}"),
            ("now", "{}"),
        ],
    );
    says(
        PYTHONIC,
        "<|python_start|>[ add( a = 1 ,\n b = 2, ) , now( ) ]<|python_end|>",
        "",
        &[("add", "{\"a\": 1, \"b\": 2}"), ("now", "{}")],
    );
}

#[test]
fn literals_become_json() {
    for (python, json) in [
        ("True", "true"),
        ("False", "false"),
        ("None", "null"),
        ("12345678901234567890", "12345678901234567890"),
        ("1e400", "1e400"),
        ("-0.10", "-0.10"),
        ("Trueish", "Trueish"),
        ("[True, [1, None]]", "[true, [1, null]]"),
        ("(1, 2)", "[1, 2]"),
        (
            "{'k': {'l': 'm'}, \"n\": False}",
            "{\"k\": {\"l\": \"m\"}, \"n\": false}",
        ),
        ("'it\\'s \"x\"'", "\"it's \\\"x\\\"\""),
        ("\"a\\\\b\\n\\t\"", "\"a\\\\b\\n\\t\""),
        ("'line\nand\ttab'", "\"line\\nand\\ttab\""),
        ("'\\x41\\u00e9\\U0001F600é'", "\"\\u0041\\u00e9😀é\""),
        ("'\\d\\a'", "\"\\\\d\\u0007\""),
        ("'a), now(b=1'", "\"a), now(b=1\""),
        ("''", "\"\""),
    ] {
        value(python, json);
    }
}

#[test]
fn text_before_between_and_after_is_content() {
    says(
        PYTHONIC,
        "I look: [now()] and [add(a=1)] then.",
        "I look:  and  then.",
        &[("now", "{}"), ("add", "{\"a\": 1}")],
    );
}

#[test]
fn what_is_no_call_is_content() {
    for text in [
        "[]",
        "[1, 2]",
        "see [now](http://x) and [now]",
        "[unknown(a=1)]",
        "[add(1, 2)]",
        "[add(a)]",
        "[add",
        "[[[",
        "now()",
        "<|python_start|>print(1)",
    ] {
        says_nothing(PYTHONIC, text);
    }
    let text = "[now(), unknown(a=1)]";
    says(PYTHONIC, text, ", unknown(a=1)]", &[("now", "{}")]);
    says(PYTHONIC, "[[now()]", "[", &[("now", "{}")]);
}

#[test]
fn what_is_no_literal_is_passed_on_as_it_is() {
    let told = super::told(PYTHONIC, "[add(a=1, f(2), c=3), now()]");
    assert_eq!(
        told.calls,
        calls(&[("add", "{\"a\": 1, f(2), c=3}"), ("now", "{}")])
    );
    value("x + y.z", "x+y.z");
}

#[test]
fn a_call_that_is_cut_is_told_as_far_as_it_came() {
    says_cut(PYTHONIC, "[add(a='on", "", "add", "{\"a\": \"on");
    says_cut(PYTHONIC, "[add(a=Tr", "", "add", "{\"a\": Tr");
    says_cut(PYTHONIC, "[add(a=1, b", "", "add", "{\"a\": 1, b");
    says_cut(PYTHONIC, "[add(a", "", "add", "{a");
    says(PYTHONIC, "[now(), ", "", &[("now", "{}")]);
}

#[test]
fn marks_that_are_tokens_have_no_text() {
    let (open, close) = (Token(Marker::Open), Token(Marker::Close));
    let told = told_with(PYTHONIC, &[open, Text("[now()]"), close, Text(" ok")]);
    assert_eq!(told.calls, calls(&[("now", "{}")]));
    assert_eq!(told.content, " ok");
    let told = told_with(PYTHONIC, &[open, Text("[add(a='x"), close]);
    assert_eq!(told.calls, calls(&[("add", "{\"a\": \"x")]));
}
