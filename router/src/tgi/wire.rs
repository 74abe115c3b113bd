//! Request and response types of TGI's routes, fields in the order they are written. Every optional
//! field may be null; unknown fields are ignored.

use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::ToSchema;

use crate::grammar;
use crate::validate::{Ask, Names};

/// Body of `/generate`, `/generate_stream` and `/tokenize`.
#[derive(Debug, Deserialize, ToSchema)]
pub(crate) struct GenerateRequest {
    /// Text to be continued.
    #[schema(min_length = 1, examples("My name is Olivier and I"))]
    pub(crate) inputs: String,
    /// How. Absent, tokens are drawn; present, they are only drawn when it says so.
    pub(crate) parameters: Option<GenerateParameters>,
}

/// Body of `/`.
#[derive(Debug, Deserialize, ToSchema)]
pub(crate) struct CompatGenerateRequest {
    /// Text to be continued.
    #[schema(min_length = 1, examples("My name is Olivier and I"))]
    pub(crate) inputs: String,
    /// How. Absent, tokens are drawn; present, they are only drawn when it says so.
    pub(crate) parameters: Option<GenerateParameters>,
    /// Whether to answer as `/generate_stream` does.
    pub(crate) stream: Option<bool>,
}

/// How text is to be continued.
#[derive(Debug, Clone, Default, Deserialize, ToSchema)]
pub(crate) struct GenerateParameters {
    /// Sequences that are generated; the most probable is the answer.
    #[schema(minimum = 1)]
    pub(crate) best_of: Option<usize>,
    /// Divides the logits.
    #[schema(exclusive_minimum = 0.0)]
    pub(crate) temperature: Option<f32>,
    /// Above 1, tokens that occurred become less probable.
    #[schema(exclusive_minimum = 0.0)]
    pub(crate) repetition_penalty: Option<f32>,
    /// Subtracted from a token's logit for each time it occurred.
    #[schema(minimum = -2.0, maximum = 2.0)]
    pub(crate) frequency_penalty: Option<f32>,
    /// Subtracted from the logit of each token that occurred.
    #[schema(minimum = -2.0, maximum = 2.0)]
    pub(crate) presence_penalty: Option<f32>,
    /// Only the most probable tokens, so many of them.
    #[schema(minimum = 1)]
    pub(crate) top_k: Option<i64>,
    /// Only the most probable tokens, up to this mass.
    #[schema(exclusive_minimum = 0.0, maximum = 1.0)]
    pub(crate) top_p: Option<f32>,
    /// Only the most typical tokens, up to this mass.
    #[schema(exclusive_minimum = 0.0, maximum = 1.0)]
    pub(crate) typical_p: Option<f32>,
    /// Only tokens at least this fraction as probable as the most probable one.
    #[schema(minimum = 0.0, maximum = 1.0)]
    pub(crate) min_p: Option<f32>,
    /// Whether tokens are drawn or the most probable one is taken.
    pub(crate) do_sample: Option<bool>,
    /// New tokens at most; absent, as many as fit.
    #[schema(minimum = 1)]
    pub(crate) max_new_tokens: Option<u32>,
    /// Whether the prompt comes before the answer.
    pub(crate) return_full_text: Option<bool>,
    /// Texts that end the answer, which keeps them.
    pub(crate) stop: Option<Vec<String>>,
    /// Prompt tokens that are kept, from the end.
    #[schema(minimum = 1)]
    pub(crate) truncate: Option<u64>,
    /// Whether the text is marked: some tokens are favoured by a rule that makes it detectable.
    pub(crate) watermark: Option<bool>,
    /// Whether tokens and reasons are told.
    pub(crate) details: Option<bool>,
    /// Whether log-probabilities of the prompt are told. Implies `details`.
    pub(crate) decoder_input_details: Option<bool>,
    /// Draws with one seed are the same each time.
    pub(crate) seed: Option<u64>,
    /// Alternatives told with each token.
    pub(crate) top_n_tokens: Option<u32>,
    /// The form that the answer is to have: `type` is `json` (with a schema for `value`) or `regex`.
    pub(crate) grammar: Option<Value>,
    /// Names no adapter yet: any value means the model itself.
    #[expect(
        dead_code,
        reason = "accepted and falls through to the base model, as in TGI"
    )]
    pub(crate) adapter_id: Option<String>,
    /// Whether generation goes on after an ending token.
    #[serde(alias = "ignore_eos_token")]
    pub(crate) ignore_eos: Option<bool>,
}

/// Answer of `/generate`; `/` answers an array of one.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct GenerateResponse {
    pub(crate) generated_text: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub(crate) details: Option<Details>,
}

/// How one sequence came about.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct Details {
    /// `length`, `eos_token` or `stop_sequence`.
    pub(crate) finish_reason: &'static str,
    pub(crate) generated_tokens: u32,
    /// Null when nothing was drawn.
    pub(crate) seed: Option<u64>,
    pub(crate) prefill: Vec<PrefillToken>,
    pub(crate) tokens: Vec<Token>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schema(required = false)]
    pub(crate) best_of_sequences: Vec<BestOfSequence>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schema(required = false)]
    pub(crate) top_tokens: Vec<Vec<Token>>,
}

