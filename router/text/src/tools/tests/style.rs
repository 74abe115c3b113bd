//! What is decided from a model's files.

use std::path::Path;

use serde_json::{Value, json};

use super::super::{CallsAs, Marker, ParserAsked, ToolFormat, ToolStyle};
use crate::chat::ChatTemplate;
use crate::tokenizer::Tokenizer;

/// A tokenizer with these added tokens, from id 1.
pub(super) fn tokenizer(added: &[(&str, bool)]) -> Tokenizer {
    let token = |(index, (content, special)): (usize, &(&str, bool))| {
        json!({"id": index + 1, "content": content, "single_word": false, "lstrip": false,
            "rstrip": false, "normalized": false, "special": special})
    };
    let added: Vec<Value> = added.iter().enumerate().map(token).collect();
    let model = json!({"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"});
    let file = json!({"version": "1.0", "truncation": null, "padding": null,
        "added_tokens": added, "normalizer": null, "pre_tokenizer": null,
        "post_processor": null, "decoder": null, "model": model});
    Tokenizer::from_json(file.to_string().as_bytes()).expect("a tokenizer")
}

/// One of the templates that the tests of chat templates replay.
fn template(name: &str) -> ChatTemplate {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/templates")
        .join(name);
    let source = std::fs::read_to_string(path).expect("a template");
    let source = format!("{{% set bos_token = '' %}}{{% set eos_token = '' %}}{source}");
    ChatTemplate::from_source(&source).expect("it compiles")
}

fn decide(name: &str) -> ToolStyle {
    ToolStyle::decide(Some(&template(name)), &tokenizer(&[]), ParserAsked::Auto)
}

#[test]
fn the_template_tells_the_format_and_what_it_wants() {
    for (name, format, shows_tools, calls) in [
        ("qwen3.jinja", ToolFormat::Hermes, true, CallsAs::Text),
        (
            "hermes.tool_use.jinja",
            ToolFormat::Hermes,
            true,
            CallsAs::Text,
        ),
        (
            "mistral_tools.jinja",
            ToolFormat::Mistral,
            true,
            CallsAs::Object,
        ),
        (
            "llama3.jinja",
            ToolFormat::Llama3Json,
            true,
            CallsAs::Object,
        ),
        (
            "deepseek.jinja",
            ToolFormat::DeepSeekV3,
            false,
            CallsAs::Text,
        ),
        ("chatml.jinja", ToolFormat::Json, false, CallsAs::Content),
    ] {
        let style = decide(name);
        assert_eq!(style.format, Some(format), "{name}");
        assert_eq!(style.shows_tools, shows_tools, "{name}");
        assert_eq!(style.calls, calls, "{name}");
    }
    for (source, format) in [
        (
            "{{ tools }}<tool_call>\n<function=f>\n<parameter=a>",
            ToolFormat::Qwen3Coder,
        ),
        ("{{ tools }}<tool_call>\n<function=f>{", ToolFormat::Json),
        (
            "'<｜tool▁call▁begin｜>' + tool['type'] + '<｜tool▁sep｜>' + '\\n' + '```json'",
            ToolFormat::DeepSeekV3,
        ),
        (
            "'<｜tool▁call▁begin｜>' + tool['function']['name'] + '<｜tool▁sep｜>'",
            ToolFormat::DeepSeekV31,
        ),
        (
            "{{ tools }}[func_name1(params_name1=params_value1)]",
            ToolFormat::Pythonic,
        ),
    ] {
        assert_eq!(ToolFormat::of_template(source), format, "{source}");
    }
}

#[test]
fn the_flag_wins_over_the_template() {
    let (qwen, tokenizer) = (template("qwen3.jinja"), tokenizer(&[]));
    let formats = "llama3-json pythonic hermes mistral qwen3_coder deepseek_v3 deepseek_v31 json";
    for name in formats.split(' ') {
        let asked = name.parse().expect("a parser's name");
        let style = ToolStyle::decide(Some(&qwen), &tokenizer, asked);
        assert_eq!(style.format.map(ToolFormat::name), Some(name));
    }
    let off = ToolStyle::decide(Some(&qwen), &tokenizer, ParserAsked::Off);
    assert!(off.format.is_none() && off.shows_tools);
    assert_eq!("auto".parse(), Ok(ParserAsked::Auto));
    let unknown = "xml".parse::<ParserAsked>().expect_err("no parser");
    assert!(unknown.to_string().contains("\"xml\""));
    let bare = ToolStyle::decide(None, &tokenizer, ParserAsked::Auto);
    assert_eq!(bare.format, None, "without a template there is no chat");
}

#[test]
fn marks_are_tokens_only_where_the_tokenizer_says_special() {
    let tokens = [
        ("<tool_call>", true),
        ("</tool_call>", false),
        ("[ARGS]", true),
    ];
    let style = ToolStyle::decide(
        Some(&template("qwen3.jinja")),
        &tokenizer(&tokens),
        ParserAsked::Auto,
    );
    assert_eq!(style.marker(1), Some(Marker::Open));
    assert_eq!(style.marker(2), None);
    assert_eq!(style.marker(3), None, "another format's");
}

