//! Shards and engine without HTTP: the launcher starts the shards, the engine runs here.

use std::ffi::OsString;
use std::sync::Arc;
use std::time::Duration;

use clap::{CommandFactory, Parser};
use futures_util::future::join_all;
use headrace_config::Serve;
use headrace_engine::{
    EngineHandle, EngineState, Facts, FinishReason, Request, RequestSpec, Sampling, TokenEvent,
    TokenId, TokenStream, Tokens, start as start_engine,
};
use headrace_launcher::{Programs, PythonNotFound, Stage, run_job};
use prometheus::Registry;
use serde_json::{Map, Value, json};
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::args::{Mix, OfflineArgs, Scenario, ScenarioArgs, part};
use crate::prompts::Random;
use crate::report::Report;
use crate::stats::rounded;
use crate::usage;

/// Flags of the server that have another default here.
///
/// Nobody reads a stream here, so no step is cut for one.
const SERVER_DEFAULTS: [(&str, &str); 2] =
    [("--prefix-caching", "false"), ("--itl-target-ms", "0")];
/// Sequences that may wait: more than any mix has.
const QUEUE_MAX: usize = 1 << 16;
/// Runs of one new token beside the long run; the best counts.
const DECODE_BASE_RUNS: usize = 2;
/// Runs of one prompt; the best counts.
const PREFILL_RUNS: usize = 3;
/// Before anything is timed: requests, prompt tokens, new tokens.
const WARM_UP: [Mix; 2] = [Mix::new(8, 128, 16), Mix::new(64, 512, 8)];
const WARM_UP_QUICK: [Mix; 1] = [Mix::new(2, 16, 4)];
/// How long running requests get when the benchmark is stopped.
const DRAIN: Duration = Duration::from_secs(1);

/// An engine that is ready.
struct Bench {
    engine: EngineHandle,
    facts: Arc<Facts>,
    random: Random,
    label: String,
}

/// Runs the scenarios on shards of its own; the exit status.
pub(crate) fn run(
    args: &[OsString],
    find_programs: impl FnOnce() -> Result<Programs, PythonNotFound>,
) -> u8 {
    let started = Instant::now();
    let (ours, theirs) = part(args, &OfflineArgs::command());
    let name = OsString::from("headrace bench offline");
    let parsed = OfflineArgs::try_parse_from(std::iter::once(name).chain(ours));
    let args = match parsed {
        Ok(args) => args,
        Err(error) => return usage(&error),
    };
    let mut line = vec![OsString::from("headrace")];
    for (flag, value) in SERVER_DEFAULTS {
        let is_flag = |arg: &OsString| arg.to_string_lossy().split('=').next() == Some(flag);
        if !theirs.iter().any(is_flag) {
            line.extend([flag.into(), value.into()]);
        }
    }
    line.extend(theirs);
    let job = move |serve: Serve, stage: Stage| measure(&args, serve, stage, started);
    run_job(line, find_programs, Box::new(job))
}

fn measure(
    args: &OfflineArgs,
    serve: Serve,
    mut stage: Stage,
    started: Instant,
) -> Result<(), String> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|error| format!("the runtime does not start: {error}"))?;
    runtime.block_on(async {
        let bench = tokio::select! {
            biased;
            () = stage.stopped() => return Ok(()),
            bench = Bench::start(args, serve) => bench?,
        };
        stage.ready().await;
        let engine = bench.engine.clone();
        tokio::select! {
            biased;
            () = stage.stopped() => {
                engine.drain(DRAIN).await;
                Ok(())
            }
            result = scenarios(args, bench, started.elapsed()) => {
                engine.drain(DRAIN).await;
                result
            }
        }
    })
}

async fn scenarios(args: &OfflineArgs, mut bench: Bench, startup: Duration) -> Result<(), String> {
    let mut report = Report::open(args.report.json.as_deref())?;
    report.push(bench.about())?;
    let startup_s = rounded(startup.as_secs_f64(), 2);
    report.push(json!({"m": bench.label, "what": "startup", "startup_s": startup_s}))?;
    let plan = chosen(&args.scenarios);
    report.progress("warming up");
    let warm_up: &[Mix] = if plan.quick { &WARM_UP_QUICK } else { &WARM_UP };
    for &mix in warm_up {
        if bench.refusal(mix.isl, mix.osl).is_none() {
            bench.run(mix).await?;
        }
    }
    for scenario in &plan.only {
        match scenario {
            Scenario::Decode => decode(&plan, &mut bench, &mut report).await?,
            Scenario::Prefill => prefill(&plan, &mut bench, &mut report).await?,
            Scenario::Offline => offline(&plan, &mut bench, &mut report).await?,
        }
    }
    report.finish();
    Ok(())
}

