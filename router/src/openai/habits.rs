//! What OpenAI's routes do where OpenAI's types and TGI disagree: all of it, as two values.

use headrace_config::Dialect;

use crate::respond::Finish;

/// The habits of one dialect.
#[derive(Debug, PartialEq, Eq)]
#[expect(clippy::struct_excessive_bools, reason = "each is a habit of its own")]
pub(crate) struct Habits {
    /// A stop string and calls of tools have OpenAI's words at the end of an answer.
    openai_words: bool,
    /// The text ends with the stop string, and nothing is held back that may become one.
    pub(crate) shows_stops: bool,
    /// Streams have an event for every token, without text for a special one in chats and with its
    /// text in completions.
    pub(crate) event_a_token: bool,
    /// An answer has an id.
    pub(crate) has_ids: bool,
    /// Log-probabilities are of the model's own distribution, not of the one drawn from.
    pub(crate) raw_logprobs: bool,
    /// A chat's `presence_penalty` p is a `repetition_penalty` of p + 2.
    pub(crate) presence_repeats: bool,
    /// The status that errors in streams tell; `None` for their own.
    pub(crate) stream_failure: Option<u16>,
}

static OPENAI: Habits = Habits {
    openai_words: true,
    shows_stops: false,
    event_a_token: false,
    has_ids: true,
    raw_logprobs: true,
    presence_repeats: false,
    stream_failure: None,
};

static TGI: Habits = Habits {
    openai_words: false,
    shows_stops: true,
    event_a_token: true,
    has_ids: false,
    raw_logprobs: false,
    presence_repeats: true,
    stream_failure: Some(422),
};

// === impl Habits ===

impl Habits {
    pub(crate) fn of(dialect: Dialect) -> &'static Self {
        match dialect {
            Dialect::Openai => &OPENAI,
            Dialect::Tgi => &TGI,
        }
    }

    /// Why an answer ended. (Streams of completions have TGI's words in either dialect.)
    pub(crate) fn finish_reason(&self, finish: Finish) -> &'static str {
        if self.openai_words {
            return finish.as_openai();
        }
        match finish {
            // TGI knows no word for calls.
            Finish::EosToken | Finish::ToolCalls => "stop",
            Finish::StopSequence | Finish::Length => finish.as_tgi(),
        }
    }
}
