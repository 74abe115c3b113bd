//! Which processes there are, with which sockets, and how each is started.

use std::ffi::OsString;
use std::fs::{self, DirBuilder};
use std::io;
use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use headrace_config::{Launch, Model, SECRET_VARIABLES, Serve, Shard};

use crate::child::{Log, Role, Spec};
use crate::error::LaunchError;
use crate::run::Programs;

/// The kernel's limit for the path of a Unix socket, its final zero not counted.
const SOCKET_PATH_MAX: usize = 107;
/// Names tried for the private folder.
const FOLDER_TRIES: u32 = 100;

/// A folder that only this user can enter, with `serve.json` and the sockets. Goes when dropped.
#[derive(Debug)]
pub(crate) struct Folder(PathBuf);

// === impl Folder ===

impl Folder {
    /// In the system's folder for temporary files, or in `/tmp` when that is too deep for sockets.
    pub(crate) fn create() -> Result<Self, LaunchError> {
        let io = |source| LaunchError::Io {
            what: "a private folder cannot be made",
            source,
        };
        let mut parent = std::env::temp_dir();
        if parent.as_os_str().len() > SOCKET_PATH_MAX / 2 {
            parent = PathBuf::from("/tmp");
        }
        for n in 0..FOLDER_TRIES {
            let path = parent.join(format!("headrace-{}-{n}", std::process::id()));
            // Making it fails if it exists, so nobody else can have prepared it.
            match DirBuilder::new().mode(0o700).create(&path) {
                Ok(()) => return Ok(Self(path)),
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(io(error)),
            }
        }
        Err(io(io::ErrorKind::AlreadyExists.into()))
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.0) {
            tracing::warn!(folder = %self.0.display(), %error, "The private folder stays behind.");
        }
    }
}

/// One shard a rank: where its socket is and where the ranks meet.
pub(crate) fn shards(launch: &Launch, folder: &Path) -> Result<Vec<Shard>, LaunchError> {
    let prefix = launch
        .socket_prefix
        .clone()
        .unwrap_or_else(|| folder.join("shard"));
    let port = match launch.rendezvous_port {
        Some(port) => port,
        None => free_port().map_err(|source| LaunchError::Io {
            what: "no free port for the shards",
            source,
        })?,
    };
    let rendezvous = format!("{}:{port}", launch.rendezvous_host);
    (0..launch.num_shard)
        .map(|rank| {
            let mut socket = OsString::from(&prefix);
            socket.push(format!("-{rank}"));
            let socket = PathBuf::from(socket);
            claim(&socket)?;
            Ok(Shard {
                rank,
                socket,
                device_index: rank,
                rendezvous: rendezvous.clone(),
            })
        })
        .collect()
}

/// The path is short enough and nobody listens there; what a dead server left is removed.
fn claim(socket: &Path) -> Result<(), LaunchError> {
    let length = socket.as_os_str().len();
    if length > SOCKET_PATH_MAX {
        let (path, max) = (socket.to_owned(), SOCKET_PATH_MAX);
        return Err(LaunchError::SocketPathTooLong { path, length, max });
    }
    if UnixStream::connect(socket).is_ok() {
        return Err(LaunchError::SocketInUse {
            path: socket.to_owned(),
        });
    }
    match fs::remove_file(socket) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => Err(LaunchError::Io {
            what: "an old socket cannot be removed",
            source,
        }),
        _ => Ok(()),
    }
}

/// Free now; the shards take it within seconds.
fn free_port() -> io::Result<u16> {
    Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?
        .local_addr()?
        .port())
}

/// Fetches the model; the only child that sees the Hub's token.
pub(crate) fn download(
    programs: &Programs,
    launch: &Launch,
    model: &Model,
    token: Option<OsString>,
) -> Spec {
    let mut command = with(&programs.server, &["download", "--lifeline"]);
    if model.load_format == "dummy" {
        command.push("--no-weights".into());
    }
    // Without an id the default model is meant, which has more sources than the Hub.
    if let Some(id) = &launch.model_id {
        command.extend(["--model-id".into(), id.into()]);
    }
    if let Some(revision) = &model.revision {
        command.extend(["--revision".into(), revision.into()]);
    }
    let mut env = Vec::new();
    if let Some(token) = token {
        env.push(("HF_TOKEN", token));
    }
    if let Some(cache) = &launch.hub_cache {
        env.push(("HF_HUB_CACHE", cache.into()));
        env.push(("HUGGINGFACE_HUB_CACHE", cache.into()));
    }
    let kept = env.iter().map(|(name, _)| *name).collect::<Vec<_>>();
    let env_remove = SECRET_VARIABLES
        .iter()
        .copied()
        .filter(|name| !kept.contains(name))
        .collect();
    Spec {
        role: Role::Download,
        command,
        env,
        env_remove,
        log: Log::Inherited,
    }
}

/// The router of a server.
pub(crate) fn router(programs: &Programs, serve_json: &Path) -> Spec {
    let mut command = with(&programs.router, &["--config"]);
    command.push(serve_json.into());
    spec(Role::Router, command, Vec::new())
}

/// Every shard of a server.
pub(crate) fn ranks(programs: &Programs, serve: &Serve, serve_json: &Path) -> Vec<Spec> {
    let mut specs = Vec::with_capacity(serve.shards.len());
    for shard in &serve.shards {
        let mut command = with(&programs.server, &["shard", "--config"]);
        command.push(serve_json.into());
        command.extend(["--rank".into(), shard.rank.to_string().into()]);
        // Libraries that read their thread count when they are loaded read it here.
        let threads = OsString::from(serve.device.threads.to_string());
        let env = vec![
            ("OMP_NUM_THREADS", threads),
            ("PYTHONUNBUFFERED", "1".into()),
        ];
        specs.push(spec(Role::Shard(shard.rank), command, env));
    }
    specs
}

fn spec(role: Role, command: Vec<OsString>, env: Vec<(&'static str, OsString)>) -> Spec {
    Spec {
        role,
        command,
        env,
        env_remove: SECRET_VARIABLES.to_vec(),
        log: Log::Pumped,
    }
}

fn with(program: &[OsString], args: &[&str]) -> Vec<OsString> {
    program
        .iter()
        .cloned()
        .chain(args.iter().map(Into::into))
        .collect()
}
