//! What the defaults depend on: cores, GPUs, and whom the system trusts.

use std::ffi::OsString;
use std::fs;
use std::path::Path;
use std::thread;

/// Where systems keep the root certificates that they trust, in one file of PEM: Debian and Alpine,
/// Red Hat, SUSE, and others with macOS.
const ROOTS: [&str; 4] = [
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
];

/// The facts of a machine that defaults are computed from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Machine {
    /// Cores this process may use: affinity and cgroup included.
    pub cores: u32,
    /// GPUs with a device node.
    pub gpus: u32,
    /// How many of them a variable names, when one does.
    pub gpus_named: Option<u32>,
    /// File of the root certificates that the system trusts.
    pub roots: Option<&'static str>,
}

// === impl Machine ===

impl Machine {
    /// Looks at this machine. Never fails: what cannot be read counts as absent.
    pub fn probe(env: &dyn Fn(&str) -> Option<OsString>) -> Self {
        let cores = thread::available_parallelism().map_or(1, |cores| saturate(cores.get()));
        let gpus = fs::read_dir("/dev").map_or(0, |entries| {
            let is_gpu = |name: &str| {
                name.strip_prefix("nvidia").is_some_and(|rest| {
                    !rest.is_empty() && rest.bytes().all(|b| b.is_ascii_digit())
                })
            };
            let names = entries
                .flatten()
                .filter_map(|entry| entry.file_name().into_string().ok());
            saturate(names.filter(|name| is_gpu(name)).count())
        });
        Self {
            cores,
            gpus,
            gpus_named: gpus_named(env, gpus),
            roots: ROOTS.into_iter().find(|path| Path::new(path).is_file()),
        }
    }

    /// GPUs that a shard can open.
    pub fn gpus_visible(&self) -> u32 {
        self.gpus_named
            .map_or(self.gpus, |named| named.min(self.gpus))
    }
}

/// `CUDA_VISIBLE_DEVICES` counts when it is set; an empty one hides every GPU, for CUDA as for us.
/// `NVIDIA_VISIBLE_DEVICES` is the container runtime's: `all` and `void` name every GPU there is, as
/// for TGI; `none` says nothing.
fn gpus_named(env: &dyn Fn(&str) -> Option<OsString>, gpus: u32) -> Option<u32> {
    if let Some(list) = env("CUDA_VISIBLE_DEVICES") {
        return Some(count(&list.to_string_lossy()));
    }
    let list = env("NVIDIA_VISIBLE_DEVICES")?;
    match list.to_string_lossy().trim() {
        "" | "none" => None,
        "all" | "void" => Some(gpus),
        list => Some(count(list)),
    }
}

/// Items up to the first -1, which ends the list for CUDA too.
fn count(list: &str) -> u32 {
    let items = list
        .split(',')
        .map(str::trim)
        .take_while(|item| *item != "-1");
    saturate(items.filter(|item| !item.is_empty()).count())
}

fn saturate(count: usize) -> u32 {
    u32::try_from(count).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use std::ffi::OsString;

    use super::gpus_named;

    #[test]
    fn variables_name_gpus_as_cuda_reads_them() {
        let table = [
            (None, None, None),
            (Some("0,1"), None, Some(2)),
            (Some(""), Some("all"), Some(0)),
            (Some("-1"), None, Some(0)),
            (Some("3,-1,4"), None, Some(1)),
            (Some("GPU-8932f937, MIG-1"), None, Some(2)),
            (None, Some("all"), Some(8)),
            (None, Some("void"), Some(8)),
            (None, Some("none"), None),
            (Some("0"), Some("all"), Some(1)),
            (None, Some("2"), Some(1)),
        ];
        for (cuda, nvidia, named) in table {
            let env = |name: &str| match name {
                "CUDA_VISIBLE_DEVICES" => cuda.map(OsString::from),
                _ => nvidia.map(OsString::from),
            };
            assert_eq!(gpus_named(&env, 8), named, "{cuda:?} {nvidia:?}");
        }
    }
}
