//! `<tool_call><function=f><parameter=a>…</parameter></function></tool_call>`.

use serde_json::{Value, json};

use super::super::signature::Kind;
use super::Piece::{Text, Token};
use super::{Marker, Signature, ToolFormat, calls, says, says_cut, says_nothing, told_with};

const CODER: ToolFormat = ToolFormat::Qwen3Coder;
const NOW: &str = "<tool_call>\n<function=now>\n</function>\n</tool_call>";

/// The value of a call's only argument, as JSON.
#[track_caller]
fn value(name: &str, written: &str, json: &str) {
    let text =
        format!("<function=get_weather>\n<parameter={name}>{written}</parameter>\n</function>");
    let arguments = format!("{{\"{name}\": {json}}}");
    says(CODER, &text, "", &[("get_weather", &arguments)]);
}

#[test]
fn one_call_and_several() {
    let weather = "<tool_call>\n<function=get_weather>\n<parameter=city>\nZürich\n</parameter>\n\
         <parameter=days>\n3\n</parameter>\n</function>\n</tool_call>";
    let told = ("get_weather", "{\"city\": \"Zürich\", \"days\": 3}");
    says(CODER, weather, "", &[told]);
    let both = format!("\n{weather}\n{NOW}\n");
    says(CODER, &both, "", &[told, ("now", "{}")]);
    // Two in one pair of marks, or in none.
    let both = NOW.replace("</tool_call>", "<function=now></function>\n</tool_call>");
    says(CODER, &both, "", &[("now", "{}"), ("now", "{}")]);
    let bare = "<function=now></function><function=now></function>";
    says(CODER, bare, "", &[("now", "{}"), ("now", "{}")]);
}

#[test]
fn text_before_between_and_after_is_content() {
    says(
        CODER,
        &format!("Let me see.\n{NOW}\nAnd {NOW} done <b>"),
        "Let me see.\n\nAnd  done <b>",
        &[("now", "{}"), ("now", "{}")],
    );
}

#[test]
fn a_text_is_a_text_whatever_it_looks_like() {
    for (written, json) in [
        ("\nParis\n", "\"Paris\""),
        ("Paris", "\"Paris\""),
        ("\n\n", "\"\""),
        ("\n", "\"\""),
        ("", "\"\""),
        ("\n\n a\n\n", "\"\\n a\\n\""),
        ("\n5\n", "\"5\""),
        ("\nnull\n", "\"null\""),
        ("\n\"a\\b\"\t\u{1}\n", "\"\\\"a\\\\b\\\"\\t\\u0001\""),
        (
            "\nif a < b:\n  c</function>\n",
            "\"if a < b:\\n  c</function>\"",
        ),
        ("\n</par<parameter\n", "\"</par<parameter\""),
        ("\na\n</parame\n", "\"a\\n</parame\""),
    ] {
        value("city", written, json);
    }
}

#[test]
fn what_is_no_text_is_json_if_it_can_be() {
    for (written, json) in [
        ("\n3\n", "3"),
        (" 12345678901234567890 ", "12345678901234567890"),
        ("\n1e400\n", "1e400"),
        ("True", "true"),
        ("\nNone\n", "null"),
        (
            "\n{\"b\":  [1, \"\\u00e9\\/\"],\n\"a\": {}}\n",
            "{\"b\":  [1, \"\\u00e9\\/\"],\n\"a\": {}}",
        ),
        (
            "\n{'a': [True, None], \"b\": 'it\\'s'}\n",
            "{\"a\": [true, null], \"b\": \"it's\"}",
        ),
        ("\nthree\n", "\"three\""),
        ("\n[1, 2\n", "\"[1, 2\""),
        ("\n1, 2\n", "\"1, 2\""),
        ("\n", "\"\""),
    ] {
        value("days", written, json);
    }
    for (written, json) in [
        ("\nnull\n", "null"),
        ("None", "null"),
        ("\nnullable\n", "\"nullable\""),
        ("\nnu\n", "\"nu\""),
        ("\nNo \"5\"\n", "\"No \\\"5\\\"\""),
        ("", "\"\""),
    ] {
        value("note", written, json);
    }
    // No schema names it: a text.
    value("unknown", "\n5\n", "\"5\"");
}