/// What was asked for, or the small numbers.
fn chosen(args: &ScenarioArgs) -> ScenarioArgs {
    if !args.quick {
        return args.clone();
    }
    ScenarioArgs {
        batches: vec![1, 4],
        decode_isl: 32,
        decode_steps: 8,
        lengths: vec![32, 256],
        mixes: vec![Mix::new(8, 32, 8)],
        ..args.clone()
    }
}

async fn decode(args: &ScenarioArgs, bench: &mut Bench, report: &mut Report) -> Result<(), String> {
    let (isl, steps) = (args.decode_isl, args.decode_steps);
    for &batch in &args.batches {
        report.progress(&format!("decode, batch {batch}"));
        let mut row = json!({"m": bench.label, "what": "decode", "batch": batch, "isl": isl, "osl": steps + 1});
        if let Some(why) = bench.refusal(isl, steps + 1) {
            row["skipped"] = why.into();
            report.push(row)?;
            continue;
        }
        let base = bench
            .best_of(DECODE_BASE_RUNS, Mix::new(batch, isl, 1))
            .await?;
        let long = bench.run(Mix::new(batch, isl, steps + 1)).await?;
        let each = (long.as_secs_f64() - base.as_secs_f64()) / f64::from(steps);
        row["step_ms"] = rounded(each * 1e3, 3).into();
        row["tok_s"] = rounded(batch as f64 / each, 1).into();
        report.push(row)?;
    }
    Ok(())
}

async fn prefill(
    args: &ScenarioArgs,
    bench: &mut Bench,
    report: &mut Report,
) -> Result<(), String> {
    for &isl in &args.lengths {
        report.progress(&format!("prefill, {isl} tokens"));
        let mut row = json!({"m": bench.label, "what": "prefill", "isl": isl, "osl": 1});
        if let Some(why) = bench.refusal(isl, 1) {
            row["skipped"] = why.into();
            report.push(row)?;
            continue;
        }
        let best = bench.best_of(PREFILL_RUNS, Mix::new(1, isl, 1)).await?;
        row["ttft_ms"] = rounded(best.as_secs_f64() * 1e3, 2).into();
        row["tok_s"] = rounded(isl as f64 / best.as_secs_f64(), 0).into();
        report.push(row)?;
    }
    Ok(())
}

async fn offline(
    args: &ScenarioArgs,
    bench: &mut Bench,
    report: &mut Report,
) -> Result<(), String> {
    for &mix in &args.mixes {
        report.progress(&format!("offline, {mix}"));
        let Mix { requests, isl, osl } = mix;
        let mut row =
            json!({"m": bench.label, "what": "offline", "n": requests, "isl": isl, "osl": osl});
        if let Some(why) = bench.refusal(isl, osl) {
            row["skipped"] = why.into();
            report.push(row)?;
            continue;
        }
        let seconds = bench.run(mix).await?.as_secs_f64();
        let new = requests as f64 * f64::from(osl);
        row["s"] = rounded(seconds, 2).into();
        row["out_tok_s"] = rounded(new / seconds, 1).into();
        row["total_tok_s"] = rounded((new + (requests * isl) as f64) / seconds, 1).into();
        report.push(row)?;
    }
    Ok(())
}

// === impl Bench ===

