//! Python's calls in a list: `[f(a=1), g()]`. Llama 3.2's and 4's format; Llama 4 has marks around
//! the list. Arguments become a JSON object.

use super::literal::{Literal, Reach};
use super::needles::{Found, Needles};
use super::output::Output;
use super::{Machine, Marker, Step};

#[derive(Debug)]
pub(super) struct Pythonic {
    needles: Needles,
    state: State,
    last: Last,
    /// Of the call, then of its argument.
    name: String,
    key: String,
}

#[derive(Debug)]
enum State {
    Text,
    /// A part of a marker is held.
    Marker,
    Opened,
    /// In the list, before a name.
    Item,
    Name,
    /// Before the first argument; only what follows tells a call from prose.
    First,
    FirstKey,
    /// The call has begun: before a further argument.
    Next,
    Key,
    Value(Literal),
    /// No argument, but the model's text for one; until the bracket that is open.
    Strange {
        depth: usize,
    },
    Between,
}

/// What was found last.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Last {
    Text,
    Call,
    /// The bracket after the calls; the closing mark may follow.
    List,
}

const MARKERS: [Marker; 2] = [Marker::Open, Marker::Close];

// === impl Pythonic ===

impl Pythonic {
    pub(super) fn new(needles: Needles) -> Self {
        Self {
            needles,
            state: State::Text,
            last: Last::Text,
            name: String::new(),
            key: String::new(),
        }
    }

    fn back(&mut self, out: &mut Output) -> Step {
        out.release();
        self.last = Last::Text;
        self.state = State::Text;
        Step::Again
    }

    fn hold(&mut self, state: State, c: char, out: &mut Output) -> Step {
        out.hold(c);
        self.state = state;
        Step::Taken
    }

    fn text(&mut self, c: char, out: &mut Output) -> Step {
        if c == '[' {
            return self.hold(State::Item, c, out);
        }
        if self.needles.find("", c, &MARKERS) == Found::Part {
            return self.hold(State::Marker, c, out);
        }
        out.content(c);
        Step::Taken
    }

    fn in_marker(&mut self, c: char, out: &mut Output) -> Step {
        let state = match self.needles.find(out.held(), c, &MARKERS) {
            Found::Part => State::Marker,
            Found::Whole(Marker::Open) => State::Opened,
            Found::Whole(_) if self.last == Last::List => {
                out.forget();
                self.last = Last::Text;
                self.state = State::Text;
                return Step::Taken;
            }
            // A mark that closes nothing is text as well.
            Found::Whole(_) | Found::Nothing => return self.back(out),
        };
        self.hold(state, c, out)
    }

    fn item(&mut self, c: char, out: &mut Output) -> Step {
        if c.is_whitespace() {
            return self.hold(State::Item, c, out);
        }
        self.name.clear();
        self.in_name(c, out)
    }

    fn in_name(&mut self, c: char, out: &mut Output) -> Step {
        if is_in_name(c) {
            self.name.push(c);
            return self.hold(State::Name, c, out);
        }
        if c == '(' && out.knows(&self.name) {
            return self.hold(State::First, c, out);
        }
        self.back(out)
    }

    fn first(&mut self, c: char, out: &mut Output) -> Step {
        if c == ')' {
            out.start(&self.name);
            out.argument('{');
            self.close(out);
            return Step::Taken;
        }
        if c.is_whitespace() {
            return self.hold(State::First, c, out);
        }
        self.key.clear();
        self.first_key(c, out)
    }

    fn first_key(&mut self, c: char, out: &mut Output) -> Step {
        if is_in_name(c) {
            self.key.push(c);
        } else if c == '=' && !self.key.is_empty() {
            out.start(&self.name);
            out.argument('{');
            self.value(out);
            return Step::Taken;
        } else if !c.is_whitespace() || self.key.is_empty() {
            return self.back(out);
        }
        self.hold(State::FirstKey, c, out)
    }

    /// The key is complete.
    fn value(&mut self, out: &mut Output) {
        out.arguments(&format!("\"{}\": ", self.key));
        self.key.clear();
        self.state = State::Value(Literal::new());
    }

    fn next(&mut self, c: char, out: &mut Output) {
        match c {
            ')' => self.close(out),
            c if c.is_whitespace() => {}
            c if is_in_name(c) => {
                self.key.push(c);
                self.state = State::Key;
            }
            c => self.strange(c, out),
        }
    }

