//! A server that is measured: a connection for each request that runs at one time, and answers
//! read against the clock.

use std::fmt::Display;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper::header::{AUTHORIZATION, CONTENT_TYPE, HOST};
use hyper::{Request, Uri};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout};

use crate::wire::{Lines, Meaning, meaning};

/// What of an error's body is quoted.
const ERROR_CHARS: usize = 200;

type Connection = SendRequest<Full<Bytes>>;

/// A server and the connections to it that nobody uses.
#[derive(Debug)]
pub(crate) struct Server {
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
pub(crate) struct Shot {
    pub(crate) path: &'static str,
    pub(crate) body: Bytes,
}

/// What one request saw.
#[derive(Debug, Default)]
pub(crate) struct Seen {
    /// Seconds to the first chunk.
    pub(crate) ttft: f64,
    /// Seconds between chunks.
    pub(crate) gaps: Vec<f64>,
    /// Seconds to the last chunk.
    pub(crate) latency: f64,
    pub(crate) tokens: u64,
    pub(crate) chunks: u64,
}

// === impl Server ===

impl Server {
    /// `url` is its base; requests may take so many seconds.
    pub(crate) fn new(url: &str, api_key: Option<&str>, timeout_s: u64) -> Result<Self, String> {
        let wrong = |why: &dyn Display| format!("--url {url}: {why}");
        let uri: Uri = url.parse().map_err(|error| wrong(&error))?;
        if uri.scheme_str() != Some("http") {
            return Err(wrong(&"only http:// is spoken here"));
        }
        let authority = uri.authority().ok_or_else(|| wrong(&"no host"))?.clone();
        let address = format!(
            "{}:{}",
            authority.host(),
            authority.port_u16().unwrap_or(80)
        );
        let key = api_key.filter(|key| !key.is_empty());
        Ok(Self {
            uri,
            authority: authority.to_string(),
            address,
            bearer: key.map(|key| format!("Bearer {key}")),
            idle: Mutex::default(),
            patience: Duration::from_secs(timeout_s),
        })
    }

    /// Sends a request whose answer is a stream, and follows that to its end.
    pub(crate) async fn send(&self, shot: Shot) -> Result<Seen, String> {
        self.in_time(self.exchange(shot)).await
    }

    /// Sends a request that is answered at once.
    pub(crate) async fn ask(&self, shot: Shot) -> Result<Bytes, String> {
        let whole = async {
            let connection = self.connection().await?;
            let (connection, body) = self.open(shot, connection).await?;
            let body = body.collect().await.map_err(|error| error.to_string())?;
            self.keep(connection);
            Ok(body.to_bytes())
        };
        self.in_time(whole).await
    }

    async fn in_time<T>(
        &self,
        answer: impl Future<Output = Result<T, String>>,
    ) -> Result<T, String> {
        match timeout(self.patience, answer).await {
            Ok(result) => result,
            Err(_) => Err(format!("no end after {} s", self.patience.as_secs())),
        }
    }

    async fn exchange(&self, shot: Shot) -> Result<Seen, String> {
        let start = Instant::now();
        let connection = self.connection().await?;
        let (connection, mut body) = self.open(shot, connection).await?;
        let mut reader = Reader::new(start);
        while let Some(frame) = body.frame().await {
            let frame = frame.map_err(|error| error.to_string())?;
            if let Some(bytes) = frame.data_ref() {
                reader.take(bytes);
            }
        }
        self.keep(connection);
        reader.finish()
    }

    /// Sends a request; the body of a good answer.
    async fn open(
        &self,
        shot: Shot,
        mut connection: Connection,
    ) -> Result<(Connection, Incoming), String> {
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
        let response = connection
            .send_request(request)
            .await
            .map_err(|error| text(&error))?;
        let status = response.status();
        let body = response.into_body();
        if !status.is_success() {
            let body = body.collect().await.map_err(|error| text(&error))?;
            let body = String::from_utf8_lossy(&body.to_bytes()).into_owned();
            let body: String = body.chars().take(ERROR_CHARS).collect();
            return Err(format!("{status}: {body}"));
        }
        Ok((connection, body))
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

    fn keep(&self, connection: Connection) {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        idle.push(connection);
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
