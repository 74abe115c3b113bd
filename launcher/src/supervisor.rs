//! Keeps the router and the shards together: starting → serving → draining → stopped. The group is
//! one failure domain: whoever dies takes the others along, and the launcher says why.

use std::time::Duration;

use headrace_config::Serve;
use nix::sys::signal::Signal;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until, timeout_at};

use crate::banner::{self, Ready};
use crate::child::{Child, Event, Role, Spec};
use crate::control::Control;
use crate::error::{Death, End, LaunchError};
use crate::job::{self, Job};
use crate::output::Output;
use crate::signals::Signals;

/// Beyond its own deadline for draining, the router gets this long to exit: clients read their last
/// event, and a collector takes the last spans.
const ROUTER_GRACE: Duration = Duration::from_secs(6);
/// Shards have nothing left to do when the router is gone; unloading takes a moment.
const SHARD_DEADLINE: Duration = Duration::from_secs(10);
/// The others' deadline after one has died: long enough to tell clients.
const FAILURE_DEADLINE: Duration = Duration::from_secs(3);
/// A killed process is gone within this time, or it hangs in the kernel and stays.
const KILL_DEADLINE: Duration = Duration::from_secs(5);
/// When the router complains, a shard that died for it is heard of within this time.
const CAUSE_GRACE: Duration = Duration::from_millis(500);
/// After its fatal line a child gets this long to exit by itself.
const FATAL_GRACE: Duration = Duration::from_secs(2);
/// A loading server says so this often.
const WAITING_EVERY: Duration = Duration::from_secs(10);
/// Events not yet looked at; a child whose event does not fit waits.
const EVENTS_QUEUED: usize = 64;

/// The processes of one server.
pub(crate) struct Supervisor<'a> {
    serve: &'a Serve,
    output: &'a Output,
    members: Vec<Member>,
    events: mpsc::Receiver<(Role, Event)>,
    phase: Phase,
    /// Who died while the others were being stopped.
    lost: Option<(Role, Death)>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Starting { port: Option<u16> },
    Serving,
}

struct Member {
    child: Child,
    is_alive: bool,
    /// A shard's socket listens, the router's group is prepared.
    is_up: bool,
    fatal: Option<String>,
}

/// What the group did while somebody waited for it.
enum Outcome {
    /// The named ones are gone.
    Gone,
    Late,
    /// Somebody asked a second time.
    Hurried,
}

// === impl Supervisor ===

impl<'a> Supervisor<'a> {
    /// Starts everybody at the same time, and the job if there is one in the router's place.
    pub(crate) fn start(
        specs: &[Spec],
        job: Option<Job>,
        serve: &'a Serve,
        output: &'a Output,
    ) -> Result<Self, LaunchError> {
        let (sender, events) = mpsc::channel(EVENTS_QUEUED);
        let phase = Phase::Starting { port: None };
        let mut members = Vec::with_capacity(specs.len() + 1);
        for spec in specs {
            // Those already started die with their lifelines.
            let child = spec
                .spawn(output, sender.clone())
                .map_err(|death| blame(spec.role, phase, death))?;
            members.push(Member::new(child));
        }
        if let Some(job) = job {
            let child = job::start(job, serve.clone(), sender)
                .map_err(|death| blame(Role::Job, phase, death))?;
            members.push(Member::new(child));
        }
        Ok(Self {
            serve,
            output,
            members,
            events,
            phase,
            lost: None,
        })
    }

    /// Until a signal or a death ends the server; nobody is alive when this returns.
    pub(crate) async fn supervise(
        &mut self,
        signals: &mut Signals,
        startup_deadline: Duration,
    ) -> Result<(), LaunchError> {
        let started = Instant::now();
        let mut waiting_at = started + WAITING_EVERY.min(startup_deadline);
        let error = loop {
            let is_starting = matches!(self.phase, Phase::Starting { .. });
            tokio::select! {
                biased;
                signal = signals.next() => {
                    tracing::info!(signal, "Stopping.");
                    return self.drain(signals).await;
                }
                Some((role, event)) = self.events.recv() => {
                    if let Some(death) = self.take(role, event) {
                        if role == Role::Job && death.is_success() {
                            return self.drain(signals).await;
                        }
                        break self.cause(role, death).await;
                    }
                }
                () = sleep_until(waiting_at), if is_starting => {
                    let after = started.elapsed();
                    if after >= startup_deadline {
                        break LaunchError::StartupTimeout { after, waiting: self.waiting() };
                    }
                    tracing::info!("Waiting for {}, {} s so far.", self.waiting(), after.as_secs());
                    waiting_at += WAITING_EVERY.min(startup_deadline.saturating_sub(after));
                }
            }
        };
        self.abort(signals).await;
        Err(error)
    }

