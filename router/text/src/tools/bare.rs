//! JSON objects among text, known by their keys: `{"name": …, "parameters": …}`, several with `;`
//! between them or in an array. Llama 3 may put `<|python_tag|>` before them.

use super::json_call::Trust;
use super::json_calls::{JsonCalls, Series};
use super::needles::{Found, Needles};
use super::output::Output;
use super::{Machine, Marker, Step};

#[derive(Debug)]
pub(super) struct Bare {
    needles: Needles,
    state: State,
}

#[derive(Debug)]
enum State {
    Text,
    /// A part of a marker is held.
    Marker,
    Opened,
    Calls(JsonCalls),
}

const MARKERS: [Marker; 1] = [Marker::Open];

// === impl Bare ===

impl Bare {
    pub(super) fn new(needles: Needles) -> Self {
        Self {
            needles,
            state: State::Text,
        }
    }

    fn text(&mut self, c: char, out: &mut Output) {
        if let Some(calls) = JsonCalls::begin(c, Trust::Bare, out) {
            self.state = State::Calls(calls);
        } else if self.needles.find("", c, &MARKERS) == Found::Part {
            out.hold(c);
            self.state = State::Marker;
        } else {
            out.content(c);
        }
    }

    fn back(&mut self, out: &mut Output) -> Step {
        out.release();
        self.state = State::Text;
        Step::Again
    }
}

impl Machine for Bare {
    fn step(&mut self, c: char, out: &mut Output) -> Step {
        match &mut self.state {
            State::Text => self.text(c, out),
            State::Marker => match self.needles.find(out.held(), c, &MARKERS) {
                Found::Part => out.hold(c),
                Found::Whole(_) => {
                    out.hold(c);
                    self.state = State::Opened;
                }
                Found::Nothing => return self.back(out),
            },
            State::Opened if c.is_whitespace() => out.hold(c),
            State::Opened => match JsonCalls::begin(c, Trust::Marked, out) {
                Some(calls) => self.state = State::Calls(calls),
                None => return self.back(out),
            },
            State::Calls(calls) => match calls.step(c, out) {
                Series::GoesOn => {}
                Series::Over => self.state = State::Text,
                Series::OverBefore => return self.back(out),
            },
        }
        Step::Taken
    }

    fn marker(&mut self, marker: Marker, out: &mut Output) {
        if marker != Marker::Open {
            return;
        }
        match &mut self.state {
            State::Calls(calls) => calls.cut(out),
            State::Text | State::Marker | State::Opened => out.release(),
        }
        self.state = State::Opened;
    }

    fn give_up(&mut self) {
        self.state = State::Text;
    }

    fn finish(&mut self, out: &mut Output) {
        if let State::Calls(calls) = &mut self.state {
            calls.finish(out);
        }
    }
}
