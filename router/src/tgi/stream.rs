//! Events of `/generate_stream`: one a token, as it is.

use bytes::BytesMut;

use crate::error::ApiError;
use crate::respond::{Piece, Respond};
use crate::sse::{Frames, event};
use crate::tgi::wire::{StreamDetails, StreamResponse, TokenRef};

/// Writes the events of one sequence.
#[derive(Debug)]
pub(crate) struct StreamFrames {
    index: u32,
    details: bool,
    /// Put before the answer, when asked for.
    prompt: Option<String>,
}

// === impl StreamFrames ===

impl StreamFrames {
    pub(crate) fn new(details: bool, prompt: Option<String>) -> Self {
        Self {
            index: 0,
            details,
            prompt,
        }
    }
}

impl Frames for StreamFrames {
    fn piece(&mut self, piece: &Piece, respond: &Respond, out: &mut BytesMut) {
        self.index += 1;
        let meter = &respond.meter;
        let details = piece
            .finish
            .filter(|_| self.details)
            .map(|finish| StreamDetails {
                finish_reason: finish.as_tgi(),
                generated_tokens: meter.generated,
                seed: meter.seed,
                input_length: meter.input,
            });
        let generated_text = piece.finish.map(|_| {
            let mut text = self.prompt.take().unwrap_or_default();
            text.push_str(&respond.generated_text());
            text
        });
        let token = TokenRef {
            id: piece.id,
            text: &piece.text,
            logprob: piece.logprob,
            special: piece.special,
        };
        let top_tokens = respond.text.alternatives(&piece.top);
        event(
            &StreamResponse {
                index: self.index,
                token,
                top_tokens,
                generated_text,
                details,
            },
            out,
        );
    }

    fn failed(&mut self, error: &ApiError, out: &mut BytesMut) {
        let incomplete = matches!(error, ApiError::Incomplete);
        let error = if incomplete {
            &ApiError::IncompleteStream
        } else {
            error
        };
        event(&error.body(), out);
    }
}
