//! Where tokens come from: the engine, or in tests a script.

use headrace_engine::{
    Attached, EngineHandle, EngineState, FinishReason, Load, Request, SubmitError, TokenEvent,
    TokenStream,
};

#[cfg(test)]
use crate::tests::script::{Script, ScriptStream};

/// What requests are submitted to.
#[derive(Clone, Debug)]
pub(crate) enum Backend {
    Engine(EngineHandle),
    #[cfg(test)]
    Script(Script),
}

/// What tokens of one sequence come from. Dropping it cancels the sequence.
#[derive(Debug)]
pub(crate) enum Source {
    Engine(TokenStream),
    #[cfg(test)]
    Script(ScriptStream),
}

// === impl Backend ===

impl Backend {
    pub(crate) fn state(&self) -> EngineState {
        match self {
            Self::Engine(engine) => engine.state(),
            #[cfg(test)]
            Self::Script(script) => script.state(),
        }
    }

    pub(crate) fn load(&self) -> Load {
        match self {
            Self::Engine(engine) => engine.load(),
            #[cfg(test)]
            Self::Script(script) => script.load(),
        }
    }

    /// Submits a request, and what comes along with it.
    pub(crate) async fn submit(
        &self,
        request: Request,
        attached: Attached,
    ) -> Result<Source, SubmitError> {
        match self {
            Self::Engine(engine) => {
                let stream = engine.submit_with(request, attached).await;
                stream.map(Source::Engine)
            }
            #[cfg(test)]
            Self::Script(script) => script
                .submit(&request, attached.matcher, attached.deadline)
                .map(Source::Script),
        }
    }
}

// === impl Source ===

impl Source {
    /// Everything that has come since the last call, at least one event; empty after the end.
    pub(crate) async fn next(&mut self) -> Vec<TokenEvent> {
        match self {
            Self::Engine(stream) => stream.next().await,
            #[cfg(test)]
            Self::Script(stream) => stream.next().await,
        }
    }

    pub(crate) fn finish(&mut self, reason: FinishReason) {
        match self {
            Self::Engine(stream) => stream.finish(reason),
            #[cfg(test)]
            Self::Script(stream) => stream.finish(reason),
        }
    }
}
