//! What a caller asks for, checked once against [`Limits`]; nobody checks it again.

use std::sync::Arc;

use crate::ids::{TokenId, Tokens};
use crate::limits::Limits;

/// How tokens are drawn. Neutral values switch a part off.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampling {
    /// 0 is greedy.
    pub temperature: f32,
    /// 0 is off.
    pub top_k: u32,
    /// 1 is off.
    pub top_p: f32,
    /// 1 is off.
    pub typical_p: f32,
    /// 0 is off.
    pub min_p: f32,
    /// 1 is off.
    pub repetition_penalty: f32,
    /// 0 is off.
    pub frequency_penalty: f32,
    /// 0 is off.
    pub presence_penalty: f32,
    /// Draws are a pure function of this and the position.
    pub seed: u64,
    /// Alternatives reported with each token.
    pub top_n: u32,
    /// Log-probabilities of the model's own distribution, not of the one drawn from.
    pub logprob_raw: bool,
    /// Green-list watermark.
    pub watermark: bool,
    /// Ending tokens are not drawn before this many new tokens.
    pub tokens_min: Tokens,
    /// Added to single logits.
    pub bias: Vec<(TokenId, f32)>,
}

impl Default for Sampling {
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            typical_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            frequency_penalty: 0.0,
            presence_penalty: 0.0,
            seed: 0,
            top_n: 0,
            logprob_raw: false,
            watermark: false,
            tokens_min: Tokens(0),
            bias: Vec::new(),
        }
    }
}

impl Sampling {
    /// Whether the shard needs every token so far (R6: a prefix hit hides them from it).
    pub fn needs_history(&self) -> bool {
        let off = |penalty: f32, neutral: f32| penalty.to_bits() == neutral.to_bits();
        !off(self.repetition_penalty, 1.0)
            || !off(self.frequency_penalty.abs(), 0.0)
            || !off(self.presence_penalty.abs(), 0.0)
    }
}

/// W3C trace context: trace id (16), span id (8), flags (1).
pub type TraceContext = [u8; 25];

/// A request before it is checked.
#[derive(Debug, Clone)]
pub struct RequestSpec {
    /// Prompt ids, at least one.
    pub prompt: Vec<TokenId>,
    /// How tokens are drawn.
    pub sampling: Sampling,
    /// Ids that end the sequence. Empty when end-of-text is ignored.
    pub ending: Vec<TokenId>,
    /// New tokens at most; `None` fills what the limits leave.
    pub tokens_max: Option<Tokens>,
    /// Log-probabilities of the prompt are wanted; such a request takes no prefix match (R5).
    pub prompt_logprobs: bool,
    /// Every token is drawn under a mask (R7), which somebody else makes.
    pub masked: bool,
    /// The caller's span, when its trace is sampled.
    pub trace: Option<TraceContext>,
}

/// A checked request. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Request {
    pub(crate) prompt: Arc<[TokenId]>,
    pub(crate) sampling: Arc<Sampling>,
    pub(crate) ending: Arc<[TokenId]>,
    pub(crate) tokens_max: Tokens,
    pub(crate) prompt_logprobs: bool,
    pub(crate) masked: bool,
    pub(crate) trace: Option<TraceContext>,
}

/// Why a request cannot be served by this group, whatever else runs.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum RequestError {
    /// No prompt token.
    #[error("the prompt has no tokens")]
    EmptyPrompt,
    /// The prompt and one new token exceed what one sequence may hold.
    #[error("the prompt has {tokens} tokens; at most {tokens_max} fit with one new token")]
    PromptTooLong {
        /// Prompt tokens.
        tokens: u32,
        /// The longest prompt that can be served.
        tokens_max: u32,
    },
    /// Prompt plus new tokens exceed what one sequence may hold.
    #[error(
        "`inputs` tokens + `max_new_tokens` must be <= {tokens_max}. Given: {prompt} `inputs` tokens and {new} `max_new_tokens`"
    )]
    TotalTooLong {
        /// Prompt tokens.
        prompt: u32,
        /// New tokens asked for.
        new: u32,
        /// The bound of their sum.
        tokens_max: u32,
    },
    /// No new token asked for.
    #[error("`max_new_tokens` must be at least 1")]
    NoNewTokens,
    /// An id outside the vocabulary.
    #[error("token id {id} is outside the vocabulary of {vocab_size}")]
    UnknownToken {
        /// The id.
        id: u32,
        /// Entries of the vocabulary.
        vocab_size: u32,
    },
}

// === impl Request ===

impl Request {
    /// Checks a request against what the group can do.
    pub fn new(spec: RequestSpec, limits: &Limits) -> Result<Self, RequestError> {
        let total_max = limits.sequence_tokens_max().0;
        let prompt = u32::try_from(spec.prompt.len()).unwrap_or(u32::MAX);
        if prompt == 0 {
            return Err(RequestError::EmptyPrompt);
        }
        if prompt >= total_max {
            return Err(RequestError::PromptTooLong {
                tokens: prompt,
                tokens_max: total_max.saturating_sub(1),
            });
        }
        if let Some(id) = spec.prompt.iter().find(|id| id.0 >= limits.vocab_size) {
            return Err(RequestError::UnknownToken {
                id: id.0,
                vocab_size: limits.vocab_size,
            });
        }
        let mut biased = spec.sampling.bias.iter().map(|(id, _)| id);
        if let Some(id) = biased.find(|id| id.0 >= limits.vocab_size) {
            return Err(RequestError::UnknownToken {
                id: id.0,
                vocab_size: limits.vocab_size,
            });
        }
        let room = total_max - prompt;
        let tokens_max = match spec.tokens_max {
            Some(Tokens(0)) => return Err(RequestError::NoNewTokens),
            Some(Tokens(new)) if new > room => {
                return Err(RequestError::TotalTooLong {
                    prompt,
                    new,
                    tokens_max: total_max,
                });
            }
            Some(tokens) => tokens,
            None => Tokens(room),
        };
        Ok(Self {
            prompt: spec.prompt.into(),
            sampling: Arc::new(spec.sampling),
            ending: spec.ending.into(),
            tokens_max,
            prompt_logprobs: spec.prompt_logprobs,
            masked: spec.masked,
            trace: spec.trace,
        })
    }

    /// The same request, whose rows say which trace they belong to.
    #[must_use]
    pub fn traced(self, context: TraceContext) -> Self {
        let trace = Some(context);
        Self { trace, ..self }
    }

    /// Prompt ids.
    pub fn prompt(&self) -> &[TokenId] {
        &self.prompt
    }

    /// New tokens at most.
    pub fn tokens_max(&self) -> Tokens {
        self.tokens_max
    }

    /// Whether every token is drawn under a mask.
    pub fn masked(&self) -> bool {
        self.masked
    }

    /// How tokens are drawn.
    pub fn sampling(&self) -> &Sampling {
        &self.sampling
    }
}
