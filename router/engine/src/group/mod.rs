//! The shard group: from sockets to one ordered pair of streams. It is *connecting* and
//! *preparing* in [`bring_up`], *ready* as a [`ShardGroup`], *draining* while it is dropped with
//! nothing in flight, and *down* with the first [`GroupEvent::Down`]. One failure domain (R8): what
//! any rank does wrong ends it.

mod connect;
mod stream;

use std::collections::VecDeque;
use std::future::poll_fn;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use headrace_core::ids::StepId;
use headrace_core::plan::StepResult;
use tokio::time::{Instant, sleep_until};

use crate::error::ShardError;
use stream::{RankResult, RankStream};

#[cfg(test)]
pub(crate) use connect::Io;
pub(crate) use connect::{Dial, Ready, bring_up, dial_sockets};

/// What the group tells the driver.
#[derive(Debug)]
#[expect(
    clippy::large_enum_variant,
    reason = "one a step, moved once; the other variant ends the group"
)]
pub(crate) enum GroupEvent {
    /// The oldest step in flight is done, and the ranks agree.
    Result(StepDone),
    /// The group is lost, with everything in flight.
    Down(ShardError),
}

/// A step that every rank has finished.
#[derive(Debug)]
pub(crate) struct StepDone {
    /// What rank 0 drew.
    pub(crate) result: StepResult,
    /// As it came.
    pub(crate) bytes: Bytes,
    /// From sending the plan to the last rank's result.
    pub(crate) took: Duration,
    /// What the step added: from the result before it, or from sending it if that was later. While
    /// plans wait for the device this is the device's time with all that surrounds it.
    pub(crate) gap: Duration,
}

/// A prepared group.
#[derive(Debug)]
pub(crate) struct ShardGroup {
    ranks: Vec<RankStream>,
    in_flight: VecDeque<Sent>,
    /// When a step last ended: the next one cannot have started on the device before.
    last_result: Instant,
    step_deadline: Duration,
}

#[derive(Debug, Clone, Copy)]
struct Sent {
    step: StepId,
    at: Instant,
}

// === impl ShardGroup ===

impl ShardGroup {
    fn new(ranks: Vec<RankStream>, step_deadline: Duration) -> Self {
        Self {
            ranks,
            in_flight: VecDeque::new(),
            last_result: Instant::now(),
            step_deadline,
        }
    }

    /// Sends one plan, encoded once, to every rank. Never waits: a stream has room for as many
    /// plans as may be in flight.
    pub(crate) fn send(&mut self, step: StepId, plan: &Bytes) -> Result<(), ShardError> {
        for rank in &mut self.ranks {
            rank.send(plan.clone())?;
        }
        self.in_flight.push_back(Sent {
            step,
            at: Instant::now(),
        });
        Ok(())
    }

    /// Sends the masks of a step to rank 0, which draws. Never waits: a stream has room for them.
    pub(crate) fn send_mask(&mut self, mask: Bytes) -> Result<(), ShardError> {
        self.ranks[0].send_mask(mask)
    }

    /// The next thing that happens. Cancel safe: results of single ranks are kept until the step
    /// is complete.
    pub(crate) async fn next(&mut self) -> GroupEvent {
        let step_deadline = self.step_deadline;
        let due = self.in_flight.front().map(|sent| {
            let started = sent.at.max(self.last_result);
            (sent.step, started + step_deadline)
        });
        let event = poll_fn(|cx| self.poll_step(cx));
        let Some((step, deadline)) = due else {
            return event.await.into();
        };
        tokio::select! {
            biased;
            event = event => event.into(),
            () = sleep_until(deadline) => {
                GroupEvent::Down(ShardError::StepDeadline { step, deadline: step_deadline })
            }
        }
    }

    fn poll_step(&mut self, cx: &mut Context<'_>) -> Poll<Result<StepDone, ShardError>> {
        let mut complete = true;
        for rank in &mut self.ranks {
            rank.poll(cx)?;
            complete &= rank.front().is_some();
        }
        if complete {
            Poll::Ready(self.complete())
        } else {
            Poll::Pending
        }
    }

    /// Takes the finished step off every rank and compares.
    fn complete(&mut self) -> Result<StepDone, ShardError> {
        let mut results = self.ranks.iter_mut().map(|rank| {
            rank.pop()
                .expect("every rank has a result; this is a router bug")
        });
        let RankResult { result, bytes } = results
            .next()
            .expect("a group has at least one rank; this is a router bug");
        let differs = results.map(|other| other.result.digest).enumerate();
        for (follower, theirs) in differs {
            if theirs != result.digest {
                let (rank, step, ours) = (follower + 1, result.step, result.digest);
                return Err(ShardError::DigestMismatch {
                    rank,
                    step,
                    ours,
                    theirs,
                });
            }
        }
        let sent = self
            .in_flight
            .pop_front()
            .expect("a rank accepts no result beyond what was sent; this is a router bug");
        let started = sent.at.max(self.last_result);
        self.last_result = Instant::now();
        Ok(StepDone {
            result,
            bytes,
            took: self.last_result - sent.at,
            gap: self.last_result - started,
        })
    }
}

impl From<Result<StepDone, ShardError>> for GroupEvent {
    fn from(outcome: Result<StepDone, ShardError>) -> Self {
        match outcome {
            Ok(done) => Self::Result(done),
            Err(error) => Self::Down(error),
        }
    }
}
