//! Traces of requests. A request that is sampled, or that asks for its own waterfall, carries a
//! [`RequestTrace`] in which moments are noted; at its end one pure function ([`spans::build`]) makes
//! spans of them, for the collector and for the answer alike. Every other request pays for the
//! decision alone.

mod context;
mod inline;
mod sampler;
mod spans;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use axum::extract::{MatchedPath, Request};
use axum::http::{HeaderMap, HeaderName, HeaderValue, header};
use axum::response::Response;
use headrace_config::Serve;
use headrace_engine::{Sampling, SeqTrace};
use headrace_otlp::{
    ClientCertificate, Counts, Exporter, Limits, Protocol, Span, SpanId, Target, TargetError, Tls,
    TraceId, Worker, exporter,
};

use self::sampler::Sampler;
pub(crate) use self::spans::{Asked, Http, SeqLine, Settled, Timeline};
use crate::error::FailureClass;
use crate::meter::Times;
use crate::validate::random_u64;

/// `x-trace: inline` asks for the waterfall in the answer.
const X_TRACE: HeaderName = HeaderName::from_static("x-trace");
const INLINE: &[u8] = b"inline";

/// What the collector has to take the last spans when the process ends.
const FLUSH_MAX: Duration = Duration::from_secs(2);

/// Who is traced, and where spans go.
#[derive(Debug)]
pub(crate) struct Tracing {
    sampler: Sampler,
    /// `None`: nowhere, and nobody is sampled.
    exporter: Option<Exporter>,
}

/// A request that is traced. Shared by whoever works on it.
#[derive(Debug)]
pub(crate) struct RequestTrace {
    origin: Origin,
    notes: Mutex<Notes>,
}

/// Where a request stands in its trace.
#[derive(Debug, Clone)]
pub(crate) struct Origin {
    pub(crate) trace: TraceId,
    /// The caller's span.
    pub(crate) parent: Option<SpanId>,
    /// `tracestate` as it came.
    pub(crate) state: Option<Arc<str>>,
    /// Spans go to the collector.
    pub(crate) sampled: bool,
    /// Spans go into the answer.
    pub(crate) inline: bool,
    /// What the ids of the request's own spans are made of.
    pub(crate) random: u64,
}

/// A timeline in the making: its sequences are still the driver's.
#[derive(Debug)]
struct Notes {
    line: Timeline,
    sequences: Vec<Arc<SeqTrace>>,
}

/// One sequence of a traced request, in the hands of whoever answers.
#[derive(Debug)]
pub(crate) struct SeqHandle {
    request: Arc<RequestTrace>,
    index: usize,
}

/// Ends a trace when the answer does, or when its client is gone.
#[derive(Debug)]
pub(crate) struct Guard {
    exporter: Option<Exporter>,
    trace: Arc<RequestTrace>,
}

tokio::task_local! {
    /// The trace of the request that this task answers: as ambient as the log's own span.
    static CURRENT: Arc<RequestTrace>;
}

// === impl Tracing ===

impl Tracing {
    /// Without a collector; requests may still ask for their waterfalls.
    pub(crate) fn off() -> Self {
        Self {
            sampler: Sampler::OFF,
            exporter: None,
        }
    }

    /// As configured, and the task that sends spans. Needs a runtime.
    pub(crate) fn new(serve: &Serve) -> Result<(Self, Option<Worker>), TargetError> {
        let (telemetry, asked) = (&serve.telemetry, &serve.telemetry.traces);
        let Some(endpoint) = &telemetry.otlp_endpoint else {
            return Ok((Self::off(), None));
        };
        let headers = asked.headers.iter();
        let target = Target {
            protocol: if asked.protocol == "grpc" {
                Protocol::Grpc
            } else {
                Protocol::HttpProtobuf
            },
            endpoint: endpoint.clone(),
            tls: asked.tls.as_ref().map(tls),
            headers: headers
                .map(|pair| (pair.name.clone(), pair.value.clone()))
                .collect(),
            timeout: Duration::from_millis(asked.timeout_ms),
        };
        let mut resource = vec![
            (
                "service.name".to_owned(),
                telemetry.otlp_service_name.clone(),
            ),
            (
                "service.version".to_owned(),
                env!("CARGO_PKG_VERSION").to_owned(),
            ),
            ("headrace.component".to_owned(), "router".to_owned()),
        ];
        let more = asked
            .resource
            .iter()
            .filter(|pair| pair.name != "service.name");
        resource.extend(more.map(|pair| (pair.name.clone(), pair.value.clone())));
        let limits = Limits {
            queue_max: asked.queue_max,
            batch_max: asked.batch_max,
            delay: Duration::from_millis(asked.delay_ms),
        };
        let (exporter, worker) = exporter(&target, resource, limits)?;
        let tracing = Self {
            sampler: Sampler::new(&asked.sampler, asked.sampler_ratio),
            exporter: Some(exporter),
        };
        Ok((tracing, Some(worker)))
    }

