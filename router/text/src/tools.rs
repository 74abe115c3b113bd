//! Calls of tools in a model's text: found as the text comes, whatever way it is cut.
//!
//! Each format is a machine that takes one character after the other, so the events of a text do
//! not depend on its pieces, and the time is linear in its length: a character is looked at once,
//! and once more if what it belonged to turned out to be no call. What a call cannot be told from
//! yet is held back, at most [`HELD_BYTES_MAX`]; arguments are passed on as they come, byte for
//! byte.

mod bare;
mod constraint;
mod deepseek;
mod format;
mod hermes;
mod history;
mod json_call;
mod json_calls;
mod literal;
mod mistral;
mod needles;
mod output;
mod parameter;
mod pythonic;
mod qwen3_coder;
mod scan;
mod signature;
mod style;
mod unescape;

use std::fmt;
use std::sync::Arc;

pub use constraint::{CallsAsked, ToolConstraint};
pub use format::ToolFormat;
pub use history::CallsAs;
pub use signature::Signature;
pub use style::{ParserAsked, ToolStyle, UnknownParser};

use needles::Needles;
use output::Output;

/// Text that may become a call, or the white space around calls, at most. More of it is content.
pub const HELD_BYTES_MAX: usize = 4096;

/// What became of a text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ToolEvent {
    /// Text that belongs to no call.
    Content(String),
    /// A call begins. Calls are numbered from 0.
    CallStart {
        /// Its number.
        index: usize,
        /// One of the tools' names.
        name: String,
    },
    /// The next piece of a call's arguments, which together are a JSON object if the model
    /// wrote one.
    Arguments {
        /// The call's number.
        index: usize,
        /// As the model wrote it.
        fragment: String,
    },
    /// The call is over. One that the end of the text cut has no such event.
    CallEnd {
        /// The call's number.
        index: usize,
    },
}

/// What formats mark calls with, where a tokenizer has a special token for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Marker {
    /// A call, or a list of them, follows.
    Open,
    /// The call is over.
    Close,
    /// Arguments follow.
    Arguments,
    /// The id that the model gives its call follows.
    CallId,
    /// Calls follow, each in marks of its own.
    ListOpen,
    /// No more of them follow.
    ListClose,
}

/// How many calls a text may have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CallsMax {
    /// The text is over with its first call.
    One,
    /// Any number.
    Many,
}

/// Finds the calls in one text.
#[derive(Debug)]
pub struct ToolCallParser {
    machine: Box<dyn Machine>,
    out: Output,
    calls_max: CallsMax,
}

/// A format.
trait Machine: fmt::Debug + Send {
    /// Takes one character.
    fn step(&mut self, c: char, out: &mut Output) -> Step;

    /// Takes a marker that is a token of its own. It has no text.
    fn marker(&mut self, marker: Marker, out: &mut Output);

    /// What is held is content after all: goes back to plain text.
    fn give_up(&mut self);

    /// Nothing comes any more: decides on what is held.
    fn finish(&mut self, out: &mut Output);
}

/// Whether a machine took a character.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    Taken,
    /// It changed its state and wants to see the character once more.
    Again,
}

// === impl ToolCallParser ===

impl ToolCallParser {
    /// For calls of these tools, in a format. `special` says which markers come by
    /// [`ToolCallParser::marker`]; the others are looked for in the text.
    fn new(
        format: ToolFormat,
        special: &[Marker],
        tools: Arc<[Signature]>,
        calls_max: CallsMax,
    ) -> Self {
        let needles = Needles::new(format.markers(), special);
        let machine: Box<dyn Machine> = match format {
            ToolFormat::Llama3Json | ToolFormat::Json => Box::new(bare::Bare::new(needles)),
            ToolFormat::Pythonic => Box::new(pythonic::Pythonic::new(needles)),
            ToolFormat::Hermes => Box::new(hermes::Hermes::new(needles)),
            ToolFormat::Mistral => Box::new(mistral::Mistral::new(needles)),
            ToolFormat::Qwen3Coder => {
                Box::new(qwen3_coder::Qwen3Coder::new(format.markers(), special))
            }
            ToolFormat::DeepSeekV3 | ToolFormat::DeepSeekV31 => {
                Box::new(deepseek::DeepSeek::new(needles))
            }
        };
        Self {
            machine,
            out: Output::new(tools),
            calls_max,
        }
    }

    /// The events that the next piece of the text decides.
    pub fn push(&mut self, text: &str) -> Vec<ToolEvent> {
        for c in text.chars() {
            if self.is_over() {
                break;
            }
            while self.machine.step(c, &mut self.out) == Step::Again {
                self.out.count_step();
            }
            self.out.count_step();
            if self.out.held().len() > HELD_BYTES_MAX {
                self.out.release();
                self.machine.give_up();
            }
        }
        self.out.take()
    }

    /// The events of a marker that is a special token; the text before it was pushed.
    pub fn marker(&mut self, marker: Marker) -> Vec<ToolEvent> {
        if !self.is_over() {
            self.machine.marker(marker, &mut self.out);
        }
        self.out.take()
    }

    /// The rest, when the text is over.
    pub fn finish(mut self) -> Vec<ToolEvent> {
        if !self.is_over() {
            self.machine.finish(&mut self.out);
        }
        self.out.finish();
        self.out.take()
    }

    /// Whether what follows counts for nothing, since the only call is over.
    pub fn is_over(&self) -> bool {
        self.calls_max == CallsMax::One && self.out.calls_ended() > 0
    }
}

#[cfg(test)]
mod tests;
