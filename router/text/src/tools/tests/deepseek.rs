//! `<｜tool▁call▁begin｜>…<｜tool▁call▁end｜>`, older and newer.

use super::Piece::{Text, Token};
use super::{Marker, ToolFormat, calls, says, says_cut, says_nothing, told_with};

const V3: ToolFormat = ToolFormat::DeepSeekV3;
const BEGIN: &str = "<｜tool▁calls▁begin｜>";
const END: &str = "<｜tool▁calls▁end｜>";
const NOW: &str = "<｜tool▁call▁begin｜>now<｜tool▁sep｜>{}<｜tool▁call▁end｜>";

/// A call as V3 writes it.
fn older(name: &str, arguments: &str) -> String {
    format!(
        "<｜tool▁call▁begin｜>function<｜tool▁sep｜>{name}\n```json\n{arguments}\n```\
         <｜tool▁call▁end｜>"
    )
}

#[test]
fn one_call_and_several() {
    let city = "{\"city\": \"Zürich\"}";
    let (weather, add) = (older("get_weather", city), older("add", "{\"a\": [1]}"));
    let told = [
        ("get_weather", city),
        ("add", "{\"a\": [1]}"),
        ("now", "{}"),
    ];
    says(V3, &format!("{BEGIN}{weather}{END}"), "", &told[..1]);
    says(V3, &format!("{BEGIN}{weather}\n{add}{NOW}{END}"), "", &told);
    says(
        ToolFormat::DeepSeekV31,
        &format!("\n{BEGIN}\n{NOW}{END}\n"),
        "",
        &told[2..],
    );
    // Without the marks of the list.
    says(V3, &format!("{weather}\n{add}\n{NOW}"), "", &told);
}

#[test]
fn text_before_between_and_after_is_content() {
    let add = older("add", "{}");
    says(
        V3,
        &format!("So:\n{BEGIN}{add}\nand {NOW}{END} done <b>"),
        "So:\n\nand  done <b>",
        &[("add", "{}"), ("now", "{}")],
    );
}

#[test]
fn arguments_are_passed_on_byte_for_byte() {
    let arguments = "{ \"b\":12345678901234567890 ,\"a\" : 1e400,\"s\":\"\\u00e9 ```\\n\\\"}{ \
         <｜tool▁call▁end｜> é\" ,\"n\":[ -0.10,[ ] ],\t\"b\":null}";
    says(V3, &older("add", arguments), "", &[("add", arguments)]);
}

#[test]
fn other_spellings_of_a_call() {
    let add = [("add", "{\"a\": 1}")];
    for text in [
        "<｜tool▁call▁begin｜>function<｜tool▁sep｜>add\n{\"a\": 1}<｜tool▁call▁end｜>",
        "<｜tool▁call▁begin｜>function<｜tool▁sep｜>add{\"a\": 1}<｜tool▁call▁end｜>",
        "<｜tool▁call▁begin｜>\nfunction\n<｜tool▁sep｜>\nadd ```{\"a\": 1}``` <｜tool▁call▁end｜>",
        "<｜tool▁call▁begin｜> add <｜tool▁sep｜>```json\n{\"a\": 1}\n```\n<｜tool▁call▁end｜>",
    ] {
        says(V3, text, "", &add);
    }
}

#[test]
fn what_is_no_call_is_content() {
    for text in [
        "a < b <｜ <｜tool▁call <｜User｜>",
        BEGIN,
        END,
        "<｜tool▁calls▁begin｜>\n<｜tool▁calls▁end｜>",
        "<｜tool▁calls▁begin｜><｜tool▁calls▁begin｜>",
        "<｜tool▁call▁begin｜>",
        "<｜tool▁call▁begin｜>add<｜tool▁call▁end｜>",
        "<｜tool▁call▁begin｜>a+b<｜tool▁sep｜>",
        "<｜tool▁call▁begin｜>add<｜tool▁sep｜>1",
        "<｜tool▁call▁begin｜>function<｜tool▁sep｜>add",
        "<｜tool▁call▁end｜><｜tool▁sep｜>",
        "{\"a\": 1}",
    ] {
        says_nothing(V3, text);
    }
    let unknown = older("unknown", "{\"a\": \"}\"}");
    says_nothing(V3, &format!("{BEGIN}{unknown}{END}"));
}

