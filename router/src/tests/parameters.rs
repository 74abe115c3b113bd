//! What reaches the engine.

use headrace_engine::{FinishReason, Request, TokenId};
use serde_json::{Value, json};

use super::{END, Stack, drawn, ids};

/// The request that a body becomes.
async fn request(path: &str, body: Value) -> Request {
    let stack = Stack::new();
    stack.script.push(drawn(&[END], FinishReason::EndOfText));
    let reply = stack.post(path, &body).await;
    assert_eq!(reply.status, 200, "{}", reply.text());
    stack.script.log().requests.remove(0)
}

async fn generate(parameters: Value) -> Request {
    request(
        "/generate",
        json!({"inputs": "Hi", "parameters": parameters}),
    )
    .await
}

async fn chat(mut body: Value) -> Request {
    body["messages"] = json!([{"role": "user", "content": "Hi"}]);
    request("/v1/chat/completions", body).await
}

#[tokio::test]
async fn tokens_are_drawn_when_parameters_are_absent_and_not_when_they_are_empty() {
    let absent = request("/generate", json!({"inputs": "Hi"})).await;
    assert!(absent.sampling().temperature > 0.0 && !absent.sampling().watermark);
    assert!(generate(json!({})).await.sampling().temperature == 0.0);
    assert!(
        generate(json!({"do_sample": null}))
            .await
            .sampling()
            .temperature
            == 0.0
    );
    assert!(
        generate(json!({"do_sample": true}))
            .await
            .sampling()
            .temperature
            == 1.0
    );
}

#[tokio::test]
async fn a_warper_asks_for_drawing_only_off_its_neutral_value() {
    for (parameters, drawn) in [
        (json!({"temperature": 0.5}), true),
        (json!({"temperature": 1.0}), false),
        (json!({"top_k": 5}), true),
        (json!({"top_p": 0.9}), true),
        (json!({"top_p": 1.0}), false),
        (json!({"typical_p": 0.9}), true),
        (json!({"min_p": 0.1}), true),
        (json!({"repetition_penalty": 1.5}), false),
    ] {
        let request = generate(parameters.clone()).await;
        assert_eq!(request.sampling().temperature > 0.0, drawn, "{parameters}");
    }
}

#[tokio::test]
async fn every_parameter_arrives() {
    let request = generate(
        json!({"temperature": 0.5, "top_k": 5, "top_p": 0.9, "typical_p": 0.8,
        "min_p": 0.1, "repetition_penalty": 1.2, "frequency_penalty": 0.3,
        "presence_penalty": -0.4, "seed": 18_446_744_073_709_551_615_u64, "top_n_tokens": 3,
        "max_new_tokens": 7, "truncate": 1, "watermark": true}),
    )
    .await;
    let sampling = request.sampling();
    assert_eq!(
        (sampling.temperature, sampling.top_k, sampling.top_p),
        (0.5, 5, 0.9)
    );
    assert_eq!((sampling.typical_p, sampling.min_p), (0.8, 0.1));
    assert_eq!(sampling.repetition_penalty, 1.2);
    assert_eq!(
        (sampling.frequency_penalty, sampling.presence_penalty),
        (0.3, -0.4)
    );
    assert_eq!(
        (sampling.seed, sampling.top_n, sampling.logprob_raw),
        (u64::MAX, 3, false)
    );
    assert!(sampling.watermark);
    assert_eq!(request.tokens_max().0, 7);
    assert_eq!(
        request.prompt(),
        [TokenId(u32::from(b'i'))],
        "truncate keeps the last tokens"
    );
}

