//! `POST /v1/chat/completions`.

use std::sync::Arc;
use std::time::Instant;

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use bytes::BytesMut;
use headrace_grammar::GrammarSpec;
use headrace_text::{ChatInput, ToolEvent};
use serde_json::{Map, Value};

use crate::answer::{Answer, ComputeTime, compute_headers, cost_headers};
use crate::app::{App, Text};
use crate::body::JsonBody;
use crate::error::{ApiError, Invalid, ToolRefusal};
use crate::intake::{Intake, Prompt};
use crate::openai::calls::{call_delta, calls};
use crate::openai::habits::Habits;
use crate::openai::shared::{Head, UsageSum, failure, joined, sequences};
use crate::openai::tools::Tools;
use crate::openai::wire::{
    AssistantMessage, ChatChoice, ChatChunk, ChatCompletion, ChatLogprob, ChatLogprobs,
    ChatRequest, ChunkChoice, Content, Delta, Message, TopLogprob, Usage,
};
use crate::respond::{Finish, Manner, Piece, Respond};
use crate::sse::{self, Frames, event};
use crate::terms::Terms;
use crate::validate::{Ask, Names};

const ROLE: &str = "assistant";

/// Writes the events of one answer.
#[derive(Debug)]
struct ChatFrames {
    head: Arc<Head>,
    habits: &'static Habits,
    index: usize,
    logprobs: bool,
    usage: Arc<UsageSum>,
}

/// What a stream tells, and how.
#[derive(Debug, Clone, Copy)]
struct Told {
    habits: &'static Habits,
    logprobs: bool,
    usage: bool,
}

/// Answers a conversation.
#[utoipa::path(
    post, path = "/v1/chat/completions", tag = "Headrace", request_body = ChatRequest,
    responses(
        (status = 200, description = "The answer", content(
            (ChatCompletion = "application/json"),
            (ChatChunk = "text/event-stream"),
        )),
    )
)]
pub(crate) async fn chat(
    State(app): State<Arc<App>>,
    terms: Terms,
    JsonBody(mut body): JsonBody<ChatRequest>,
) -> Result<Response, ApiError> {
    let received = Instant::now();
    let tools = Tools::take(&mut body).map_err(ApiError::Tool)?;
    let ask = ask(&app, terms.habits, &mut body, tools.as_ref())?;
    let copies = sequences(&app, 1, body.n)?;
    let logprobs = body.logprobs.unwrap_or(false);
    let head = Head::new(&app, terms.habits, "chatcmpl", body.model.as_deref());
    let mut intake = Intake::open(&app, terms, Manner::Chat, copies, ask)?;
    intake.tools = tools.as_ref().map(Tools::rules);
    let stream = body.stream.unwrap_or(false);
    let options = body.stream_options.take().unwrap_or_default();
    let (characters, prompt) = prompt(&intake.ready.text, body, tools)?;
    let responds = intake.submit(vec![prompt], copies).await?;
    if stream {
        let headers = compute_headers(&app, characters);
        let usage = options.include_usage.unwrap_or(false);
        let told = Told {
            habits: terms.habits,
            logprobs,
            usage,
        };
        return Ok((headers, streamed(head, responds, told)).into_response());
    }
    let answers = Answer::collect_all(responds).await?;
    let headers = cost_headers(&app, characters, &answers, ComputeTime::Told(received));
    Ok((
        headers,
        Json(completion(head, terms.habits, &answers, logprobs)),
    )
        .into_response())
}

/// Characters of the prompt, and one answer that is not streamed. It is a text, calls of tools
/// included.
pub(crate) async fn whole(
    app: &Arc<App>,
    terms: Terms,
    mut body: ChatRequest,
) -> Result<(usize, Vec<Answer>), ApiError> {
    let tools = Tools::take(&mut body).map_err(ApiError::Tool)?;
    let ask = ask(app, terms.habits, &mut body, tools.as_ref())?;
    let intake = Intake::open(app, terms, Manner::Chat, 1, ask)?;
    let (characters, prompt) = prompt(&intake.ready.text, body, tools)?;
    let responds = intake.submit(vec![prompt], 1).await?;
    Ok((characters, Answer::collect_all(responds).await?))
}

