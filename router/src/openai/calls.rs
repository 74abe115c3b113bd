//! Calls of tools in answers, and their ids.

use headrace_text::{ToolEvent, ToolFormat};
use serde::Serialize;
use utoipa::ToSchema;

use crate::respond::Piece;
use crate::validate::random_u64;

const FUNCTION: &str = "function";

/// The letters of an id, and how many Mistral's templates want: nine, and nothing else.
const LETTERS: &[u8; 62] = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";
const MISTRAL_ID_LETTERS: usize = 9;

/// A call.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct ToolCall {
    pub(crate) id: String,
    /// `function`.
    #[serde(rename = "type")]
    pub(crate) kind: &'static str,
    pub(crate) function: FunctionCall,
}

/// Which function is called, and with what.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct FunctionCall {
    pub(crate) name: String,
    /// A JSON object as the model wrote it; what there is of one, if the answer was cut.
    pub(crate) arguments: String,
}

/// A part of a call. The first has an id and a name, the others text to be appended to its
/// arguments.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct ToolCallDelta<'a> {
    /// The number of the call in the answer.
    pub(crate) index: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub(crate) id: Option<String>,
    /// `function`.
    #[serde(rename = "type", skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub(crate) kind: Option<&'static str>,
    #[schema(value_type = FunctionCallDelta)]
    pub(crate) function: FunctionCallDelta<'a>,
}

/// A part of a function's call.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct FunctionCallDelta<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub(crate) name: Option<&'a str>,
    pub(crate) arguments: &'a str,
}

// === free functions ===

/// The calls of an answer.
pub(crate) fn calls(pieces: &[Piece], format: Option<ToolFormat>) -> Vec<ToolCall> {
    let mut calls: Vec<ToolCall> = Vec::new();
    for event in pieces.iter().flat_map(|piece| &piece.events) {
        match event {
            ToolEvent::CallStart { name, .. } => calls.push(ToolCall {
                id: call_id(format),
                kind: FUNCTION,
                function: FunctionCall {
                    name: name.clone(),
                    arguments: String::new(),
                },
            }),
            ToolEvent::Arguments { fragment, .. } => {
                if let Some(call) = calls.last_mut() {
                    call.function.arguments.push_str(fragment);
                }
            }
            ToolEvent::Content(_) | ToolEvent::CallEnd { .. } => {}
        }
    }
    calls
}

/// What a stream says of an event, unless that is text or nothing.
pub(crate) fn call_delta(
    event: &ToolEvent,
    format: Option<ToolFormat>,
) -> Option<ToolCallDelta<'_>> {
    match event {
        ToolEvent::CallStart { index, name } => Some(ToolCallDelta {
            index: *index,
            id: Some(call_id(format)),
            kind: Some(FUNCTION),
            function: FunctionCallDelta {
                name: Some(name),
                arguments: "",
            },
        }),
        ToolEvent::Arguments { index, fragment } => Some(ToolCallDelta {
            index: *index,
            id: None,
            kind: None,
            function: FunctionCallDelta {
                name: None,
                arguments: fragment,
            },
        }),
        ToolEvent::Content(_) | ToolEvent::CallEnd { .. } => None,
    }
}

/// An id that no other call has, in a conversation or elsewhere.
fn call_id(format: Option<ToolFormat>) -> String {
    if format != Some(ToolFormat::Mistral) {
        return format!("call_{:016x}{:08x}", random_u64(), random_u64() >> 32);
    }
    let mut bits = random_u64();
    let letter = |_| {
        let letter = LETTERS[usize::try_from(bits % 62).unwrap_or(0)];
        bits /= 62;
        char::from(letter)
    };
    (0..MISTRAL_ID_LETTERS).map(letter).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn ids_differ_and_fit_the_template() {
        let ids: BTreeSet<String> = (0..1000).map(|_| call_id(None)).collect();
        assert_eq!(ids.len(), 1000);
        let long = |id: &String| id.starts_with("call_") && id.len() == 29;
        assert!(ids.iter().all(long), "{ids:?}");
        let short: BTreeSet<String> = (0..1000)
            .map(|_| call_id(Some(ToolFormat::Mistral)))
            .collect();
        assert_eq!(short.len(), 1000);
        for id in short {
            let plain = id.chars().all(|c| c.is_ascii_alphanumeric());
            assert!(plain && id.len() == 9, "{id}");
        }
    }
}
