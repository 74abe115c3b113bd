//! A job in the router's place: it runs on a thread of this process, drives the shards itself and
//! ends the server when it is done. What it writes on standard output stays its own: the log of
//! launcher and shards goes to standard error.

use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::thread;

use headrace_config::Serve;
use nix::sys::signal::Signal;
use tokio::sync::mpsc;

use crate::child::{Child, Event, Role};
use crate::control::Control;
use crate::error::{Death, End};

/// Signals on their way to a job.
const SIGNALS_QUEUED: usize = 4;
/// How the system writes an exit with status 1.
const RAW_FAILURE: i32 = 1 << 8;

/// What is done while the shards run. The error is a sentence for a person.
pub type Job = Box<dyn FnOnce(Serve, Stage) -> Result<(), String> + Send>;

/// What a job tells the launcher, and hears from it.
#[derive(Debug)]
pub struct Stage {
    events: mpsc::Sender<(Role, Event)>,
    signals: mpsc::Receiver<Signal>,
}

// === impl Stage ===

impl Stage {
    /// Says that the group is prepared, which ends the launcher's deadline for starting.
    pub async fn ready(&self) {
        // Nobody listens any more when the launcher is ending.
        drop(
            self.events
                .send((Role::Job, Event::Control(Control::Serving)))
                .await,
        );
    }

    /// Resolves when the job is asked to end. Safe to drop while it waits.
    pub async fn stopped(&mut self) {
        self.signals.recv().await;
    }
}

/// Starts the job; its end arrives as the exit of a child does.
pub(crate) fn start(
    job: Job,
    serve: Serve,
    events: mpsc::Sender<(Role, Event)>,
) -> Result<Child, Death> {
    let (signals, received) = mpsc::channel(SIGNALS_QUEUED);
    let stage = Stage {
        events: events.clone(),
        signals: received,
    };
    let run = move || {
        let status = match job(serve, stage) {
            Ok(()) => ExitStatus::from_raw(0),
            Err(message) => {
                let fatal = Event::Control(Control::Fatal { message });
                drop(events.blocking_send((Role::Job, fatal)));
                ExitStatus::from_raw(RAW_FAILURE)
            }
        };
        let exited = Event::Exited {
            status,
            last_lines: Vec::new(),
        };
        drop(events.blocking_send((Role::Job, exited)));
    };
    let name = Role::Job.to_string();
    match thread::Builder::new().name(name.clone()).spawn(run) {
        Ok(_) => Ok(Child::on_a_thread(Role::Job, signals)),
        Err(error) => Err(Death {
            name,
            fatal: None,
            end: End::NotStarted(error),
            last_lines: Vec::new(),
        }),
    }
}