/// A sequence that was not the best.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct BestOfSequence {
    pub(crate) generated_text: String,
    pub(crate) finish_reason: &'static str,
    pub(crate) generated_tokens: u32,
    pub(crate) seed: Option<u64>,
    pub(crate) prefill: Vec<PrefillToken>,
    pub(crate) tokens: Vec<Token>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schema(required = false)]
    pub(crate) top_tokens: Vec<Vec<Token>>,
}

/// A token of the prompt.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct PrefillToken {
    pub(crate) id: u32,
    pub(crate) text: String,
    /// Null for the first token.
    #[schema(value_type = Option<f32>)]
    pub(crate) logprob: f32,
}

/// A drawn token.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub(crate) struct Token {
    pub(crate) id: u32,
    pub(crate) text: String,
    #[schema(value_type = Option<f32>)]
    pub(crate) logprob: f32,
    pub(crate) special: bool,
}

/// A drawn token that is written at once.
#[derive(Debug, Serialize)]
pub(crate) struct TokenRef<'a> {
    pub(crate) id: u32,
    pub(crate) text: &'a str,
    pub(crate) logprob: f32,
    pub(crate) special: bool,
}

/// An event of `/generate_stream`.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct StreamResponse<'a> {
    /// Counts from 1.
    pub(crate) index: u32,
    #[schema(value_type = Token)]
    pub(crate) token: TokenRef<'a>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schema(required = false)]
    pub(crate) top_tokens: Vec<Token>,
    /// Null until the last event.
    pub(crate) generated_text: Option<String>,
    /// Null until the last event, and there too unless asked for.
    pub(crate) details: Option<StreamDetails>,
}

/// How a streamed sequence came about.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct StreamDetails {
    pub(crate) finish_reason: &'static str,
    pub(crate) generated_tokens: u32,
    pub(crate) seed: Option<u64>,
    pub(crate) input_length: u32,
}

/// A token of `/tokenize`.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct SimpleToken {
    pub(crate) id: u32,
    pub(crate) text: String,
    /// Its first byte in the input,
    pub(crate) start: usize,
    /// and the byte after its last.
    pub(crate) stop: usize,
}

/// Answer of `/chat_tokenize`.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct ChatTokenizeResponse {
    pub(crate) tokenize_response: Vec<SimpleToken>,
    pub(crate) templated_text: String,
}

/// Answer of `/info`.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct Info {
    pub(crate) model_id: String,
    pub(crate) model_sha: Option<String>,
    pub(crate) model_pipeline_tag: Option<String>,
    pub(crate) max_concurrent_requests: usize,
    pub(crate) max_best_of: usize,
    pub(crate) max_stop_sequences: usize,
    pub(crate) max_input_tokens: Option<u32>,
    pub(crate) max_total_tokens: Option<u32>,
    pub(crate) validation_workers: usize,
    pub(crate) max_client_batch_size: usize,
    pub(crate) router: &'static str,
    pub(crate) version: &'static str,
    pub(crate) sha: Option<&'static str>,
    pub(crate) docker_label: Option<&'static str>,
    pub(crate) model_dtype: Option<String>,
    /// As the model's unless told; ours alone.
    pub(crate) kv_cache_dtype: Option<String>,
    pub(crate) model_device_type: Option<String>,
    pub(crate) max_input_length: Option<u32>,
    pub(crate) max_batch_prefill_tokens: u32,
    pub(crate) max_batch_total_tokens: Option<u32>,
    pub(crate) waiting_served_ratio: f32,
    pub(crate) max_waiting_tokens: u32,
    pub(crate) max_batch_size: Option<u32>,
}

// === impl GenerateParameters ===

impl GenerateParameters {
    /// What holds when a request has no `parameters` at all: tokens are drawn.
    pub(crate) fn absent() -> Self {
        Self {
            do_sample: Some(true),
            ..Self::default()
        }
    }

    pub(crate) fn wants_details(&self) -> bool {
        self.details.unwrap_or(false) || self.wants_prefill()
    }

    pub(crate) fn wants_prefill(&self) -> bool {
        self.decoder_input_details.unwrap_or(false)
    }

    pub(crate) fn into_ask(self) -> Ask {
        Ask {
            best_of: self.best_of,
            temperature: self.temperature,
            repetition_penalty: self.repetition_penalty,
            frequency_penalty: self.frequency_penalty,
            presence_penalty: self.presence_penalty,
            top_k: self.top_k,
            top_p: self.top_p,
            typical_p: self.typical_p,
            min_p: self.min_p,
            do_sample: self.do_sample.unwrap_or(false),
            greedy: false,
            seed: self.seed,
            stop: self.stop.unwrap_or_default(),
            tokens_max: self.max_new_tokens,
            tokens_min: None,
            truncate: self.truncate,
            ignore_eos: self.ignore_eos.unwrap_or(false),
            prompt_logprobs: self.decoder_input_details.unwrap_or(false),
            top_n: self.top_n_tokens,
            names: Names::default(),
            bias: Vec::new(),
            watermark: self.watermark.unwrap_or(false),
            grammar: self.grammar.as_ref().map(grammar::of_tgi),
            logprob_raw: false,
        }
    }
}
