//! Calls of tools in the text of one sequence.

use std::sync::Arc;

use headrace_text::{CallsMax, Marker, Signature, ToolCallParser, ToolEvent, ToolStyle};

/// The tools that a request names.
#[derive(Debug, Clone)]
pub(crate) struct ToolRules {
    pub(crate) tools: Arc<[Signature]>,
    pub(crate) calls_max: CallsMax,
}

/// What finds calls, and how many there were.
#[derive(Debug)]
pub(crate) struct Calls {
    /// Until the text is over.
    parser: Option<ToolCallParser>,
    begun: usize,
    ended: usize,
}

// === impl ToolRules ===

impl ToolRules {
    /// For one sequence; `None` where the server looks for no calls.
    pub(crate) fn calls(&self, style: &ToolStyle) -> Option<Calls> {
        let parser = style.parser(Arc::clone(&self.tools), self.calls_max)?;
        Some(Calls {
            parser: Some(parser),
            begun: 0,
            ended: 0,
        })
    }
}

// === impl Calls ===

impl Calls {
    /// Takes the text that a token released, and the marker that it is; leaves in `text` what is
    /// no call. The text is over with the last token.
    pub(crate) fn take(
        &mut self,
        text: &mut String,
        marker: Option<Marker>,
        is_last: bool,
    ) -> Vec<ToolEvent> {
        let Some(parser) = &mut self.parser else {
            return Vec::new();
        };
        let mut events = parser.push(text);
        if let Some(marker) = marker {
            events.extend(parser.marker(marker));
        }
        if is_last && let Some(parser) = self.parser.take() {
            events.extend(parser.finish());
        }
        text.clear();
        for event in &events {
            match event {
                ToolEvent::Content(content) => text.push_str(content),
                ToolEvent::CallStart { .. } => self.begun += 1,
                ToolEvent::CallEnd { .. } => self.ended += 1,
                ToolEvent::Arguments { .. } => {}
            }
        }
        events
    }

    /// Whether the only call that was asked for has been made.
    pub(crate) fn is_over(&self) -> bool {
        self.parser.as_ref().is_some_and(ToolCallParser::is_over)
    }

    /// Whether there are calls, none of which was cut.
    pub(crate) fn are_whole(&self) -> bool {
        self.begun > 0 && self.begun == self.ended
    }
}
