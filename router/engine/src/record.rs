//! The record of a run: everything the shards were told and what rank 0 answered, so that
//! `headrace replay` can execute it again.
//!
//! The file starts with eight bytes `HEADRACE` and a `u32` version (1). Then records follow until
//! the end of the file, each a kind (`u8`), a length (`u32`) and as many bytes. Numbers are
//! little-endian. A record that the end of the file cuts short is the last one and is ignored.
//!
//! | kind | bytes |
//! |---|---|
//! | 1 | `PrepareRequest`, with `blocks_max` set to the blocks that the group came to have |
//! | 2 | `ToShard`, exactly as sent |
//! | 3 | `StepResult` of rank 0, exactly as received |
//! | 4 | `DescribeReply` of rank 0; readers skip kinds they do not know |
//! | 5 | `serve.json` without secrets, so that a replay needs nothing but the file and the model |
//!
//! One record each of kinds 5, 4 and 1 come first. With several plans in flight results stand
//! after the plans that were sent before they arrived.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::Path;

use bytes::Bytes;
use tokio::sync::mpsc;
use tokio::sync::mpsc::error::TryRecvError;
use tokio::task::JoinHandle;

use crate::error::EngineError;

const MAGIC: &[u8; 8] = b"HEADRACE";
const VERSION: u32 = 1;

/// Records that may wait for the disk; the driver waits when there are more.
const RECORDS_MAX: usize = 256;

/// What a record holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Kind {
    Prepare = 1,
    ToShard = 2,
    Result = 3,
    Describe = 4,
    Serve = 5,
}

/// The driver's end of the writer thread.
#[derive(Debug)]
pub(crate) struct Recorder {
    records: mpsc::Sender<(Kind, Bytes)>,
    writer: JoinHandle<()>,
}

// === impl Recorder ===

impl Recorder {
    /// Creates the file and starts its writer.
    pub(crate) fn create(path: &Path) -> Result<Self, EngineError> {
        let failed = |source| EngineError::Record {
            path: path.to_owned(),
            source,
        };
        let mut file = BufWriter::new(File::create(path).map_err(failed)?);
        file.write_all(MAGIC).map_err(failed)?;
        file.write_all(&VERSION.to_le_bytes()).map_err(failed)?;
        let (records, receiver) = mpsc::channel(RECORDS_MAX);
        let path = path.to_owned();
        let writer = tokio::task::spawn_blocking(move || write_all(file, receiver, &path));
        Ok(Self { records, writer })
    }

    /// Hands a record to the writer; waits when the disk is far behind, and drops nothing.
    pub(crate) async fn write(&self, kind: Kind, bytes: Bytes) {
        // A closed channel means that the writer has failed, which it has logged.
        drop(self.records.send((kind, bytes)).await);
    }

    /// Waits until everything is on its way to the disk.
    pub(crate) async fn close(self) {
        drop(self.records);
        if let Err(error) = self.writer.await {
            tracing::error!(%error, "the recorder ended abnormally");
        }
    }
}

fn write_all(mut file: BufWriter<File>, mut records: mpsc::Receiver<(Kind, Bytes)>, path: &Path) {
    if let Err(error) = pump(&mut file, &mut records) {
        tracing::error!(path = %path.display(), %error, "recording stops here");
    }
}

fn pump(file: &mut impl Write, records: &mut mpsc::Receiver<(Kind, Bytes)>) -> io::Result<()> {
    loop {
        let record = match records.try_recv() {
            Ok(record) => Some(record),
            Err(TryRecvError::Disconnected) => None,
            // Nothing waits: what was written so far survives a crash.
            Err(TryRecvError::Empty) => {
                file.flush()?;
                records.blocking_recv()
            }
        };
        let Some((kind, bytes)) = record else {
            return file.flush();
        };
        let len = u32::try_from(bytes.len()).map_err(io::Error::other)?;
        file.write_all(&[kind as u8])?;
        file.write_all(&len.to_le_bytes())?;
        file.write_all(&bytes)?;
    }
}
