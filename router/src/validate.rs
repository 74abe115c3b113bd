//! What an API accepted becomes what the engine takes. Every check of a parameter is here, in
//! TGI's order, and each refusal names the field and its limit.

use std::hash::{BuildHasher, RandomState};
use std::ops::Range;

use headrace_config::Requests;
use headrace_engine::{Request, RequestError, RequestSpec, Sampling, TokenId, Tokens};
use headrace_grammar::{Compiled, GrammarSpec, Matcher};

use crate::app::Ready;
use crate::error::Invalid;
use crate::grammar::Asked;
use crate::meter::{GenerateParameters, Texts};

/// New tokens that are counted against the total at validation. More may be asked for: the
/// sequence then ends with reason `length` where the total is reached.
const NEW_TOKENS_COUNTED_MAX: u32 = 1024;

/// Entries of `logit_bias`.
const LOGIT_BIAS_MAX: usize = 1024;

/// The penalties' range on both sides of zero.
const PENALTY_MAX: f32 = 2.0;

/// The range of a logit bias on both sides of zero.
const BIAS_MAX: f32 = 100.0;

/// What an API calls the fields that others call otherwise: a refusal names the caller's own.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Names {
    pub(crate) prompt: &'static str,
    pub(crate) tokens_max: &'static str,
    pub(crate) top_n: &'static str,
}

/// Parameters of every API in one shape, unchecked. `None` is "not given".
#[derive(Debug, Clone, Default)]
#[expect(clippy::struct_excessive_bools, reason = "each is a field of an API")]
pub(crate) struct Ask {
    pub(crate) best_of: Option<usize>,
    pub(crate) temperature: Option<f32>,
    pub(crate) repetition_penalty: Option<f32>,
    pub(crate) frequency_penalty: Option<f32>,
    pub(crate) presence_penalty: Option<f32>,
    pub(crate) top_k: Option<i64>,
    pub(crate) top_p: Option<f32>,
    pub(crate) typical_p: Option<f32>,
    pub(crate) min_p: Option<f32>,
    pub(crate) do_sample: bool,
    /// Temperature 0, where an API knows it: the other warpers are checked and then ignored.
    pub(crate) greedy: bool,
    pub(crate) seed: Option<u64>,
    pub(crate) stop: Vec<String>,
    pub(crate) tokens_max: Option<u32>,
    pub(crate) tokens_min: Option<u32>,
    pub(crate) truncate: Option<u64>,
    pub(crate) ignore_eos: bool,
    pub(crate) prompt_logprobs: bool,
    pub(crate) top_n: Option<u32>,
    pub(crate) names: Names,
    pub(crate) bias: Vec<(String, f32)>,
    pub(crate) watermark: bool,
    /// The form that the answer is to have.
    pub(crate) grammar: Asked,
    /// Log-probabilities of the model's own distribution (OpenAI), not of the one drawn from (TGI).
    pub(crate) logprob_raw: bool,
}

/// Parameters that are in order by themselves; only lengths are unchecked.
#[derive(Debug, Clone)]
#[expect(clippy::struct_excessive_bools, reason = "each is a field of an API")]
pub(crate) struct Checked {
    sampling: Sampling,
    /// Whether tokens are drawn, so that the seed means something.
    pub(crate) sampled: bool,
    /// Whether the caller chose the seed.
    pub(crate) seeded: bool,
    pub(crate) best_of: usize,
    pub(crate) stop: Vec<String>,
    pub(crate) truncate: Option<usize>,
    tokens_max: Option<u32>,
    pub(crate) ignore_eos: bool,
    prompt_logprobs: bool,
    pub(crate) grammar: Option<GrammarSpec>,
    pub(crate) names: Names,
}

// === impl Names ===

/// TGI's names.
impl Default for Names {
    fn default() -> Self {
        Self {
            prompt: "inputs",
            tokens_max: "max_new_tokens",
            top_n: "top_n_tokens",
        }
    }
}

// === impl Ask ===

