//! Tokens of one sequence become text: detokenizing, stop strings, the end. Shared by every API.

use std::sync::Arc;

use headrace_engine::{FinishReason, PromptToken, Request, SampledToken, TokenEvent, TokenId};
use headrace_text::{Detokenizer, SpecialTokens, StopDetector, StopMatcher, StopPlace, ToolEvent};

use crate::app::Text;
use crate::backend::Source;
use crate::calls::{Calls, ToolRules};
use crate::error::{ApiError, Fault, Overdue};
use crate::meter::Meter;
use crate::terms::Timeout;

/// Prompt tokens that a detokenizer is shown.
const CONTEXT_TOKENS: usize = 8;

/// What an API does with special tokens, and whether a text begins or goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Manner {
    /// One event a token as it is.
    Tgi,
    /// Text that goes on after the prompt. Special tokens have no text.
    Completion,
    /// The same, but a text of its own.
    Chat,
}

/// Why a sequence ended well.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Finish {
    Length,
    EosToken,
    StopSequence,
    /// The model called tools, and its last call is whole.
    ToolCalls,
}

/// One token, with the text that it releases.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Piece {
    pub(crate) id: u32,
    /// `Manner::Tgi`: the token's own text. Otherwise: text that may be shown now.
    pub(crate) text: String,
    /// Where calls of tools are looked for: what is known now, this text included.
    pub(crate) events: Vec<ToolEvent>,
    pub(crate) logprob: f32,
    pub(crate) special: bool,
    /// Alternatives asked for, best first.
    pub(crate) top: Vec<(TokenId, f32)>,
    /// On the last piece.
    pub(crate) finish: Option<Finish>,
}

/// How one sequence is to be told.
#[derive(Debug, Clone)]
pub(crate) struct Rules {
    pub(crate) manner: Manner,
    /// The text keeps the stop string, and nothing that may become one is held back.
    pub(crate) shows_stops: bool,
    /// What the request was given, where its time is bounded.
    pub(crate) timeout: Option<Timeout>,
    pub(crate) stop: Vec<String>,
    /// Ending ids are tokens like others.
    pub(crate) ignore_eos: bool,
    /// The tools whose calls are looked for.
    pub(crate) tools: Option<ToolRules>,
}

/// How stop strings are looked for.
#[derive(Debug)]
enum Stops {
    None,
    /// The text is shown as it comes.
    Shown(StopDetector),
    /// What may become a stop string is held back.
    Hidden(StopMatcher),
}

/// One sequence on its way to a response. Dropping it cancels the sequence.
#[derive(Debug)]
pub(crate) struct Respond {
    pub(crate) meter: Meter,
    pub(crate) text: Arc<Text>,
    request: Request,
    source: Source,
    rules: Rules,
    detokenizer: Detokenizer,
    stops: Stops,
    calls: Option<Calls>,
    ids: Vec<u32>,
    prompt_tokens: Vec<PromptToken>,
    /// The last token; it is told when the driver has said why it is the last.
    held: Option<Piece>,
    /// The stop string that was met.
    stopped: Option<usize>,
    failed: Option<ApiError>,
}

// === impl Finish ===

impl Finish {
    /// A proper end, or the fault that was none.
    fn of(reason: FinishReason) -> Result<Self, Fault> {
        match reason {
            FinishReason::Length => Ok(Self::Length),
            FinishReason::EndOfText => Ok(Self::EosToken),
            FinishReason::StopText => Ok(Self::StopSequence),
            FinishReason::Nan => Err(Fault::Nan),
            FinishReason::MaskMissed => Err(Fault::MaskMissed),
            FinishReason::GrammarFailed => Err(Fault::GrammarFailed),
            FinishReason::GroupLost => Err(Fault::GroupLost),
            FinishReason::Cancelled | FinishReason::Deadline => Err(Fault::Cancelled),
        }
    }

    /// TGI's word.
    pub(crate) fn as_tgi(self) -> &'static str {
        match self {
            Self::Length => "length",
            Self::EosToken => "eos_token",
            Self::StopSequence => "stop_sequence",
            Self::ToolCalls => "tool_calls",
        }
    }

    /// OpenAI's word, on its routes but for the streams of completions.
    pub(crate) fn as_openai(self) -> &'static str {
        match self {
            Self::EosToken | Self::StopSequence => "stop",
            Self::Length | Self::ToolCalls => self.as_tgi(),
        }
    }
}

