//! The client: closed and open loop, a connection for each request that runs at one time.

use std::collections::VecDeque;
use std::ffi::OsString;
use std::fmt::Display;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use clap::Parser;
use http_body_util::{BodyExt, Full};
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper::header::{AUTHORIZATION, CONTENT_TYPE, HOST};
use hyper::{Request, Uri};
use hyper_util::rt::TokioIo;
use serde_json::{Map, Value, json};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until, timeout};

use crate::args::{HttpArgs, LoadArgs, ServerArgs};
use crate::prompts::{Prompts, Random};
use crate::report::Report;
use crate::stats::{percentile, rounded};
use crate::wire::{Lines, Meaning, meaning, request};
use crate::{fail, usage};

const STATUS_FAILED: u8 = 1;
/// Requests of a level unless told: so many a client, within these bounds.
const REQUESTS_PER_CLIENT: usize = 4;
const REQUESTS_MIN: usize = 8;
const REQUESTS_MAX: usize = 1024;
/// What of an error's body is quoted.
const ERROR_CHARS: usize = 200;
/// Moves the seed of each level: no two send the same prompts.
const SEED_STEP: u64 = 1_000_003;

type Connection = SendRequest<Full<Bytes>>;

/// A server and the connections to it that nobody uses.
#[derive(Debug)]
struct Server {
    uri: Uri,
    authority: String,
    /// Host and port, for the system's resolver.
    address: String,
    bearer: Option<String>,
    idle: Mutex<Vec<Connection>>,
    patience: Duration,
}

/// A request ready to be sent.
#[derive(Debug, Clone)]
struct Shot {
    path: &'static str,
    body: Bytes,
}

/// What one request saw.
#[derive(Debug, Default)]
struct Seen {
    /// Seconds to the first chunk.
    ttft: f64,
    /// Seconds between chunks.
    gaps: Vec<f64>,
    /// Seconds to the last chunk.
    latency: f64,
    tokens: u64,
    chunks: u64,
}

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
    let server = Arc::new(Server::new(&args.server, args.load.timeout)?);
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

// === impl Server ===

impl Server {
    fn new(args: &ServerArgs, timeout_s: u64) -> Result<Self, String> {
        let wrong = |why: &dyn Display| format!("--url {}: {why}", args.url);
        let uri: Uri = args.url.parse().map_err(|error| wrong(&error))?;
        if uri.scheme_str() != Some("http") {
            return Err(wrong(&"only http:// is spoken here"));
        }
        let authority = uri.authority().ok_or_else(|| wrong(&"no host"))?.clone();
        let address = format!(
            "{}:{}",
            authority.host(),
            authority.port_u16().unwrap_or(80)
        );
        let key = args.api_key.as_ref().filter(|key| !key.is_empty());
        Ok(Self {
            uri,
            authority: authority.to_string(),
            address,
            bearer: key.map(|key| format!("Bearer {key}")),
            idle: Mutex::default(),
            patience: Duration::from_secs(timeout_s),
        })
    }

    async fn send(&self, shot: Shot) -> Result<Seen, String> {
        match timeout(self.patience, self.exchange(shot)).await {
            Ok(result) => result,
            Err(_) => Err(format!("no end after {} s", self.patience.as_secs())),
        }
    }

    async fn exchange(&self, shot: Shot) -> Result<Seen, String> {
        let text = |error: &dyn Display| error.to_string();
        let path = format!("{}{}", self.uri.path().trim_end_matches('/'), shot.path);
        let mut request = Request::post(path)
            .header(HOST, &self.authority)
            .header(CONTENT_TYPE, "application/json");
        if let Some(bearer) = &self.bearer {
            request = request.header(AUTHORIZATION, bearer);
        }
        let request = request
            .body(Full::new(shot.body))
            .map_err(|error| text(&error))?;
        let start = Instant::now();
        let mut connection = self.connection().await?;
        let response = connection
            .send_request(request)
            .await
            .map_err(|error| text(&error))?;
        let status = response.status();
        let mut body = response.into_body();
        if !status.is_success() {
            let body = body.collect().await.map_err(|error| text(&error))?;
            let body = String::from_utf8_lossy(&body.to_bytes()).into_owned();
            let body: String = body.chars().take(ERROR_CHARS).collect();
            return Err(format!("{status}: {body}"));
        }
        let mut reader = Reader::new(start);
        while let Some(frame) = body.frame().await {
            let frame = frame.map_err(|error| text(&error))?;
            if let Some(bytes) = frame.data_ref() {
                reader.take(bytes);
            }
        }
        let idle = &self.idle;
        let mut idle = idle.lock().unwrap_or_else(PoisonError::into_inner);
        idle.push(connection);
        drop(idle);
        reader.finish()
    }

    /// One that is open and unused, or a new one.
    async fn connection(&self) -> Result<Connection, String> {
        loop {
            let idle = self
                .idle
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .pop();
            let Some(mut connection) = idle else { break };
            if connection.ready().await.is_ok() {
                return Ok(connection);
            }
        }
        let wrong = |error: &dyn Display| format!("{}: {error}", self.address);
        let stream = TcpStream::connect(&self.address)
            .await
            .map_err(|error| wrong(&error))?;
        stream.set_nodelay(true).map_err(|error| wrong(&error))?;
        let (connection, driver) = handshake(TokioIo::new(stream))
            .await
            .map_err(|error| wrong(&error))?;
        // Its error comes back to whoever uses the connection, too.
        tokio::spawn(async move { drop(driver.await) });
        Ok(connection)
    }
}

/// Reads one answer against the clock.
#[derive(Debug)]
struct Reader {
    start: Instant,
    last: Instant,
    lines: Lines,
    seen: Seen,
    counted: Option<u64>,
    error: Option<String>,
}

// === impl Reader ===

impl Reader {
    fn new(start: Instant) -> Self {
        Self {
            start,
            last: start,
            lines: Lines::default(),
            seen: Seen::default(),
            counted: None,
            error: None,
        }
    }

    fn take(&mut self, bytes: &[u8]) {
        let Self {
            start,
            last,
            lines,
            seen,
            counted,
            error,
        } = self;
        lines.push(bytes, |payload| match meaning(payload) {
            Meaning::Chunk { tokens } => {
                let now = Instant::now();
                if seen.chunks == 0 {
                    seen.ttft = (now - *start).as_secs_f64();
                } else {
                    seen.gaps.push((now - *last).as_secs_f64());
                }
                *last = now;
                seen.chunks += 1;
                *counted = tokens.or(*counted);
            }
            Meaning::Count { tokens } => *counted = Some(tokens),
            Meaning::Nothing => {}
            Meaning::Error(message) => *error = Some(message),
        });
    }

    fn finish(mut self) -> Result<Seen, String> {
        if let Some(error) = self.error {
            return Err(error);
        }
        if self.seen.chunks == 0 {
            return Err("the answer ended without a token".to_owned());
        }
        self.seen.latency = (self.last - self.start).as_secs_f64();
        self.seen.tokens = self.counted.unwrap_or(self.seen.chunks);
        Ok(self.seen)
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
