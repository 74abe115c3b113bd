//! Request and response types of OpenAI's routes, fields in the order they are written. Every
//! optional field may be null; unknown fields are ignored.

use std::collections::HashMap;

use serde::{Deserialize, Serialize, Serializer};
use serde_json::{Map, Value};
use utoipa::ToSchema;

use crate::grammar;
use crate::intake::Prompt;
use crate::openai::calls::{ToolCall, ToolCallDelta};
use crate::validate::Ask;

/// Writes out the fields that both routes share, because `flatten` would lose the name of a field
/// that does not parse.
macro_rules! request {
    (
        $(#[$doc:meta])* $name:ident {
            $($(#[$field_doc:meta])* $field:ident: $type:ty,)*
        }
    ) => {
        $(#[$doc])*
        #[derive(Debug, Deserialize, ToSchema)]
        pub(crate) struct $name {
            $($(#[$field_doc])* pub(crate) $field: $type,)*
            /// Divides the logits; 0 takes the most probable token.
            #[schema(minimum = 0.0)]
            temperature: Option<f32>,
            /// Only the most probable tokens, up to this mass.
            #[schema(exclusive_minimum = 0.0, maximum = 1.0)]
            top_p: Option<f32>,
            /// Only the most probable tokens, so many of them; 0 and -1 are all of them.
            #[schema(minimum = -1)]
            top_k: Option<i64>,
            /// Only tokens at least this fraction as probable as the most probable one.
            #[schema(minimum = 0.0, maximum = 1.0)]
            min_p: Option<f32>,
            /// Only the most typical tokens, up to this mass.
            #[schema(exclusive_minimum = 0.0, maximum = 1.0)]
            typical_p: Option<f32>,
            /// Above 1, tokens that occurred become less probable.
            #[schema(exclusive_minimum = 0.0)]
            repetition_penalty: Option<f32>,
            /// Subtracted from a token's logit for each time it occurred.
            #[schema(minimum = -2.0, maximum = 2.0)]
            frequency_penalty: Option<f32>,
            /// Subtracted from the logit of each token that occurred.
            #[schema(minimum = -2.0, maximum = 2.0)]
            presence_penalty: Option<f32>,
            /// Draws with one seed are the same each time.
            #[schema(value_type = Option<i64>)]
            seed: Option<Seed>,
            /// Texts that end the answer, which does not show them.
            stop: Option<TextOrTexts>,
            /// Added to the logits of single tokens: token ids to values from -100 to 100.
            #[schema(value_type = Option<HashMap<String, f32>>)]
            logit_bias: Option<LogitBias>,
            /// New tokens before an ending token may be drawn.
            min_tokens: Option<u32>,
            /// Whether generation goes on after an ending token.
            ignore_eos: Option<bool>,
            /// The form that the answer is to have.
            pub(crate) response_format: Option<ResponseFormat>,
            /// The same as a grammar in Lark's notation; or as TGI's `/generate` takes it.
            grammar: Option<Value>,
        }

        impl $name {
            /// How tokens are drawn, with everything else at "not given".
            pub(crate) fn ask(&mut self) -> Ask {
                let greedy = self.temperature == Some(0.0);
                Ask {
                    temperature: self.temperature.filter(|_| !greedy),
                    greedy,
                    do_sample: !greedy,
                    top_p: self.top_p,
                    top_k: self.top_k.filter(|k| !matches!(k, 0 | -1)),
                    min_p: self.min_p,
                    typical_p: self.typical_p,
                    repetition_penalty: self.repetition_penalty,
                    frequency_penalty: self.frequency_penalty,
                    presence_penalty: self.presence_penalty,
                    seed: self.seed.map(Seed::bits),
                    stop: self.stop.take().map(TextOrTexts::into_vec).unwrap_or_default(),
                    bias: self.logit_bias.take().map(LogitBias::into_vec).unwrap_or_default(),
                    tokens_min: self.min_tokens,
                    ignore_eos: self.ignore_eos.unwrap_or(false),
                    logprob_raw: true,
                    grammar: grammar::of_openai(
                        self.response_format.take(),
                        self.grammar.as_ref(),
                    ),
                    ..Ask::default()
                }
            }
        }
    };
}

request! {
    /// Body of `/v1/chat/completions`.
    ChatRequest {
        /// The conversation.
        #[schema(min_items = 1)]
        messages: Vec<Message>,
        /// Any name: what is not known means the model that is served.
        model: Option<String>,
        /// New tokens at most; absent, as many as fit.
        #[schema(minimum = 1)]
        max_tokens: Option<u32>,
        /// The newer name; it wins.
        #[schema(minimum = 1)]
        max_completion_tokens: Option<u32>,
        /// Answers to one conversation.
        #[schema(minimum = 1)]
        n: Option<usize>,
        /// Whether log-probabilities are told.
        logprobs: Option<bool>,
        /// Alternatives told with each token.
        top_logprobs: Option<u32>,
        /// Whether the answer is sent in parts.
        stream: Option<bool>,
        /// What a stream tells besides text.
        stream_options: Option<StreamOptions>,
        /// Functions that the model may call: `{"type": "function", "function": {"name", …}}`.
        tools: Option<Vec<Value>>,
        /// `auto`, `none`, `required`, a function's name, or
        /// `{"type": "function", "function": {"name": …}}`.
        tool_choice: Option<Value>,
        /// What the model is told about tools besides what its template says.
        tool_prompt: Option<String>,
        /// False ends the answer with its first call.
        parallel_tool_calls: Option<bool>,
        /// Further variables of the chat template.
        chat_template_kwargs: Option<Map<String, Value>>,
    }
}

request! {
    /// Body of `/v1/completions`.
    CompletionRequest {
        /// Text to be continued, or its token ids, which are taken as they are; several of one kind.
        prompt: PromptOrPrompts,
        /// Any name: what is not known means the model that is served.
        model: Option<String>,
        /// New tokens at most; absent, as many as fit. 0, with `echo` only: the prompt alone.
        max_tokens: Option<u32>,
        /// Whether the prompt comes before the continuation, with its log-probabilities where these
        /// are told.
        echo: Option<bool>,
        /// Answers to each prompt.
        #[schema(minimum = 1)]
        n: Option<usize>,
        /// Answers to each prompt that are generated, of which the `n` with the highest mean
        /// log-probability of their tokens are told.
        #[schema(minimum = 1)]
        best_of: Option<usize>,
        /// Alternatives told with each token.
        logprobs: Option<u32>,
        /// Whether the answer is sent in parts.
        stream: Option<bool>,
        /// Not supported.
        suffix: Option<String>,
    }
}

/// One text or several.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(untagged, expecting = "expected a string or an array of strings")]
pub(crate) enum TextOrTexts {
    One(String),
    Several(Vec<String>),
}

/// What is to be continued.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(
    untagged,
    expecting = "expected a string, an array of strings, an array of token ids, or an array of \
                 such arrays"
)]
pub(crate) enum PromptOrPrompts {
    Text(String),
    Texts(Vec<String>),
    Ids(Vec<u32>),
    SeveralIds(Vec<Vec<u32>>),
}

/// A seed. OpenAI's may be negative.
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(untagged, expecting = "expected an integer of 64 bits")]
pub(crate) enum Seed {
    Positive(u64),
    Negative(i64),
}

/// Values added to logits.
#[derive(Debug, Deserialize)]
#[serde(untagged, expecting = "expected a map from token ids to numbers")]
pub(crate) enum LogitBias {
    ByToken(HashMap<String, f32>),
    /// TGI's own type; it never had an effect.
    Unused(Vec<f32>),
}

/// One message of a conversation.
#[derive(Debug, Deserialize, ToSchema)]
pub(crate) struct Message {
    pub(crate) role: String,
    pub(crate) content: Option<Content>,
    pub(crate) name: Option<String>,
    pub(crate) tool_calls: Option<Vec<Value>>,
    pub(crate) tool_call_id: Option<String>,
    /// What the model thought, for templates that show it.
    pub(crate) reasoning_content: Option<String>,
}

/// What a message says.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(
    untagged,
    expecting = "expected a string or an array of parts with a `type`"
)]
pub(crate) enum Content {
    Text(String),
    Parts(Vec<Part>),
}