// === impl Respond ===

impl Respond {
    pub(crate) fn new(
        source: Source,
        request: Request,
        rules: Rules,
        text: Arc<Text>,
        meter: Meter,
    ) -> Self {
        Self {
            meter,
            detokenizer: detokenizer(rules.manner, &text, &request),
            stops: Stops::new(&rules),
            calls: rules
                .tools
                .as_ref()
                .and_then(|tools| tools.calls(&text.tools)),
            text,
            request,
            source,
            rules,
            ids: Vec::new(),
            prompt_tokens: Vec::new(),
            held: None,
            stopped: None,
            failed: None,
        }
    }

    /// Appends what can be told now, at least one piece. The last piece has `finish`; nothing may
    /// be asked for after it or after an error.
    pub(crate) async fn next(&mut self, out: &mut Vec<Piece>) -> Result<(), ApiError> {
        if let Some(error) = self.failed.take() {
            return Err(error);
        }
        self.meter.run();
        let before = out.len();
        while out.len() == before {
            let events = self.source.next().await;
            if events.is_empty() {
                return Err(ApiError::Incomplete);
            }
            for event in events {
                match self.take(event) {
                    Ok(None) => {}
                    Ok(Some(piece)) => {
                        let last = piece.finish.is_some();
                        out.push(piece);
                        if last {
                            return Ok(());
                        }
                    }
                    // What was told before the fault is shown before it.
                    Err(error) if out.len() > before => {
                        self.failed = Some(error);
                        return Ok(());
                    }
                    Err(error) => return Err(error),
                }
            }
        }
        Ok(())
    }

    /// TGI's `generated_text`: everything drawn without special tokens, up to and with the stop
    /// string.
    pub(crate) fn generated_text(&self) -> String {
        let mut text = self.text.tokenizer.decode(&self.ids, true);
        self.cut_after_stop(&mut text);
        text
    }

    /// Has a text that shows its stop string end with it.
    pub(crate) fn cut_after_stop(&self, text: &mut String) {
        if self.rules.shows_stops
            && let Some(stop) = self.stopped.and_then(|index| self.rules.stop.get(index))
            && let Some(at) = text.find(stop.as_str())
        {
            text.truncate(at + stop.len());
        }
    }

    pub(crate) fn prompt(&self) -> Vec<u32> {
        self.request.prompt().iter().map(|id| id.0).collect()
    }

    /// Prompt ids with their log-probabilities, when they were asked for.
    pub(crate) fn prefill(&self) -> impl Iterator<Item = (u32, PromptToken)> {
        let ids = self.request.prompt().iter().map(|id| id.0);
        ids.zip(self.prompt_tokens.iter().copied())
    }

    fn take(&mut self, event: TokenEvent) -> Result<Option<Piece>, ApiError> {
        match event {
            TokenEvent::Started { cached_tokens } => {
                self.meter.start(cached_tokens);
                Ok(None)
            }
            TokenEvent::PromptLogprobs(logprobs) => {
                self.prompt_tokens.extend(logprobs);
                Ok(None)
            }
            TokenEvent::Token(token) => Ok(self.piece(token)),
            TokenEvent::Finished(reason) => self.end(reason).map(Some),
        }
    }

    fn piece(&mut self, token: SampledToken) -> Option<Piece> {
        let id = token.id.0;
        self.meter.token();
        self.ids.push(id);
        let special = self.text.tokenizer.is_special(id);
        let last = self.meter.generated >= self.request.tokens_max().0
            || (!self.rules.ignore_eos && self.text.ending.contains(&token.id));
        let mut text = self.detokenizer.push(id);
        if last {
            text.push_str(&self.detokenizer.finish());
        }
        self.match_stops(id, special, last, &mut text);
        let events = self.find_calls(id, last, &mut text);
        let is_over = self.stopped.is_some() || self.calls.as_ref().is_some_and(Calls::is_over);
        let stopped = is_over && !last;
        let finish = stopped.then(|| self.told(Finish::StopSequence));
        let piece = Piece {
            id,
            text,
            events,
            logprob: token.logprob,
            special,
            top: token.top,
            finish,
        };
        if stopped {
            self.source.finish(FinishReason::StopText);
        }
        if last {
            self.held = Some(piece);
            return None;
        }
        Some(piece)
    }

