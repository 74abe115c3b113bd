//! Tools: what the model is told of them, and how its calls are told.

use headrace_engine::{FinishReason, TokenEvent};
use serde_json::{Value, json};

use super::golden::golden;
use super::script::Wakes;
use super::{END, Stack, THIRD, drawn, ids, text_of, token};

const PATH: &str = "/v1/chat/completions";

const QWEN: &str = include_str!("../../text/tests/templates/qwen3.jinja");
const MISTRAL: &str = include_str!("../../text/tests/templates/mistral_tools.jinja");
const LLAMA: &str = include_str!("../../text/tests/templates/llama3.jinja");
/// A template that knows nothing of tools.
const PLAIN: &str = "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}";

/// A call of Qwen's, with a letter of two bytes and digits that no number of ours holds.
const CALL: &str = "<tool_call>\n{\"name\": \"get_weather\", \"arguments\": \
                    {\"city\": \"Zürich\",  \"n\": 1e400}}\n</tool_call>";
const ARGUMENTS: &str = "{\"city\": \"Zürich\",  \"n\": 1e400}";
const SECOND: &str = "<tool_call>\n{\"name\": \"add\", \"arguments\": {\"a\": 1}}\n</tool_call>";

/// A server of a model with this template.
pub(super) fn stack(template: &str, third: &str) -> Stack {
    let names = "{% set bos_token = '<s>' %}{% set eos_token = '</s>' %}";
    Stack::of(text_of(&format!("{names}{template}"), third), |serve| {
        serve.requests.max_total_tokens = Some(4096);
        serve.requests.max_input_tokens = Some(2048);
    })
}

fn qwen() -> Stack {
    stack(QWEN, "<|third|>")
}

/// A body that names two tools.
pub(super) fn asked(more: &Value) -> Value {
    let tool = |name: &str| {
        json!({"type": "function", "function": {"name": name,
        "description": format!("does {name}"),
        "parameters": {"type": "object", "properties": {"a": {"type": "number"}}}}})
    };
    let mut body = json!({"messages": [{"role": "user", "content": "Hi"}],
        "tools": [tool("get_weather"), tool("add")]});
    for (key, value) in more.as_object().unwrap() {
        body[key] = value.clone();
    }
    body
}

/// The model says a text and ends.
pub(super) fn said(text: &str) -> Wakes {
    let mut all = ids(text);
    all.push(END);
    drawn(&all, FinishReason::EndOfText)
}

/// The same in wakes of other sizes, which repeat.
fn regrouped(wakes: &Wakes, sizes: &[usize]) -> Wakes {
    let mut events: std::collections::VecDeque<TokenEvent> = wakes.concat().into();
    let mut grouped = Vec::new();
    for size in sizes.iter().cycle() {
        if events.is_empty() {
            break;
        }
        grouped.push(events.drain(..(*size).min(events.len())).collect());
    }
    grouped
}

pub(super) async fn answer(stack: &Stack, body: &Value, wakes: Wakes) -> Value {
    stack.script.push(wakes);
    let reply = stack.post(PATH, body).await;
    assert_eq!(reply.status, 200, "{}", reply.text());
    reply.json()
}

/// The chunks of a stream.
pub(super) async fn chunks(stack: &Stack, body: &Value, wakes: Wakes) -> Vec<Value> {
    stack.script.push(wakes);
    let mut body = body.clone();
    body["stream"] = json!(true);
    let reply = stack.post(PATH, &body).await;
    assert_eq!(reply.status, 200, "{}", reply.text());
    let mut events: Vec<&str> = reply.text().split("\n\n").collect();
    assert_eq!(events.pop(), Some(""));
    assert_eq!(events.pop(), Some("data: [DONE]"));
    let event = |event: &str| serde_json::from_str(event.strip_prefix("data: ").unwrap()).unwrap();
    events.into_iter().map(event).collect()
}