    /// The trace of a request, if it is to have one.
    pub(crate) fn begin(&self, request: &Request) -> Option<Arc<RequestTrace>> {
        let headers = request.headers();
        let asked = headers.get(X_TRACE);
        if self.sampler.is_off() && asked.is_none() {
            return None;
        }
        let inline = asked.is_some_and(|asked| asked.as_bytes().eq_ignore_ascii_case(INLINE));
        let parent = context::parent(headers);
        let trace = parent.map_or_else(random_trace, |parent| parent.trace);
        let sampled = self
            .sampler
            .takes(trace, parent.map(|parent| parent.sampled));
        if !sampled && !inline {
            return None;
        }
        let origin = Origin {
            trace,
            parent: parent.map(|parent| parent.span),
            state: parent.and_then(|_| context::state(headers)),
            sampled,
            inline,
            random: random_u64(),
        };
        Some(Arc::new(RequestTrace::new(origin, http(request))))
    }

    /// Sends what waits, for [`FLUSH_MAX`] at most.
    pub(crate) async fn flush(&self, worker: Option<tokio::task::JoinHandle<()>>) {
        let (Some(exporter), Some(worker)) = (&self.exporter, worker) else {
            return;
        };
        exporter.close();
        let is_late = tokio::time::timeout(FLUSH_MAX, worker).await.is_err();
        let counts = exporter.counts();
        if is_late || counts.dropped + counts.failed > 0 {
            tracing::warn!(
                sent = counts.sent,
                dropped = counts.dropped,
                failed = counts.failed,
                in_time = !is_late,
                "Not all spans reached the collector"
            );
        }
    }

    /// What became of spans so far; `None` without a collector.
    pub(crate) fn counts(&self) -> Option<Counts> {
        self.exporter.as_ref().map(Exporter::counts)
    }

    /// The answer of a traced request: with its waterfall, if that was asked for. The trace ends with
    /// it.
    pub(crate) async fn finish(
        &self,
        trace: Arc<RequestTrace>,
        mut response: Response,
    ) -> Response {
        trace.responded(&response);
        if trace.origin.sampled {
            trace.origin.tell(response.headers_mut());
        }
        let guard = Guard {
            exporter: self.exporter.clone(),
            trace,
        };
        inline::finish(guard, response).await
    }
}

// === impl RequestTrace ===

impl RequestTrace {
    fn new(origin: Origin, http: Http) -> Self {
        let since = SystemTime::now().duration_since(UNIX_EPOCH);
        let line = Timeline {
            received: Instant::now(),
            unix: since.unwrap_or_default(),
            http,
            asked: None,
            validate: None,
            tokenize: None,
            grammar: None,
            sequences: Vec::new(),
            responded: None,
            streamed: false,
        };
        Self {
            origin,
            notes: Mutex::new(Notes {
                line,
                sequences: Vec::new(),
            }),
        }
    }

    /// The id that logs and callers know the request by.
    pub(crate) fn id(&self) -> TraceId {
        self.origin.trace
    }

    /// Runs what answers the request, so that [`RequestTrace::current`] finds it.
    pub(crate) async fn around<F: Future>(self: Arc<Self>, answering: F) -> F::Output {
        CURRENT.scope(self, answering).await
    }

    /// The trace of the request that this task answers, if it is traced.
    pub(crate) fn current() -> Option<Arc<Self>> {
        CURRENT.try_with(Arc::clone).ok()
    }

    /// Parameters are being checked.
    pub(crate) fn validating(&self) {
        self.line(|line| line.validate = Some((Instant::now(), None)));
    }

    /// Prompts were tokenized, from that moment until now.
    pub(crate) fn tokenized(&self, begun: Instant) {
        self.line(|line| line.tokenize = Some((begun, Some(Instant::now()))));
    }

    /// A grammar was found or compiled, from that moment until now.
    pub(crate) fn compiled(&self, begun: Instant) {
        self.line(|line| line.grammar = Some((begun, Some(Instant::now()))));
    }

