//! What `commit` and `finish` tell the outside world about sequences.

use crate::ids::{SeqId, TokenId};

/// Why a sequence ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FinishReason {
    /// An ending id was drawn.
    EndOfText,
    /// The last permitted token was drawn (it wins over an ending id on that token, as in TGI).
    Length,
    /// The response task matched a stop string (R2).
    StopText,
    /// The client is gone.
    Cancelled,
    /// The time that it was given is over; who has a clock says so.
    Deadline,
    /// The model produced a number that is none (R10).
    Nan,
    /// A mask was missed twice for one token (R7).
    MaskMissed,
    /// The grammar asked for more than its bounds allow while it was followed.
    GrammarFailed,
    /// The shard group did not come back (R8).
    GroupLost,
}

/// What the sequence at the front of the queue lacked, and everybody behind it with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WaitReason {
    /// A slot: as many sequences run as may.
    Slots,
    /// Room for the counts of its penalties.
    State,
    /// Blocks for its whole prompt, beside what running sequences may still need.
    Blocks,
    /// Prompt tokens in the step: the budget, or the target for the gaps between tokens.
    Budget,
    /// The end of a preempted sequence's way back (R6).
    Recovery,
}

/// A drawn token with what was asked to be told about it.
#[derive(Debug, Clone, PartialEq)]
pub struct SampledToken {
    /// The id.
    pub id: TokenId,
    /// Its log-probability.
    pub logprob: f32,
    /// Alternatives, best first.
    pub top: Vec<(TokenId, f32)>,
}

/// What the model made of a token of a prompt.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PromptToken {
    /// Its log-probability; NaN for the first token, which nothing comes before.
    pub logprob: f32,
    /// The most probable token in its place.
    pub best: TokenId,
    /// That one's log-probability.
    pub best_logprob: f32,
}

/// One thing that happened to one sequence, in order.
#[derive(Debug, Clone, PartialEq)]
pub enum SeqEvent {
    /// It was given a slot for the first time; `cached` prompt tokens came from the prefix tree.
    Started {
        /// The sequence.
        seq: SeqId,
        /// Prompt tokens that need not be computed.
        cached: u32,
        /// What it waited for last; `None`: the first plan that could take it did.
        waited_for: Option<WaitReason>,
    },
    /// Log-probabilities of prompt tokens, in order, as their chunks commit.
    PromptLogprobs {
        /// The sequence.
        seq: SeqId,
        /// One a prompt token.
        logprobs: Vec<PromptToken>,
    },
    /// A token was drawn.
    Token {
        /// The sequence.
        seq: SeqId,
        /// The token.
        token: SampledToken,
    },
    /// It ended. Always the last event of a sequence.
    Finished {
        /// The sequence.
        seq: SeqId,
        /// Why.
        reason: FinishReason,
    },
}