/// Puts a stream together as OpenAI's clients do: content, calls and the reason of the end.
pub(super) fn joined(chunks: &[Value]) -> (String, Vec<Value>, Value) {
    let (mut content, mut calls, mut reason) = (String::new(), Vec::<Value>::new(), Value::Null);
    for choice in chunks.iter().filter_map(|chunk| chunk["choices"].get(0)) {
        assert!(reason.is_null(), "nothing comes after the end");
        reason = choice["finish_reason"].clone();
        let delta = &choice["delta"];
        content += delta["content"].as_str().unwrap_or("");
        let Some(parts) = delta["tool_calls"].as_array() else {
            continue;
        };
        for part in parts {
            let index = usize::try_from(part["index"].as_u64().unwrap()).unwrap();
            if index == calls.len() {
                assert_eq!(part["type"], "function");
                assert_eq!(part["function"]["arguments"], "");
                let mut call = part.clone();
                call.as_object_mut().unwrap().shift_remove("index");
                calls.push(call);
                continue;
            }
            let object = part.as_object().unwrap();
            assert!(
                !object.contains_key("id") && !object.contains_key("type"),
                "{part}"
            );
            let function = &mut calls[index]["function"];
            let before = function["arguments"].as_str().unwrap();
            let more = part["function"]["arguments"].as_str().unwrap();
            function["arguments"] = format!("{before}{more}").into();
        }
    }
    (content, calls, reason)
}

/// Names and arguments.
fn functions(calls: &Value) -> Vec<(String, String)> {
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    let function = |call: &Value| {
        assert_eq!(call["type"], "function");
        let function = &call["function"];
        (text(&function["name"]), text(&function["arguments"]))
    };
    calls.as_array().unwrap().iter().map(function).collect()
}

fn pair(name: &str, arguments: &str) -> (String, String) {
    (name.to_owned(), arguments.to_owned())
}

#[tokio::test]
async fn transcripts_of_calls() {
    // One token a byte, so that the stream is short enough to be read.
    let call = "<tool_call>{\"name\": \"add\", \"arguments\": {\"a\":1}}</tool_call>";
    let text = format!("Só\n{call}\n{call}");
    let body = asked(&json!({"stream": true, "stream_options": {"include_usage": true}}));
    let stack = qwen();
    stack.script.push(regrouped(&said(&text), &[29, 17, 40, 1]));
    let reply = stack.post(PATH, &body).await;
    golden("tools.sse", reply.text());
    stack.script.push(said(&text));
    let reply = stack.post(PATH, &asked(&json!({}))).await;
    golden("tools.json", reply.text());
}

#[tokio::test]
async fn any_grouping_of_tokens_says_the_same() {
    let stack = qwen();
    let text = format!("Só.\n{CALL}{SECOND} <b>");
    let whole = answer(&stack, &asked(&json!({})), said(&text)).await;
    let choice = &whole["choices"][0];
    assert_eq!(choice["message"]["content"], "Só.\n <b>");
    assert_eq!(choice["finish_reason"], "tool_calls");
    let expected = [pair("get_weather", ARGUMENTS), pair("add", "{\"a\": 1}")];
    assert_eq!(functions(&choice["message"]["tool_calls"]), expected);
    for sizes in [&[1][..], &[2], &[3, 1], &[7, 5, 1], &[64], &[1000]] {
        let wakes = regrouped(&said(&text), sizes);
        let chunks = chunks(&stack, &asked(&json!({})), wakes).await;
        let (content, calls, reason) = joined(&chunks);
        assert_eq!(content, "Só.\n <b>", "{sizes:?}");
        assert_eq!(functions(&calls.into()), expected, "{sizes:?}");
        assert_eq!(reason, "tool_calls", "{sizes:?}");
    }
}

#[tokio::test]
async fn a_message_of_calls_alone_has_no_content() {
    let stack = qwen();
    let reply = answer(&stack, &asked(&json!({})), said(CALL)).await;
    let message = &reply["choices"][0]["message"];
    assert!(message["content"].is_null() && message.as_object().unwrap().contains_key("content"));
    let id = message["tool_calls"][0]["id"].as_str().unwrap();
    assert!(id.starts_with("call_"), "{id}");
}

#[tokio::test]
async fn text_is_text_where_no_tools_are_in_use() {
    let stack = qwen();
    for more in [
        json!({"tools": []}),
        json!({"tools": null}),
        json!({"tool_choice": "none"}),
    ] {
        let reply = answer(&stack, &asked(&more), said(CALL)).await;
        let choice = &reply["choices"][0];
        assert_eq!(choice["message"]["content"], CALL);
        assert_eq!(choice["message"].get("tool_calls"), None);
        assert_eq!(choice["finish_reason"], "stop");
        let prompt = stack.post("/chat_tokenize", &asked(&more)).await.json();
        let prompt = prompt["templated_text"].as_str().unwrap().to_owned();
        assert!(!prompt.contains("get_weather"), "{prompt}");
    }
    // A tool that was not offered.
    let other = CALL.replace("get_weather", "get_time");
    let reply = answer(&stack, &asked(&json!({})), said(&other)).await;
    assert_eq!(reply["choices"][0]["message"]["content"], other);
    assert_eq!(reply["choices"][0]["finish_reason"], "stop");
}