/// The prompt of a conversation, which may use tools.
pub(crate) fn render(
    text: &Text,
    body: ChatRequest,
    tools: Option<Tools>,
) -> Result<String, ApiError> {
    if body.messages.is_empty() {
        return Err(Invalid::Empty { field: "messages" }.into());
    }
    let template = text.template.as_ref().ok_or(ApiError::NoTemplate)?;
    // An answer that has begun is gone on with.
    let goes_on = body.messages.last().is_some_and(|message| {
        message.role == ROLE && message.content.is_some() && !message.has_calls()
    });
    let messages = body.messages.into_iter().enumerate();
    let messages = messages.map(|(index, message)| flat(index, message, text));
    let mut messages = messages.collect::<Result<Vec<_>, _>>()?;
    if let Some(tools) = &tools {
        tell_tools(&mut messages, text, tools);
    }
    let input = ChatInput {
        messages: messages.into_iter().map(Value::Object).collect(),
        tools: tools
            .filter(|_| text.tools.shows_tools)
            .map(|tools| tools.list.into()),
        add_generation_prompt: !goes_on,
        continue_final_message: goes_on,
        documents: None,
        kwargs: body.chat_template_kwargs.unwrap_or_default(),
    };
    Ok(template.render(&input)?)
}

// === impl ChatFrames ===

impl ChatFrames {
    fn write(
        &self,
        delta: Delta<'_>,
        logprobs: Option<ChatLogprobs>,
        finish: Option<Finish>,
        out: &mut BytesMut,
    ) {
        let choice = ChunkChoice {
            index: self.index,
            delta,
            logprobs,
            finish_reason: finish.map(|finish| self.habits.finish_reason(finish)),
        };
        chunk(&self.head, &[choice], None, out);
    }
}

impl Frames for ChatFrames {
    fn piece(&mut self, piece: &Piece, respond: &Respond, out: &mut BytesMut) {
        if piece.finish.is_some() {
            self.usage.add(respond.meter.generated);
        }
        let mut logprobs = self.logprobs.then(|| ChatLogprobs {
            content: vec![logprob(&respond.text, piece)],
        });
        let deltas = piece.events.iter();
        for delta in deltas.filter_map(|event| event_delta(event, respond)) {
            self.write(delta, logprobs.take(), None, out);
        }
        // With events there is no text but theirs.
        let text = if piece.events.is_empty() {
            piece.text.as_str()
        } else {
            ""
        };
        let is_told = self.habits.event_a_token && piece.events.is_empty();
        if is_told || piece.finish.is_some() || !text.is_empty() || logprobs.is_some() {
            self.write(content_delta(text), logprobs, piece.finish, out);
        }
    }

    fn failed(&mut self, error: &ApiError, out: &mut BytesMut) {
        failure(self.habits, error, out);
    }
}

// === free functions ===

fn ask(
    app: &App,
    habits: &Habits,
    body: &mut ChatRequest,
    tools: Option<&Tools>,
) -> Result<Ask, ApiError> {
    // Before the model is loaded nothing is asked of it.
    let calls = match (tools, app.text.get()) {
        (Some(tools), Some(text)) => tools.constraint(&text.tools).map_err(ApiError::Tool)?,
        (None, _) | (_, None) => None,
    };
    let mut plain = body.ask();
    if habits.presence_repeats
        && let Some(penalty) = plain.presence_penalty.take()
    {
        plain.repetition_penalty.get_or_insert(penalty + 2.0);
    }
    let grammar = match calls {
        Some(_) if plain.grammar.is_some() => return Err(ApiError::Tool(ToolRefusal::Format)),
        Some(calls) => Some(Ok(GrammarSpec::Lark(calls.lark))),
        None => plain.grammar,
    };
    Ok(Ask {
        tokens_max: body.max_completion_tokens.or(body.max_tokens),
        top_n: body.top_logprobs,
        names: Names {
            prompt: "messages",
            tokens_max: "max_tokens",
            top_n: "top_logprobs",
        },
        grammar,
        logprob_raw: habits.raw_logprobs,
        ..plain
    })
}

/// What a conversation is continued from, and how many characters it has.
fn prompt(
    text: &Text,
    body: ChatRequest,
    tools: Option<Tools>,
) -> Result<(usize, Prompt), ApiError> {
    let text = render(text, body, tools)?;
    let characters = text.chars().count();
    let add_special_tokens = false; // The template has put them.
    Ok((
        characters,
        Prompt::Text {
            text,
            add_special_tokens,
        },
    ))
}

/// A message as templates know it: its content is one text, its calls as the template wants them.
fn flat(index: usize, message: Message, text: &Text) -> Result<Map<String, Value>, Invalid> {
    let content = match message.content {
        None => Value::Null,
        Some(Content::Text(text)) => Value::String(text),
        Some(Content::Parts(parts)) => {
            let mut text = String::new();
            for (part, content) in parts.into_iter().enumerate() {
                let (Some(more), "text") = (content.text, content.kind.as_str()) else {
                    let (message, kind) = (index, content.kind);
                    return Err(Invalid::ContentPart {
                        message,
                        part,
                        kind,
                    });
                };
                text.push_str(&more);
            }
            Value::String(text)
        }
    };
    let mut object = Map::new();
    object.insert("role".to_owned(), Value::String(message.role));
    object.insert("content".to_owned(), content);
    let optional = [
        ("name", message.name.map(Value::String)),
        ("tool_calls", message.tool_calls.map(Value::Array)),
        ("tool_call_id", message.tool_call_id.map(Value::String)),
        (
            "reasoning_content",
            message.reasoning_content.map(Value::String),
        ),
    ];
    for (key, value) in optional {
        if let Some(value) = value {
            object.insert(key.to_owned(), value);
        }
    }
    text.tools.place_calls(&mut object);
    Ok(object)
}

