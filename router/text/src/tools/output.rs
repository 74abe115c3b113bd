//! What a machine writes: events, and the text that it has not decided on.

use std::sync::Arc;

use super::{HELD_BYTES_MAX, Signature, ToolEvent};

/// The events of a text so far, and what is held back of it.
#[derive(Debug)]
pub(super) struct Output {
    tools: Arc<[Signature]>,
    events: Vec<ToolEvent>,
    /// Text that may become part of a call.
    held: String,
    /// White space since the beginning or since a call: content if text follows.
    space: String,
    is_blank: bool,
    calls: usize,
    calls_ended: usize,
    /// Characters that were looked at, again and again included.
    #[cfg(test)]
    steps: usize,
}

// === impl Output ===

impl Output {
    pub(super) fn new(tools: Arc<[Signature]>) -> Self {
        Self {
            tools,
            events: Vec::new(),
            held: String::new(),
            space: String::new(),
            is_blank: true,
            calls: 0,
            calls_ended: 0,
            #[cfg(test)]
            steps: 0,
        }
    }

    pub(super) fn knows(&self, name: &str) -> bool {
        self.tool(name).is_some()
    }

    pub(super) fn tool(&self, name: &str) -> Option<&Signature> {
        self.tools.iter().find(|tool| tool.name == name)
    }

    pub(super) fn held(&self) -> &str {
        &self.held
    }

    pub(super) fn hold(&mut self, c: char) {
        self.held.push(c);
    }

    /// What is held belongs to a call's syntax, and so does the white space between them.
    pub(super) fn forget(&mut self) {
        self.held.clear();
        self.space.clear();
    }

    /// What is held is content.
    pub(super) fn release(&mut self) {
        let held = std::mem::take(&mut self.held);
        for c in held.chars() {
            self.content(c);
        }
    }

    /// What is held before `at` is content.
    pub(super) fn release_before(&mut self, at: usize) {
        let rest = self.held.split_off(at);
        self.release();
        self.held = rest;
    }

    /// What is held before `at` belongs to a call's syntax.
    pub(super) fn forget_before(&mut self, at: usize) {
        let rest = self.held.split_off(at);
        self.forget();
        self.held = rest;
    }

    /// What is held belongs to a call.
    pub(super) fn take_held(&mut self) -> String {
        std::mem::take(&mut self.held)
    }

    pub(super) fn content(&mut self, c: char) {
        if self.is_blank {
            if c.is_whitespace() && self.space.len() < HELD_BYTES_MAX {
                return self.space.push(c);
            }
            self.is_blank = false;
            let space = std::mem::take(&mut self.space);
            self.append_content(&space);
        }
        self.append_content(c.encode_utf8(&mut [0; 4]));
    }

    /// A call begins; what is held was its beginning.
    pub(super) fn start(&mut self, name: &str) {
        self.held.clear();
        self.space.clear();
        self.events.push(ToolEvent::CallStart {
            index: self.calls,
            name: name.to_owned(),
        });
        self.calls += 1;
    }

    pub(super) fn argument(&mut self, c: char) {
        self.arguments(c.encode_utf8(&mut [0; 4]));
    }

    pub(super) fn arguments(&mut self, text: &str) {
        let index = self.calls.saturating_sub(1);
        if let Some(ToolEvent::Arguments { fragment, .. }) = self.events.last_mut() {
            // No call begins without an event of its own.
            fragment.push_str(text);
        } else if !text.is_empty() {
            let fragment = text.to_owned();
            self.events.push(ToolEvent::Arguments { index, fragment });
        }
    }

    /// The call that began last is over.
    pub(super) fn end(&mut self) {
        let index = self.calls.saturating_sub(1);
        self.events.push(ToolEvent::CallEnd { index });
        self.calls_ended += 1;
        self.is_blank = true;
    }

    pub(super) fn calls_ended(&self) -> usize {
        self.calls_ended
    }

    pub(super) fn take(&mut self) -> Vec<ToolEvent> {
        std::mem::take(&mut self.events)
    }

    /// White space after calls is nobody's; a text of nothing else is content.
    pub(super) fn finish(&mut self) {
        self.release();
        let space = std::mem::take(&mut self.space);
        if self.calls == 0 {
            self.append_content(&space);
        }
    }

    #[cfg_attr(not(test), expect(clippy::unused_self, reason = "tests count"))]
    pub(super) fn count_step(&mut self) {
        #[cfg(test)]
        {
            self.steps += 1;
        }
    }

    #[cfg(test)]
    pub(super) fn steps(&self) -> usize {
        self.steps
    }

    fn append_content(&mut self, text: &str) {
        if let Some(ToolEvent::Content(content)) = self.events.last_mut() {
            content.push_str(text);
        } else if !text.is_empty() {
            self.events.push(ToolEvent::Content(text.to_owned()));
        }
    }
}
