//! One rank's `Execute` stream: plans out, results in, in the order of steps (R1).

use std::collections::VecDeque;
use std::fmt;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::Bytes;
use futures_util::Stream;
use futures_util::future::BoxFuture;
use headrace_core::ids::StepId;
use headrace_core::plan::StepResult;
use headrace_wire::{ShardClient, decode_result};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use tonic::{Response, Status, Streaming};

use crate::error::ShardError;

/// A plan and its masks.
const MESSAGES_A_STEP: usize = 2;

/// One rank's result.
#[derive(Debug)]
pub(crate) struct RankResult {
    pub(crate) result: StepResult,
    pub(crate) bytes: Bytes,
}

/// One rank.
#[derive(Debug)]
pub(crate) struct RankStream {
    rank: usize,
    outbound: mpsc::Sender<Bytes>,
    inbound: Inbound,
    /// Results that other ranks still owe; at most the plans in flight.
    results: VecDeque<RankResult>,
    /// The step whose result comes next,
    expected: StepId,
    /// and how many are owed.
    owed: u32,
}

/// A server may hold its response headers back until it has the first result, so plans are sent
/// before the call is answered.
enum Inbound {
    Opening(BoxFuture<'static, Result<Response<Streaming<Bytes>>, Status>>),
    Open(Box<Streaming<Bytes>>),
}

// === impl RankStream ===

impl RankStream {
    /// Opens the stream; `depth` plans may be in flight.
    pub(crate) fn open(
        rank: usize,
        mut client: ShardClient<Channel>,
        first_step: StepId,
        depth: u32,
    ) -> Self {
        let (outbound, plans) = mpsc::channel(MESSAGES_A_STEP * depth as usize);
        let call = async move { client.execute(ReceiverStream::new(plans)).await };
        Self {
            rank,
            outbound,
            inbound: Inbound::Opening(Box::pin(call)),
            results: VecDeque::with_capacity(depth as usize),
            expected: first_step,
            owed: 0,
        }
    }

    /// Hands a plan to the stream; never waits.
    pub(crate) fn send(&mut self, plan: Bytes) -> Result<(), ShardError> {
        self.put(plan)?;
        self.owed += 1;
        Ok(())
    }

    /// Hands over the masks of the plan that was sent last; never waits.
    pub(crate) fn send_mask(&mut self, mask: Bytes) -> Result<(), ShardError> {
        self.put(mask)
    }

    fn put(&mut self, message: Bytes) -> Result<(), ShardError> {
        match self.outbound.try_send(message) {
            Ok(()) => Ok(()),
            // The stream is being torn down; its status comes by the way of results.
            Err(mpsc::error::TrySendError::Closed(_)) => self.ended("it takes no more plans"),
            Err(mpsc::error::TrySendError::Full(_)) => {
                unreachable!("no more is sent than the plans in flight take; this is a router bug")
            }
        }
    }

    /// Takes in what has arrived.
    pub(crate) fn poll(&mut self, cx: &mut Context<'_>) -> Result<(), ShardError> {
        loop {
            let message = match &mut self.inbound {
                Inbound::Opening(call) => match call.as_mut().poll(cx) {
                    Poll::Pending => return Ok(()),
                    Poll::Ready(Ok(response)) => {
                        self.inbound = Inbound::Open(Box::new(response.into_inner()));
                        continue;
                    }
                    Poll::Ready(Err(status)) => return self.ended(status.message()),
                },
                Inbound::Open(stream) => match Pin::new(&mut **stream).poll_next(cx) {
                    Poll::Pending => return Ok(()),
                    Poll::Ready(message) => message,
                },
            };
            match message {
                Some(Ok(bytes)) => self.accept(bytes)?,
                Some(Err(status)) => return self.ended(status.message()),
                None => return self.ended("without a status"),
            }
        }
    }

    /// The oldest result that was not taken.
    pub(crate) fn front(&self) -> Option<&RankResult> {
        self.results.front()
    }

    /// Takes it.
    pub(crate) fn pop(&mut self) -> Option<RankResult> {
        self.results.pop_front()
    }

    fn accept(&mut self, bytes: Bytes) -> Result<(), ShardError> {
        let rank = self.rank;
        let result = decode_result(bytes.clone())
            .map_err(|source| ShardError::Malformed { rank, source })?;
        if result.step != self.expected || self.owed == 0 {
            let (step, expected) = (result.step, self.expected);
            return Err(ShardError::OutOfOrder {
                rank,
                step,
                expected,
            });
        }
        self.expected = self.expected.next();
        self.owed -= 1;
        self.results.push_back(RankResult { result, bytes });
        Ok(())
    }

    fn ended(&self, message: &str) -> Result<(), ShardError> {
        Err(ShardError::StreamEnded {
            rank: self.rank,
            message: message.to_owned(),
        })
    }
}

impl fmt::Debug for Inbound {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Opening(_) => "Opening",
            Self::Open(_) => "Open",
        })
    }
}
