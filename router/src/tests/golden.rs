//! Transcripts of both API families, byte for byte but for ids and times. `UPDATE=1` writes them
//! anew.

use std::path::Path;

use headrace_engine::{FinishReason, PromptToken, SampledToken, TokenEvent, TokenId};
use serde_json::json;

use super::script::Wakes;
use super::{END, Stack, WORLD, drawn, ids, token};

/// Compares with `golden/<name>`, times and random parts replaced.
pub(super) fn golden(name: &str, actual: &str) {
    let actual = steady(actual);
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("src/tests/golden")
        .join(name);
    if std::env::var_os("UPDATE").is_some() {
        std::fs::write(&path, &actual).unwrap();
    }
    let expected = std::fs::read_to_string(&path).unwrap();
    assert_eq!(actual, expected, "{name} differs; UPDATE=1 writes it anew");
}

/// `text` with the digits after these keys and prefixes replaced.
fn steady(text: &str) -> String {
    let mut steady = String::with_capacity(text.len());
    let mut rest = text;
    let marks = ["chatcmpl-", "cmpl-", "\"call_", "\"created\":", "\"seed\":"];
    while let Some((at, mark)) = marks
        .iter()
        .filter_map(|mark| rest.find(mark).map(|at| (at, mark)))
        .min_by_key(|(at, mark)| (*at, std::cmp::Reverse(mark.len())))
    {
        let (before, after) = rest.split_at(at + mark.len());
        steady.push_str(before);
        let end = after
            .find(|c: char| !c.is_ascii_hexdigit())
            .unwrap_or(after.len());
        steady.push_str(if end == 0 { "" } else { "N" });
        rest = &after[end..];
    }
    steady + rest
}

fn with_alternatives(id: u32, top: &[(u32, f32)]) -> TokenEvent {
    let top = top
        .iter()
        .map(|(id, logprob)| (TokenId(*id), *logprob))
        .collect();
    TokenEvent::Token(SampledToken {
        id: TokenId(id),
        logprob: -0.25,
        top,
    })
}

/// Of the prompt `Hi`, in whose second place `w` was more probable.
fn prompt_tokens() -> Vec<PromptToken> {
    let told = |logprob, best: u8, best_logprob| PromptToken {
        logprob,
        best: TokenId(best.into()),
        best_logprob,
    };
    vec![told(f32::NAN, 0, f32::NAN), told(-1.3, b'w', -0.1)]
}

/// A request whose prompt `Hi` was asked about.
fn asked(ids: &[u32]) -> Wakes {
    let mut wakes = drawn(ids, FinishReason::Length);
    wakes[0].push(TokenEvent::PromptLogprobs(prompt_tokens()));
    wakes
}

/// `Hé world!` and the end; the second letter arrives in two halves.
fn hello() -> Wakes {
    let [c3, a9] = [0xC3, 0xA9];
    vec![
        vec![TokenEvent::Started { cached_tokens: 2 }],
        vec![token(u32::from(b'H')), token(c3)],
        vec![token(a9), token(WORLD), token(u32::from(b'!'))],
        vec![token(END), TokenEvent::Finished(FinishReason::EndOfText)],
    ]
}

async fn transcript(name: &str, path: &str, body: serde_json::Value, scripts: &[Wakes]) {
    let stack = Stack::new();
    for wakes in scripts {
        stack.script.push(wakes.clone());
    }
    let reply = stack.post(path, &body).await;
    assert_eq!(reply.status, 200, "{}", reply.text());
    golden(name, reply.text());
}

#[tokio::test]
async fn tgi_stream_has_one_event_a_token_and_keeps_special_tokens() {
    let body = json!({"inputs": "Hi", "parameters": {"details": true}});
    transcript("generate_stream.sse", "/generate_stream", body, &[hello()]).await;
}

#[tokio::test]
async fn tgi_stream_keeps_the_stop_string_and_holds_nothing_back() {
    let body = json!({"inputs": "Hi", "parameters": {"details": true, "stop": ["END"]}});
    let wakes = drawn(&ids("An END and more"), FinishReason::Length);
    transcript(
        "generate_stream_stop.sse",
        "/generate_stream",
        body,
        &[wakes],
    )
    .await;
}

#[tokio::test]
async fn tgi_root_streams_on_request_and_puts_the_prompt_first() {
    let body = json!({"inputs": "Hi", "stream": true, "parameters": null});
    transcript("compat_stream.sse", "/", body, &[hello()]).await;
}

