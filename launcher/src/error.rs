//! Why a server did not start or did not go on. The names are TGI's: people grep for them.

use std::io;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::ExitStatus;
use std::time::Duration;

use headrace_config::{ConfigError, FileError};
use nix::sys::signal::Signal;
use thiserror::Error;

use crate::python::PythonNotFound;

/// Ends the launcher with status 1; printed after `Error: `.
#[derive(Debug, Error)]
pub(crate) enum LaunchError {
    #[error("ArgumentValidation: {0}")]
    ArgumentValidation(ConfigError),
    #[error("ArgumentValidation: --log-level: {0}")]
    LogLevel(String),
    #[error(
        "ArgumentValidation: the socket's path {path} has {length} bytes, {max} are allowed; choose a shorter --shard-uds-path"
    )]
    SocketPathTooLong {
        path: PathBuf,
        length: usize,
        max: usize,
    },
    #[error(
        "ArgumentValidation: {path} is the socket of a server that runs; choose another --shard-uds-path"
    )]
    SocketInUse { path: PathBuf },
    #[error("NotEnoughCUDADevices: {0}")]
    NotEnoughCUDADevices(ConfigError),
    #[error("DownloadError: {0}")]
    DownloadError(Death),
    #[error("ShardCannotStart: {0}")]
    ShardCannotStart(Death),
    #[error("ShardFailed: {0}")]
    ShardFailed(Death),
    #[error("WebserverCannotStart: {0}")]
    WebserverCannotStart(Death),
    #[error("WebserverFailed: {0}")]
    WebserverFailed(Death),
    #[error("{0}")]
    JobFailed(Death),
    #[error("ShardCannotStart: {0}")]
    Python(#[from] PythonNotFound),
    #[error("ShardCannotStart: not ready after {} s (--startup-timeout); still waiting for {waiting}", after.as_secs())]
    StartupTimeout { after: Duration, waiting: String },
    #[error("cannot write {0}")]
    Config(#[from] FileError),
    #[error("{what}: {source}")]
    Io {
        what: &'static str,
        source: io::Error,
    },
}

// === impl LaunchError ===

impl From<ConfigError> for LaunchError {
    fn from(error: ConfigError) -> Self {
        if matches!(error, ConfigError::NotEnoughCudaDevices { .. }) {
            Self::NotEnoughCUDADevices(error)
        } else {
            Self::ArgumentValidation(error)
        }
    }
}

/// How a child ended, and what it said before.
#[derive(Debug, Error)]
#[error("{name}{}{}", self.how(), self.last_words())]
pub(crate) struct Death {
    pub(crate) name: String,
    /// What it gave as its reason, if it could.
    pub(crate) fatal: Option<String>,
    pub(crate) end: End,
    /// The end of its log.
    pub(crate) last_lines: Vec<String>,
}

#[derive(Debug)]
pub(crate) enum End {
    NotStarted(io::Error),
    Exited(ExitStatus),
    /// It said that it cannot go on, and has not ended yet.
    StillRunning,
}

// === impl Death ===

impl Death {
    fn how(&self) -> String {
        if let Some(fatal) = &self.fatal {
            return format!(": {fatal}");
        }
        match &self.end {
            End::NotStarted(error) => format!(" could not be started: {error}"),
            End::StillRunning => " gave up".to_owned(),
            End::Exited(status) => match (status.signal(), status.code()) {
                (Some(signal), _) => {
                    let name = Signal::try_from(signal).map_or("unknown", Signal::as_str);
                    let hint = if signal == Signal::SIGKILL as i32 {
                        "; if nobody did that by hand, the machine was out of memory"
                    } else {
                        ""
                    };
                    format!(" was killed by signal {signal} ({name}){hint}")
                }
                (None, Some(0)) => " ended by itself, without a reason".to_owned(),
                (None, code) => format!(" exited with status {}", code.unwrap_or(-1)),
            },
        }
    }

    /// A reason given makes the log's end superfluous.
    fn last_words(&self) -> String {
        if self.fatal.is_some() || self.last_lines.is_empty() {
            return String::new();
        }
        let mut text = String::from("; its last lines:");
        for line in &self.last_lines {
            text.push_str("\n    ");
            text.push_str(line);
        }
        text
    }

    /// It ended because it was done.
    pub(crate) fn is_success(&self) -> bool {
        matches!(&self.end, End::Exited(status) if status.success()) && self.fatal.is_none()
    }

    pub(crate) fn signal(&self) -> Option<i32> {
        match &self.end {
            End::Exited(status) => status.signal(),
            End::NotStarted(_) | End::StillRunning => None,
        }
    }
}