#[tokio::test]
async fn a_cut_call_is_told_as_far_as_it_came_with_the_reason_of_the_cut() {
    let stack = qwen();
    let cut = &CALL[..CALL.find("rich").unwrap()];
    for (body, wakes, reason, arguments) in [
        (
            json!({}),
            drawn(&ids(cut), FinishReason::Length),
            "length",
            "{\"city\": \"Zü",
        ),
        (json!({}), said(cut), "stop", "{\"city\": \"Zü"),
        (json!({"stop": "Z"}), said(CALL), "stop", "{\"city\": \""),
        // Complete, but at the last token that was allowed.
        (
            json!({}),
            drawn(&ids(CALL), FinishReason::Length),
            "length",
            ARGUMENTS,
        ),
    ] {
        let mut body = asked(&body);
        if reason == "length" {
            let tokens = wakes.concat().len() - 2;
            body["max_tokens"] = json!(tokens);
        }
        let reply = answer(&stack, &body, wakes.clone()).await;
        let choice = &reply["choices"][0];
        let expected = [pair("get_weather", arguments)];
        assert_eq!(functions(&choice["message"]["tool_calls"]), expected);
        assert_eq!(choice["finish_reason"], reason, "{arguments}");
        let (content, calls, told) = joined(&chunks(&stack, &body, wakes).await);
        assert_eq!((content.as_str(), told), ("", json!(reason)));
        assert_eq!(functions(&calls.into()), expected);
    }
}

#[tokio::test]
async fn a_stop_string_after_a_call_ends_it_like_an_ending_token() {
    let stack = qwen();
    let body = asked(&json!({"stop": ["</tool"]}));
    let reply = answer(&stack, &body, said(&format!("{CALL} more"))).await;
    let choice = &reply["choices"][0];
    assert_eq!(
        functions(&choice["message"]["tool_calls"]),
        [pair("get_weather", ARGUMENTS)]
    );
    assert_eq!(choice["finish_reason"], "tool_calls");
    assert_eq!(stack.script.log().finished, [FinishReason::StopText]);
}

#[tokio::test]
async fn without_parallel_calls_the_first_is_the_last() {
    let stack = qwen();
    let body = asked(&json!({"parallel_tool_calls": false}));
    let text = format!("So {CALL}\n{SECOND}");
    let reply = answer(&stack, &body, said(&text)).await;
    let choice = &reply["choices"][0];
    assert_eq!(
        functions(&choice["message"]["tool_calls"]),
        [pair("get_weather", ARGUMENTS)]
    );
    assert_eq!(choice["message"]["content"], "So ");
    assert_eq!(choice["finish_reason"], "tool_calls");
    assert_eq!(
        stack.script.log().finished,
        [FinishReason::StopText],
        "generation ended with the call"
    );
    let (_, calls, reason) = joined(&chunks(&stack, &body, said(&text)).await);
    assert_eq!((calls.len(), reason), (1, json!("tool_calls")));
}

#[tokio::test]
async fn several_answers_have_calls_of_their_own() {
    let stack = qwen();
    let body = asked(&json!({"n": 2}));
    stack.script.push(said(SECOND));
    let reply = answer(&stack, &body, said(CALL)).await;
    let call = |index: usize| &reply["choices"][index]["message"]["tool_calls"];
    assert_eq!(functions(call(0)), [pair("add", "{\"a\": 1}")]);
    assert_eq!(functions(call(1)), [pair("get_weather", ARGUMENTS)]);
    assert_ne!(call(0)[0]["id"], call(1)[0]["id"]);
    let tokens = SECOND.len() + CALL.len() + 2;
    assert_eq!(reply["usage"]["completion_tokens"], tokens);
    stack.script.push(said(SECOND));
    let chunks = chunks(&stack, &body, said(CALL)).await;
    for (index, name) in [(0, "add"), (1, "get_weather")] {
        let own = |chunk: &&Value| chunk["choices"][0]["index"] == index;
        let own: Vec<Value> = chunks.iter().filter(own).cloned().collect();
        let (_, calls, _) = joined(&own);
        assert_eq!(functions(&calls.into())[0].0, name);
    }
}