#[tokio::test]
async fn tgi_root_answers_an_array() {
    let body = json!({"inputs": "Hi", "stream": false});
    transcript("compat.json", "/", body, &[hello()]).await;
}

#[tokio::test]
async fn tgi_answer_has_every_detail() {
    let body = json!({"inputs": "Hi", "parameters": {"decoder_input_details": true,
        "top_n_tokens": 2, "max_new_tokens": 2, "seed": 3, "do_sample": true}});
    let wakes = vec![
        vec![
            TokenEvent::Started { cached_tokens: 0 },
            TokenEvent::PromptLogprobs(prompt_tokens()),
        ],
        vec![with_alternatives(
            u32::from(b'a'),
            &[(97, -0.25), (WORLD, -2.0)],
        )],
        vec![
            with_alternatives(u32::from(b'b'), &[(98, -0.25)]),
            TokenEvent::Finished(FinishReason::Length),
        ],
    ];
    transcript("generate.json", "/generate", body, &[wakes]).await;
}

#[tokio::test]
async fn tgi_best_of_answers_the_most_probable_and_tells_the_other() {
    let body = json!({"inputs": "Hi", "parameters": {"best_of": 2, "do_sample": true,
        "details": true, "max_new_tokens": 1}});
    let better = vec![vec![
        TokenEvent::Started { cached_tokens: 0 },
        with_alternatives(u32::from(b'B'), &[]),
        TokenEvent::Finished(FinishReason::Length),
    ]];
    let scripts = [drawn(&ids("a"), FinishReason::Length), better];
    transcript("best_of.json", "/generate", body, &scripts).await;
}

#[tokio::test]
async fn chat_stream_shows_text_and_ends_with_usage_and_done() {
    let body = json!({"model": "tgi", "stream": true, "stream_options": {"include_usage": true},
        "messages": [{"role": "user", "content": "Hi"}]});
    transcript("chat.sse", "/v1/chat/completions", body, &[hello()]).await;
}