#[test]
fn the_schema_tells_what_an_argument_is() {
    let text = json!({"type": "string"});
    let root = json!({"$defs": {"s": text, "l": {"anyOf": [{"$ref": "#/$defs/l"}, text]}},
        "properties": {}});
    for (schema, kind) in [
        (text.clone(), Kind::Text),
        (json!({"enum": ["a", "b"]}), Kind::Text),
        (json!({"const": "a"}), Kind::Text),
        (json!({"$ref": "#/$defs/s"}), Kind::Text),
        (json!({"type": ["string", "null"]}), Kind::TextOrNull),
        (json!({"oneOf": [text, {"const": null}]}), Kind::TextOrNull),
        (json!({"enum": ["a", 1]}), Kind::Json),
        (json!({"type": "integer"}), Kind::Json),
        (json!({"anyOf": [text, {"type": "number"}]}), Kind::Json),
        (json!({"type": "null"}), Kind::Json),
        (json!({"$ref": "#/$defs/none"}), Kind::Json),
        (json!({"$ref": "elsewhere"}), Kind::Json),
        (json!({"$ref": "#/$defs/l"}), Kind::Json),
        (json!({}), Kind::Json),
        (json!(true), Kind::Json),
        (json!(5), Kind::Json),
    ] {
        let mut root = root.clone();
        root["properties"]["a"] = schema.clone();
        let signature = Signature::new("f", &json!({"parameters": root}));
        assert_eq!(signature.kind("a"), kind, "{schema}");
        assert_eq!(signature.kind("b"), Kind::Text);
    }
    for function in [json!({}), json!({"parameters": null}), Value::Null] {
        assert_eq!(Signature::new("f", &function).kind("a"), Kind::Text);
    }
}

#[test]
fn what_is_no_call_is_content() {
    for text in [
        "a < b <tool <tool_call <<tool_call",
        "<tool_call>",
        "<tool_call>\n",
        "<tool_call>text</tool_call>",
        "<tool_call></tool_call>",
        "<tool_call>{\"name\": \"add\", \"arguments\": {}}</tool_call>",
        "<tool_call>\n<function=unknown>\n<parameter=a>\n1\n</parameter>\n</function>\n</tool_call>",
        "<function=\n>",
        "<function=add",
        "</tool_call></function><parameter=a>1</parameter>",
    ] {
        says_nothing(CODER, text);
    }
}

#[test]
fn a_call_follows_what_is_no_call() {
    for text in [
        "<tool_call>",
        "<tool_call>\n<tool_call>\n",
        "<tool_",
        "<function=",
        "<tool_call>\n<function=unknown>\n</function>\n</tool_call>",
    ] {
        says(CODER, &format!("{text}{NOW}"), text, &[("now", "{}")]);
    }
}

#[test]
fn a_call_that_is_cut_is_told_as_far_as_it_came() {
    let call = "ok <tool_call>\n<function=get_weather>\n";
    let cut = |text: &str, arguments: &str| {
        says_cut(
            CODER,
            &format!("{call}{text}"),
            "ok ",
            "get_weather",
            arguments,
        );
    };
    cut("", "");
    cut("<param", "");
    cut("<parameter=ci", "");
    cut("<parameter=city>", "{\"city\": ");
    cut("<parameter=city>\nPa", "{\"city\": \"Pa");
    cut("<parameter=city>\nPa\n</para", "{\"city\": \"Pa");
    cut(
        "<parameter=city>\nPa\n</parameter>\n</func",
        "{\"city\": \"Pa\"",
    );
    cut("<parameter=days>\n[1, ", "{\"days\": [1, ");
    cut("<parameter=note>\nnu", "{\"note\": \"nu");
}

#[test]
fn a_forgotten_tag_costs_no_call() {
    let weather = ("get_weather", "{\"city\": \"a\", \"days\": 1}");
    let city = "<tool_call>\n<function=get_weather>\n<parameter=city>\na\n";
    let days = "<parameter=days>\n1\n";
    let end = "</function>\n</tool_call>\n";
    // What ends one argument, or both.
    says(
        CODER,
        &format!("{city}{days}</parameter>\n{end}{NOW}"),
        "",
        &[weather, ("now", "{}")],
    );
    says(
        CODER,
        &format!("{city}{days}{end}{NOW}"),
        "",
        &[weather, ("now", "{}")],
    );
    // What ends the function, or the call.
    let whole = format!("{city}</parameter>\n{days}</parameter>\n");
    for rest in ["</tool_call>\n", "</function>\n", "\n", ""] {
        let text = format!("{whole}{rest}{NOW}");
        says(CODER, &text, "", &[weather, ("now", "{}")]);
    }
    // Something else in its place.
    let text = format!("{whole}and {NOW}");
    says(CODER, &text, "and ", &[weather, ("now", "{}")]);
    let text = format!("{whole}<b>{NOW}");
    says(CODER, &text, "<b>", &[weather, ("now", "{}")]);
}

#[test]
fn marks_that_are_tokens_have_no_text() {
    let (open, close) = (Token(Marker::Open), Token(Marker::Close));
    let call = "\n<function=now>\n</function>\n";
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
    let told = told_with(CODER, &pieces);
    assert_eq!(told.calls, calls(&[("now", "{}"), ("now", "{}")]));
    assert_eq!(told.content, "So: ");
    // A mark ends what it comes into.
    let city = "<function=get_weather><parameter=city>\na\n</par";
    let told = told_with(CODER, &[open, Text(city), open, Text(call), close]);
    let cut = ("get_weather", "{\"city\": \"a\\n</par\"}");
    assert_eq!(told.calls, calls(&[cut, ("now", "{}")]));
}