impl Bench {
    /// Connects to the shards and waits until they are prepared.
    async fn start(args: &OfflineArgs, serve: Serve) -> Result<Self, String> {
        let mut config = headrace_router::engine_config(&serve, Registry::new());
        config.queue_max = QUEUE_MAX;
        let (engine, driver) = start_engine(config);
        let mut state = engine.watch();
        let settled = state
            .wait_for(|state| !matches!(state, EngineState::Loading))
            .await;
        let facts = match settled.as_deref() {
            Ok(EngineState::Ready(facts)) => Some(Arc::clone(facts)),
            _ => None,
        };
        drop(settled);
        let Some(facts) = facts else {
            return Err(match driver.await {
                Ok(Err(error)) => error.to_string(),
                Ok(Ok(())) | Err(_) => "the engine stopped".to_owned(),
            });
        };
        let name = serve.model.id.trim_end_matches('/');
        let name = name.rsplit('/').next().unwrap_or(name);
        Ok(Self {
            engine,
            facts,
            random: Random::new(args.scenarios.seed),
            label: args.report.label.clone().unwrap_or_else(|| name.to_owned()),
        })
    }

    /// What the figures are figures of.
    fn about(&self) -> Value {
        let (limits, describe) = (&self.facts.limits, &self.facts.describe);
        let memory = self.facts.memory.iter().cloned();
        let memory: Map<_, _> = memory.map(|(what, bytes)| (what, bytes.into())).collect();
        json!({
            "m": self.label,
            "what": "server",
            "version": env!("CARGO_PKG_VERSION"),
            "device": describe.device,
            "dtype": describe.dtype,
            "block_tokens": limits.block_size.tokens().0,
            "blocks": limits.blocks.0,
            "running_max": limits.running_max,
            "step_tokens_max": limits.step_tokens_max.0,
            "prefill_tokens_max": limits.prefill_tokens_max.0,
            "depth": limits.depth,
            "prefix_caching": limits.prefix_caching,
            "memory": memory,
        })
    }

    /// Why requests of these lengths cannot be served.
    fn refusal(&self, isl: usize, osl: u32) -> Option<String> {
        let max = self.facts.limits.sequence_tokens_max().0;
        let wanted = isl as u64 + u64::from(osl);
        (wanted > u64::from(max)).then(|| format!("{wanted} tokens a sequence, {max} fit"))
    }

    async fn best_of(&mut self, runs: usize, mix: Mix) -> Result<Duration, String> {
        let mut best = Duration::MAX;
        for _ in 0..runs {
            best = best.min(self.run(mix).await?);
        }
        Ok(best)
    }

    /// Submits everything at once; the time until the last token is there.
    async fn run(&mut self, mix: Mix) -> Result<Duration, String> {
        let requests: Vec<Request> = (0..mix.requests)
            .map(|_| self.request(mix.isl, mix.osl))
            .collect::<Result<_, _>>()?;
        let mut answers = JoinSet::new();
        let start = Instant::now();
        // By one task, so that as a rule the driver finds all waiting when it makes the first plan.
        for stream in join_all(requests.into_iter().map(|r| self.engine.submit(r))).await {
            let stream = stream.map_err(|error| error.to_string())?;
            answers.spawn(answer(stream, mix.osl));
        }
        while let Some(answer) = answers.join_next().await {
            answer.map_err(|error| format!("a request's task failed: {error}"))??;
        }
        Ok(start.elapsed())
    }

    fn request(&mut self, isl: usize, osl: u32) -> Result<Request, String> {
        let limits = &self.facts.limits;
        let ids = self.random.ids(isl, limits.vocab_size);
        let spec = RequestSpec {
            prompt: ids.into_iter().map(TokenId).collect(),
            sampling: Sampling::default(),
            ending: Vec::new(),
            tokens_max: Some(Tokens(osl)),
            prompt_logprobs: false,
            masked: false,
            trace: None,
        };
        Request::new(spec, limits).map_err(|error| error.to_string())
    }
}

// === free functions ===

/// Reads an answer to its end, which must come after as many tokens as were asked for.
async fn answer(mut stream: TokenStream, osl: u32) -> Result<(), String> {
    let mut tokens = 0;
    loop {
        for event in stream.next().await {
            match event {
                TokenEvent::Token(_) => tokens += 1,
                TokenEvent::Finished(FinishReason::Length) if tokens == osl => return Ok(()),
                TokenEvent::Finished(reason) => {
                    return Err(format!(
                        "a request ended after {tokens} of {osl} tokens: {reason:?}"
                    ));
                }
                TokenEvent::Started { .. } | TokenEvent::PromptLogprobs(_) => {}
            }
        }
    }
}
