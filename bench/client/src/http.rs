//! The load: closed and open loop.

use std::collections::VecDeque;
use std::ffi::OsString;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use clap::Parser;
use serde_json::{Map, Value, json};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};

use crate::args::{HttpArgs, LoadArgs};
use crate::prompts::{Prompts, Random};
use crate::report::Report;
use crate::server::{Seen, Server, Shot};
use crate::stats::{percentile, rounded};
use crate::wire::request;
use crate::{STATUS_FAILED, fail, usage};

/// Requests of a level unless told: so many a client, within these bounds.
const REQUESTS_PER_CLIENT: usize = 4;
const REQUESTS_MIN: usize = 8;
const REQUESTS_MAX: usize = 1024;
/// Moves the seed of each level: no two send the same prompts.
const SEED_STEP: u64 = 1_000_003;

/// How requests arrive.
#[derive(Debug, Clone, Copy)]
enum Arrival {
    Closed { clients: usize },
    Open { rate: f64 },
}

/// What the requests of one level saw.
#[derive(Debug, Default)]
struct Level {
    seen: Vec<Seen>,
    errors: Vec<String>,
    seconds: f64,
}

/// Loads the server; the exit status.
pub(crate) fn run(args: &[OsString]) -> u8 {
    let name = OsString::from("headrace bench http");
    let line = std::iter::once(name).chain(args.iter().cloned());
    let args = match HttpArgs::try_parse_from(line) {
        Ok(args) => args,
        Err(error) => return usage(&error),
    };
    match measure(&args) {
        Ok(true) => 0,
        Ok(false) => fail(
            STATUS_FAILED,
            "some requests failed; the figures name the first",
        ),
        Err(message) => fail(STATUS_FAILED, &message),
    }
}

/// Whether every request was answered.
fn measure(args: &HttpArgs) -> Result<bool, String> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(args.load.threads.max(1))
        .enable_all()
        .build()
        .map_err(|error| format!("the runtime does not start: {error}"))?;
    let key = args.server.api_key.as_deref();
    let server = Arc::new(Server::new(&args.server.url, key, args.load.timeout)?);
    let mut report = Report::open(args.report.json.as_deref())?;
    runtime.block_on(async {
        let warm_up = Arrival::Closed {
            clients: args.load.warmup.max(1),
        };
        report.progress("warming up");
        let shots = shots(args, args.load.warmup, args.load.seed)?;
        let level = level(&server, warm_up, shots, args.load.seed).await;
        if let Some(error) = level.errors.first() {
            return Err(format!("a request before the first level failed: {error}"));
        }
        let arrivals: Vec<Arrival> = match args.load.rate {
            Some(rate) if rate > 0.0 && rate.is_finite() => vec![Arrival::Open { rate }],
            Some(rate) => return Err(format!("--rate must be above 0, it is {rate}")),
            None => {
                let closed = |&clients| Arrival::Closed { clients };
                args.load.concurrency.iter().map(closed).collect()
            }
        };
        let mut answered = true;
        for (n, arrival) in arrivals.into_iter().enumerate() {
            let seed = args.load.seed.wrapping_add((n as u64 + 1) * SEED_STEP);
            let row = one_level(args, &server, arrival, seed, &report).await?;
            answered &= row["errors"] == 0;
            report.push(row)?;
        }
        report.finish();
        Ok(answered)
    })
}

async fn one_level(
    args: &HttpArgs,
    server: &Arc<Server>,
    arrival: Arrival,
    seed: u64,
    report: &Report,
) -> Result<Value, String> {
    let count = arrival.requests(&args.load);
    let label = args.report.label.as_deref();
    let mut row = json!({"m": label, "what": "http", "isl": args.load.isl, "osl": args.load.osl});
    match arrival {
        Arrival::Closed { clients } => row["concurrency"] = clients.into(),
        Arrival::Open { rate } => row["rate"] = rate.into(),
    }
    report.progress(&format!("{arrival:?}, {count} requests"));
    let level = level(server, arrival, shots(args, count, seed)?, seed).await;
    if let Value::Object(row) = &mut row {
        row.extend(level.figures(args.load.osl));
    }
    Ok(row)
}

/// Bodies are made beforehand: making them takes nothing from the server while it is measured.
fn shots(args: &HttpArgs, count: usize, seed: u64) -> Result<VecDeque<Shot>, String> {
    let load = &args.load;
    let mut prompts = match &load.tokenizer {
        Some(folder) => Prompts::texts(folder, seed)?,
        None => Prompts::ids(load.vocab, seed),
    };
    let shot = |_| {
        let prompt = prompts.next(load.isl)?;
        let (path, body) = request(args.server.api, &args.server.model, &prompt, load.osl);
        let body = body.to_string().into();
        Ok(Shot { path, body })
    };
    (0..count).map(shot).collect()
}