#[tokio::test]
async fn log_probabilities_are_of_every_token() {
    let stack = qwen();
    let body = asked(&json!({"logprobs": true}));
    let text = format!("a{CALL}b");
    let reply = answer(&stack, &body, said(&text)).await;
    let told = &reply["choices"][0]["logprobs"]["content"];
    assert_eq!(told.as_array().unwrap().len(), text.len() + 1);
    let chunks = chunks(&stack, &body, regrouped(&said(&text), &[50])).await;
    let told = chunks.iter().filter_map(|chunk| {
        let content = &chunk["choices"][0]["logprobs"]["content"];
        content.as_array().map(Vec::len)
    });
    assert_eq!(told.sum::<usize>(), text.len() + 1);
    let (content, calls, _) = joined(&chunks);
    assert_eq!((content.as_str(), calls.len()), ("ab", 1));
}

#[tokio::test]
async fn a_marker_that_is_a_special_token_is_seen_and_not_shown() {
    let stack = stack(MISTRAL, "[TOOL_CALLS]");
    let mut tokens = ids("Sure.");
    tokens.push(THIRD);
    tokens.extend(ids("[{\"name\": \"add\", \"arguments\": {\"a\": 1}}]"));
    tokens.push(END);
    let wakes = drawn(&tokens, FinishReason::EndOfText);
    // What may become a stop string is shown before the marker.
    let body = asked(&json!({"stop": "e.["}));
    let reply = answer(&stack, &body, wakes.clone()).await;
    let message = &reply["choices"][0]["message"];
    assert_eq!(message["content"], "Sure.");
    assert_eq!(
        functions(&message["tool_calls"]),
        [pair("add", "{\"a\": 1}")]
    );
    let id = message["tool_calls"][0]["id"].as_str().unwrap();
    let fits = id.len() == 9 && id.chars().all(|c| c.is_ascii_alphanumeric());
    assert!(fits, "the template refuses {id}");
    let (content, calls, _) = joined(&chunks(&stack, &body, wakes).await);
    assert_eq!((content.as_str(), calls.len()), ("Sure.", 1));
    // Before anything else than a call it is nothing, like other special tokens.
    let wakes = vec![
        vec![token(THIRD), token(u32::from(b'a'))],
        said("b").concat(),
    ];
    let reply = answer(&stack, &body, wakes).await;
    assert_eq!(reply["choices"][0]["message"]["content"], "ab");
}

#[tokio::test]
async fn an_answer_that_is_a_text_keeps_its_calls() {
    let stack = qwen();
    stack.script.push(said(CALL));
    let body = json!({"instances": [asked(&json!({}))]});
    let reply = stack.post("/vertex", &body).await;
    assert_eq!(reply.status, 200, "{}", reply.text());
    assert_eq!(reply.json()["predictions"], json!([CALL]));
    let prompt = stack.script.log().requests[0].prompt().len();
    assert!(prompt > 300, "the tools are in the prompt: {prompt} bytes");
}

/// What a conversation becomes.
async fn rendered(stack: &Stack, body: &Value) -> String {
    let reply = stack.post("/chat_tokenize", body).await;
    assert_eq!(reply.status, 200, "{}", reply.text());
    reply.json()["templated_text"].as_str().unwrap().to_owned()
}

#[tokio::test]
async fn the_template_shows_the_tools_as_they_were_given() {
    let body = asked(&json!({}));
    let prompt = rendered(&qwen(), &body).await;
    let tool = "{\"type\": \"function\", \"function\": {\"name\": \"add\", \"description\": \
                \"does add\", \"parameters\": {\"type\": \"object\", \"properties\": \
                {\"a\": {\"type\": \"number\"}}}}}";
    assert!(prompt.contains(tool), "{prompt}");
    assert!(
        prompt.contains("user\nHi<|im_end|>"),
        "nothing of ours: {prompt}"
    );
    let own = rendered(&qwen(), &asked(&json!({"tool_prompt": "Be brief."}))).await;
    assert!(own.contains("user\nHi\n---\nBe brief.<|im_end|>"), "{own}");
    // TGI's other name of the parameters.
    let tool =
        json!({"type": "function", "function": {"name": "f", "arguments": {"type": "object"}}});
    let prompt = rendered(&qwen(), &asked(&json!({"tools": [tool]}))).await;
    assert!(
        prompt.contains("\"parameters\": {\"type\": \"object\"}"),
        "{prompt}"
    );
}

