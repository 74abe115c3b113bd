//! A call that is a JSON object: `{"name": …, "arguments": …}`.

use super::output::Output;
use super::scan::{Reach, Scan};
use super::unescape::Unescape;

/// Longer than every key that means something.
const KEY_BYTES_MAX: usize = 16;

/// Whether an object must be a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Trust {
    /// A marker says so: the name of a tool is enough.
    Marked,
    /// Only its keys tell: it has arguments, and nothing that calls have not.
    Bare,
}

/// What a character did.
#[derive(Debug, Clone, Copy)]
pub(super) enum Progress {
    More,
    /// It closed the call.
    Closed,
    /// It cannot be there, and was not taken.
    Broken,
    /// It ended a name that no tool has. The rest of the object is as the scan says.
    Unknown(Scan),
}

/// An object after its opening brace. What it takes is held until it is known to be a call.
#[derive(Debug)]
pub(super) struct JsonCall {
    trust: Trust,
    at: At,
    key: String,
    role: Role,
    raw_name: String,
    /// A tool's name.
    name: Option<String>,
    /// Whether the name stands in an object of its own, as in OpenAI's `{"function": {…}}`.
    is_nested: bool,
    has_arguments: bool,
    /// Where the arguments that came before the name are among what is held.
    early: Option<(usize, usize)>,
    /// For arguments that are a string with JSON in it.
    unescape: Option<Unescape>,
    is_started: bool,
}

#[derive(Debug, Clone, Copy)]
enum At {
    Key,
    InKey { escaped: bool },
    Colon,
    Value,
    InName { escaped: bool },
    InValue(Scan),
    After,
}

/// What the value of a key is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    Name,
    /// A name, or an object that has it.
    Function,
    Arguments,
    Other,
}

// === impl JsonCall ===

impl JsonCall {
    pub(super) fn new(trust: Trust) -> Self {
        Self {
            trust,
            at: At::Key,
            key: String::new(),
            role: Role::Other,
            raw_name: String::new(),
            name: None,
            is_nested: false,
            has_arguments: false,
            early: None,
            unescape: None,
            is_started: false,
        }
    }

    pub(super) fn step(&mut self, c: char, out: &mut Output) -> Progress {
        match self.at {
            At::Key => match c {
                '"' => {
                    self.key.clear();
                    self.go(At::InKey { escaped: false }, c, out)
                }
                '}' => self.close(c, out),
                c => self.blank(c, out),
            },
            At::InKey { escaped } => self.in_key(escaped, c, out),
            At::Colon if c == ':' => match self.role_of_key() {
                Some(role) => {
                    self.role = role;
                    self.go(At::Value, c, out)
                }
                None => Progress::Broken,
            },
            At::Value if !c.is_whitespace() => self.value(c, out),
            At::InName { escaped } => self.in_name(escaped, c, out),
            At::InValue(scan) => self.in_value(scan, c, out),
            At::After => match c {
                ',' => self.go(At::Key, c, out),
                '}' => self.close(c, out),
                c => self.blank(c, out),
            },
            At::Colon | At::Value => self.blank(c, out),
        }
    }

    pub(super) fn is_started(&self) -> bool {
        self.is_started
    }

    /// Ends the call where it is: something else begins. What is no call yet is content.
    pub(super) fn cut(&mut self, out: &mut Output) {
        if self.is_started {
            out.end();
        } else {
            out.release();
        }
    }

    /// The text is over. A call is whole with its arguments, whatever brace is missing after them;
    /// one that is marked and whose name is known has begun.
    pub(super) fn finish(&mut self, out: &mut Output) {
        let in_value = matches!(self.at, At::InValue(_));
        let in_arguments = in_value && self.role == Role::Arguments;
        match (&self.name, self.trust) {
            _ if self.is_started && in_arguments => {}
            _ if self.is_started => out.end(),
            (Some(name), Trust::Marked) => {
                out.start(name);
                self.is_started = true;
            }
            (Some(_) | None, _) => out.release(),
        }
    }

    fn go(&mut self, at: At, c: char, out: &mut Output) -> Progress {
        self.at = at;
        if !self.is_started {
            out.hold(c);
        }
        Progress::More
    }

    fn blank(&mut self, c: char, out: &mut Output) -> Progress {
        if c.is_whitespace() {
            self.go(self.at, c, out)
        } else {
            Progress::Broken
        }
    }

    fn in_key(&mut self, escaped: bool, c: char, out: &mut Output) -> Progress {
        if c == '"' && !escaped {
            return self.go(At::Colon, c, out);
        }
        if self.key.len() < KEY_BYTES_MAX {
            self.key.push(c);
        }
        let escaped = c == '\\' && !escaped;
        self.go(At::InKey { escaped }, c, out)
    }

