//! Calls in forms that are no JSON, and grammars of them.

use serde_json::{Value, json};

use super::tools::{answer, asked, chunks, joined, may_say, said, stack};

const DEEPSEEK: &str = include_str!("../../text/tests/templates/deepseek.jinja");
/// A template that teaches Qwen3-Coder's form.
const CODER: &str = "{% if tools %}{{ tools | tojson }} as <tool_call><function=f><parameter=a>\
                     {% endif %}{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}";

#[tokio::test]
async fn a_call_without_quotes_is_typed_by_the_tool_s_schema() {
    let stack = stack(CODER, "<|third|>");
    let point = json!({"type": "object", "properties": {"x": {"$ref": "#/$defs/n"}},
        "required": ["x"], "additionalProperties": false});
    let parameters = json!({"type": "object", "required": ["text"], "$defs": {"n": {"type": "integer"},
        "p": point}, "properties": {"a": {"$ref": "#/$defs/n"}, "text": {"type": "string"},
        "p": {"$ref": "#/$defs/p"}}});
    let tools = json!([
        {"type": "function", "function": {"name": "write", "parameters": parameters}},
        {"type": "function", "function": {"name": "now"}},
    ]);
    let call = "<tool_call>\n<function=write>\n<parameter=a>\n5\n</parameter>\n<parameter=text>\n5\n\
                <b>\n</parameter>\n<parameter=p>\n{\"x\": 1}\n</parameter>\n</function>\n</tool_call>";
    let body = asked(&json!({"tools": tools, "tool_choice": "required"}));
    let reply = answer(&stack, &body, said(call)).await;
    let function = &reply["choices"][0]["message"]["tool_calls"][0]["function"];
    let arguments: Value = serde_json::from_str(function["arguments"].as_str().unwrap()).unwrap();
    let expected = json!({"a": 5, "text": "5\n<b>", "p": {"x": 1}});
    assert_eq!(arguments, expected);
    assert!(may_say(&stack, &body, call).await);
    let less = "<parameter=a>\n5\n</parameter>\n";
    assert!(may_say(&stack, &body, &call.replace(less, "")).await);
    let now = "<tool_call>\n<function=now>\n</function>\n</tool_call>";
    assert!(may_say(&stack, &body, &format!("{call}\n{now}")).await);
    for wrong in [
        call.replace("\n5\n</", "\nfive\n</"),
        call.replace("\"x\": 1", "\"x\": \"1\""),
        call.replace("<parameter=text>\n5\n<b>\n</parameter>\n", ""),
        call.replace("=write", "=read"),
        now.replace("</tool_call>", ""),
    ] {
        assert!(!may_say(&stack, &body, &wrong).await, "{wrong}");
    }
}

#[tokio::test]
async fn deepseek_s_calls_are_made_and_told() {
    let stack = stack(DEEPSEEK, "<|third|>");
    let add = "<｜tool▁call▁begin｜>function<｜tool▁sep｜>add\n```json\n{\"a\": 1}\n```\
               <｜tool▁call▁end｜>";
    let calls = format!("<｜tool▁calls▁begin｜>{add}\n{add}<｜tool▁calls▁end｜>");
    let reply = answer(&stack, &asked(&json!({})), said(&format!("So:{calls}"))).await;
    let choice = &reply["choices"][0];
    assert_eq!(choice["message"]["content"], "So:");
    assert_eq!(choice["message"]["tool_calls"].as_array().unwrap().len(), 2);
    assert_eq!(choice["finish_reason"], "tool_calls");
    let chunks = chunks(&stack, &asked(&json!({})), said(&calls)).await;
    let (content, streamed, _) = joined(&chunks);
    assert_eq!(content, "");
    assert_eq!(streamed[1]["function"]["arguments"], "{\"a\": 1}");
    let body = asked(&json!({"tool_choice": "required"}));
    assert!(may_say(&stack, &body, &calls).await);
    assert!(!may_say(&stack, &body, &calls.replace("add", "sub")).await);
    assert!(!may_say(&stack, &body, &calls.replace('1', "\"1\"")).await);
    let newer = "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>add<｜tool▁sep｜>{\"a\": 1}\
                 <｜tool▁call▁end｜><｜tool▁calls▁end｜>";
    let template = DEEPSEEK.replace("```json", "");
    let stack = super::tools::stack(&template, "<|third|>");
    assert!(may_say(&stack, &body, newer).await);
    assert!(!may_say(&stack, &body, &calls).await);
}