    /// Notes what a child did; a death that nobody asked for comes back.
    fn take(&mut self, role: Role, event: Event) -> Option<Death> {
        let member = self
            .members
            .iter_mut()
            .find(|member| member.child.role == role);
        let member =
            member.expect("events come from children of this group; this is a launcher bug");
        match event {
            Event::Control(Control::Fatal { message }) => {
                member.fatal = Some(message);
                Some(member.death(End::StillRunning, Vec::new()))
            }
            Event::Exited { status, last_lines } => {
                member.is_alive = false;
                Some(member.death(End::Exited(status), last_lines))
            }
            Event::Control(Control::Serving) => {
                member.is_up = true;
                if role == Role::Job {
                    self.phase = Phase::Serving;
                }
                None
            }
            Event::Control(Control::Listening { port }) => {
                self.phase = match self.phase {
                    Phase::Starting { port: _ } => Phase::Starting { port: Some(port) },
                    Phase::Serving => Phase::Serving,
                };
                tracing::info!(
                    port,
                    "HTTP listens; it answers 503 until the model is loaded."
                );
                None
            }
            Event::Control(Control::Ready {
                model,
                device,
                dtype,
            }) => {
                member.is_up = true;
                self.announce(&Ready {
                    model,
                    device,
                    dtype,
                });
                None
            }
            Event::Control(Control::Model { .. }) => None,
        }
    }

    fn announce(&mut self, ready: &Ready) {
        let Phase::Starting { port } = self.phase else {
            return;
        };
        self.phase = Phase::Serving;
        let url = banner::url(self.serve, port.unwrap_or(self.serve.http.port));
        if self.output.is_json() {
            tracing::info!(url, model = ready.model, "Ready.");
        } else {
            self.output
                .push(banner::banner(self.serve, &url, ready).into_bytes());
        }
    }

    /// Who is to blame. A router that ends because its shard is gone is often heard of first.
    async fn cause(&mut self, role: Role, death: Death) -> LaunchError {
        let phase = self.phase;
        if !role.is_front() || death.signal().is_some() {
            return blame(role, phase, self.last_words(role, death).await);
        }
        let deadline = Instant::now() + CAUSE_GRACE;
        while let Ok(Some((role, event))) = timeout_at(deadline, self.events.recv()).await {
            let other = self.take(role, event);
            if let (Role::Shard(_), Some(death)) = (role, other) {
                return blame(role, phase, self.last_words(role, death).await);
            }
        }
        blame(role, phase, death)
    }

    /// A child that gave its reason may still be writing its log.
    async fn last_words(&mut self, role: Role, death: Death) -> Death {
        if !matches!(death.end, End::StillRunning) {
            return death;
        }
        let deadline = Instant::now() + FATAL_GRACE;
        while let Ok(Some((other, event))) = timeout_at(deadline, self.events.recv()).await {
            let other_death = self.take(other, event);
            if let (true, Some(death)) = (other == role, other_death) {
                return death;
            }
        }
        death
    }

    /// Everybody ends at once.
    async fn abort(&mut self, signals: &mut Signals) {
        self.signal(Signal::SIGTERM, |_| true);
        match self.wait(|_| true, FAILURE_DEADLINE, signals).await {
            Outcome::Gone => {}
            Outcome::Late | Outcome::Hurried => self.kill(|_| true, signals).await,
        }
    }