#[test]
fn tools_are_told_in_words_where_the_template_does_not_show_them() {
    let tools = [json!({"type": "function", "function": {"name": "f"}})];
    let shown = decide("qwen3.jinja");
    assert_eq!(shown.tools_text(&tools, None), None);
    assert_eq!(
        shown.tools_text(&tools, Some("x")).as_deref(),
        Some("\n---\nx")
    );
    let told = decide("chatml.jinja");
    let json = r#"[{"type":"function","function":{"name":"f"}}]"#;
    let own = told.tools_text(&tools, Some("Use them.")).expect("a text");
    assert_eq!(own, format!("\n---\n{json}\nUse them."));
    let ours = told.tools_text(&tools, None).expect("a text");
    assert!(ours.starts_with(&format!("\n---\n{json}\n")), "{ours}");
    assert!(ours.contains("\"parameters\""), "{ours}");
}

/// What a message's calls and content become.
fn placed(calls: CallsAs, format: ToolFormat, message: Value) -> Value {
    let asked = ParserAsked::Format(format);
    let mut style = ToolStyle::decide(None, &tokenizer(&[]), asked);
    style.calls = calls;
    let Value::Object(mut message) = message else {
        panic!("an object")
    };
    style.place_calls(&mut message);
    Value::Object(message)
}

#[test]
fn arguments_of_earlier_calls_take_the_form_that_is_wanted() {
    let call =
        |arguments: Value| json!({"id": "1", "function": {"name": "f", "arguments": arguments}});
    for (form, given, expected) in [
        (
            CallsAs::Object,
            json!("{\"b\": 1, \"a\": 2}"),
            json!({"b": 1, "a": 2}),
        ),
        (CallsAs::Object, json!({"a": 1}), json!({"a": 1})),
        (CallsAs::Object, json!(""), json!({})),
        (CallsAs::Object, json!("{\"a\": "), json!("{\"a\": ")),
        (
            CallsAs::Text,
            json!("{\"a\":  1e400}"),
            json!("{\"a\":  1e400}"),
        ),
        (
            CallsAs::Text,
            json!({"b": 1, "a": 2}),
            json!("{\"b\":1,\"a\":2}"),
        ),
    ] {
        let message = json!({"tool_calls": [call(given), {"name": "g"}, 5]});
        let told = placed(form, ToolFormat::Json, message);
        let expected = json!({"tool_calls": [call(expected), {"name": "g"}, 5]});
        assert_eq!(told, expected);
    }
    let flat = json!({"tool_calls": [{"name": "f", "arguments": "{}"}]});
    let told = placed(CallsAs::Object, ToolFormat::Json, flat);
    assert_eq!(told["tool_calls"][0]["arguments"], json!({}));
    let none = json!({"content": "a", "tool_calls": []});
    let told = placed(CallsAs::Object, ToolFormat::Json, none);
    assert_eq!(told, json!({"content": "a"}));
}

#[test]
fn calls_that_a_template_does_not_show_are_written_into_the_content() {
    let arguments = "{\"b\": [1e400, true, null],  \"a\": {\"c\": \"'d'\"}}";
    let call = |arguments: &str| json!({"function": {"name": "add", "arguments": arguments}});
    for (format, expected) in [
        (
            ToolFormat::Json,
            format!("{{\"name\": \"add\", \"parameters\": {arguments}}}"),
        ),
        (
            ToolFormat::Hermes,
            format!("<tool_call>\n{{\"name\": \"add\", \"arguments\": {arguments}}}\n</tool_call>"),
        ),
        (
            ToolFormat::Mistral,
            format!("[TOOL_CALLS][{{\"name\": \"add\", \"arguments\": {arguments}}}]"),
        ),
        (
            ToolFormat::DeepSeekV3,
            format!(
                "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>add\n```json\n\
                 {arguments}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
            ),
        ),
        (
            ToolFormat::DeepSeekV31,
            format!(
                "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>add<｜tool▁sep｜>{arguments}\
                 <｜tool▁call▁end｜><｜tool▁calls▁end｜>"
            ),
        ),
    ] {
        let message =
            json!({"role": "assistant", "content": null, "tool_calls": [call(arguments)]});
        let told = placed(CallsAs::Content, format, message);
        assert_eq!(told, json!({"role": "assistant", "content": expected}));
        // And is read again.
        super::says(format, &expected, "", &[("add", arguments)]);
    }
    let arguments = "{\"a\": [1, true, null], \"b\": {\"c\": \"'d'\"}}";
    let python = "[add(a=[1, True, None], b={\"c\": \"'d'\"})]";
    let message = json!({"content": "So:", "tool_calls": [call(arguments), call("{}")]});
    let told = placed(CallsAs::Content, ToolFormat::Pythonic, message);
    assert_eq!(told, json!({"content": format!("So:\n{python}\n[add()]")}));
    super::says(ToolFormat::Pythonic, python, "", &[("add", arguments)]);
    let arguments = "{\"a\": [1,true,null], \"s\": \"5\\n\"}";
    let tags = "<tool_call>\n<function=add>\n<parameter=a>\n[1,true,null]\n</parameter>\n\
         <parameter=s>\n5\n\n</parameter>\n</function>\n</tool_call>";
    let message = json!({"content": null, "tool_calls": [call(arguments)]});
    let told = placed(CallsAs::Content, ToolFormat::Qwen3Coder, message);
    assert_eq!(told, json!({"content": tags}));
    super::says(ToolFormat::Qwen3Coder, tags, "", &[("add", arguments)]);
}
