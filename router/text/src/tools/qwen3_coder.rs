//! Qwen3-Coder's calls: `<tool_call><function=f><parameter=a>…</parameter></function></tool_call>`.
//! Arguments have no quotes; a line break at each end of one does not count. The marks around a
//! function may be missing, and so may the one that ends an argument, if what follows begins a line.

use super::needles::{Found, Needles};
use super::output::Output;
use super::parameter::Parameter;
use super::signature::{Kind, Signature};
use super::{Machine, Marker, Step};

#[derive(Debug)]
pub(super) struct Qwen3Coder {
    tags: Needles<Tag>,
    state: State,
    /// Whether a call's closing mark has not come yet.
    is_unclosed: bool,
    /// Of the function, or of the argument that is begun.
    name: String,
    /// The function's.
    signature: Option<Signature>,
    has_arguments: bool,
}

#[derive(Debug)]
enum State {
    Text,
    /// A part of a tag is held.
    Tag,
    /// The mark of a call is held, if it is text, and white space.
    Opened,
    /// A part of a tag is held from there.
    OpenedTag {
        from: usize,
    },
    /// A function's name, all of it held.
    Function,
    /// In a call, and in none of its arguments.
    Between,
    /// There, a part of a tag is held.
    BetweenTag,
    /// An argument's name, held with its tag.
    Key,
    /// What is held there is a part of a tag.
    Value {
        value: Parameter,
        line: Line,
    },
}

/// Where in a line of a value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Line {
    /// Behind the tag: a line break does not count.
    Tag,
    /// At its beginning.
    Start,
    /// At its beginning, and the break before it counts only if something follows.
    Break,
    Within,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Tag {
    Open,
    Close,
    Function,
    EndFunction,
    Parameter,
    EndParameter,
}

const TAGS: [(&str, Tag); 4] = [
    ("<function=", Tag::Function),
    ("</function>", Tag::EndFunction),
    ("<parameter=", Tag::Parameter),
    ("</parameter>", Tag::EndParameter),
];
const IN_TEXT: [Tag; 3] = [Tag::Open, Tag::Close, Tag::Function];
const BETWEEN: [Tag; 5] = [
    Tag::Parameter,
    Tag::EndFunction,
    Tag::Close,
    Tag::Open,
    Tag::Function,
];
const IN_LINE: [Tag; 1] = [Tag::EndParameter];
const AT_LINE_START: [Tag; 3] = [Tag::EndParameter, Tag::EndFunction, Tag::Parameter];

// === impl Line ===

impl Line {
    /// The tags that end a value here.
    fn tags(self) -> &'static [Tag] {
        match self {
            Self::Tag | Self::Within => &IN_LINE,
            Self::Start | Self::Break => &AT_LINE_START,
        }
    }
}

// === impl Qwen3Coder ===

