//! `serve.json` on disk.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use crate::Serve;

/// Why a `serve.json` cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    #[error("{path}: {source}")]
    Io { path: PathBuf, source: io::Error },
    #[error("{path} is no serve.json of this version: {source}")]
    Format {
        path: PathBuf,
        source: serde_json::Error,
    },
}

/// Writes a new file that only its owner can read: it may hold the API key.
pub fn save(serve: &Serve, path: &Path) -> Result<(), FileError> {
    let io = |source| FileError::Io {
        path: path.to_owned(),
        source,
    };
    let mut text = serde_json::to_vec_pretty(serve).map_err(|source| FileError::Format {
        path: path.to_owned(),
        source,
    })?;
    text.push(b'\n');
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .map_err(io)?;
    file.write_all(&text).map_err(io)
}

/// The same text for a file that others may read: without the API key and the headers of a collector.
///
/// # Panics
///
/// Never: every key is a string and every number finite.
#[must_use]
pub fn without_secrets(serve: &Serve) -> Vec<u8> {
    let mut open = serve.clone();
    open.http.api_key = None;
    open.telemetry.traces.headers.clear();
    serde_json::to_vec(&open).expect("plain values become JSON; this is a bug of config")
}

/// Reads what [`save`] wrote. Unknown and missing keys are errors: both sides are one version.
pub fn load(path: &Path) -> Result<Serve, FileError> {
    let text = fs::read(path).map_err(|source| FileError::Io {
        path: path.to_owned(),
        source,
    })?;
    serde_json::from_slice(&text).map_err(|source| FileError::Format {
        path: path.to_owned(),
        source,
    })
}