/// A part of a message. Only text is supported yet.
#[derive(Debug, Deserialize, ToSchema)]
pub(crate) struct Part {
    #[serde(rename = "type")]
    pub(crate) kind: String,
    pub(crate) text: Option<String>,
}

/// What a stream tells besides text.
#[derive(Debug, Default, Deserialize, ToSchema)]
pub(crate) struct StreamOptions {
    /// Whether the stream ends with the number of tokens.
    pub(crate) include_usage: Option<bool>,
}

/// What form the answer has.
#[derive(Debug, Deserialize, ToSchema)]
pub(crate) struct ResponseFormat {
    /// `text`, `json_object`, `json_schema`, `json` or `regex`.
    #[serde(rename = "type")]
    pub(crate) kind: String,
    /// OpenAI's place for a schema, with its name.
    pub(crate) json_schema: Option<Value>,
    /// TGI's place for a schema, or the regular expression.
    pub(crate) value: Option<Value>,
    /// Others' place for a schema.
    pub(crate) schema: Option<Value>,
}

/// Answer of `/v1/chat/completions`.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct ChatCompletion {
    /// `chat.completion`.
    pub(crate) object: &'static str,
    pub(crate) id: String,
    /// Seconds since 1970.
    pub(crate) created: u64,
    pub(crate) model: String,
    pub(crate) system_fingerprint: String,
    pub(crate) choices: Vec<ChatChoice>,
    pub(crate) usage: Usage,
}

