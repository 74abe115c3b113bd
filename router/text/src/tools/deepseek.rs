//! DeepSeek's calls, each in marks, and all of them in another pair. Since V3: `function`, a mark,
//! the function's name, and arguments in a fence of JSON. Since V3.1: the name, a mark, arguments.

use super::needles::{Found, Needles};
use super::output::Output;
use super::scan::{Reach, Scan};
use super::{Machine, Marker, Step};

/// What V3 writes before a function's name.
const KIND: &str = "function";

/// Between a name and its arguments, or behind these, besides white space.
const FENCE: &str = "`json";

#[derive(Debug)]
pub(super) struct DeepSeek {
    needles: Needles,
    state: State,
    /// Of the function, or what stands in its place.
    name: String,
    /// Whether a call's closing mark has not come yet.
    is_unclosed: bool,
    /// Whether calls came whose list is not closed.
    is_listed: bool,
}

#[derive(Debug, Clone, Copy)]
enum State {
    Text,
    /// A part of a mark is held.
    Marker,
    /// The mark of a list is held, if it is text, and white space.
    Listed,
    /// A part of a mark is held from there.
    ListedMarker {
        from: usize,
    },
    /// Behind the mark of a call; it is held as well.
    Opened,
    /// A part of a mark is held from there.
    OpenedMarker {
        from: usize,
    },
    /// A function's name behind its kind.
    Name,
    /// Before the arguments of the name.
    Before,
    Arguments(Scan),
    /// Arguments of a name that no tool has.
    Passing(Scan),
    /// Behind the arguments of a call.
    After,
    /// A part of a mark is held from there.
    AfterMarker {
        from: usize,
    },
}

const IN_TEXT: [Marker; 4] = [
    Marker::ListOpen,
    Marker::Open,
    Marker::Close,
    Marker::ListClose,
];
const LISTED: [Marker; 2] = [Marker::Open, Marker::ListOpen];
const OPENED: [Marker; 3] = [Marker::Arguments, Marker::Open, Marker::ListOpen];

// === impl DeepSeek ===