impl Ask {
    /// What the log tells of it.
    pub(crate) fn told(&self) -> GenerateParameters {
        GenerateParameters {
            best_of: self.best_of,
            temperature: self.temperature,
            repetition_penalty: self.repetition_penalty,
            frequency_penalty: self.frequency_penalty,
            top_k: self.top_k,
            top_p: self.top_p,
            typical_p: self.typical_p,
            do_sample: self.do_sample,
            max_new_tokens: self.tokens_max,
            stop: Texts(self.stop.len()),
            truncate: self.truncate,
            watermark: self.watermark,
            decoder_input_details: self.prompt_logprobs,
            seed: self.seed,
            top_n_tokens: self.top_n,
            grammar: self.grammar.is_some(),
        }
    }

    /// Checks everything that needs no tokens, in TGI's order.
    pub(crate) fn check(self, bounds: &Requests, vocab_size: u32) -> Result<Checked, Invalid> {
        let best_of = self.check_best_of(bounds)?;
        let sampling = self.check_sampling(vocab_size)?;
        if self.tokens_max == Some(0) {
            return Err(Invalid::NoCount {
                field: self.names.tokens_max,
                given: 0,
            });
        }
        if self.stop.len() > bounds.max_stop_sequences {
            let (max, given) = (bounds.max_stop_sequences, self.stop.len());
            return Err(Invalid::StopSequence { max, given });
        }
        if let (Some(given), true) = (self.seed, best_of > 1) {
            return Err(Invalid::BestOfSeed { given });
        }
        if let Some(given) = self.top_n.filter(|n| *n > bounds.max_top_n_tokens) {
            let (field, max) = (self.names.top_n, bounds.max_top_n_tokens);
            return Err(Invalid::TopTokens { field, max, given });
        }
        if self.grammar.is_some() && bounds.disable_grammar_support {
            return Err(Invalid::Grammar);
        }
        let grammar = self.grammar.transpose()?;
        Ok(Checked {
            sampled: sampling.temperature > 0.0,
            seeded: self.seed.is_some(),
            sampling,
            best_of,
            stop: self
                .stop
                .into_iter()
                .filter(|stop| !stop.is_empty())
                .collect(),
            truncate: self
                .truncate
                .map(|n| usize::try_from(n).unwrap_or(usize::MAX)),
            tokens_max: self.tokens_max,
            ignore_eos: self.ignore_eos,
            prompt_logprobs: self.prompt_logprobs,
            grammar,
            names: self.names,
        })
    }

    /// Whether a parameter was given that only makes sense when tokens are drawn.
    fn asks_for_sampling(&self) -> bool {
        self.do_sample
            || self.temperature.is_some()
            || self.top_k.is_some()
            || self.top_p.is_some()
            || self.typical_p.is_some()
            || self.min_p.is_some()
    }

    /// Whether tokens are drawn. A warper at its neutral value does not ask for it, as in TGI's
    /// shard; several sequences of one prompt only differ when they are drawn.
    fn is_sampled(&self) -> bool {
        !self.greedy && (self.do_sample || self.best_of.unwrap_or(1) > 1 || self.is_warped())
    }

    #[expect(clippy::float_cmp, reason = "only the neutral value itself is neutral")]
    fn is_warped(&self) -> bool {
        self.temperature.is_some_and(|t| t != 1.0)
            || self.top_k.is_some_and(|k| k != 0)
            || self.top_p.is_some_and(|p| p < 1.0)
            || self.typical_p.is_some_and(|p| p < 1.0)
            || self.min_p.is_some_and(|p| p > 0.0)
    }

    fn check_best_of(&self, bounds: &Requests) -> Result<usize, Invalid> {
        let (best_of, max) = (self.best_of.unwrap_or(1), bounds.max_best_of);
        if best_of != 1 && max == 1 {
            return Err(Invalid::BestOfDisabled { given: best_of });
        }
        if best_of == 0 || best_of > max.max(1) {
            return Err(Invalid::BestOf {
                max,
                given: best_of,
            });
        }
        if best_of > 1 && !self.asks_for_sampling() {
            return Err(Invalid::BestOfSampling { given: best_of });
        }
        Ok(best_of)
    }