/// One answer.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct ChatChoice {
    pub(crate) index: usize,
    pub(crate) message: AssistantMessage,
    pub(crate) logprobs: Option<ChatLogprobs>,
    /// `stop`, `length` or `tool_calls`.
    pub(crate) finish_reason: &'static str,
}

/// What the model says.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct AssistantMessage {
    /// `assistant`.
    pub(crate) role: &'static str,
    /// Null where there are only calls.
    pub(crate) content: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schema(required = false)]
    pub(crate) tool_calls: Vec<ToolCall>,
}

/// Log-probabilities of an answer.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct ChatLogprobs {
    pub(crate) content: Vec<ChatLogprob>,
}

/// Log-probability of one token.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct ChatLogprob {
    pub(crate) token: String,
    #[schema(value_type = Option<f32>)]
    pub(crate) logprob: f32,
    pub(crate) top_logprobs: Vec<TopLogprob>,
}

/// An alternative.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct TopLogprob {
    pub(crate) token: String,
    #[schema(value_type = Option<f32>)]
    pub(crate) logprob: f32,
}

/// An event of a chat stream.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct ChatChunk<'a> {
    /// `chat.completion.chunk`.
    pub(crate) object: &'static str,
    pub(crate) id: &'a str,
    pub(crate) created: u64,
    pub(crate) model: &'a str,
    pub(crate) system_fingerprint: &'a str,
    /// One, or none in the event that tells the usage.
    #[schema(value_type = Vec<ChunkChoice>)]
    pub(crate) choices: &'a [ChunkChoice<'a>],
    pub(crate) usage: Option<Usage>,
}

/// A part of an answer.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct ChunkChoice<'a> {
    pub(crate) index: usize,
    #[schema(value_type = Delta)]
    pub(crate) delta: Delta<'a>,
    pub(crate) logprobs: Option<ChatLogprobs>,
    pub(crate) finish_reason: Option<&'static str>,
}

/// Text to be appended, or a part of a call.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct Delta<'a> {
    /// `assistant`.
    pub(crate) role: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub(crate) content: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Vec<ToolCallDelta>, required = false, nullable = false)]
    pub(crate) tool_calls: Option<[ToolCallDelta<'a>; 1]>,
}

/// Answer of `/v1/completions`; with `usage` the last event of its streams, without the others.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct Completion<'a> {
    /// `text_completion`.
    pub(crate) object: &'static str,
    pub(crate) id: &'a str,
    /// Seconds since 1970.
    pub(crate) created: u64,
    pub(crate) model: &'a str,
    pub(crate) system_fingerprint: &'a str,
    #[schema(value_type = Vec<CompletionChoice>)]
    pub(crate) choices: &'a [CompletionChoice<'a>],
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub(crate) usage: Option<Usage>,
}

/// One continuation.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct CompletionChoice<'a> {
    pub(crate) index: usize,
    pub(crate) text: &'a str,
    pub(crate) logprobs: Option<CompletionLogprobs>,
    /// `stop` or `length`; in a stream TGI's words, and empty until the last event.
    pub(crate) finish_reason: &'static str,
}

/// Log-probabilities by the texts of tokens, written with the digits that columns of floats have:
/// clients compare them.
#[derive(Debug, Default)]
pub(crate) struct TopByText(Vec<(String, f32)>);

