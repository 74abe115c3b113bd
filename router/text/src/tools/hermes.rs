//! One JSON object a call, each in marks: `<tool_call>{"name": …, "arguments": …}</tool_call>`.
//! Qwen's format and Hermes'.

use super::json_call::{JsonCall, Progress, Trust};
use super::needles::{Found, Needles};
use super::output::Output;
use super::scan::{Reach, Scan};
use super::{Machine, Marker, Step};

#[derive(Debug)]
pub(super) struct Hermes {
    needles: Needles,
    state: State,
    /// Whether a call's closing mark has not come yet.
    is_unclosed: bool,
}

#[derive(Debug)]
enum State {
    Text,
    /// A part of a marker is held.
    Marker,
    Opened,
    Call(JsonCall),
    /// The rest of an object that is no call.
    Passing(Scan),
}

const MARKERS: [Marker; 2] = [Marker::Open, Marker::Close];

// === impl Hermes ===

impl Hermes {
    pub(super) fn new(needles: Needles) -> Self {
        Self {
            needles,
            state: State::Text,
            is_unclosed: false,
        }
    }

    /// `c` is no part of what is held.
    fn back(&mut self, out: &mut Output) -> Step {
        out.release();
        self.state = State::Text;
        Step::Again
    }

    /// A marker in the text is complete, and held.
    fn reached(&mut self, marker: Marker, out: &mut Output) {
        if marker == Marker::Open {
            self.state = State::Opened;
            return;
        }
        // A closing mark that closes nothing is content.
        if self.is_unclosed {
            out.forget();
        } else {
            out.release();
        }
        self.is_unclosed = false;
        self.state = State::Text;
    }

    fn progressed(&mut self, progress: Progress, out: &mut Output) -> Step {
        match progress {
            Progress::More => {}
            Progress::Closed => {
                self.is_unclosed = true;
                self.state = State::Text;
            }
            Progress::Unknown(rest) => {
                out.release();
                self.is_unclosed = false;
                self.state = State::Passing(rest);
            }
            Progress::Broken => {
                self.settle(out);
                return Step::Again;
            }
        }
        Step::Taken
    }

    /// Decides on what is held: something else begins.
    fn settle(&mut self, out: &mut Output) {
        if let State::Call(call) = &mut self.state {
            call.cut(out);
            self.is_unclosed = call.is_started();
        }
        out.release();
        self.state = State::Text;
    }
}

impl Machine for Hermes {
    fn step(&mut self, c: char, out: &mut Output) -> Step {
        match &mut self.state {
            State::Text if self.needles.find("", c, &MARKERS) == Found::Part => {
                out.hold(c);
                self.state = State::Marker;
            }
            State::Text => out.content(c),
            State::Marker => match self.needles.find(out.held(), c, &MARKERS) {
                Found::Part => out.hold(c),
                Found::Whole(marker) => {
                    out.hold(c);
                    self.reached(marker, out);
                }
                Found::Nothing => return self.back(out),
            },
            State::Opened if c == '{' => {
                out.hold(c);
                self.state = State::Call(JsonCall::new(Trust::Marked));
            }
            State::Opened if c.is_whitespace() => out.hold(c),
            State::Opened => return self.back(out),
            State::Call(call) => {
                let progress = call.step(c, out);
                return self.progressed(progress, out);
            }
            State::Passing(scan) => {
                let reach = scan.step(c);
                if reach != Reach::Within {
                    self.state = State::Text;
                }
                if reach == Reach::Past {
                    return Step::Again;
                }
                out.content(c);
            }
        }
        Step::Taken
    }

    fn marker(&mut self, marker: Marker, out: &mut Output) {
        self.settle(out);
        self.is_unclosed = false;
        if marker == Marker::Open {
            self.state = State::Opened;
        }
    }

    fn give_up(&mut self) {
        self.state = State::Text;
    }

    fn finish(&mut self, out: &mut Output) {
        if let State::Call(call) = &mut self.state {
            call.finish(out);
        }
    }
}