    fn in_key(&mut self, c: char, out: &mut Output) {
        match c {
            '=' => {
                out.arguments(", ");
                self.value(out);
            }
            c if is_in_name(c) && self.key.len() < super::HELD_BYTES_MAX => self.key.push(c),
            c if c.is_whitespace() => {}
            c => self.strange(c, out),
        }
    }

    /// Something other than `key=value`: all of it is the arguments' text.
    fn strange(&mut self, c: char, out: &mut Output) {
        out.arguments(", ");
        out.arguments(&std::mem::take(&mut self.key));
        self.state = State::Strange { depth: 0 };
        self.in_strange(0, c, out);
    }

    fn in_strange(&mut self, depth: usize, c: char, out: &mut Output) {
        let depth = match c {
            ')' if depth == 0 => return self.close(out),
            '(' => depth + 1,
            ')' => depth - 1,
            _ => depth,
        };
        out.argument(c);
        self.state = State::Strange { depth };
    }

    fn close(&mut self, out: &mut Output) {
        out.argument('}');
        out.end();
        self.last = Last::Call;
        self.state = State::Between;
    }

    fn between(&mut self, c: char, out: &mut Output) -> Step {
        match c {
            ']' => {
                out.forget();
                self.last = Last::List;
                self.state = State::Text;
                Step::Taken
            }
            ',' => self.hold(State::Item, c, out),
            c if c.is_whitespace() => self.hold(State::Between, c, out),
            _ => self.back(out),
        }
    }

    fn is_in_call(&self) -> bool {
        match self.state {
            State::Next | State::Key | State::Value(_) | State::Strange { .. } => true,
            State::Text
            | State::Marker
            | State::Opened
            | State::Item
            | State::Name
            | State::First
            | State::FirstKey
            | State::Between => false,
        }
    }
}

impl Machine for Pythonic {
    fn step(&mut self, c: char, out: &mut Output) -> Step {
        match &mut self.state {
            State::Text => return self.text(c, out),
            State::Marker => return self.in_marker(c, out),
            State::Opened if c == '[' => return self.hold(State::Item, c, out),
            State::Opened if c.is_whitespace() => out.hold(c),
            State::Opened => return self.back(out),
            State::Item => return self.item(c, out),
            State::Name => return self.in_name(c, out),
            State::First => return self.first(c, out),
            State::FirstKey => return self.first_key(c, out),
            State::Next => self.next(c, out),
            State::Key => self.in_key(c, out),
            State::Strange { depth } => {
                let depth = *depth;
                self.in_strange(depth, c, out);
            }
            State::Value(literal) => {
                if literal.step(c, out) == Reach::Past {
                    self.state = State::Next;
                    if c == ')' {
                        self.close(out);
                    }
                }
            }
            State::Between => return self.between(c, out),
        }
        Step::Taken
    }

    fn marker(&mut self, marker: Marker, out: &mut Output) {
        if self.is_in_call() {
            self.finish(out);
            out.end();
        } else if !matches!(self.state, State::First | State::FirstKey) {
            self.finish(out);
        }
        out.release();
        self.last = Last::Text;
        self.state = match marker {
            Marker::Open => State::Opened,
            Marker::Close
            | Marker::Arguments
            | Marker::CallId
            | Marker::ListOpen
            | Marker::ListClose => State::Text,
        };
    }

    fn give_up(&mut self) {
        self.state = State::Text;
    }

    fn finish(&mut self, out: &mut Output) {
        match &mut self.state {
            State::Value(literal) => literal.finish(out),
            State::Key => {
                out.arguments(", ");
                out.arguments(&std::mem::take(&mut self.key));
            }
            State::First | State::FirstKey => {
                out.start(&self.name);
                out.argument('{');
                out.arguments(&std::mem::take(&mut self.key));
            }
            // Commas and the like after a call.
            State::Between => out.forget(),
            State::Item if self.last == Last::Call => out.forget(),
            State::Text
            | State::Marker
            | State::Opened
            | State::Item
            | State::Name
            | State::Next
            | State::Strange { .. } => {}
        }
    }
}

// === free functions ===

fn is_in_name(c: char) -> bool {
    c.is_alphanumeric() || matches!(c, '_' | '-' | '.')
}