    /// Looks for stop strings in the text so far and, where they are hidden, leaves in `text` what
    /// may be shown.
    fn match_stops(&mut self, id: u32, special: bool, last: bool, text: &mut String) {
        // A special token may be named although it has no text.
        let named = || {
            let own = self.text.tokenizer.token_text(id);
            self.rules.stop.iter().position(|stop| *stop == own)
        };
        match &mut self.stops {
            Stops::None => {}
            Stops::Shown(detector) => {
                let met = detector.push(text);
                self.stopped = met.or_else(|| special.then(named).flatten());
            }
            Stops::Hidden(matcher) => {
                let released = matcher.push(text);
                *text = released.text;
                self.stopped = released.stopped;
                if self.stopped.is_none() && special {
                    self.stopped = named();
                }
                if released.stopped.is_none() && (last || self.stopped.is_some()) {
                    text.push_str(&matcher.flush());
                }
            }
        }
    }

    /// Leaves in `text` what is no call.
    fn find_calls(&mut self, id: u32, last: bool, text: &mut String) -> Vec<ToolEvent> {
        let Some(calls) = &mut self.calls else {
            return Vec::new();
        };
        let is_over = last || self.stopped.is_some();
        let marker = self.text.tools.marker(id);
        if let (Some(_), Stops::Hidden(matcher)) = (marker, &mut self.stops) {
            // A stop string does not reach over it.
            text.push_str(&matcher.flush());
        }
        calls.take(text, marker, is_over)
    }

    /// Why the sequence ended, as it is told.
    fn told(&self, finish: Finish) -> Finish {
        let is_called = self.calls.as_ref().is_some_and(Calls::are_whole);
        match finish {
            Finish::EosToken | Finish::StopSequence if is_called => Finish::ToolCalls,
            Finish::EosToken | Finish::StopSequence | Finish::Length | Finish::ToolCalls => finish,
        }
    }

    fn overdue(&self, timeout: Timeout) -> Overdue {
        let generated = self.meter.generated;
        if self.meter.has_started() {
            Overdue::Running { timeout, generated }
        } else {
            Overdue::Waiting { timeout }
        }
    }

    fn end(&mut self, reason: FinishReason) -> Result<Piece, ApiError> {
        if let (FinishReason::Deadline, Some(timeout)) = (reason, self.rules.timeout) {
            return Err(ApiError::Deadline(self.overdue(timeout)));
        }
        let finish = Finish::of(reason).map_err(ApiError::Generation)?;
        let mut piece = self.held.take().ok_or(ApiError::Incomplete)?;
        piece.finish = Some(self.told(finish));
        Ok(piece)
    }
}

// === impl Stops ===

impl Stops {
    fn new(rules: &Rules) -> Self {
        if rules.stop.is_empty() {
            return Self::None;
        }
        if rules.shows_stops {
            Self::Shown(StopDetector::new(&rules.stop, StopPlace::Anywhere))
        } else {
            Self::Hidden(StopMatcher::new(&rules.stop))
        }
    }
}

// === free functions ===

fn detokenizer(manner: Manner, text: &Text, request: &Request) -> Detokenizer {
    let tokenizer = Arc::clone(&text.tokenizer);
    let special = match manner {
        Manner::Tgi => SpecialTokens::Keep,
        Manner::Completion | Manner::Chat => SpecialTokens::Skip,
    };
    if manner == Manner::Chat {
        return Detokenizer::new(tokenizer, special);
    }
    // The last ids of the prompt are context enough.
    let prompt = request.prompt();
    let context = &prompt[prompt.len().saturating_sub(CONTEXT_TOKENS)..];
    let context: Vec<u32> = context.iter().map(|id| id.0).collect();
    Detokenizer::continuing(tokenizer, special, &context)
}