#[tokio::test]
async fn chat_stream_never_shows_a_part_of_the_stop_string() {
    let body = json!({"model": "x", "stream": true, "stop": "END", "stream_options": null,
        "messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]});
    let wakes = drawn(&ids("E. An END and more"), FinishReason::Length);
    transcript("chat_stop.sse", "/v1/chat/completions", body, &[wakes]).await;
}

#[tokio::test]
async fn chat_answer_has_logprobs() {
    let body = json!({"logprobs": true, "top_logprobs": 1, "max_tokens": 1, "temperature": 0,
        "messages": [{"role": "user", "content": "Hi"}]});
    let wakes = vec![vec![
        TokenEvent::Started { cached_tokens: 0 },
        with_alternatives(u32::from(b'a'), &[(98, -0.25)]),
        TokenEvent::Finished(FinishReason::Length),
    ]];
    transcript("chat.json", "/v1/chat/completions", body, &[wakes]).await;
}

#[tokio::test]
async fn chat_gives_several_answers() {
    let body = json!({"n": 2, "max_tokens": 1, "messages": [{"role": "user", "content": "Hi"}]});
    let scripts = ["a", "b"].map(|text| drawn(&ids(text), FinishReason::Length));
    let stack = Stack::new();
    for wakes in scripts {
        stack.script.push(wakes);
    }
    let reply = stack.post("/v1/chat/completions", &body).await.json();
    assert_eq!(reply["choices"][1]["message"]["content"], "b");
    assert_eq!(reply["choices"][1]["index"], 1);
    assert_eq!(reply["usage"]["completion_tokens"], 2);
    let log = stack.script.log();
    assert_ne!(
        log.requests[0].sampling().seed,
        log.requests[1].sampling().seed
    );
}

#[tokio::test]
async fn completions_stream_interleaves_prompts_by_index() {
    let body = json!({"prompt": ["Hi", "Ho"], "stream": true});
    let first = drawn(&[u32::from(b'a'), END], FinishReason::EndOfText);
    let scripts = [first, hello()];
    transcript("completions.sse", "/v1/completions", body, &scripts).await;
}

#[tokio::test]
async fn completions_answer_sums_usage_over_prompts() {
    let body = json!({"prompt": ["Hi", "Ho"], "stop": ["!"], "logprobs": 0});
    let scripts = [drawn(&ids("ab!"), FinishReason::Length), hello()];
    transcript("completions.json", "/v1/completions", body, &scripts).await;
}

#[tokio::test]
async fn completions_tell_the_most_probable_and_count_them_all() {
    let answer = |text: &str, logprob| {
        let token = |id| {
            TokenEvent::Token(SampledToken {
                id: TokenId(id),
                logprob,
                top: Vec::new(),
            })
        };
        let mut events = vec![TokenEvent::Started { cached_tokens: 0 }];
        events.extend(ids(text).into_iter().chain([END]).map(token));
        events.push(TokenEvent::Finished(FinishReason::EndOfText));
        vec![events]
    };
    // By token, the longer one is the more probable; by their sum it is the less probable.
    let (longer, shorter) = (answer("ab", -0.5), answer("c", -0.7));
    for (body, expected) in [
        (json!({"prompt": "Hi", "best_of": 2}), ["ab"].as_slice()),
        (
            json!({"prompt": ["Hi", "Ho"], "best_of": 2, "seed": 3}),
            &["ab", "ab"],
        ),
        (json!({"prompt": "Hi", "best_of": 2, "n": 2}), &["c", "ab"]),
        (
            json!({"prompt": "Hi", "best_of": 2, "temperature": 0}),
            &["ab"],
        ),
    ] {
        let stack = Stack::new();
        for _ in 0..2 {
            stack.script.push(shorter.clone());
            stack.script.push(longer.clone());
        }
        let reply = stack.post("/v1/completions", &body).await;
        assert_eq!(reply.status, 200, "{body}: {}", reply.text());
        let (generated, reply) = (reply.header("x-generated-tokens"), reply.json());
        let prompts = stack.script.log().requests.len() / 2;
        assert_eq!(
            generated,
            Some((5 * prompts).to_string().as_str()),
            "{body}"
        );
        let choices = reply["choices"].as_array().unwrap();
        let texts: Vec<_> = choices.iter().map(|choice| &choice["text"]).collect();
        assert_eq!(texts, expected, "{body}");
        let indices: Vec<_> = choices.iter().map(|choice| &choice["index"]).collect();
        let counted: Vec<usize> = (0..expected.len()).collect();
        assert_eq!(indices, counted, "{body}");
        assert_eq!(reply["usage"]["completion_tokens"], 5 * prompts, "{body}");
        assert_eq!(reply["usage"]["prompt_tokens"], 2 * prompts, "{body}");
    }
}

#[tokio::test]
async fn completions_echo_the_prompt_with_its_logprobs() {
    let body = json!({"prompt": ["Hi", "Hi"], "echo": true, "logprobs": 1, "max_tokens": 2});
    let scripts = [asked(&ids("ab")), asked(&ids("cd"))];
    transcript("completions_echo.json", "/v1/completions", body, &scripts).await;
    let body =
        json!({"prompt": "Hi", "echo": true, "logprobs": 1, "max_tokens": 2, "stream": true});
    let scripts = [asked(&ids("ab"))];
    transcript("completions_echo.sse", "/v1/completions", body, &scripts).await;
}

#[tokio::test]
async fn a_prompt_may_be_all_that_is_told() {
    // What lm-eval asks for.
    let body = json!({"prompt": [[72, 105]], "echo": true, "logprobs": 1, "max_tokens": 0,
        "temperature": 0});
    let scripts = [asked(&ids("a"))];
    transcript("completions_scored.json", "/v1/completions", body, &scripts).await;
    let stack = Stack::new();
    stack.script.push(asked(&ids("a")));
    let body = json!({"prompt": "Hi", "echo": true, "max_tokens": 0});
    let reply = stack.post("/v1/completions", &body).await.json();
    assert_eq!(reply["choices"][0]["text"], "Hi");
    assert_eq!(reply["usage"]["completion_tokens"], 0);
    let log = stack.script.log();
    assert_eq!(
        log.requests[0].tokens_max().0,
        1,
        "a step is needed all the same"
    );
    let body = json!({"prompt": "Hi", "max_tokens": 0});
    assert_eq!(stack.post("/v1/completions", &body).await.status, 422);
}

#[tokio::test]
async fn a_fault_in_a_stream_is_an_event_in_the_api_s_own_shape() {
    let wakes = drawn(&ids("a"), FinishReason::GroupLost);
    let chat = json!({"stream": true, "messages": [{"role": "user", "content": "Hi"}]});
    let scripts = [wakes.clone()];
    transcript("chat_fault.sse", "/v1/chat/completions", chat, &scripts).await;
    let body = json!({"inputs": "Hi"});
    transcript(
        "generate_stream_fault.sse",
        "/generate_stream",
        body,
        &[wakes],
    )
    .await;
}
