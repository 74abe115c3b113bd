//! An argument that is written without quotes, as JSON.

use serde::de::IgnoredAny;

use super::ToolEvent;
use super::literal::{Literal, Reach, character};
use super::output::Output;
use super::signature::Kind;

/// How models write nothing.
const NULLS: [&str; 2] = ["null", "None"];

/// Writes one argument. A text is passed on as it comes; what else may be one is known at its end.
#[derive(Debug)]
pub(super) struct Parameter {
    kind: Kind,
    /// What is not decided on.
    held: String,
    /// Whether it is a text, whose quotes are open.
    is_open: bool,
}

// === impl Parameter ===

impl Parameter {
    pub(super) fn new(kind: Kind) -> Self {
        Self {
            kind,
            held: String::new(),
            is_open: false,
        }
    }

    pub(super) fn push(&mut self, c: char, out: &mut Output) {
        if self.is_open {
            return character(c, out);
        }
        self.held.push(c);
        let may_be_null = || NULLS.iter().any(|null| null.starts_with(&self.held));
        match self.kind {
            Kind::Json => {}
            Kind::TextOrNull if may_be_null() => {}
            Kind::Text | Kind::TextOrNull => self.open(out),
        }
    }

    /// It is whole.
    pub(super) fn close(&mut self, out: &mut Output) {
        let json = match self.kind {
            Kind::Json => as_json(&self.held),
            Kind::TextOrNull if NULLS.contains(&self.held.as_str()) => Some("null".to_owned()),
            Kind::Text | Kind::TextOrNull => None,
        };
        if let Some(json) = json {
            return out.arguments(&json);
        }
        self.open(out);
        out.argument('"');
    }

    /// The text is over within.
    pub(super) fn cut(&mut self, out: &mut Output) {
        match self.kind {
            Kind::Json => out.arguments(self.held.trim_start()),
            Kind::Text | Kind::TextOrNull if self.is_open || self.held.is_empty() => {}
            Kind::Text | Kind::TextOrNull => self.open(out),
        }
    }

    /// It is a text; writes what is held of it.
    fn open(&mut self, out: &mut Output) {
        if !self.is_open {
            self.is_open = true;
            out.argument('"');
        }
        for c in std::mem::take(&mut self.held).chars() {
            character(c, out);
        }
    }
}

// === free functions ===

/// JSON as it is, a literal of Python's as JSON, nothing of anything else.
fn as_json(text: &str) -> Option<String> {
    let text = text.trim();
    let is_json = |text: &str| serde_json::from_str::<IgnoredAny>(text).is_ok();
    if is_json(text) {
        return Some(text.to_owned());
    }
    let (mut literal, mut out) = (Literal::new(), Output::new([].into()));
    for c in text.chars() {
        if literal.step(c, &mut out) == Reach::Past {
            return None;
        }
    }
    // A comma ends it, unless it is within something.
    if literal.step(',', &mut out) != Reach::Past {
        return None;
    }
    let written = out.take().into_iter().map(|event| match event {
        ToolEvent::Arguments { fragment, .. } => fragment,
        ToolEvent::Content(_) | ToolEvent::CallStart { .. } | ToolEvent::CallEnd { .. } => {
            String::new()
        }
    });
    Some(written.collect()).filter(|json: &String| is_json(json))
}
