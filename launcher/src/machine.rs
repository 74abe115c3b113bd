//! `--env`: what the server runs on, in the log, for a bug report.

use std::fs;
use std::process::Stdio;
use std::time::Duration;

use headrace_config::Machine;
use tokio::process::Command;
use tokio::time::timeout;

/// A driver that hangs must not keep the server from starting.
const SMI_DEADLINE: Duration = Duration::from_secs(10);

/// Logs versions, CPU, memory and GPUs.
pub(crate) async fn log(machine: &Machine) {
    let cpu = field("/proc/cpuinfo", "model name");
    let memory = field("/proc/meminfo", "MemTotal");
    tracing::info!(
        version = env!("CARGO_PKG_VERSION"),
        os = std::env::consts::OS,
        arch = std::env::consts::ARCH,
        cpu,
        cores = machine.cores,
        memory,
        gpus = machine.gpus,
        gpus_visible = machine.gpus_visible(),
        "Runtime environment."
    );
    if machine.gpus > 0 {
        let text = nvidia_smi()
            .await
            .unwrap_or_else(|| "not available".to_owned());
        tracing::info!("nvidia-smi:\n{text}");
    }
}

fn field(file: &str, name: &str) -> String {
    let text = fs::read_to_string(file).unwrap_or_default();
    let value = text
        .lines()
        .find_map(|line| line.strip_prefix(name)?.split_once(':'));
    value
        .map_or("unknown", |(_, value)| value.trim())
        .to_owned()
}

async fn nvidia_smi() -> Option<String> {
    let mut command = Command::new("nvidia-smi");
    command
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .kill_on_drop(true);
    let output = timeout(SMI_DEADLINE, command.output()).await.ok()?.ok()?;
    output
        .status
        .success()
        .then(|| String::from_utf8_lossy(&output.stdout).into_owned())
}