impl TopByText {
    /// Adds a token, the more probable ones first. Two may have one text, such as parts of a
    /// letter: the first is told.
    pub(crate) fn add(&mut self, text: String, logprob: f32) {
        if self.0.iter().all(|(known, _)| *known != text) {
            self.0.push((text, logprob));
        }
    }
}

impl Serialize for TopByText {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().map(|(text, logprob)| (text, logprob)))
    }
}

/// Log-probabilities of a continuation, in columns.
#[derive(Debug, Default, Serialize, ToSchema)]
pub(crate) struct CompletionLogprobs {
    pub(crate) tokens: Vec<String>,
    #[schema(value_type = Vec<Option<f32>>)]
    pub(crate) token_logprobs: Vec<f32>,
    /// Of a prompt's token: itself and the most probable one. Null for a prompt's first token.
    #[schema(value_type = Vec<Option<HashMap<String, Option<f32>>>>)]
    pub(crate) top_logprobs: Vec<Option<TopByText>>,
    /// Characters before each token in the text.
    pub(crate) text_offset: Vec<usize>,
}

/// Tokens that a request took.
#[derive(Debug, Clone, Copy, Default, Serialize, ToSchema)]
#[expect(clippy::struct_field_names, reason = "the names are OpenAI's")]
pub(crate) struct Usage {
    pub(crate) prompt_tokens: u32,
    pub(crate) completion_tokens: u32,
    pub(crate) total_tokens: u32,
}

/// An error in a stream of these routes.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct StreamError {
    pub(crate) error: StreamErrorBody,
}

/// What went wrong, and the status it would have had.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct StreamErrorBody {
    pub(crate) message: String,
    pub(crate) http_status_code: u16,
}

/// Answer of `/v1/models`.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct Models {
    /// `list`.
    pub(crate) object: &'static str,
    pub(crate) data: Vec<Model>,
}

/// A model.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct Model {
    pub(crate) id: String,
    /// `model`.
    pub(crate) object: &'static str,
    pub(crate) created: u64,
    pub(crate) owned_by: String,
}

// === impl Message ===

impl Message {
    /// Some clients send an empty list where there are none.
    pub(crate) fn has_calls(&self) -> bool {
        self.tool_calls
            .as_ref()
            .is_some_and(|calls| !calls.is_empty())
    }
}

// === impl TextOrTexts ===

impl TextOrTexts {
    pub(crate) fn into_vec(self) -> Vec<String> {
        match self {
            Self::One(text) => vec![text],
            Self::Several(texts) => texts,
        }
    }
}

// === impl PromptOrPrompts ===

impl PromptOrPrompts {
    /// Of all texts together.
    pub(crate) fn characters(&self) -> usize {
        match self {
            Self::Text(text) => text.chars().count(),
            Self::Texts(texts) => texts.iter().map(|text| text.chars().count()).sum(),
            Self::Ids(_) | Self::SeveralIds(_) => 0,
        }
    }

    pub(crate) fn into_prompts(self) -> Vec<Prompt> {
        let text = |text| Prompt::Text {
            text,
            add_special_tokens: true,
        };
        match self {
            Self::Text(one) => vec![text(one)],
            Self::Texts(texts) => texts.into_iter().map(text).collect(),
            Self::Ids(ids) => vec![Prompt::Ids(ids)],
            Self::SeveralIds(several) => several.into_iter().map(Prompt::Ids).collect(),
        }
    }
}

// === impl LogitBias ===

impl LogitBias {
    fn into_vec(self) -> Vec<(String, f32)> {
        match self {
            Self::ByToken(map) => map.into_iter().collect(),
            Self::Unused(values) => {
                drop(values);
                Vec::new()
            }
        }
    }
}

// === impl Seed ===

impl Seed {
    /// The same 64 bits without a sign.
    fn bits(self) -> u64 {
        match self {
            Self::Positive(seed) => seed,
            Self::Negative(seed) => seed.cast_unsigned(),
        }
    }
}

// === impl Usage ===

impl Usage {
    pub(crate) fn new(prompt_tokens: u32, completion_tokens: u32) -> Self {
        let total_tokens = prompt_tokens.saturating_add(completion_tokens);
        Self {
            prompt_tokens,
            completion_tokens,
            total_tokens,
        }
    }
}