/// Puts what is to be said of tools besides the template into the last message that is not the
/// model's own.
fn tell_tools(messages: &mut [Map<String, Value>], text: &Text, tools: &Tools) {
    let prompt = tools.prompt.as_deref();
    let Some(more) = text.tools.tools_text(&tools.list, prompt) else {
        return;
    };
    let others = |message: &Map<String, Value>| message["role"] != ROLE;
    let last = messages.iter().rposition(others);
    let last = last.or(messages.len().checked_sub(1));
    if let Some(content) = last.and_then(|last| messages[last].get_mut("content")) {
        let before = content.as_str().unwrap_or_default();
        *content = Value::String(format!("{before}{more}"));
    }
}

fn content_delta(text: &str) -> Delta<'_> {
    Delta {
        role: ROLE,
        content: Some(text),
        tool_calls: None,
    }
}

fn event_delta<'a>(event: &'a ToolEvent, respond: &Respond) -> Option<Delta<'a>> {
    if let ToolEvent::Content(text) = event {
        return Some(content_delta(text));
    }
    let call = call_delta(event, respond.text.tools.format)?;
    Some(Delta {
        role: ROLE,
        content: None,
        tool_calls: Some([call]),
    })
}

fn streamed(head: Head, responds: Vec<Respond>, told: Told) -> Response {
    let head = Arc::new(head);
    let usage = UsageSum::new(responds.first().map_or(0, |respond| respond.meter.input));
    let sequences = responds.into_iter().enumerate().map(|(index, respond)| {
        let (head, usage) = (Arc::clone(&head), Arc::clone(&usage));
        sse::frames(
            respond,
            ChatFrames {
                head,
                habits: told.habits,
                index,
                logprobs: told.logprobs,
                usage,
            },
        )
    });
    let sequences = sequences.collect();
    let tail = move || {
        let mut last = BytesMut::new();
        if told.usage {
            chunk(&head, &[], Some(usage.usage()), &mut last);
        }
        last.freeze()
    };
    sse::response(joined(sequences, tail))
}

fn chunk(head: &Head, choices: &[ChunkChoice<'_>], usage: Option<Usage>, out: &mut BytesMut) {
    let chunk = ChatChunk {
        object: "chat.completion.chunk",
        id: &head.id,
        created: head.created,
        model: &head.model,
        system_fingerprint: &head.fingerprint,
        choices,
        usage,
    };
    event(&chunk, out);
}

fn completion(head: Head, habits: &Habits, answers: &[Answer], logprobs: bool) -> ChatCompletion {
    let prompt = answers
        .first()
        .map_or(0, |answer| answer.respond.meter.input);
    let completion = answers
        .iter()
        .map(|answer| answer.respond.meter.generated)
        .sum();
    let choice = |(index, answer): (usize, &Answer)| ChatChoice {
        index,
        message: message(answer),
        logprobs: logprobs.then(|| {
            let pieces = answer.pieces.iter();
            let text = &answer.respond.text;
            ChatLogprobs {
                content: pieces.map(|piece| logprob(text, piece)).collect(),
            }
        }),
        finish_reason: habits.finish_reason(answer.finish),
    };
    ChatCompletion {
        object: "chat.completion",
        id: head.id,
        created: head.created,
        model: head.model,
        system_fingerprint: head.fingerprint,
        choices: answers.iter().enumerate().map(choice).collect(),
        usage: Usage::new(prompt, completion),
    }
}

fn message(answer: &Answer) -> AssistantMessage {
    let tool_calls = calls(&answer.pieces, answer.respond.text.tools.format);
    let text = answer.shown_text();
    AssistantMessage {
        role: ROLE,
        content: (tool_calls.is_empty() || !text.is_empty()).then_some(text),
        tool_calls,
    }
}

fn logprob(text: &Text, piece: &Piece) -> ChatLogprob {
    let top = piece.top.iter().map(|(id, logprob)| TopLogprob {
        token: text.tokenizer.token_text(id.0),
        logprob: *logprob,
    });
    ChatLogprob {
        token: text.tokenizer.token_text(piece.id),
        logprob: piece.logprob,
        top_logprobs: top.collect(),
    }
}