#[test]
fn a_call_follows_what_is_no_call() {
    let unknown = older("unknown", "{\"a\": {");
    for text in [
        "<",
        "<｜tool▁calls",
        "<｜tool▁call▁begin｜>",
        "<｜tool▁call▁begin｜>function<｜tool▁sep｜>",
        "<｜tool▁call▁begin｜>a",
        &unknown,
    ] {
        says(V3, &format!("{text}{NOW}"), text, &[("now", "{}")]);
    }
}

#[test]
fn a_call_that_is_cut_is_told_as_far_as_it_came() {
    let text = format!("ok {BEGIN}{}", older("add", "{\"a\": [1, \"é"));
    let (text, _) = text.split_once("\n```<").expect("a fence");
    says_cut(V3, text, "ok ", "add", "{\"a\": [1, \"é");
    let text = "<｜tool▁call▁begin｜>function<｜tool▁sep｜>add\n```js";
    says_cut(V3, text, "", "add", "");
    for rest in ["", "\n``", "\n```<｜tool▁ca", "\n```<｜tool▁call▁end｜>\n"] {
        let text = format!("{BEGIN}<｜tool▁call▁begin｜>now<｜tool▁sep｜>{{}}{rest}");
        says(V3, &text, "", &[("now", "{}")]);
    }
}

#[test]
fn a_forgotten_mark_costs_no_call() {
    let both = [("add", "{\"a\": 1}"), ("now", "{}")];
    let add = "<｜tool▁call▁begin｜>add<｜tool▁sep｜>{\"a\": 1}";
    says(V3, &format!("{BEGIN}{add}{NOW}{END}"), "", &both);
    says(V3, &format!("{BEGIN}{add}\n```\n{NOW}"), "", &both);
    says(V3, &format!("{BEGIN}{add}{END}{BEGIN}{NOW}"), "", &both);
    // Text in its place, and it comes later.
    says(
        V3,
        &format!("{add} so<｜tool▁call▁end｜>{NOW}"),
        " so",
        &both,
    );
    // The inner brace: the arguments are what the model wrote.
    let text = format!("<｜tool▁call▁begin｜>add<｜tool▁sep｜>{{\"a\": {{}}{NOW}");
    says(V3, &text, "", &[("add", "{\"a\": {}"), ("now", "{}")]);
}

#[test]
fn a_function_may_be_called_function() {
    let parse = |text: &str| {
        let tool = super::Signature::new("function", &serde_json::Value::Null);
        let max = super::CallsMax::Many;
        let parser = super::ToolCallParser::new(V3, &[], [tool].into(), max);
        super::Told::of(&super::feed(parser, &[Text(text)]))
    };
    for text in [
        older("function", "{}"),
        NOW.replace("now", "function"),
        NOW.replace("now", "function").replace('{', "\n{"),
    ] {
        assert_eq!(parse(&text).calls, calls(&[("function", "{}")]), "{text}");
    }
}

#[test]
fn marks_that_are_tokens_have_no_text() {
    let [list, open, sep, close, end] = [
        Marker::ListOpen,
        Marker::Open,
        Marker::Arguments,
        Marker::Close,
        Marker::ListClose,
    ]
    .map(Token);
    let add = Text("add\n```json\n{\"a\": 1}\n```");
    let (kind, now, empty) = (Text("function"), Text("now"), Text("{}"));
    let pieces = [
        Text("So: "),
        list,
        open,
        kind,
        sep,
        add,
        close,
        Text("\n"),
        open,
        now,
        sep,
        empty,
        close,
        end,
        Text("ok"),
    ];
    let told = told_with(V3, &pieces);
    assert_eq!(told.calls, calls(&[("add", "{\"a\": 1}"), ("now", "{}")]));
    assert_eq!(told.content, "So: ok");
    // A mark ends what it comes into.
    let told = told_with(
        V3,
        &[
            open,
            now,
            sep,
            Text("{\"a\": "),
            open,
            now,
            sep,
            empty,
            close,
        ],
    );
    assert_eq!(told.calls, calls(&[("now", "{\"a\": "), ("now", "{}")]));
    // One that means nothing has no text either.
    let told = told_with(
        V3,
        &[sep, Text("a"), close, end, list, Text("b"), open, Text("c")],
    );
    assert_eq!((told.content.as_str(), told.calls.len()), ("abc", 0));
}