    fn check_sampling(&self, vocab_size: u32) -> Result<Sampling, Invalid> {
        let temperature = positive("temperature", self.temperature, 1.0)?;
        let repetition_penalty = positive("repetition_penalty", self.repetition_penalty, 1.0)?;
        let frequency_penalty = penalty("frequency_penalty", self.frequency_penalty)?;
        let presence_penalty = penalty("presence_penalty", self.presence_penalty)?;
        let top_p = mass("top_p", self.top_p)?;
        let typical_p = mass("typical_p", self.typical_p)?;
        let min_p = within("min_p", self.min_p.unwrap_or(0.0), 0.0, 1.0)?;
        let top_k = match self.top_k {
            Some(given) if given <= 0 => {
                return Err(Invalid::NoCount {
                    field: "top_k",
                    given,
                });
            }
            Some(given) => u32::try_from(given).unwrap_or(u32::MAX),
            None => 0,
        };
        Ok(Sampling {
            temperature: if self.is_sampled() { temperature } else { 0.0 },
            top_k,
            top_p,
            typical_p,
            min_p,
            repetition_penalty,
            frequency_penalty,
            presence_penalty,
            seed: self.seed.unwrap_or_else(random_u64),
            top_n: self.top_n.unwrap_or(0),
            logprob_raw: self.logprob_raw,
            watermark: self.watermark,
            tokens_min: Tokens(self.tokens_min.unwrap_or(0)),
            bias: check_bias(&self.bias, vocab_size)?,
        })
    }
}

// === impl Checked ===

impl Checked {
    /// How tokens are drawn.
    pub(crate) fn sampling(&self) -> &Sampling {
        &self.sampling
    }

    /// The seed, where one is used.
    pub(crate) fn seed(&self, copy: usize) -> Option<u64> {
        self.sampled.then(|| derive_seed(self.sampling.seed, copy))
    }

    /// A matcher for one sequence of a request that asks for a grammar.
    pub(crate) fn matcher(&self, grammar: &Compiled) -> Matcher {
        grammar
            .matcher()
            .with_tokens_min(self.sampling.tokens_min.0)
    }

    /// Checks the range of `truncate`, before anything is tokenized.
    pub(crate) fn check_truncate(&self, ready: &Ready) -> Result<(), Invalid> {
        let max = ready.input_max;
        match self.truncate {
            Some(given) if given == 0 || given > max as usize => Err(Invalid::Truncate {
                max,
                given: given as u64,
            }),
            _ => Ok(()),
        }
    }

    /// Prompt ids that are kept: the last `truncate` of them.
    pub(crate) fn kept<'a>(&self, ids: &'a [u32]) -> &'a [u32] {
        let kept = self.truncate.unwrap_or(usize::MAX);
        &ids[ids.len().saturating_sub(kept)..]
    }

    /// The requests of some sequences of one prompt, whose seeds are derived by these numbers.
    /// Lengths are checked here.
    pub(crate) fn requests(
        &self,
        ids: &[u32],
        ready: &Ready,
        copies: Range<usize>,
    ) -> Result<Vec<Request>, Invalid> {
        let input = u32::try_from(ids.len()).unwrap_or(u32::MAX);
        let new = self.tokens_max.unwrap_or(1);
        let counted = new.min(NEW_TOKENS_COUNTED_MAX);
        if self.tokens_max.is_some() && input.saturating_add(counted) > ready.total_max {
            return Err(Invalid::TotalTokens {
                max: ready.total_max,
                input,
                new,
            });
        }
        if input > ready.input_max {
            return Err(Invalid::InputTokens {
                max: ready.input_max,
                given: input,
            });
        }
        let room = ready.total_max.saturating_sub(input);
        let mut sampling = self.sampling.clone();
        if self.grammar.is_some() {
            // The matcher sees to it, because the grammar may end before.
            sampling.tokens_min = Tokens(0);
        }
        let spec = RequestSpec {
            prompt: ids.iter().copied().map(TokenId).collect(),
            sampling,
            ending: if self.ignore_eos {
                Vec::new()
            } else {
                ready.text.ending.clone()
            },
            tokens_max: Some(Tokens(self.tokens_max.map_or(room, |new| new.min(room)))),
            prompt_logprobs: self.prompt_logprobs,
            masked: self.grammar.is_some(),
            trace: None,
        };
        let limits = &ready.facts.limits;
        let copy = |index| {
            let mut spec = spec.clone();
            spec.sampling.seed = derive_seed(spec.sampling.seed, index);
            Request::new(spec, limits).map_err(|error| named(&error))
        };
        copies.map(copy).collect()
    }
}