/// Sends everything and waits for the last answer.
async fn level(server: &Arc<Server>, arrival: Arrival, shots: VecDeque<Shot>, seed: u64) -> Level {
    let start = Instant::now();
    let mut tasks: JoinSet<Vec<Result<Seen, String>>> = JoinSet::new();
    match arrival {
        Arrival::Closed { clients } => {
            let shots = Arc::new(Mutex::new(shots));
            for _ in 0..clients {
                tasks.spawn(client(Arc::clone(server), Arc::clone(&shots)));
            }
        }
        Arrival::Open { rate } => {
            let (mut at, mut random) = (start, Random::new(seed));
            for shot in shots {
                sleep_until(at).await;
                let server = Arc::clone(server);
                tasks.spawn(async move { vec![server.send(shot).await] });
                at += Duration::from_secs_f64(-random.unit().ln() / rate);
            }
        }
    }
    let mut level = Level::default();
    while let Some(results) = tasks.join_next().await {
        let results = results.unwrap_or_else(|error| vec![Err(error.to_string())]);
        for result in results {
            match result {
                Ok(answer) => level.seen.push(answer),
                Err(error) => level.errors.push(error),
            }
        }
    }
    level.seconds = start.elapsed().as_secs_f64();
    level
}

/// One request after the other until none is left.
async fn client(
    server: Arc<Server>,
    shots: Arc<Mutex<VecDeque<Shot>>>,
) -> Vec<Result<Seen, String>> {
    let mut results = Vec::new();
    loop {
        let shot = shots
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .pop_front();
        let Some(shot) = shot else { return results };
        results.push(server.send(shot).await);
    }
}

// === impl Arrival ===

impl Arrival {
    fn requests(self, load: &LoadArgs) -> usize {
        let default = match self {
            Self::Closed { clients } => {
                (REQUESTS_PER_CLIENT * clients).clamp(REQUESTS_MIN, REQUESTS_MAX.max(clients))
            }
            #[expect(
                clippy::cast_possible_truncation,
                clippy::cast_sign_loss,
                reason = "a float becomes the nearest number of requests there can be"
            )]
            Self::Open { rate } => (rate * load.duration).round().max(1.0) as usize,
        };
        load.requests.unwrap_or(default).max(1)
    }
}

// === impl Level ===

impl Level {
    /// The figures as they go to JSON; times in milliseconds.
    fn figures(&self, osl: u32) -> Map<String, Value> {
        let tokens: u64 = self.seen.iter().map(|seen| seen.tokens).sum();
        let chunks: u64 = self.seen.iter().map(|seen| seen.chunks).sum();
        let short = self
            .seen
            .iter()
            .filter(|seen| seen.tokens != u64::from(osl));
        let mut figures = Map::new();
        let mut put = |name: &str, value: Value| {
            figures.insert(name.to_owned(), value);
        };
        put("n", self.seen.len().into());
        put("errors", self.errors.len().into());
        put("first_error", self.errors.first().cloned().into());
        put("other_length", short.count().into());
        put("s", rounded(self.seconds, 3).into());
        put("out_tok_s", rounded(tokens as f64 / self.seconds, 1).into());
        put(
            "req_s",
            rounded(self.seen.len() as f64 / self.seconds, 3).into(),
        );
        let per_chunk = tokens as f64 / chunks.max(1) as f64;
        put("tokens_per_chunk", rounded(per_chunk, 3).into());
        let tpot = |seen: &Seen| {
            let after = seen.tokens.checked_sub(1).filter(|&after| after > 0)?;
            Some((seen.latency - seen.ttft) / after as f64)
        };
        let columns = [
            ("ttft", self.seen.iter().map(|seen| seen.ttft).collect()),
            (
                "itl",
                self.seen
                    .iter()
                    .flat_map(|seen| seen.gaps.iter().copied())
                    .collect(),
            ),
            ("tpot", self.seen.iter().filter_map(tpot).collect()),
            ("e2e", self.seen.iter().map(|seen| seen.latency).collect()),
        ];
        for (name, column) in columns {
            let mut column: Vec<f64> = column;
            let mean = column.iter().sum::<f64>() / column.len().max(1) as f64;
            put(&format!("{name}_mean_ms"), rounded(mean * 1e3, 3).into());
            for (part, q) in [("p50", 0.5), ("p90", 0.9), ("p99", 0.99)] {
                let value = percentile(&mut column, q).map(|value| rounded(value * 1e3, 3));
                put(&format!("{name}_{part}_ms"), value.into());
            }
        }
        figures
    }
}
