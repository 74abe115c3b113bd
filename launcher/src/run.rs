//! From the command line to the exit status.

use std::env;
use std::ffi::OsString;
use std::io::{self, IsTerminal, Write};

use headrace_config::{Launch, Machine, Resolved, Serve, Typed, hub_token, resolve, save};
use tracing_subscriber::EnvFilter;

use crate::download::download;
use crate::error::LaunchError;
use crate::job::Job;
use crate::machine;
use crate::output::Output;
use crate::python::PythonNotFound;
use crate::secrets::Secrets;
use crate::signals::Signals;
use crate::supervisor::Supervisor;
use crate::topology::{self, Folder};

/// How the children are started.
#[derive(Debug, Clone)]
pub struct Programs {
    /// The router; `--config FILE` is appended.
    pub router: Vec<OsString>,
    /// The Python side; `download …` or `shard --config FILE --rank N` is appended.
    pub server: Vec<OsString>,
}

/// Everything wrong with a command line; clap's customary status.
const STATUS_USAGE: u8 = 2;
const STATUS_FAILED: u8 = 1;

/// Serves until a signal or a death ends the server. Returns the exit status: 0 after an orderly
/// stop, 1 with `Error: …` on standard error, 2 with the usage.
///
/// `argv` starts with the program's name. `find_programs` is asked once the command line is good.
pub fn run(
    argv: impl IntoIterator<Item = OsString>,
    find_programs: impl FnOnce() -> Result<Programs, PythonNotFound>,
) -> u8 {
    start(argv, find_programs, None)
}

/// [`run`] with a job in the router's place: the server ends when the job does. The log goes to
/// standard error.
pub fn run_job(
    argv: impl IntoIterator<Item = OsString>,
    find_programs: impl FnOnce() -> Result<Programs, PythonNotFound>,
    job: Job,
) -> u8 {
    start(argv, find_programs, Some(job))
}

fn start(
    argv: impl IntoIterator<Item = OsString>,
    find_programs: impl FnOnce() -> Result<Programs, PythonNotFound>,
    job: Option<Job>,
) -> u8 {
    let typed = match Typed::parse(argv, &|name| env::var_os(name)) {
        Ok(typed) => typed,
        Err(error) => {
            // Help and version are errors of clap's, too, on standard output and with status 0.
            drop(error.print());
            return if error.use_stderr() { STATUS_USAGE } else { 0 };
        }
    };
    let secrets = Secrets::of(&typed);
    match launch(&typed, find_programs, job, &secrets) {
        Ok(()) => 0,
        Err(error) => {
            let line = format!("Error: {error}\n");
            // Nobody may be left to read it.
            drop(io::stderr().write_all(&secrets.hide(line.as_bytes())));
            STATUS_FAILED
        }
    }
}

fn launch(
    typed: &Typed,
    find_programs: impl FnOnce() -> Result<Programs, PythonNotFound>,
    job: Option<Job>,
    secrets: &Secrets,
) -> Result<(), LaunchError> {
    let machine = Machine::probe(&|name| env::var_os(name));
    let Resolved {
        serve,
        launch,
        warnings,
    } = resolve(typed, &machine)?;
    let programs = find_programs()?;
    let filter = EnvFilter::try_new(&serve.telemetry.log_level)
        .map_err(|error| LaunchError::LogLevel(error.to_string()))?;
    let io = |what| move |source| LaunchError::Io { what, source };
    let (output, is_terminal) = if job.is_some() {
        let output = Output::start(io::stderr(), serve.telemetry.json_output, secrets.clone());
        (output, io::stderr().is_terminal())
    } else {
        let output = Output::start(io::stdout(), serve.telemetry.json_output, secrets.clone());
        (output, io::stdout().is_terminal())
    };
    let output = output.map_err(io("no thread for the log"))?;
    start_log(&output, filter, is_terminal);
    for warning in warnings {
        tracing::warn!("{warning}");
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(io("the launcher's runtime does not start"))?;
    let served = runtime.block_on(async {
        if launch.log_machine {
            machine::log(&machine).await;
        }
        serve_until_stopped(serve, &launch, &programs, &output, job).await
    });
    drop(runtime);
    output.flush();
    served
}

fn start_log(output: &Output, filter: EnvFilter, is_terminal: bool) {
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(output.clone());
    let log = log.with_ansi(is_terminal);
    // The first log of a process stays; only a test makes a second one.
    drop(if output.is_json() {
        log.json().flatten_event(true).try_init()
    } else {
        log.try_init()
    });
}

async fn serve_until_stopped(
    mut serve: Serve,
    launch: &Launch,
    programs: &Programs,
    output: &Output,
    job: Option<Job>,
) -> Result<(), LaunchError> {
    let mut signals = Signals::install().map_err(|source| LaunchError::Io {
        what: "signals cannot be handled",
        source,
    })?;
    let token = hub_token(&|name| env::var_os(name));
    let spec = topology::download(programs, launch, &serve.model, token);
    let Some(found) = download(&spec, output, &mut signals).await? else {
        return Ok(());
    };
    (serve.model.path, serve.model.sha) = (found.path, found.sha);

    let folder = Folder::create()?;
    serve.shards = topology::shards(launch, folder.path())?;
    let serve_json = folder.path().join("serve.json");
    save(&serve, &serve_json)?;
    let (id, path, shards) = (
        &serve.model.id,
        serve.model.path.display(),
        serve.shards.len(),
    );
    let front = if job.is_some() { "job" } else { "router" };
    tracing::info!("Starting the {front} and {shards} shard(s) for {id} in {path}.");
    tracing::info!("Arguments: {serve:?}");
    let mut specs = Vec::new();
    if job.is_none() {
        specs.push(topology::router(programs, &serve_json));
    }
    specs.extend(topology::ranks(programs, &serve, &serve_json));
    let mut supervisor = Supervisor::start(&specs, job, &serve, output)?;
    supervisor
        .supervise(&mut signals, launch.startup_deadline)
        .await
}
