//! The signals that end a server.

use std::io;
use std::time::Duration;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::time::Instant;

/// Signals closer together than this are one request: `timeout` signals the process and then its
/// group, a shell its job, and a person who hurries takes longer.
const SAME: Duration = Duration::from_millis(500);

/// SIGINT, SIGTERM and SIGHUP, from the moment this is made.
pub(crate) struct Signals {
    interrupt: Signal,
    terminate: Signal,
    hangup: Signal,
    last: Option<Instant>,
}

// === impl Signals ===

impl Signals {
    pub(crate) fn install() -> io::Result<Self> {
        Ok(Self {
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
            hangup: signal(SignalKind::hangup())?,
            last: None,
        })
    }

    /// The name of the next signal that means something new. Safe to drop while it waits.
    pub(crate) async fn next(&mut self) -> &'static str {
        loop {
            let name = tokio::select! {
                _ = self.interrupt.recv() => "SIGINT",
                _ = self.terminate.recv() => "SIGTERM",
                _ = self.hangup.recv() => "SIGHUP",
            };
            if self.last.is_none_or(|last| last.elapsed() >= SAME) {
                self.last = Some(Instant::now());
                return name;
            }
        }
    }
}