#[tokio::test]
async fn nulls_are_as_good_as_nothing() {
    let parameters = json!({"best_of": null, "temperature": null, "repetition_penalty": null,
        "frequency_penalty": null, "presence_penalty": null, "top_k": null, "top_p": null,
        "typical_p": null, "min_p": null, "do_sample": null, "max_new_tokens": null,
        "return_full_text": null, "stop": null, "truncate": null, "watermark": null,
        "details": null, "decoder_input_details": null, "seed": null, "top_n_tokens": null,
        "grammar": null, "adapter_id": null, "ignore_eos_token": null, "unknown": null});
    generate(parameters).await;
    let body = json!({"model": null, "max_tokens": null, "max_completion_tokens": null,
        "n": null, "logprobs": null, "top_logprobs": null, "stream": null, "stream_options": null,
        "tools": null, "tool_choice": null, "tool_prompt": null, "response_format": null,
        "chat_template_kwargs": null, "temperature": null, "top_p": null, "seed": null,
        "stop": null, "logit_bias": null, "presence_penalty": null, "user": null});
    chat(body).await;
    let body = json!({"prompt": "Hi", "model": null, "suffix": null, "logprobs": null,
        "echo": null, "n": null, "best_of": null, "stop": null, "stream_options": null});
    request("/v1/completions", body).await;
}

#[tokio::test]
async fn openai_s_fields_keep_openai_s_meaning() {
    let greedy = chat(json!({"temperature": 0, "top_p": 0.9, "seed": -1})).await;
    assert!(
        greedy.sampling().temperature == 0.0,
        "0 is greedy whatever else is asked"
    );
    assert_eq!(greedy.sampling().seed, u64::MAX);
    assert!(greedy.sampling().logprob_raw);
    let drawn = chat(json!({"top_p": 1.0, "presence_penalty": 0.0, "top_k": -1,
        "logit_bias": {"7": -100}, "tools": [], "response_format": {"type": "text"}}))
    .await;
    let sampling = drawn.sampling();
    assert_eq!(
        (sampling.temperature, sampling.top_p, sampling.top_k),
        (1.0, 1.0, 0)
    );
    assert_eq!(
        (sampling.presence_penalty, sampling.repetition_penalty),
        (0.0, 1.0)
    );
    assert_eq!(sampling.bias, [(TokenId(7), -100.0)]);
    let newer = chat(json!({"max_tokens": 9, "max_completion_tokens": 3})).await;
    assert_eq!(newer.tokens_max().0, 3);
    chat(json!({"tools": [{"type": "function"}], "tool_choice": "none"})).await;
    chat(json!({"tools": [], "tool_choice": "auto", "tool_prompt": "a"})).await;
    chat(json!({"logit_bias": [0.5]})).await;
}

#[tokio::test]
async fn new_tokens_fill_what_is_left_or_are_clamped_to_it() {
    assert_eq!(generate(json!({})).await.tokens_max().0, 126);
    let stack = Stack::with(|serve| serve.requests.max_total_tokens = Some(2048));
    for (asked, given) in [(1024, 1024), (2000, 2000), (100_000, 2046)] {
        stack.script.push(drawn(&[END], FinishReason::EndOfText));
        let body = json!({"inputs": "Hi", "parameters": {"max_new_tokens": asked}});
        assert_eq!(stack.post("/generate", &body).await.status, 200);
        assert_eq!(
            stack.script.log().requests.last().unwrap().tokens_max().0,
            given
        );
    }
}

#[tokio::test]
async fn chat_is_rendered_once_and_an_answer_that_has_begun_goes_on() {
    let prompt = |request: &Request| {
        let text = super::text();
        let ids: Vec<u32> = request.prompt().iter().map(|id| id.0).collect();
        text.tokenizer.decode(&ids, false)
    };
    let asked = chat(json!({})).await;
    assert_eq!(
        prompt(&asked),
        "<|im_start|>user:Hi<|im_end|><|im_start|>assistant:"
    );
    let parts = json!([{"type": "text", "text": "Hi"}, {"type": "text", "text": " you"}]);
    let body = json!({"messages": [{"role": "user", "content": parts}]});
    let one = request("/v1/chat/completions", body).await;
    assert_eq!(
        prompt(&one),
        "<|im_start|>user:Hi you<|im_end|><|im_start|>assistant:"
    );
    let body = json!({"messages": [{"role": "assistant", "content": "So"}]});
    let begun = request("/v1/chat/completions", body).await;
    assert_eq!(prompt(&begun), "<|im_start|>assistant:So");
}

