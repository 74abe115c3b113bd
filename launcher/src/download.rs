//! The first child: it brings the model to this machine and says where it is.

use std::path::PathBuf;
use std::time::Duration;

use nix::sys::signal::Signal;
use tokio::sync::mpsc;
use tokio::time::timeout;

use crate::child::{Event, Spec};
use crate::control::Control;
use crate::error::{Death, End, LaunchError};
use crate::output::Output;
use crate::signals::Signals;

/// A download that is told to stop may finish a write for this long.
const STOP_DEADLINE: Duration = Duration::from_secs(5);
const EVENTS_QUEUED: usize = 16;

/// A model on this machine.
#[derive(Debug)]
pub(crate) struct Found {
    pub(crate) path: PathBuf,
    pub(crate) sha: Option<String>,
}

/// `None` when a signal came first.
pub(crate) async fn download(
    spec: &Spec,
    output: &Output,
    signals: &mut Signals,
) -> Result<Option<Found>, LaunchError> {
    let (sender, mut events) = mpsc::channel(EVENTS_QUEUED);
    let child = spec
        .spawn(output, sender)
        .map_err(LaunchError::DownloadError)?;
    let mut found = None;
    let mut fatal = None;
    loop {
        let event = tokio::select! {
            event = events.recv() => event,
            signal = signals.next() => {
                tracing::info!(signal, "Stopping the download.");
                child.signal(Signal::SIGTERM);
                if timeout(STOP_DEADLINE, ended(&mut events)).await.is_err() {
                    child.signal(Signal::SIGKILL);
                    ended(&mut events).await;
                }
                return Ok(None);
            }
        };
        match event.map(|(_, event)| event) {
            Some(Event::Control(Control::Model { path, sha })) => found = Some(Found { path, sha }),
            Some(Event::Control(Control::Fatal { message })) => fatal = Some(message),
            Some(Event::Control(
                Control::Listening { .. } | Control::Ready { .. } | Control::Serving,
            )) => {}
            Some(Event::Exited { status, last_lines }) => {
                if status.success() && found.is_some() && fatal.is_none() {
                    return Ok(found);
                }
                let (name, end) = (child.role.to_string(), End::Exited(status));
                let death = Death {
                    name,
                    fatal,
                    end,
                    last_lines,
                };
                return Err(LaunchError::DownloadError(death));
            }
            None => unreachable!("a child's last event is its exit; this is a launcher bug"),
        }
    }
}

async fn ended(events: &mut mpsc::Receiver<(crate::child::Role, Event)>) {
    while let Some((_, event)) = events.recv().await {
        if matches!(event, Event::Exited { .. }) {
            return;
        }
    }
}
