//! Compiles `server/kernels/*.cpp` into one shared library that the Python side loads through
//! ctypes. Without a C++ compiler there is no library: the server says so in one log line and
//! uses PyTorch.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

fn main() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let kernels = root.join("server/kernels");
    let library = root.join("server/headrace/_native/libheadrace_kernels.so");
    println!("cargo:rerun-if-changed={}", kernels.display());
    println!("cargo:rerun-if-env-changed=CXX");
    let inputs = inputs(&kernels);
    for input in &inputs {
        println!("cargo:rerun-if-changed={}", input.display());
    }
    if !inputs.iter().any(|path| is_source(path)) {
        return;
    }
    match build(&kernels, &inputs, &library) {
        // Built again when somebody removes it, too.
        Ok(()) => println!("cargo:rerun-if-changed={}", library.display()),
        Err(reason) => {
            // A library of older sources would be worse than none.
            if library.exists() {
                fs::remove_file(&library).expect("the old kernel library can be removed");
            }
            println!("cargo:warning=CPU kernels not built, PyTorch takes over: {reason}");
        }
    }
}

fn is_source(path: &Path) -> bool {
    path.extension() == Some(OsStr::new("cpp"))
}

/// Sources, headers and the flags, in a fixed order.
fn inputs(kernels: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(kernels) else {
        return Vec::new();
    };
    let mut inputs: Vec<PathBuf> = entries
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.is_file())
        .collect();
    inputs.sort();
    inputs
}

fn build(kernels: &Path, inputs: &[PathBuf], library: &Path) -> Result<(), String> {
    let newest = newest(inputs).map_err(|error| format!("cannot read the sources: {error}"))?;
    // The library carries the time of its newest input. Cargo would otherwise see a file that is
    // younger than the start of this script, and run it again on every build.
    if fs::metadata(library)
        .and_then(|meta| meta.modified())
        .is_ok_and(|time| time == newest)
    {
        return Ok(());
    }
    let flags = fs::read_to_string(kernels.join("flags.txt"))
        .map_err(|error| format!("cannot read flags.txt: {error}"))?;
    let compiler = cc::Build::new()
        .cpp(true)
        .no_default_flags(true)
        .cargo_metadata(false)
        .try_get_compiler()
        .map_err(|error| format!("no C++ compiler: {error}"))?;
    let folder = library.parent().expect("the library's path has a folder");
    fs::create_dir_all(folder).map_err(|error| format!("{}: {error}", folder.display()))?;
    // Under another name until complete: a running server may have the old one open.
    let unfinished = library.with_extension(format!("so.new.{}", std::process::id()));
    let output = compiler
        .to_command()
        .args(
            flags
                .lines()
                .filter(|line| !line.starts_with('#'))
                .flat_map(str::split_whitespace),
        )
        .args(inputs.iter().filter(|path| is_source(path)))
        .arg("-o")
        .arg(&unfinished)
        .output()
        .map_err(|error| format!("no C++ compiler ({}): {error}", compiler.path().display()))?;
    if !output.status.success() {
        let errors = String::from_utf8_lossy(&output.stderr);
        let first = errors
            .lines()
            .find(|line| line.contains("error"))
            .unwrap_or("no message");
        return Err(format!("{} failed: {first}", compiler.path().display()));
    }
    finish(&unfinished, library, newest).map_err(|error| format!("{}: {error}", library.display()))
}

fn newest(inputs: &[PathBuf]) -> io::Result<SystemTime> {
    let mut newest = SystemTime::UNIX_EPOCH;
    for input in inputs {
        newest = newest.max(fs::metadata(input)?.modified()?);
    }
    Ok(newest)
}

fn finish(unfinished: &Path, library: &Path, time: SystemTime) -> io::Result<()> {
    File::options()
        .write(true)
        .open(unfinished)?
        .set_modified(time)?;
    fs::rename(unfinished, library)
}
