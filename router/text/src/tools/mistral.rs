//! Mistral's calls: `[TOOL_CALLS]` and a JSON array of them, or, since its third tokenizer of
//! tools, `[TOOL_CALLS]name[ARGS]{…}` for each, with `[CALL_ID]…` before `[ARGS]` at times.

use super::json_call::Trust;
use super::json_calls::{JsonCalls, Series};
use super::needles::{Found, Needles};
use super::output::Output;
use super::scan::{Reach, Scan};
use super::{Machine, Marker, Step};

#[derive(Debug)]
pub(super) struct Mistral {
    needles: Needles,
    state: State,
    name: String,
}

#[derive(Debug)]
enum State {
    Text,
    /// A part of `[TOOL_CALLS]` is held.
    Marker,
    Opened,
    Calls(JsonCalls),
    Name,
    /// After a name, a part of a marker is held from there.
    NameMarker {
        from: usize,
    },
    CallId,
    /// A part of `[ARGS]` is held from there.
    IdMarker {
        from: usize,
    },
    /// Before the arguments of the name.
    Before,
    Arguments(Scan),
    /// Arguments of a name that no tool has.
    Passing(Scan),
}

const OPEN: [Marker; 1] = [Marker::Open];
const AFTER_NAME: [Marker; 2] = [Marker::Arguments, Marker::CallId];
const AFTER_ID: [Marker; 1] = [Marker::Arguments];

// === impl Mistral ===

impl Mistral {
    pub(super) fn new(needles: Needles) -> Self {
        Self {
            needles,
            state: State::Text,
            name: String::new(),
        }
    }

    fn back(&mut self, out: &mut Output) -> Step {
        out.release();
        self.state = State::Text;
        Step::Again
    }

    fn hold(&mut self, state: State, c: char, out: &mut Output) -> Step {
        out.hold(c);
        self.state = state;
        Step::Taken
    }

    fn text(&mut self, c: char, out: &mut Output) -> Step {
        if self.needles.find("", c, &OPEN) == Found::Part {
            return self.hold(State::Marker, c, out);
        }
        out.content(c);
        Step::Taken
    }

    fn opened(&mut self, c: char, out: &mut Output) -> Step {
        if let Some(calls) = JsonCalls::begin(c, Trust::Marked, out) {
            self.state = State::Calls(calls);
            return Step::Taken;
        }
        if c.is_whitespace() {
            return self.hold(State::Opened, c, out);
        }
        self.name.clear();
        if !is_in_name(c) {
            return self.back(out);
        }
        self.name.push(c);
        self.hold(State::Name, c, out)
    }

    fn after_name(&mut self, c: char, out: &mut Output) -> Step {
        if is_in_name(c) {
            self.name.push(c);
            return self.hold(State::Name, c, out);
        }
        if self.needles.find("", c, &AFTER_NAME) == Found::Part {
            let from = out.held().len();
            return self.hold(State::NameMarker { from }, c, out);
        }
        self.before(c, out)
    }

    /// The next character of a marker that is held from there; `wanted` says which it may be.
    fn in_marker(&mut self, from: usize, wanted: &[Marker], c: char, out: &mut Output) -> Step {
        let found = self.needles.find(&out.held()[from..], c, wanted);
        match found {
            Found::Part => {
                out.hold(c);
                Step::Taken
            }
            Found::Whole(marker) => {
                out.hold(c);
                self.reached(marker);
                Step::Taken
            }
            Found::Nothing => self.back(out),
        }
    }

    fn reached(&mut self, marker: Marker) {
        self.state = match marker {
            Marker::Open => State::Opened,
            Marker::Close | Marker::ListOpen | Marker::ListClose => State::Text,
            Marker::Arguments => State::Before,
            Marker::CallId => State::CallId,
        };
    }

    fn call_id(&mut self, c: char, out: &mut Output) -> Step {
        if self.needles.find("", c, &AFTER_ID) == Found::Part {
            let from = out.held().len();
            return self.hold(State::IdMarker { from }, c, out);
        }
        if c.is_ascii_alphanumeric() {
            return self.hold(State::CallId, c, out);
        }
        self.before(c, out)
    }

    fn before(&mut self, c: char, out: &mut Output) -> Step {
        if c.is_whitespace() {
            return self.hold(State::Before, c, out);
        }
        if c != '{' {
            return self.back(out);
        }
        if out.knows(&self.name) {
            out.start(&self.name);
            out.argument(c);
            self.state = State::Arguments(Scan::open(1));
        } else {
            out.hold(c);
            out.release();
            self.state = State::Passing(Scan::open(1));
        }
        Step::Taken
    }

    /// Decides on what is held: something else begins.
    fn settle(&mut self, out: &mut Output) {
        match &mut self.state {
            State::Calls(calls) => calls.cut(out),
            State::Arguments(_) => out.end(),
            State::Text
            | State::Marker
            | State::Opened
            | State::Name
            | State::NameMarker { .. }
            | State::CallId
            | State::IdMarker { .. }
            | State::Before
            | State::Passing(_) => out.release(),
        }
    }
}

impl Machine for Mistral {
    fn step(&mut self, c: char, out: &mut Output) -> Step {
        match &mut self.state {
            State::Text => return self.text(c, out),
            State::Marker => return self.in_marker(0, &OPEN, c, out),
            State::Opened => return self.opened(c, out),
            State::Name => return self.after_name(c, out),
            State::NameMarker { from } => {
                let from = *from;
                return self.in_marker(from, &AFTER_NAME, c, out);
            }
            State::CallId => return self.call_id(c, out),
            State::IdMarker { from } => {
                let from = *from;
                return self.in_marker(from, &AFTER_ID, c, out);
            }
            State::Before => return self.before(c, out),
            State::Calls(calls) => match calls.step(c, out) {
                Series::GoesOn => {}
                Series::Over => self.state = State::Text,
                Series::OverBefore => return self.back(out),
            },
            State::Arguments(scan) => match scan.step(c) {
                Reach::Within => out.argument(c),
                Reach::Last => {
                    out.argument(c);
                    out.end();
                    self.state = State::Text;
                }
                Reach::Past => {
                    out.end();
                    return self.back(out);
                }
            },
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
        match (marker, &self.state) {
            (Marker::Arguments, State::Name | State::CallId) | (Marker::CallId, State::Name) => {
                self.reached(marker);
            }
            (Marker::Open, _) => {
                self.settle(out);
                self.state = State::Opened;
            }
            // Where it means nothing it has no text either.
            (
                Marker::Arguments
                | Marker::CallId
                | Marker::Close
                | Marker::ListOpen
                | Marker::ListClose,
                _,
            ) => {}
        }
    }

    fn give_up(&mut self) {
        self.state = State::Text;
    }

    fn finish(&mut self, out: &mut Output) {
        if let State::Calls(calls) = &mut self.state {
            calls.finish(out);
        } else if matches!(self.state, State::Before) && out.knows(&self.name) {
            out.start(&self.name);
        }
    }
}

// === free functions ===

fn is_in_name(c: char) -> bool {
    c.is_alphanumeric() || matches!(c, '_' | '-' | '.')
}