#[tokio::test]
async fn an_ignored_ending_token_is_a_token_like_others() {
    let stack = Stack::new();
    let mut tokens = ids("a");
    tokens.extend([END, u32::from(b'b')]);
    stack.script.push(drawn(&tokens, FinishReason::Length));
    let body = json!({"inputs": "Hi", "parameters": {"ignore_eos_token": true,
        "max_new_tokens": 3, "details": true}});
    let reply = stack.post("/generate", &body).await.json();
    assert_eq!(reply["generated_text"], "ab");
    assert_eq!(reply["details"]["finish_reason"], "length");
}

#[tokio::test]
async fn prompts_share_a_seed_only_when_it_was_given() {
    for (seed, equal) in [(json!(5), true), (Value::Null, false)] {
        let stack = Stack::new();
        for _ in 0..2 {
            stack.script.push(drawn(&[END], FinishReason::EndOfText));
        }
        let body = json!({"prompt": ["Hi", "Hi"], "seed": seed});
        assert_eq!(stack.post("/v1/completions", &body).await.status, 200);
        let log = stack.script.log();
        let seeds = [0, 1].map(|index: usize| log.requests[index].sampling().seed);
        assert_eq!(seeds[0] == seeds[1], equal);
    }
}

#[tokio::test]
async fn token_ids_are_a_prompt_as_they_are() {
    let one = request("/v1/completions", json!({"prompt": [5, 6, 5]})).await;
    assert_eq!(one.prompt(), [5, 6, 5].map(TokenId));
    let stack = Stack::new();
    for _ in 0..2 {
        stack.script.push(drawn(&[END], FinishReason::EndOfText));
    }
    let body = json!({"prompt": [[7], [8, 9]]});
    assert_eq!(stack.post("/v1/completions", &body).await.status, 200);
    let prompts: Vec<_> = stack
        .script
        .log()
        .requests
        .iter()
        .map(|r| r.prompt().to_vec())
        .collect();
    assert_eq!(prompts, [vec![TokenId(7)], vec![TokenId(8), TokenId(9)]]);
}

#[tokio::test]
async fn best_of_may_be_switched_off() {
    let stack = Stack::with(|serve| {
        serve.requests.max_best_of = 1;
        serve.requests.max_top_n_tokens = 0;
    });
    let body = json!({"inputs": "Hi", "parameters": {"best_of": 2, "do_sample": true}});
    let reply = stack.post("/generate", &body).await;
    assert_eq!(reply.status, 422);
    assert!(
        reply.text().contains("(`max_best_of` is 1). Given: 2"),
        "{}",
        reply.text()
    );
    let body = json!({"prompt": "Hi", "best_of": 2});
    let reply = stack.post("/v1/completions", &body).await;
    assert!(
        reply.text().contains("(`max_best_of` is 1). Given: 2"),
        "{}",
        reply.text()
    );
    let body = json!({"inputs": "Hi", "parameters": {"top_n_tokens": 1}});
    let reply = stack.post("/generate", &body).await;
    assert_eq!(reply.status, 422);
    assert!(
        reply
            .text()
            .contains("`top_n_tokens` must be >= 0 and <= 0. Given: 1"),
        "{}",
        reply.text()
    );
}

#[tokio::test]
async fn fields_are_taken_as_the_table_of_compatibility_says() {
    const DOCUMENT: &str = include_str!("../../../docs/tgi-compatibility.md");
    let (_, table) = DOCUMENT.split_once("## Parameters\n").unwrap();
    let table = table.split("\n## ").next().unwrap();
    let mut tried = 0;
    for line in table.lines().filter(|line| line.starts_with("| /")) {
        let row: Vec<&str> = line.split('|').map(str::trim).collect();
        let (path, body, note) = (row[1], row[4], row[5]);
        // With room for what is written about tools.
        let stack = Stack::with(|serve| {
            serve.requests.max_input_tokens = Some(512);
            serve.requests.max_total_tokens = Some(1024);
        });
        stack
            .script
            .otherwise(drawn(&[END], FinishReason::EndOfText));
        let body: Value = serde_json::from_str(body).unwrap();
        let reply = stack.post(path, &body).await;
        let refused = note.starts_with("refused") || row[3] == "refused";
        let expected = if refused { 422 } else { 200 };
        assert_eq!(reply.status, expected, "{line}: {}", reply.text());
        tried += 1;
    }
    assert_eq!(tried, 58);
}