// === free functions ===

/// Sixty-four bits from the hash keys that the standard library draws from the system. Good for
/// seeds and ids, not for secrets.
pub(crate) fn random_u64() -> u64 {
    RandomState::new().hash_one(0_u8)
}

/// The seed of one of several sequences of a request: the first has the request's own.
fn derive_seed(seed: u64, copy: usize) -> u64 {
    seed.wrapping_add((copy as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15))
}

fn positive(field: &'static str, given: Option<f32>, neutral: f32) -> Result<f32, Invalid> {
    match given {
        Some(given) if given > 0.0 && given.is_finite() => Ok(given),
        Some(given) => Err(Invalid::NotPositive { field, given }),
        None => Ok(neutral),
    }
}

fn penalty(field: &'static str, given: Option<f32>) -> Result<f32, Invalid> {
    within(field, given.unwrap_or(0.0), -PENALTY_MAX, PENALTY_MAX)
}

fn within(field: &'static str, given: f32, min: f32, max: f32) -> Result<f32, Invalid> {
    if (min..=max).contains(&given) {
        Ok(given)
    } else {
        Err(Invalid::Range {
            field,
            min,
            max,
            given,
        })
    }
}

fn mass(field: &'static str, given: Option<f32>) -> Result<f32, Invalid> {
    match given {
        Some(given) if given > 0.0 && given <= 1.0 => Ok(given),
        Some(given) => Err(Invalid::Mass { field, given }),
        None => Ok(1.0),
    }
}

fn check_bias(bias: &[(String, f32)], vocab_size: u32) -> Result<Vec<(TokenId, f32)>, Invalid> {
    if bias.len() > LOGIT_BIAS_MAX {
        let (max, given) = (LOGIT_BIAS_MAX, bias.len());
        return Err(Invalid::TooMany {
            field: "logit_bias",
            max,
            given,
        });
    }
    let entry = |(id, value): &(String, f32)| {
        let known = id.trim().parse::<u32>().ok().filter(|id| *id < vocab_size);
        let Some(known) = known else {
            return Err(Invalid::BiasToken {
                vocab_size,
                given: id.clone(),
            });
        };
        Ok((
            TokenId(known),
            within("logit_bias", *value, -BIAS_MAX, BIAS_MAX)?,
        ))
    };
    bias.iter().map(entry).collect()
}

/// The engine's own check, in the API's words.
fn named(error: &RequestError) -> Invalid {
    match *error {
        RequestError::EmptyPrompt => Invalid::Empty { field: "inputs" },
        RequestError::PromptTooLong { tokens, tokens_max } => Invalid::InputTokens {
            max: tokens_max,
            given: tokens,
        },
        RequestError::TotalTooLong {
            prompt,
            new,
            tokens_max,
        } => Invalid::TotalTokens {
            max: tokens_max,
            input: prompt,
            new,
        },
        RequestError::NoNewTokens => Invalid::NoCount {
            field: "max_new_tokens",
            given: 0,
        },
        RequestError::UnknownToken { id, vocab_size } => Invalid::UnknownToken { id, vocab_size },
    }
}