    /// `None` for a key that says that this is no call.
    fn role_of_key(&self) -> Option<Role> {
        match self.key.as_str() {
            "name" if self.name.is_none() => Some(Role::Name),
            "function" if self.name.is_none() && !self.is_nested => Some(Role::Function),
            "arguments" | "parameters" if !self.has_arguments => Some(Role::Arguments),
            "id" | "type" | "index" => Some(Role::Other),
            _ if self.trust == Trust::Marked || self.is_started => Some(Role::Other),
            _ => None,
        }
    }

    fn value(&mut self, c: char, out: &mut Output) -> Progress {
        match (self.role, c) {
            (Role::Name | Role::Function, '"') => self.go(At::InName { escaped: false }, c, out),
            (Role::Function, '{') => {
                self.is_nested = true;
                self.go(At::Key, c, out)
            }
            (Role::Name | Role::Function, _) => Progress::Broken,
            (Role::Arguments | Role::Other, _) => match Scan::begin(c) {
                Some(scan) if self.role == Role::Arguments => self.arguments(scan, c, out),
                Some(scan) => self.go(At::InValue(scan), c, out),
                None => Progress::Broken,
            },
        }
    }

    fn arguments(&mut self, scan: Scan, c: char, out: &mut Output) -> Progress {
        self.has_arguments = true;
        if c == 'n' {
            // Null: a call without arguments.
            self.role = Role::Other;
            return self.go(At::InValue(scan), c, out);
        }
        let Some(name) = &self.name else {
            self.early = Some((out.held().len(), out.held().len()));
            return self.go(At::InValue(scan), c, out);
        };
        out.start(name);
        self.is_started = true;
        self.at = At::InValue(scan);
        if c == '"' {
            self.unescape = Some(Unescape::default());
        } else {
            out.argument(c);
        }
        Progress::More
    }

    fn in_name(&mut self, escaped: bool, c: char, out: &mut Output) -> Progress {
        if c != '"' || escaped {
            self.raw_name.push(c);
            let escaped = c == '\\' && !escaped;
            return self.go(At::InName { escaped }, c, out);
        }
        let name = unquoted(&self.raw_name);
        self.go(At::After, c, out);
        if !out.knows(&name) {
            return Progress::Unknown(Scan::open(1 + usize::from(self.is_nested)));
        }
        if let Some((from, to)) = self.early {
            let raw = &out.held()[from..to];
            let inner = raw.strip_prefix('"').and_then(|raw| raw.strip_suffix('"'));
            let arguments = inner.map_or_else(|| raw.to_owned(), unquoted);
            out.start(&name);
            out.arguments(&arguments);
            self.is_started = true;
        }
        self.name = Some(name);
        Progress::More
    }

    fn in_value(&mut self, mut scan: Scan, c: char, out: &mut Output) -> Progress {
        let reach = scan.step(c);
        if reach != Reach::Past {
            self.tell(c, reach, out);
        }
        self.at = match reach {
            Reach::Within => At::InValue(scan),
            Reach::Last | Reach::Past => At::After,
        };
        if reach != Reach::Within
            && self.role == Role::Arguments
            && let Some((_, to)) = &mut self.early
        {
            *to = out.held().len();
        }
        if reach == Reach::Past {
            return self.step(c, out);
        }
        Progress::More
    }

    /// A character of a value.
    fn tell(&mut self, c: char, reach: Reach, out: &mut Output) {
        if !self.is_started {
            out.hold(c);
        } else if self.role != Role::Arguments {
            // Nobody asks for it.
        } else if let Some(unescape) = &mut self.unescape {
            let mut text = String::new();
            if reach == Reach::Within {
                unescape.step(c, &mut text);
            }
            out.arguments(&text);
        } else {
            out.argument(c);
        }
    }

    fn close(&mut self, c: char, out: &mut Output) -> Progress {
        if self.is_nested {
            self.is_nested = false;
            return self.go(At::After, c, out);
        }
        if !self.is_started {
            let is_call = self.trust == Trust::Marked || self.has_arguments;
            let Some(name) = self.name.as_ref().filter(|_| is_call) else {
                return Progress::Broken;
            };
            out.start(name);
            out.arguments("{}");
            self.is_started = true;
        }
        out.end();
        Progress::Closed
    }
}

// === free functions ===

/// The text of a JSON string, whose quotes are off.
fn unquoted(raw: &str) -> String {
    let (mut text, mut unescape) = (String::new(), Unescape::default());
    for c in raw.chars() {
        unescape.step(c, &mut text);
    }
    text
}
