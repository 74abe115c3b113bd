//! One child process: its lifeline, its control lines, its log, its end.
//!
//! Standard input is the lifeline, the read end of a pipe that only this process can write: when
//! the launcher is gone, however it went, the child reads the end of the file and exits. Standard
//! output carries control lines, standard error the log. A child has a process group of its own,
//! so that Ctrl-C in a terminal reaches the launcher alone.

use std::ffi::OsString;
use std::fmt;
use std::process::{ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::Pid;
use tokio::io::AsyncRead;
use tokio::process::{ChildStdin, Command};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use crate::control::Control;
use crate::error::{Death, End};
use crate::lines::{Lines, Tail};
use crate::output::Output;

/// What a child has written when it ends is read for this long; a grandchild may hold its pipes.
const PIPES_GRACE: Duration = Duration::from_millis(500);
/// Signals on their way to a child.
const SIGNALS_QUEUED: usize = 4;

/// What a process is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Role {
    Download,
    Router,
    /// A thread of the launcher in the router's place.
    Job,
    Shard(u32),
}

/// How to start a child.
#[derive(Debug, Clone)]
pub(crate) struct Spec {
    pub(crate) role: Role,
    /// The program and its arguments.
    pub(crate) command: Vec<OsString>,
    pub(crate) env: Vec<(&'static str, OsString)>,
    pub(crate) env_remove: Vec<&'static str>,
    pub(crate) log: Log,
}

/// Where a child's standard error goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Log {
    /// Through the launcher, line by line, with the child's name.
    Pumped,
    /// Straight to ours: progress bars want a terminal.
    Inherited,
}

/// What happens to a child.
#[derive(Debug)]
pub(crate) enum Event {
    Control(Control),
    Exited {
        status: ExitStatus,
        last_lines: Vec<String>,
    },
}

/// A child that was started. Dropping it closes the lifeline.
#[derive(Debug)]
pub(crate) struct Child {
    pub(crate) role: Role,
    signals: mpsc::Sender<Signal>,
    _lifeline: Option<ChildStdin>,
    _task: Option<JoinHandle<()>>,
}

// === impl Role ===

impl Role {
    /// Whoever drives the shards.
    pub(crate) fn is_front(self) -> bool {
        matches!(self, Self::Router | Self::Job)
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Download => f.write_str("download"),
            Self::Router => f.write_str("router"),
            Self::Job => f.write_str("job"),
            Self::Shard(rank) => write!(f, "shard-{rank}"),
        }
    }
}

// === impl Spec ===

impl Spec {
    /// Starts the process; its events arrive with its role.
    pub(crate) fn spawn(
        &self,
        output: &Output,
        events: mpsc::Sender<(Role, Event)>,
    ) -> Result<Child, Death> {
        let role = self.role;
        let (program, args) = self
            .command
            .split_first()
            .expect("a launcher's spec has a program");
        let mut command = Command::new(program);
        command
            .args(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .process_group(0);
        command.stderr(match self.log {
            Log::Pumped => Stdio::piped(),
            Log::Inherited => Stdio::inherit(),
        });
        command.envs(self.env.iter().map(|(name, value)| (name, value)));
        for name in &self.env_remove {
            command.env_remove(name);
        }
        let mut process = command.spawn().map_err(|error| Death {
            name: role.to_string(),
            fatal: None,
            end: End::NotStarted(error),
            last_lines: Vec::new(),
        })?;
        let lifeline = process.stdin.take();
        let (signals, signals_sent) = mpsc::channel(SIGNALS_QUEUED);
        let output = output.clone();
        let task = tokio::spawn(live(role, process, output, signals_sent, events));
        Ok(Child {
            role,
            signals,
            _lifeline: lifeline,
            _task: Some(task),
        })
    }
}

// === impl Child ===

impl Child {
    /// What is no process: signals are messages, and its own thread tells the rest.
    pub(crate) fn on_a_thread(role: Role, signals: mpsc::Sender<Signal>) -> Self {
        Self {
            role,
            signals,
            _lifeline: None,
            _task: None,
        }
    }

    /// Asks for a signal to be sent; one that has ended gets none.
    pub(crate) fn signal(&self, signal: Signal) {
        // A full queue means that this many signals are on their way already.
        self.signals.try_send(signal).ok();
    }
}

/// Follows a process from its start until it is gone and its last words are read.
async fn live(
    role: Role,
    mut process: tokio::process::Child,
    output: Output,
    mut signals: mpsc::Receiver<Signal>,
    events: mpsc::Sender<(Role, Event)>,
) {
    let group = process
        .id()
        .and_then(|id| i32::try_from(id).ok())
        .map(Pid::from_raw);
    let stdout = process
        .stdout
        .take()
        .expect("the launcher pipes every child's output");
    let stderr = process.stderr.take();
    let tail = Arc::new(Mutex::new(Tail::default()));
    let control = tokio::spawn(pump_control(role, stdout, output.clone(), events.clone()));
    let log = tokio::spawn(pump_log(role, stderr, output, tail.clone()));
    let status = loop {
        tokio::select! {
            status = process.wait() => break status,
            Some(signal) = signals.recv() => send(&process, signal),
        }
    };
    // What the child itself started must not outlive it. Its id cannot name another group yet:
    // ids are handed out in a circle.
    if let Some(group) = group {
        killpg(group, Signal::SIGKILL).ok();
    }
    let (stop_control, stop_log) = (control.abort_handle(), log.abort_handle());
    // Whether they ended or are ended, what they read so far is all there is.
    drop(timeout(PIPES_GRACE, async { drop((control.await, log.await)) }).await);
    stop_control.abort();
    stop_log.abort();
    let last_lines = tail.lock().unwrap_or_else(PoisonError::into_inner).lines();
    let exited = Event::Exited {
        status: status.unwrap_or_default(),
        last_lines,
    };
    // Nobody listens any more when the launcher itself is ending.
    drop(events.send((role, exited)).await);
}

/// The kernel knows the process until it is waited for, so the id cannot be another's. SIGKILL
/// takes the child's own children with it.
fn send(process: &tokio::process::Child, signal: Signal) {
    let Some(pid) = process
        .id()
        .and_then(|id| i32::try_from(id).ok())
        .map(Pid::from_raw)
    else {
        return;
    };
    let sent = if signal == Signal::SIGKILL {
        killpg(pid, signal)
    } else {
        kill(pid, signal)
    };
    if let Err(error) = sent {
        tracing::warn!(%pid, %signal, %error, "A signal could not be sent.");
    }
}

async fn pump_control<R: AsyncRead + Unpin>(
    role: Role,
    pipe: R,
    output: Output,
    events: mpsc::Sender<(Role, Event)>,
) {
    let name = role.to_string();
    let mut lines = Lines::new(pipe);
    while let Ok(Some(line)) = lines.next().await {
        match Control::parse(line) {
            None => output.child_line(&name, line),
            Some(control) => {
                if events.send((role, Event::Control(control))).await.is_err() {
                    return;
                }
            }
        }
    }
}

async fn pump_log<R: AsyncRead + Unpin>(
    role: Role,
    pipe: Option<R>,
    output: Output,
    tail: Arc<Mutex<Tail>>,
) {
    let name = role.to_string();
    let Some(pipe) = pipe else { return };
    let mut lines = Lines::new(pipe);
    while let Ok(Some(line)) = lines.next().await {
        output.child_line(&name, line);
        tail.lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(line);
    }
}