#[tokio::test]
async fn a_template_without_tools_gets_them_in_the_last_message() {
    let stack = stack(PLAIN, "<|third|>");
    let tool = json!({"type": "function", "function": {"name": "f"}});
    let shown = "\n---\n[{\"type\":\"function\",\"function\":{\"name\":\"f\"}}]\n";
    let prompt = rendered(&stack, &asked(&json!({"tools": [tool]}))).await;
    assert!(prompt.starts_with(&format!("user:Hi{shown}")), "{prompt}");
    assert!(
        prompt.contains("\"parameters\""),
        "the form of a call: {prompt}"
    );
    let body = asked(&json!({"tools": [tool], "tool_prompt": "Use f."}));
    assert_eq!(
        rendered(&stack, &body).await,
        format!("user:Hi{shown}Use f.;")
    );
    // And a call in that form is one.
    let call = "{\"name\": \"f\", \"parameters\": {}}";
    let reply = answer(&stack, &body, said(call)).await;
    let calls = &reply["choices"][0]["message"]["tool_calls"];
    assert_eq!(functions(calls), [pair("f", "{}")]);
    // An answer that has begun is not written into.
    let messages =
        json!([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "So"}]);
    let body = asked(&json!({"tools": [tool], "tool_prompt": "Use f.", "messages": messages}));
    let prompt = rendered(&stack, &body).await;
    assert_eq!(prompt, format!("user:Hi{shown}Use f.;assistant:So"));
}

/// A conversation with calls and their results.
fn history(calls: &[(&str, &str)], result: &str) -> Value {
    let call = |(id, arguments): &(&str, &str)| {
        json!({"id": id, "type": "function",
        "function": {"name": "add", "arguments": arguments}})
    };
    let calls: Vec<Value> = calls.iter().map(call).collect();
    json!([{"role": "user", "content": "Hi"},
        {"role": "assistant", "content": null, "tool_calls": calls},
        {"role": "tool", "content": result, "tool_call_id": "abcdefghi", "name": "add"}])
}

#[tokio::test]
async fn calls_of_earlier_turns_reach_the_template() {
    let arguments = "{\"b\": 1,  \"a\": 12345678901234567890}";
    let messages = history(&[("abcdefghi", arguments), ("123456789", "{}")], "3");
    // Byte for byte, where the template takes a text.
    let prompt = rendered(&qwen(), &asked(&json!({"messages": messages}))).await;
    let call =
        format!("<tool_call>\n{{\"name\": \"add\", \"arguments\": {arguments}}}\n</tool_call>");
    assert!(prompt.contains(&call), "{prompt}");
    assert!(
        prompt.contains("<tool_response>\n3\n</tool_response>"),
        "{prompt}"
    );
    // As an object where it writes one itself, with the ids it asks for.
    let mistral = stack(MISTRAL, "[TOOL_CALLS]");
    let prompt = rendered(&mistral, &asked(&json!({"messages": messages}))).await;
    let call = "[TOOL_CALLS] [{\"name\": \"add\", \"arguments\": {\"b\": 1, \
                \"a\": 12345678901234567890}, \"id\": \"abcdefghi\"}, {\"name\": \"add\", \
                \"arguments\": {}, \"id\": \"123456789\"}]";
    assert!(prompt.contains(call), "{prompt}");
    assert!(prompt.contains("\"call_id\": \"abcdefghi\""), "{prompt}");
    let messages = history(&[("abcdefghi", "{\"a\": 1}")], "3");
    let llama = stack(LLAMA, "<|python_tag|>");
    let prompt = rendered(&llama, &asked(&json!({"messages": messages}))).await;
    assert!(
        prompt.contains("{\"name\": \"add\", \"parameters\": {\"a\": 1}}"),
        "{prompt}"
    );
    // As content where it shows none.
    let plain = stack(PLAIN, "<|third|>");
    let prompt = rendered(&plain, &json!({"messages": messages})).await;
    let call = "assistant:{\"name\": \"add\", \"parameters\": {\"a\": 1}};tool:3;";
    assert!(prompt.ends_with(call), "{prompt}");
    // What was cut stays what it was, and an empty list is none.
    let messages = history(&[("abcdefghi", "{\"a\": ")], "3");
    let prompt = rendered(&qwen(), &asked(&json!({"messages": messages}))).await;
    assert!(prompt.contains("\"arguments\": {\"a\": }"), "{prompt}");
    let messages = json!([{"role": "assistant", "content": "So", "tool_calls": []}]);
    let prompt = rendered(&llama, &json!({"messages": messages})).await;
    assert!(
        prompt.ends_with("So"),
        "an answer that has begun goes on: {prompt}"
    );
}

