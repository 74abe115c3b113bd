//! The processes, and what they use.

use std::error::Error;
use std::fs;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use serde_json::Value;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, ChildStdout, Command};

/// Clock ticks of `/proc` a second; the same on every Linux.
const TICKS_PER_S: f64 = 100.0;

/// A part of the benchmark in its own process; killed when dropped.
#[derive(Debug)]
pub(crate) struct Part {
    child: Child,
    pub(crate) pid: u32,
}

/// What a process has used.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Usage {
    pub(crate) cpu: Duration,
    pub(crate) rss_bytes: u64,
}

// === impl Part ===

impl Part {
    /// Starts this program again as one of its parts. Its standard input is the lifeline: it ends
    /// when we do.
    pub(crate) fn start(args: &[&str]) -> Result<(Self, ChildStdout), Box<dyn Error>> {
        let mut child = Command::new(std::env::current_exe()?)
            .args(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()?;
        let pid = child.id().ok_or("the process ended at once")?;
        let stdout = child
            .stdout
            .take()
            .ok_or("the process has no standard output")?;
        Ok((Self { child, pid }, stdout))
    }

    /// Ends it and waits until it is gone.
    pub(crate) async fn stop(mut self) -> Result<(), Box<dyn Error>> {
        Ok(self.child.kill().await?)
    }

    pub(crate) fn usage(&self) -> Result<Usage, Box<dyn Error>> {
        usage(self.pid)
    }
}

/// Reads control lines until one names this event.
pub(crate) async fn wait_for(
    event: &str,
    lines: &mut BufReader<ChildStdout>,
) -> Result<Value, Box<dyn Error>> {
    let mut line = String::new();
    while lines.read_line(&mut line).await? > 0 {
        if let Ok(value) = serde_json::from_str::<Value>(&line) {
            if value["event"] == event {
                return Ok(value);
            }
            if value["event"] == "fatal" {
                return Err(value["message"].to_string().into());
            }
        }
        line.clear();
    }
    Err(format!("the process ended before it said `{event}`").into())
}

pub(crate) fn usage(pid: u32) -> Result<Usage, Box<dyn Error>> {
    let folder = Path::new("/proc").join(pid.to_string());
    let stat = fs::read_to_string(folder.join("stat"))?;
    // The name in parentheses may hold anything; the numbers follow it.
    let numbers = stat.rsplit_once(')').ok_or("/proc/*/stat has a name")?.1;
    let numbers: Vec<&str> = numbers.split_whitespace().collect();
    let ticks = |at: usize| {
        numbers
            .get(at)
            .and_then(|n| n.parse::<f64>().ok())
            .unwrap_or(0.0)
    };
    let cpu = Duration::from_secs_f64((ticks(11) + ticks(12)) / TICKS_PER_S);
    let status = fs::read_to_string(folder.join("status"))?;
    let rss_kib = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))
        .and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok())
        .unwrap_or(0);
    Ok(Usage {
        cpu,
        rss_bytes: rss_kib * 1024,
    })
}