impl Qwen3Coder {
    pub(super) fn new(markers: &[(&'static str, Marker)], special: &[Marker]) -> Self {
        let text = markers.iter().filter(|(_, mark)| !special.contains(mark));
        let marks = text.filter_map(|(text, marker)| match marker {
            Marker::Open => Some((*text, Tag::Open)),
            Marker::Close => Some((*text, Tag::Close)),
            Marker::Arguments | Marker::CallId | Marker::ListOpen | Marker::ListClose => None,
        });
        Self {
            tags: Needles::of(marks.chain(TAGS)),
            state: State::Text,
            is_unclosed: false,
            name: String::new(),
            signature: None,
            has_arguments: false,
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

    fn tag(&mut self, c: char, out: &mut Output) -> Step {
        let found = self.tags.find(out.held(), c, &IN_TEXT);
        if found == Found::Nothing {
            return self.back(out);
        }
        out.hold(c);
        if let Found::Whole(tag) = found {
            self.reached(tag, out);
        }
        Step::Taken
    }

    /// A tag in the text is complete, and held.
    fn reached(&mut self, tag: Tag, out: &mut Output) {
        match tag {
            Tag::Open => self.state = State::Opened,
            Tag::Function => {
                self.name.clear();
                self.state = State::Function;
            }
            // A closing mark that closes nothing is content.
            Tag::Close | Tag::EndFunction | Tag::Parameter | Tag::EndParameter => {
                if self.is_unclosed {
                    out.forget();
                } else {
                    out.release();
                }
                self.is_unclosed = false;
                self.state = State::Text;
            }
        }
    }

    fn opened(&mut self, c: char, out: &mut Output) -> Step {
        if c == '<' {
            let from = out.held().len();
            return self.hold(State::OpenedTag { from }, c, out);
        }
        if c.is_whitespace() {
            return self.hold(State::Opened, c, out);
        }
        self.back(out)
    }

    fn opened_tag(&mut self, from: usize, c: char, out: &mut Output) -> Step {
        match self.tags.find(&out.held()[from..], c, &IN_TEXT) {
            Found::Nothing => self.back(out),
            Found::Part => self.hold(State::OpenedTag { from }, c, out),
            Found::Whole(tag) => {
                out.hold(c);
                // Of two marks, or of one that is closed at once, the first is content.
                if tag != Tag::Function {
                    out.release_before(from);
                    self.is_unclosed = false;
                }
                self.reached(tag, out);
                Step::Taken
            }
        }
    }

    fn function(&mut self, c: char, out: &mut Output) -> Step {
        match c {
            '>' => {
                self.signature = out.tool(&self.name).cloned();
                if self.signature.is_none() {
                    out.hold(c);
                    out.release();
                    self.is_unclosed = false;
                    self.state = State::Text;
                    return Step::Taken;
                }
                out.start(&self.name);
                self.has_arguments = false;
                self.state = State::Between;
                Step::Taken
            }
            '<' | '\n' => self.back(out),
            c => {
                self.name.push(c);
                self.hold(State::Function, c, out)
            }
        }
    }

    fn between(&mut self, c: char, out: &mut Output) -> Step {
        if c == '<' {
            return self.hold(State::BetweenTag, c, out);
        }
        if c.is_whitespace() {
            return Step::Taken;
        }
        self.end(out);
        Step::Again
    }

    fn between_tag(&mut self, c: char, out: &mut Output) -> Step {
        match self.tags.find(out.held(), c, &BETWEEN) {
            Found::Nothing => {
                self.end(out);
                self.back(out)
            }
            Found::Part => self.hold(State::BetweenTag, c, out),
            Found::Whole(tag) => {
                out.hold(c);
                self.follows(tag, out);
                Step::Taken
            }
        }
    }

    /// A tag in a call, and in none of its values, is complete, and held.
    fn follows(&mut self, tag: Tag, out: &mut Output) {
        match tag {
            Tag::EndParameter => {
                out.forget();
                self.state = State::Between;
            }
            Tag::Parameter => {
                self.name.clear();
                self.state = State::Key;
            }
            Tag::EndFunction => {
                out.forget();
                self.end(out);
            }
            // What ends the function is missing.
            Tag::Close | Tag::Open | Tag::Function => {
                self.end(out);
                self.reached(tag, out);
            }
        }
    }

    fn key(&mut self, c: char, out: &mut Output) -> Step {
        match c {
            '>' => {
                out.forget();
                out.arguments(if self.has_arguments { ", " } else { "{" });
                self.has_arguments = true;
                out.arguments(&serde_json::Value::from(self.name.as_str()).to_string());
                out.arguments(": ");
                let signature = self.signature.as_ref();
                let kind = signature.map_or(Kind::Text, |function| function.kind(&self.name));
                self.state = State::Value {
                    value: Parameter::new(kind),
                    line: Line::Tag,
                };
                Step::Taken
            }
            '<' | '\n' => {
                self.end(out);
                self.back(out)
            }
            c => {
                self.name.push(c);
                self.hold(State::Key, c, out)
            }
        }
    }

    /// The call is over.
    fn end(&mut self, out: &mut Output) {
        out.arguments(if self.has_arguments { "}" } else { "{}" });
        out.end();
        self.is_unclosed = true;
        self.state = State::Text;
    }

    /// Decides on what is held: something else begins.
    fn settle(&mut self, out: &mut Output) {
        match std::mem::replace(&mut self.state, State::Text) {
            State::Value { mut value, line } => {
                if !out.held().is_empty() {
                    untagged(&mut value, line, out);
                }
                value.close(out);
                self.end(out);
            }
            State::Between | State::BetweenTag | State::Key => self.end(out),
            State::Text
            | State::Tag
            | State::Opened
            | State::OpenedTag { .. }
            | State::Function => {}
        }
        out.release();
    }
}

impl Machine for Qwen3Coder {
    fn step(&mut self, c: char, out: &mut Output) -> Step {
        match &mut self.state {
            State::Text if c == '<' => return self.hold(State::Tag, c, out),
            State::Text => out.content(c),
            State::Tag => return self.tag(c, out),
            State::Opened => return self.opened(c, out),
            State::OpenedTag { from } => {
                let from = *from;
                return self.opened_tag(from, c, out);
            }
            State::Function => return self.function(c, out),
            State::Between => return self.between(c, out),
            State::BetweenTag => return self.between_tag(c, out),
            State::Key => return self.key(c, out),
            State::Value { value, line } if out.held().is_empty() => match c {
                '<' => out.hold(c),
                '\n' if *line == Line::Tag => *line = Line::Start,
                '\n' => {
                    broken(value, *line, out);
                    *line = Line::Break;
                }
                c => {
                    broken(value, *line, out);
                    value.push(c, out);
                    *line = Line::Within;
                }
            },
            State::Value { value, line } => match self.tags.find(out.held(), c, line.tags()) {
                Found::Part => out.hold(c),
                Found::Whole(tag) => {
                    out.hold(c);
                    value.close(out);
                    self.follows(tag, out);
                }
                Found::Nothing => {
                    untagged(value, *line, out);
                    *line = Line::Within;
                    return Step::Again;
                }
            },
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
        match &mut self.state {
            State::Value { value, .. } => {
                out.forget();
                value.cut(out);
            }
            State::BetweenTag | State::Key => out.forget(),
            State::Text
            | State::Tag
            | State::Opened
            | State::OpenedTag { .. }
            | State::Function
            | State::Between => {}
        }
    }
}

// === free functions ===

/// Writes the line break that counts, since something follows.
fn broken(value: &mut Parameter, line: Line, out: &mut Output) {
    if line == Line::Break {
        value.push('\n', out);
    }
}

/// What is held is part of the value.
fn untagged(value: &mut Parameter, line: Line, out: &mut Output) {
    broken(value, line, out);
    for c in out.take_held().chars() {
        value.push(c, out);
    }
}