/// Whether the model may say a text, a token a byte, and end there.
pub(super) async fn may_say(stack: &Stack, body: &Value, text: &str) -> bool {
    stack.script.push(drawn(&[END], FinishReason::EndOfText));
    let reply = stack.post(PATH, body).await;
    assert_eq!(reply.status, 200, "{}", reply.text());
    let log = stack.script.log();
    let matcher = log.matchers.last().unwrap().clone();
    let mut matcher = matcher.expect("the answer is constrained");
    let mut mask = matcher.first_mask();
    for id in ids(text) {
        if !mask.allows(id) {
            return false;
        }
        matcher.accept(id).unwrap();
        mask = matcher.mask().unwrap();
    }
    mask.allows(END)
}

#[tokio::test]
async fn a_call_that_must_be_made_is_all_that_can_be_said() {
    const ADD: &str = "<tool_call>\n{\"name\": \"add\", \"arguments\": {\"a\": 1}}\n</tool_call>";
    const WEATHER: &str =
        "<tool_call>\n{\"name\": \"get_weather\", \"arguments\": {\"a\": 1}}\n</tool_call>";
    let stack = qwen();
    let object = json!({"type": "function", "function": {"name": "add"}});
    for (choice, both) in [
        (json!("required"), true),
        (json!("add"), false),
        (object, false),
    ] {
        let body = asked(&json!({"tool_choice": choice}));
        assert!(may_say(&stack, &body, ADD).await, "{choice}");
        assert_eq!(may_say(&stack, &body, WEATHER).await, both, "{choice}");
        assert!(!may_say(&stack, &body, "I would rather not").await);
        assert!(!may_say(&stack, &body, &ADD.replace('1', "\"1\"")).await);
        let two = format!("{ADD}\n{WEATHER}");
        assert_eq!(may_say(&stack, &body, &two).await, both, "{choice}");
    }
    let one = asked(&json!({"tool_choice": "required", "parallel_tool_calls": false}));
    assert!(!may_say(&stack, &one, &format!("{ADD}\n{ADD}")).await);
    let llama = self::stack(LLAMA, "<|python_tag|>");
    let body = asked(&json!({"tool_choice": "required"}));
    let call = "{\"name\": \"add\", \"parameters\": {\"a\": 1}}";
    assert!(may_say(&llama, &body, call).await);
    assert!(!may_say(&llama, &body, &call.replace("add", "sub")).await);
}

#[tokio::test]
async fn a_call_that_must_be_made_is_told_as_a_call() {
    let stack = qwen();
    let body = asked(&json!({"tool_choice": "add"}));
    let reply = answer(&stack, &body, said(SECOND)).await;
    let choice = &reply["choices"][0];
    assert_eq!(
        choice["message"]["tool_calls"][0]["function"]["name"],
        "add"
    );
    assert_eq!(choice["finish_reason"], "tool_calls");
}

#[tokio::test]
async fn a_grammar_and_a_call_that_must_be_made_exclude_each_other() {
    let stack = qwen();
    let body = asked(&json!({"tool_choice": "required", "grammar": "start: \"a\""}));
    let reply = stack.post(PATH, &body).await;
    assert_eq!(reply.status, 422);
    assert_eq!(reply.json()["error_type"], "tool_error");
    assert!(stack.script.log().requests.is_empty());
}

#[tokio::test]
async fn refusals_of_tools_are_tgi_s_error_object() {
    let stack = qwen();
    let reply = stack
        .post(PATH, &asked(&json!({"tool_choice": "other"})))
        .await;
    assert_eq!(reply.status, 422);
    assert_eq!(reply.json()["error_type"], "tool_error");
    assert!(
        reply.text().contains("Tool error: `tool_choice` names"),
        "{}",
        reply.text()
    );
    let tool = json!({"type": "function", "function": {"name": "f"}});
    let tools = vec![tool; 513];
    let stack = Stack::with(|serve| serve.requests.payload_limit = 100_000);
    let reply = stack.post(PATH, &asked(&json!({"tools": tools}))).await;
    assert_eq!(reply.status, 422);
    assert!(
        reply.text().contains("513 entries; at most 512"),
        "{}",
        reply.text()
    );
}
