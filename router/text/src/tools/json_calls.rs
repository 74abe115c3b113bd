//! One call after the other: a JSON array of them, or objects with `;` or space between.

use super::json_call::{JsonCall, Progress, Trust};
use super::output::Output;
use super::scan::{Reach, Scan};

/// Calls after the bracket or brace that opened them.
#[derive(Debug)]
pub(super) struct JsonCalls {
    trust: Trust,
    is_list: bool,
    last: Last,
    at: At,
}

#[derive(Debug)]
enum At {
    Item,
    Call(JsonCall),
    /// The rest of an object that is no call.
    Passing(Scan),
    Between,
}

/// What the last object was.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Last {
    /// There was none yet.
    Nothing,
    Call,
    Other,
}

/// Whether more can come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Series {
    GoesOn,
    /// It ended with this character.
    Over,
    /// It ended before this character.
    OverBefore,
}

// === impl JsonCalls ===

impl JsonCalls {
    /// Calls that begin with `first`, if it is a brace or a bracket.
    pub(super) fn begin(first: char, trust: Trust, out: &mut Output) -> Option<Self> {
        let at = match first {
            '{' => At::Call(JsonCall::new(trust)),
            '[' => At::Item,
            _ => return None,
        };
        out.hold(first);
        Some(Self {
            trust,
            is_list: first == '[',
            last: Last::Nothing,
            at,
        })
    }

    pub(super) fn step(&mut self, c: char, out: &mut Output) -> Series {
        match &mut self.at {
            At::Item => self.item(c, out),
            At::Call(call) => {
                let progress = call.step(c, out);
                self.progressed(progress, out)
            }
            At::Passing(scan) => match scan.step(c) {
                Reach::Within => {
                    out.content(c);
                    Series::GoesOn
                }
                Reach::Last => {
                    out.content(c);
                    self.at = At::Between;
                    if self.is_list {
                        Series::GoesOn
                    } else {
                        Series::Over
                    }
                }
                Reach::Past => Series::OverBefore,
            },
            At::Between => self.between(c, out),
        }
    }

    pub(super) fn finish(&mut self, out: &mut Output) {
        match &mut self.at {
            At::Call(call) => call.finish(out),
            // Commas and the like after a call.
            At::Between | At::Item if self.last == Last::Call => out.forget(),
            At::Between | At::Item | At::Passing(_) => out.release(),
        }
    }

    /// Something else begins.
    pub(super) fn cut(&mut self, out: &mut Output) {
        match &mut self.at {
            At::Call(call) => call.cut(out),
            At::Between | At::Item | At::Passing(_) => self.finish(out),
        }
    }

    fn item(&mut self, c: char, out: &mut Output) -> Series {
        if c == '{' {
            self.at = At::Call(JsonCall::new(self.trust));
        } else if !c.is_whitespace() {
            out.release();
            return Series::OverBefore;
        }
        out.hold(c);
        Series::GoesOn
    }

    fn progressed(&mut self, progress: Progress, out: &mut Output) -> Series {
        match progress {
            Progress::More => {}
            Progress::Closed => {
                self.last = Last::Call;
                self.at = At::Between;
            }
            Progress::Unknown(rest) => {
                out.release();
                self.last = Last::Other;
                self.at = At::Passing(rest);
            }
            Progress::Broken => {
                self.cut(out);
                return Series::OverBefore;
            }
        }
        Series::GoesOn
    }

    fn between(&mut self, c: char, out: &mut Output) -> Series {
        match c {
            ']' if self.is_list && self.last == Last::Call => {
                out.forget();
                Series::Over
            }
            ',' if self.is_list => {
                self.at = At::Item;
                out.hold(c);
                Series::GoesOn
            }
            ';' if !self.is_list => {
                self.at = At::Item;
                out.hold(c);
                Series::GoesOn
            }
            '{' if !self.is_list => self.item(c, out),
            c if c.is_whitespace() => {
                out.hold(c);
                Series::GoesOn
            }
            _ => {
                out.release();
                Series::OverBefore
            }
        }
    }
}
