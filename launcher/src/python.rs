//! Where Python is: the one whose environment the wheel was installed into.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use thiserror::Error;

/// Neither beside the binary nor in an activated environment.
#[derive(Debug, Error)]
#[error(
    "no Python beside {} and none in an activated environment (VIRTUAL_ENV): install headrace with \
     pip into a virtual environment and start it from there",
    binary.display()
)]
pub struct PythonNotFound {
    binary: PathBuf,
}

/// The Python beside `binary`, which is where pip puts both, or else that of `VIRTUAL_ENV`, which
/// serves a binary that was built and not installed.
pub fn find_python(
    binary: &Path,
    virtual_env: Option<OsString>,
) -> Result<PathBuf, PythonNotFound> {
    let beside = binary.parent().map(Path::to_owned);
    let activated = virtual_env
        .filter(|path| !path.is_empty())
        .map(|p| Path::new(&p).join("bin"));
    beside
        .into_iter()
        .chain(activated)
        .flat_map(|folder| [folder.join("python3"), folder.join("python")])
        .find(|path| path.is_file())
        .ok_or_else(|| PythonNotFound {
            binary: binary.to_owned(),
        })
}
