//! What a model does about tools: decided once, from its template and its tokenizer.

use std::str::FromStr;
use std::sync::Arc;

use serde_json::Value;

use super::history::shows_tools;
use super::{CallsAs, CallsMax, Marker, Signature, ToolCallParser, ToolFormat};
use crate::chat::ChatTemplate;
use crate::tokenizer::Tokenizer;

/// How tools are shown to a model, and how its calls are found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ToolStyle {
    /// The format of calls; `None` leaves them in the text.
    pub format: Option<ToolFormat>,
    /// Whether the template shows tools. Otherwise a message must.
    pub shows_tools: bool,
    /// What the template makes of calls of earlier turns.
    pub calls: CallsAs,
    /// The format's marks that are special tokens, which have no text.
    markers: Vec<(u32, Marker)>,
}

/// What `--tool-call-parser` says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ParserAsked {
    /// What the template tells.
    Auto,
    /// This one.
    Format(ToolFormat),
    /// None.
    Off,
}

/// No parser has this name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("there is no parser of tool calls named {0:?}")]
pub struct UnknownParser(pub String);

// === impl ToolStyle ===

impl ToolStyle {
    /// Decides for a model.
    pub fn decide(
        template: Option<&ChatTemplate>,
        tokenizer: &Tokenizer,
        asked: ParserAsked,
    ) -> Self {
        let source = template.and_then(|template| template.source(true));
        let format = match asked {
            ParserAsked::Auto => source.map(ToolFormat::of_template),
            ParserAsked::Format(format) => Some(format),
            ParserAsked::Off => None,
        };
        let marker = |(text, marker): &(&str, Marker)| {
            let id = tokenizer.token_id(text)?;
            tokenizer.is_special(id).then_some((id, *marker))
        };
        let markers = format.map_or(&[][..], ToolFormat::markers);
        Self {
            format,
            shows_tools: template.is_some_and(shows_tools),
            calls: template.map_or(CallsAs::Object, CallsAs::of_template),
            markers: markers.iter().filter_map(marker).collect(),
        }
    }

    /// The marker that a token is.
    pub fn marker(&self, id: u32) -> Option<Marker> {
        let found = self.markers.iter().find(|(known, _)| *known == id);
        found.map(|(_, marker)| *marker)
    }

    /// The token that a marker is.
    pub(super) fn marker_id(&self, marker: Marker) -> Option<u32> {
        let found = self.markers.iter().find(|(_, known)| *known == marker);
        found.map(|(id, _)| *id)
    }

    /// For one text with calls of these tools.
    pub fn parser(&self, tools: Arc<[Signature]>, calls_max: CallsMax) -> Option<ToolCallParser> {
        let special: Vec<Marker> = self.markers.iter().map(|(_, marker)| *marker).collect();
        self.format
            .map(|format| ToolCallParser::new(format, &special, tools, calls_max))
    }

    /// What the last message has to say besides its own text: the tools, where the template does
    /// not show them, and the caller's words or ours about them.
    pub fn tools_text(&self, tools: &[Value], prompt: Option<&str>) -> Option<String> {
        if self.shows_tools {
            return prompt.map(|prompt| format!("\n---\n{prompt}"));
        }
        let tools: Vec<String> = tools.iter().map(Value::to_string).collect();
        let tools = tools.join(",");
        Some(match (prompt, self.format) {
            (Some(prompt), _) => format!("\n---\n[{tools}]\n{prompt}"),
            (None, Some(format)) => format!(
                "\n---\n[{tools}]\nThese functions can be called. Where one of them helps, answer \
                 with nothing but the call, with real values, in this form:\n{}",
                format.write("the function", r#"{"an argument": "its value"}"#)
            ),
            (None, None) => format!("\n---\n[{tools}]\nThese functions can be called."),
        })
    }
}

impl FromStr for ParserAsked {
    type Err = UnknownParser;

    fn from_str(name: &str) -> Result<Self, UnknownParser> {
        match name {
            "auto" => Ok(Self::Auto),
            "none" => Ok(Self::Off),
            name => ToolFormat::from_str(name)
                .map(Self::Format)
                .map_err(|()| UnknownParser(name.to_owned())),
        }
    }
}