impl DeepSeek {
    pub(super) fn new(needles: Needles) -> Self {
        Self {
            needles,
            state: State::Text,
            name: String::new(),
            is_unclosed: false,
            is_listed: false,
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

    /// Whether a mark that is text may begin with this.
    fn may_be_marker(&self, c: char, wanted: &[Marker]) -> bool {
        self.needles.find("", c, wanted) == Found::Part
    }

    /// The next character of a mark that is held from there.
    fn in_marker(&mut self, from: usize, wanted: &[Marker], c: char, out: &mut Output) -> Step {
        match self.needles.find(&out.held()[from..], c, wanted) {
            Found::Nothing => self.back(out),
            Found::Part => {
                out.hold(c);
                Step::Taken
            }
            Found::Whole(marker) => {
                out.hold(c);
                self.reached(from, marker, out);
                Step::Taken
            }
        }
    }

    /// A mark is complete, and held from there if it is text.
    fn reached(&mut self, from: usize, marker: Marker, out: &mut Output) {
        let is_after = matches!(self.state, State::After | State::AfterMarker { .. });
        let is_listed = matches!(self.state, State::Listed | State::ListedMarker { .. });
        match marker {
            // What is held belongs to the call before; or to this one; or it came to nothing.
            _ if is_after => out.forget_before(from),
            Marker::Arguments => {}
            Marker::Open if is_listed => {}
            Marker::Open
            | Marker::ListOpen
            | Marker::Close
            | Marker::ListClose
            | Marker::CallId => out.release_before(from),
        }
        match marker {
            Marker::ListOpen => self.state = State::Listed,
            Marker::Open => {
                self.name.clear();
                self.is_unclosed = false;
                self.state = State::Opened;
            }
            Marker::Arguments => self.named(),
            Marker::Close => {
                self.closed(is_after || self.is_unclosed, out);
                self.is_unclosed = false;
            }
            Marker::ListClose => {
                self.closed(self.is_listed, out);
                (self.is_unclosed, self.is_listed) = (false, false);
            }
            Marker::CallId => self.state = State::Text,
        }
    }

    /// A mark that closes nothing is content.
    fn closed(&mut self, is_closing: bool, out: &mut Output) {
        if is_closing {
            out.forget();
        } else {
            out.release();
        }
        self.state = State::Text;
    }

    /// The mark before the arguments, or before a name whose kind is held.
    fn named(&mut self) {
        self.name = self.name.trim().to_owned();
        self.state = if self.name == KIND {
            self.name.clear();
            State::Name
        } else {
            State::Before
        };
    }

    fn name(&mut self, c: char, out: &mut Output) -> Step {
        if is_in_name(c) {
            self.name.push(c);
            return self.hold(State::Name, c, out);
        }
        if self.name.is_empty() && c.is_whitespace() {
            return self.hold(State::Name, c, out);
        }
        // A function may be called so.
        if self.name.is_empty() && c == '{' {
            self.name.push_str(KIND);
        }
        self.before(c, out)
    }

    fn before(&mut self, c: char, out: &mut Output) -> Step {
        if c.is_whitespace() || FENCE.contains(c) {
            return self.hold(State::Before, c, out);
        }
        if c != '{' {
            return self.back(out);
        }
        if out.knows(&self.name) {
            out.start(&self.name);
            out.argument(c);
            self.is_listed = true;
            self.state = State::Arguments(Scan::open(1));
        } else {
            out.hold(c);
            out.release();
            self.state = State::Passing(Scan::open(1));
        }
        Step::Taken
    }

    fn arguments(&mut self, mut scan: Scan, c: char, out: &mut Output) -> Step {
        let reach = scan.step(c);
        if reach == Reach::Past {
            out.end();
            self.is_unclosed = true;
            return self.back(out);
        }
        out.argument(c);
        self.state = State::Arguments(scan);
        if reach == Reach::Last {
            out.end();
            self.state = State::After;
        }
        Step::Taken
    }

    fn passing(&mut self, mut scan: Scan, c: char, out: &mut Output) -> Step {
        let reach = scan.step(c);
        self.state = match reach {
            Reach::Within => State::Passing(scan),
            Reach::Last | Reach::Past => State::Text,
        };
        if reach == Reach::Past {
            return Step::Again;
        }
        out.content(c);
        Step::Taken
    }

    fn after(&mut self, c: char, out: &mut Output) -> Step {
        if c.is_whitespace() || c == '`' {
            return self.hold(State::After, c, out);
        }
        if self.may_be_marker(c, &IN_TEXT) {
            let from = out.held().len();
            return self.hold(State::AfterMarker { from }, c, out);
        }
        self.is_unclosed = true;
        self.back(out)
    }

    /// Decides on what is held: something else begins.
    fn settle(&mut self, out: &mut Output) {
        match self.state {
            State::Arguments(_) => out.end(),
            State::After => out.forget(),
            State::Text
            | State::Marker
            | State::Listed
            | State::ListedMarker { .. }
            | State::Opened
            | State::OpenedMarker { .. }
            | State::Name
            | State::Before
            | State::Passing(_)
            | State::AfterMarker { .. } => out.release(),
        }
        self.state = State::Text;
    }
}

impl Machine for DeepSeek {
    fn step(&mut self, c: char, out: &mut Output) -> Step {
        let from = out.held().len();
        match self.state {
            State::Text if self.may_be_marker(c, &IN_TEXT) => self.hold(State::Marker, c, out),
            State::Text => {
                out.content(c);
                Step::Taken
            }
            State::Marker => self.in_marker(0, &IN_TEXT, c, out),
            State::Listed if c.is_whitespace() => self.hold(State::Listed, c, out),
            State::Listed if self.may_be_marker(c, &LISTED) => {
                self.hold(State::ListedMarker { from }, c, out)
            }
            State::Opened if is_in_name(c) || c.is_whitespace() => {
                self.name.push(c);
                self.hold(State::Opened, c, out)
            }
            State::Opened if self.may_be_marker(c, &OPENED) => {
                self.hold(State::OpenedMarker { from }, c, out)
            }
            State::Listed | State::Opened => self.back(out),
            State::ListedMarker { from } => self.in_marker(from, &LISTED, c, out),
            State::OpenedMarker { from } => self.in_marker(from, &OPENED, c, out),
            State::Name => self.name(c, out),
            State::Before => self.before(c, out),
            State::Arguments(scan) => self.arguments(scan, c, out),
            State::Passing(scan) => self.passing(scan, c, out),
            State::After => self.after(c, out),
            State::AfterMarker { from } => {
                self.is_unclosed = true;
                self.in_marker(from, &IN_TEXT, c, out)
            }
        }
    }

    fn marker(&mut self, marker: Marker, out: &mut Output) {
        match (marker, &self.state) {
            (Marker::Arguments, State::Opened) => self.named(),
            // The list's own mark is held, or has no text.
            (Marker::Open, State::Listed) => self.reached(0, marker, out),
            // Where they mean nothing they have no text either.
            (Marker::Arguments | Marker::CallId, _) => {}
            (Marker::ListOpen | Marker::Open | Marker::Close | Marker::ListClose, _) => {
                self.settle(out);
                self.reached(0, marker, out);
            }
        }
    }

    fn give_up(&mut self) {
        self.state = State::Text;
    }

    fn finish(&mut self, out: &mut Output) {
        match self.state {
            State::After | State::AfterMarker { .. } => out.forget(),
            State::Before if out.knows(&self.name) => out.start(&self.name),
            State::Text
            | State::Marker
            | State::Listed
            | State::ListedMarker { .. }
            | State::Opened
            | State::OpenedMarker { .. }
            | State::Name
            | State::Before
            | State::Arguments(_)
            | State::Passing(_) => {}
        }
    }
}

// === free functions ===

fn is_in_name(c: char) -> bool {
    c.is_alphanumeric() || matches!(c, '_' | '-' | '.')
}