    /// The router first: it refuses what is new and lets streams end; then the shards.
    async fn drain(&mut self, signals: &mut Signals) -> Result<(), LaunchError> {
        let is_router = Role::is_front;
        let phase = self.phase;
        let deadline = Duration::from_millis(self.serve.http.drain_deadline_ms);
        self.signal(Signal::SIGTERM, is_router);
        match self.wait(is_router, deadline + ROUTER_GRACE, signals).await {
            Outcome::Gone => {}
            Outcome::Late => {
                let seconds = deadline.as_secs();
                tracing::warn!("Streams still run after {seconds} s; they are cut off.");
                self.kill(is_router, signals).await;
            }
            Outcome::Hurried => {
                self.kill(|_| true, signals).await;
                return Ok(());
            }
        }
        // A shard that died meanwhile took running streams with it.
        let lost = self.lost.take();
        self.signal(Signal::SIGTERM, |_| true);
        match self.wait(|_| true, SHARD_DEADLINE, signals).await {
            Outcome::Gone => {}
            Outcome::Late | Outcome::Hurried => self.kill(|_| true, signals).await,
        }
        if let Some((role, death)) = lost {
            return Err(blame(role, phase, death));
        }
        tracing::info!("Stopped.");
        Ok(())
    }

    /// Until those chosen are gone. A death among the others is remembered.
    async fn wait(
        &mut self,
        who: impl Fn(Role) -> bool,
        within: Duration,
        signals: &mut Signals,
    ) -> Outcome {
        let deadline = Instant::now() + within;
        while self
            .members
            .iter()
            .any(|member| member.is_alive && who(member.child.role))
        {
            tokio::select! {
                biased;
                signal = signals.next() => {
                    tracing::info!(signal, "Stopping at once.");
                    return Outcome::Hurried;
                }
                () = sleep_until(deadline) => return Outcome::Late,
                Some((role, event)) = self.events.recv() => {
                    let failed = match &event {
                        Event::Exited { status, .. } => !status.success(),
                        Event::Control(_) => false,
                    };
                    let death = self.take(role, event);
                    if failed && !who(role) && self.lost.is_none() {
                        self.lost = death.map(|death| (role, death));
                    }
                }
            }
        }
        Outcome::Gone
    }

    async fn kill(&mut self, who: impl Fn(Role) -> bool, signals: &mut Signals) {
        self.signal(Signal::SIGKILL, &who);
        let deadline = Instant::now() + KILL_DEADLINE;
        loop {
            let within = deadline.saturating_duration_since(Instant::now());
            match self.wait(&who, within, signals).await {
                Outcome::Gone => return,
                Outcome::Hurried => {}
                Outcome::Late => {
                    tracing::error!("A killed process does not end: {}.", self.alive());
                    return;
                }
            }
        }
    }

    fn signal(&self, signal: Signal, who: impl Fn(Role) -> bool) {
        for member in &self.members {
            if member.is_alive && who(member.child.role) {
                member.child.signal(signal);
            }
        }
    }

    fn alive(&self) -> String {
        names(self.members.iter().filter(|member| member.is_alive))
    }

    fn waiting(&self) -> String {
        names(self.members.iter().filter(|member| !member.is_up))
    }
}

// === impl Member ===

impl Member {
    fn new(child: Child) -> Self {
        Self {
            child,
            is_alive: true,
            is_up: false,
            fatal: None,
        }
    }

    fn death(&self, end: End, last_lines: Vec<String>) -> Death {
        Death {
            name: self.child.role.to_string(),
            fatal: self.fatal.clone(),
            end,
            last_lines,
        }
    }
}

fn names<'m>(members: impl Iterator<Item = &'m Member>) -> String {
    members
        .map(|member| member.child.role.to_string())
        .collect::<Vec<_>>()
        .join(", ")
}

/// TGI's name for it.
fn blame(role: Role, phase: Phase, death: Death) -> LaunchError {
    match (role, phase) {
        (Role::Download, _) => LaunchError::DownloadError(death),
        (Role::Job, _) => LaunchError::JobFailed(death),
        (Role::Router, Phase::Starting { .. }) => LaunchError::WebserverCannotStart(death),
        (Role::Router, Phase::Serving) => LaunchError::WebserverFailed(death),
        (Role::Shard(_), Phase::Starting { .. }) => LaunchError::ShardCannotStart(death),
        (Role::Shard(_), Phase::Serving) => LaunchError::ShardFailed(death),
    }
}