    /// All checks are passed.
    pub(crate) fn validated(&self, model: &str, sampling: &Sampling, tokens_max: u32) {
        let asked = Asked {
            model: model.to_owned(),
            sampling: sampling.clone(),
            tokens_max,
        };
        self.line(|line| {
            if let Some((_, end)) = &mut line.validate {
                end.get_or_insert_with(Instant::now);
            }
            line.asked = Some(asked);
        });
    }

    /// Another sequence, about to be submitted.
    pub(crate) fn sequence(self: &Arc<Self>, input: u32) -> (Arc<SeqTrace>, SeqHandle) {
        let ids = SeqTrace::new(self.origin.trace.0, self.origin.sampled, random_u64());
        let ids = Arc::new(ids);
        let mut notes = self.lock();
        let index = notes.sequences.len();
        notes.sequences.push(Arc::clone(&ids));
        let line = SeqLine::new(&ids, input);
        notes.line.sequences.push(line);
        let request = Arc::clone(self);
        (ids, SeqHandle { request, index })
    }

    /// Whether every sequence has been told to its end, good or bad.
    pub(crate) fn is_settled(&self) -> bool {
        let notes = self.lock();
        let mut sequences = notes.line.sequences.iter();
        sequences.all(|sequence| sequence.settled.is_some())
    }

    /// All spans as they stand, what runs ending now.
    pub(crate) fn spans(&self) -> Vec<Span> {
        let notes = self.lock();
        let mut line = notes.line.clone();
        for (sequence, trace) in line.sequences.iter_mut().zip(&notes.sequences) {
            sequence.notes = trace.notes();
        }
        drop(notes);
        spans::build(&self.origin, &line, Instant::now())
    }

    fn responded(&self, response: &Response) {
        let kind = response.headers().get(header::CONTENT_TYPE);
        let streamed = kind.is_some_and(|kind| kind == "text/event-stream");
        let class = response.extensions().get::<FailureClass>();
        let error = class.map(|class| class.err);
        let status = response.status().as_u16();
        self.line(|line| {
            (line.http.status, line.http.error) = (status, error);
            (line.responded, line.streamed) = (Some(Instant::now()), streamed);
        });
    }

    fn line(&self, change: impl FnOnce(&mut Timeline)) {
        change(&mut self.lock().line);
    }

    fn lock(&self) -> MutexGuard<'_, Notes> {
        self.notes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

// === impl Origin ===

impl Origin {
    /// Names the request's span to its caller.
    fn tell(&self, headers: &mut HeaderMap) {
        let parent = context::header(self.trace, spans::http_id(self), self.sampled);
        headers.insert(context::TRACEPARENT, parent);
        let state = self.state.as_deref().map(HeaderValue::from_str);
        if let Some(Ok(state)) = state {
            headers.insert(context::TRACESTATE, state);
        }
    }
}

// === impl SeqHandle ===

impl SeqHandle {
    /// It ended well.
    pub(crate) fn succeeded(&self, times: Times, seed: Option<u64>) {
        self.settle(Settled {
            times: Some(times),
            seed,
            error: None,
        });
    }

    /// It failed.
    pub(crate) fn failed(&self, class: &str) {
        self.settle(Settled {
            times: None,
            seed: None,
            error: Some(class.to_owned()),
        });
    }

    fn settle(&self, settled: Settled) {
        self.request
            .line(|line| line.sequences[self.index].settled = Some(settled));
    }
}

// === impl Guard ===

impl Drop for Guard {
    fn drop(&mut self) {
        if let Some(exporter) = self.exporter.as_ref().filter(|_| self.trace.origin.sampled) {
            exporter.export(self.trace.spans());
        }
    }
}

// === free functions ===

fn http(request: &Request) -> Http {
    let route = request.extensions().get::<MatchedPath>();
    let agent = request.headers().get(header::USER_AGENT);
    Http {
        method: request.method().to_string(),
        route: route.map_or_else(
            || request.uri().path().to_owned(),
            |route| route.as_str().to_owned(),
        ),
        path: request.uri().path().to_owned(),
        agent: agent.and_then(|agent| agent.to_str().ok().map(str::to_owned)),
        status: 0,
        error: None,
    }
}

fn tls(asked: &headrace_config::Tls) -> Tls {
    Tls {
        roots: asked.roots.clone(),
        client: asked.client.as_ref().map(|own| ClientCertificate {
            certificate: own.certificate.clone(),
            key: own.key.clone(),
        }),
    }
}

fn random_trace() -> TraceId {
    let mut id = [0; 16];
    id[..8].copy_from_slice(&random_u64().to_be_bytes());
    // Not all of it can be zero.
    id[8..].copy_from_slice(&random_u64().max(1).to_be_bytes());
    TraceId(id)
}
