//! Text events become server-sent events: one write for all that is ready, a comment where
//! nothing comes for long, and the end of the sequence when the client is gone.

use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::Body;
use axum::http::{HeaderName, HeaderValue, header};
use axum::response::{IntoResponse, Response};
use bytes::{BufMut, Bytes, BytesMut};
use futures_util::{Stream, StreamExt, stream};
use serde::Serialize;
use tokio::time::{Instant, Sleep, sleep};

use crate::error::ApiError;
use crate::meter::Count;
use crate::respond::{Piece, Respond};

/// A stream that says nothing for so long says that it lives.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

const COMMENT: Bytes = Bytes::from_static(b":\n\n");

/// The last event of OpenAI's streams.
pub(crate) const DONE: Bytes = Bytes::from_static(b"data: [DONE]\n\n");

/// Room for some events; it is reused once they are on their way.
const BUFFER_BYTES: usize = 4096;

/// Room for one event, usually; less is made up for before it is written.
const EVENT_BYTES: usize = 512;

const ACCEL_BUFFERING: HeaderName = HeaderName::from_static("x-accel-buffering");

/// How an API writes the events of one sequence.
pub(crate) trait Frames: Send + 'static {
    /// A token. The last one has `finish`.
    fn piece(&mut self, piece: &Piece, respond: &Respond, out: &mut BytesMut);

    /// The sequence failed after the status was sent.
    fn failed(&mut self, error: &ApiError, out: &mut BytesMut);
}

/// The stream of one sequence's events; every item is what was ready at one time.
pub(crate) fn frames<F: Frames>(respond: Respond, frames: F) -> impl Stream<Item = Bytes> + Send {
    let writer = Writer {
        respond,
        frames,
        pieces: Vec::new(),
        buffer: BytesMut::with_capacity(BUFFER_BYTES),
    };
    stream::unfold(Some(Box::new(writer)), |writer| async {
        let mut writer = writer?;
        let progress = writer.advance().await;
        let bytes = writer.buffer.split().freeze();
        Some((bytes, (progress == Progress::More).then_some(writer)))
    })
    // What is held back makes no event.
    .filter(|bytes| std::future::ready(!bytes.is_empty()))
}

/// The response that such streams are the body of.
pub(crate) fn response(events: impl Stream<Item = Bytes> + Send + 'static) -> Response {
    let body = Body::from_stream(KeepAlive::new(Box::pin(events), KEEP_ALIVE));
    let headers = [
        (
            header::CONTENT_TYPE,
            HeaderValue::from_static("text/event-stream"),
        ),
        (header::CACHE_CONTROL, HeaderValue::from_static("no-cache")),
        (ACCEL_BUFFERING, HeaderValue::from_static("no")),
    ];
    (headers, body).into_response()
}

/// Appends one event.
pub(crate) fn event<T: Serialize>(payload: &T, out: &mut BytesMut) {
    out.extend_from_slice(b"data: ");
    serde_json::to_writer(out.writer(), payload)
        .expect("events are structs of text and numbers; this is a router bug");
    out.extend_from_slice(b"\n\n");
}

/// One sequence, and how it is written.
struct Writer<F> {
    respond: Respond,
    frames: F,
    pieces: Vec<Piece>,
    buffer: BytesMut,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Progress {
    More,
    Over,
}

/// Puts a comment where the inner stream is silent. The timer is only moved when it fires.
pub(crate) struct KeepAlive<S> {
    inner: Pin<Box<S>>,
    period: Duration,
    timer: Pin<Box<Sleep>>,
    last: Instant,
}

// === impl Writer ===

impl<F: Frames> Writer<F> {
    /// Writes what is ready.
    async fn advance(&mut self) -> Progress {
        self.buffer.reserve(EVENT_BYTES);
        let result = self.respond.next(&mut self.pieces).await;
        if let Err(error) = result {
            self.respond.meter.fail(error.class(), Count::Here);
            tracing::error!(%error, "A stream failed");
            self.frames.failed(&error, &mut self.buffer);
            return Progress::Over;
        }
        let mut progress = Progress::More;
        for piece in self.pieces.drain(..) {
            if piece.finish.is_some() {
                progress = Progress::Over;
                self.respond.meter.succeed();
            }
            self.frames.piece(&piece, &self.respond, &mut self.buffer);
        }
        progress
    }
}

// === impl KeepAlive ===

impl<S> KeepAlive<S> {
    pub(crate) fn new(inner: Pin<Box<S>>, period: Duration) -> Self {
        Self {
            inner,
            period,
            timer: Box::pin(sleep(period)),
            last: Instant::now(),
        }
    }
}

impl<S: Stream<Item = Bytes>> Stream for KeepAlive<S> {
    type Item = Result<Bytes, Infallible>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if let Poll::Ready(item) = self.inner.as_mut().poll_next(cx) {
            self.last = Instant::now();
            return Poll::Ready(item.map(Ok));
        }
        while self.timer.as_mut().poll(cx).is_ready() {
            let (now, due) = (Instant::now(), self.last + self.period);
            if now >= due {
                let next = now + self.period;
                self.last = now;
                self.timer.as_mut().reset(next);
                return Poll::Ready(Some(Ok(COMMENT)));
            }
            self.timer.as_mut().reset(due);
        }
        Poll::Pending
    }
}
