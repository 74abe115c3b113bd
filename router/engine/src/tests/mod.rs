//! The engine against shards that behave and shards that do not, with paused time.

mod fake;
mod faults;
mod grammar;
mod pace;
mod record;
mod referee;
mod streams;
mod trace;

use std::time::Duration;

use headrace_core::ids::{TokenId, Tokens};
use headrace_core::request::{Request, RequestSpec, Sampling};
use prometheus::Registry;
use prometheus::proto::MetricType;
use tokio::task::JoinHandle;

use crate::config::EngineConfig;
use crate::error::EngineError;
use crate::handle::{EngineHandle, EngineState, TokenStream, start_with};
use crate::sink::TokenEvent;
use crate::{FinishReason, SubmitError};
use fake::{Fake, dial};

fn config(ranks: usize) -> EngineConfig {
    EngineConfig {
        sockets: vec!["/nowhere".into(); ranks],
        block_tokens: 0,
        blocks_max: 0,
        running_max: 16,
        step_tokens_max: 256,
        prefill_tokens_max: 128,
        itl_target: None,
        depth: 2,
        prefix_caching: true,
        queue_max: 64,
        context_tokens_max: None,
        kv_dtype: String::new(),
        memory_fraction: 0.0,
        record: None,
        step_deadline: Duration::from_secs(10),
        mask_max: Duration::from_millis(20),
        mask_threads: 1,
        prepare_deadline: Duration::from_secs(60),
        metrics: Registry::new(),
    }
}

/// A ready engine and what its driver ends with.
struct Engine {
    handle: EngineHandle,
    task: JoinHandle<Result<(), EngineError>>,
    metrics: Registry,
}

// === impl Engine ===

impl Engine {
    async fn ready(group: Vec<Fake>) -> Self {
        Self::ready_with(config(group.len()), group).await
    }

    async fn ready_with(config: EngineConfig, group: Vec<Fake>) -> Self {
        let metrics = config.metrics.clone();
        let (handle, task) = start_with(config, dial(group));
        let engine = Self {
            handle,
            task,
            metrics,
        };
        engine
            .wait_for(|state| matches!(state, EngineState::Ready(_)))
            .await;
        engine
    }

    async fn wait_for(&self, what: impl FnMut(&EngineState) -> bool) {
        self.handle
            .watch()
            .wait_for(what)
            .await
            .expect("the engine gets there");
    }

    fn request(&self, prompt: u32, tokens_max: u32) -> Request {
        self.request_of((0..prompt).map(TokenId).collect(), tokens_max)
    }

    fn request_of(&self, prompt: Vec<TokenId>, tokens_max: u32) -> Request {
        let facts = self.handle.facts().expect("the engine is ready");
        let spec = RequestSpec {
            prompt,
            sampling: Sampling::default(),
            ending: vec![],
            tokens_max: Some(Tokens(tokens_max)),
            prompt_logprobs: false,
            masked: false,
            trace: None,
        };
        Request::new(spec, &facts.limits).expect("it fits")
    }

    async fn submit(&self, prompt: u32, tokens_max: u32) -> Result<TokenStream, SubmitError> {
        self.handle.submit(self.request(prompt, tokens_max)).await
    }

    async fn stream(&self, prompt: u32, tokens_max: u32) -> TokenStream {
        self.submit(prompt, tokens_max)
            .await
            .expect("there is room")
    }

    /// How often a histogram was told something, and the sum of it.
    fn histogram(&self, name: &str) -> (u64, f64) {
        let families = self.metrics.gather();
        let family = families.iter().find(|family| family.name() == name);
        let histogram = family.expect("it exists").get_metric()[0].get_histogram();
        (histogram.get_sample_count(), histogram.get_sample_sum())
    }

    /// How many sequences ended at their deadline, by their state then.
    fn deadlines_passed(&self) -> Vec<(String, u64)> {
        let families = self.metrics.gather();
        let passed = families
            .iter()
            .find(|family| family.name() == "headrace_deadlines_passed");
        let metrics = passed.expect("it exists").get_metric().iter();
        metrics
            .map(|metric| {
                let state = metric.get_label()[0].value().to_owned();
                let value = metric.get_counter().get_value();
                (
                    state,
                    format!("{value:.0}").parse().expect("a whole number"),
                )
            })
            .collect()
    }

    /// The value of a gauge or counter without labels; all of them are whole numbers.
    fn metric(&self, name: &str) -> i64 {
        let families = self.metrics.gather();
        let family = families
            .iter()
            .find(|family| family.name() == name)
            .expect("it exists");
        let metric = &family.get_metric()[0];
        let value = match family.get_field_type() {
            MetricType::GAUGE => metric.get_gauge().get_value(),
            MetricType::COUNTER => metric.get_counter().get_value(),
            other @ (MetricType::SUMMARY | MetricType::UNTYPED | MetricType::HISTOGRAM) => {
                panic!("{name} is a {other:?}")
            }
        };
        format!("{value:.0}").parse().expect("a whole number")
    }
}

/// Reads to the end: the tokens, and why there are no more.
async fn read(stream: &mut TokenStream) -> (Vec<u32>, FinishReason) {
    let mut tokens = Vec::new();
    loop {
        let events = stream.next().await;
        assert!(!events.is_empty(), "a stream ends with a reason");
        for event in events {
            match event {
                TokenEvent::Started { .. } | TokenEvent::PromptLogprobs(_) => {}
                TokenEvent::Token(token) => tokens.push(token.id.0),
                TokenEvent::Finished(reason) => {
                    assert_eq!(stream.next().await, [], "nothing follows the end");
                    return (tokens, reason);
                }
            }
        }
    }
}

/// What [`fake::answer`] draws for a request.
fn expected(prompt: u32, tokens: u32) -> Vec<u32> {
    (prompt..prompt + tokens)
        .map(|len| len % fake::VOCAB)
        .collect()
}
