//! Grammars of calls that must be made.

use serde_json::{Value, json};

use super::super::{CallsAsked, CallsMax, ParserAsked, ToolConstraint, ToolFormat, ToolStyle};
use super::style::tokenizer;

fn tools() -> Vec<Value> {
    let schema = json!({"type": "object", "properties": {"a": {"$ref": "#/$defs/n"}},
        "$defs": {"n": {"type": "number"}}});
    vec![
        json!({"type": "function", "function": {"name": "add", "parameters": schema}}),
        json!({"type": "function", "function": {"name": "now"}}),
    ]
}

fn lark(
    format: ToolFormat,
    added: &[(&str, bool)],
    asked: CallsAsked<'_>,
    max: CallsMax,
) -> String {
    let style = ToolStyle::decide(None, &tokenizer(added), ParserAsked::Format(format));
    let ToolConstraint { lark } = style.constraint(&tools(), asked, max).expect("a grammar");
    lark
}

const SCHEMA: &str = r##"{"type":"object","properties":{"a":{"$ref":"#/$defs/n"}},"$defs":{"n":{"type":"number"}}}"##;

#[test]
fn any_call_or_several_in_the_model_s_format() {
    let expected = format!(
        "start: \"<tool_call>\" \"\\n\" function \"\\n\" \"</tool_call>\" \
         (\"\\n\" \"<tool_call>\" \"\\n\" function \"\\n\" \"</tool_call>\")*\n\
         function: f0 | f1\n\
         f0: \"{{\\\"name\\\": \\\"add\\\", \\\"arguments\\\": \" f0_arguments \"}}\"\n\
         f0_arguments: %json {SCHEMA}\n\
         f1: \"{{\\\"name\\\": \\\"now\\\", \\\"arguments\\\": \" f1_arguments \"}}\"\n\
         f1_arguments: %json {{\"type\":\"object\"}}\n"
    );
    let hermes = lark(ToolFormat::Hermes, &[], CallsAsked::Any, CallsMax::Many);
    assert_eq!(hermes, expected);
    let json = lark(ToolFormat::Json, &[], CallsAsked::Any, CallsMax::Many);
    assert!(
        json.starts_with("start: \"[\" function (\", \" function)* \"]\"\n"),
        "{json}"
    );
    let llama = lark(ToolFormat::Llama3Json, &[], CallsAsked::Any, CallsMax::Many);
    assert!(
        llama.starts_with("start: function (\"; \" function)*\n"),
        "{llama}"
    );
    assert!(llama.contains("\\\"parameters\\\": "), "{llama}");
}

#[test]
fn one_call_of_one_function() {
    let named = CallsAsked::Named("now");
    let json = lark(ToolFormat::Json, &[], named, CallsMax::One);
    assert!(
        json.starts_with("start: function\nfunction: f0\n"),
        "{json}"
    );
    assert!(json.contains("now") && !json.contains("add"), "{json}");
    let style = ToolStyle::decide(None, &tokenizer(&[]), ParserAsked::Format(ToolFormat::Json));
    let unknown = CallsAsked::Named("other");
    assert_eq!(style.constraint(&tools(), unknown, CallsMax::One), None);
    let off = ToolStyle::decide(None, &tokenizer(&[]), ParserAsked::Off);
    assert_eq!(off.constraint(&tools(), named, CallsMax::One), None);
}

#[test]
fn marks_that_are_tokens_are_named_by_their_ids() {
    let tokens = [("[TOOL_CALLS]", true), ("[ARGS]", true)];
    let newer = lark(
        ToolFormat::Mistral,
        &tokens,
        CallsAsked::Any,
        CallsMax::Many,
    );
    assert!(
        newer.starts_with("start: <[1]> function (<[1]> function)*\n"),
        "{newer}"
    );
    assert!(
        newer.contains("f0: \"add\" <[2]> f0_arguments\n"),
        "{newer}"
    );
    let older = lark(
        ToolFormat::Mistral,
        &tokens[..1],
        CallsAsked::Any,
        CallsMax::One,
    );
    assert!(
        older.starts_with("start: <[1]> \"[\" function \"]\"\n"),
        "{older}"
    );
}

#[test]
fn python_s_arguments_are_named() {
    let python = lark(ToolFormat::Pythonic, &[], CallsAsked::Any, CallsMax::Many);
    let add = "f0: \"add(\" (f0_argument (\", \" f0_argument)*)? \")\"\nf0_argument: (\"a\") \"=\" value\n";
    assert!(python.contains(add), "{python}");
    assert!(
        python.contains("f1_argument: NAME \"=\" value\n"),
        "{python}"
    );
    assert!(python.contains("\nvalue: STRING | "), "{python}");
}

#[test]
fn tags_hold_what_the_schema_says_alone() {
    let coder = lark(ToolFormat::Qwen3Coder, &[], CallsAsked::Any, CallsMax::One);
    let value = r##"{"$ref":"#/$defs/n","$defs":{"n":{"type":"number"}}}"##;
    let expected = format!(
        "start: \"<tool_call>\" \"\\n\" function \"\\n\" \"</tool_call>\"\n\
         function: f0 | f1\n\
         f0: \"<function=add>\\n\" f0_a0? \"</function>\"\n\
         f0_a0: \"<parameter=a>\\n\" f0_v0 \"\\n</parameter>\\n\"\n\
         f0_v0: %json {value}\n\
         f1_any: \"<parameter=\" KEY \">\\n\" tagged\n\
         f1: \"<function=now>\\n\" f1_any* \"</function>\"\n\
         tagged[lazy]: "
    );
    assert!(coder.starts_with(&expected), "{coder}");
    // A text is free, what must be there is there, and a schema that cannot stand alone is any.
    let properties =
        json!({"s": {"type": "string"}, "l": {"items": {"$ref": "#"}, "type": "array"}});
    let tool = json!({"function": {"name": "f", "parameters": {"properties": properties,
        "required": ["s"]}}});
    let asked = ParserAsked::Format(ToolFormat::Qwen3Coder);
    let style = ToolStyle::decide(None, &tokenizer(&[]), asked);
    let constraint = style.constraint(&[tool], CallsAsked::Any, CallsMax::One);
    let ToolConstraint { lark } = constraint.expect("a grammar");
    for rule in [
        "f0: \"<function=f>\\n\" f0_a0 f0_a1? \"</function>\"\n",
        "f0_a0: \"<parameter=s>\\n\" tagged\n",
        "f0_v1: %json {}\n",
    ] {
        assert!(lark.contains(rule), "{lark}");
    }
}

#[test]
fn deepseek_s_marks_are_around_each_call_and_all_of_them() {
    let tokens = [("<｜tool▁call▁begin｜>", true)];
    let older = lark(
        ToolFormat::DeepSeekV3,
        &tokens,
        CallsAsked::Any,
        CallsMax::Many,
    );
    let start = "start: \"<｜tool▁calls▁begin｜>\" <[1]> function \"<｜tool▁call▁end｜>\" \
                 (\"\\n\" <[1]> function \"<｜tool▁call▁end｜>\")* \"<｜tool▁calls▁end｜>\"\n";
    assert!(older.starts_with(start), "{older}");
    let add = "f0: \"function\" \"<｜tool▁sep｜>\" \"add\\n```json\\n\" f0_arguments \"\\n```\"\n";
    assert!(older.contains(add), "{older}");
    let named = CallsAsked::Named("add");
    let newer = lark(ToolFormat::DeepSeekV31, &[], named, CallsMax::One);
    let add = "f0: \"add\" \"<｜tool▁sep｜>\" f0_arguments\n";
    assert!(newer.contains(add), "{newer}");
}
