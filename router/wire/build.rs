//! Compiles `/proto` without a system protoc, and leaves the descriptor set where the Python side
//! builds its message classes from it.

use std::path::{Path, PathBuf};
use std::{env, error, fs, io};

use tonic_prost_build::manual;

const PROTO: &str = "headrace/v1/shard.proto";

fn main() -> Result<(), Box<dyn error::Error>> {
    let root = PathBuf::from(env::var("CARGO_MANIFEST_DIR")?).join("../..");
    let include = root.join("proto");
    let native = root.join("server/headrace/_native/shard.binpb");
    println!("cargo:rerun-if-changed={}", include.join(PROTO).display());
    // A missing copy counts as changed.
    println!("cargo:rerun-if-changed={}", native.display());

    let mut compiler = protox::Compiler::new([&include])?;
    compiler.include_imports(true).open_file(PROTO)?;
    let descriptors = compiler.encode_file_descriptor_set();
    fs::write(
        PathBuf::from(env::var("OUT_DIR")?).join("shard.binpb"),
        &descriptors,
    )?;
    write_if_changed(&native, &descriptors)?;

    tonic_prost_build::Config::new()
        .bytes(["."])
        .compile_fds(compiler.file_descriptor_set())?;
    manual::Builder::new().compile(&[service()]);
    Ok(())
}

/// The service of `shard.proto`, with our own types in place of messages: `Execute` carries bytes
/// that were encoded once for every rank, the rest plain structs.
fn service() -> manual::Service {
    let method = |name: &str, route: &str, input: &str, output: &str| {
        manual::Method::builder()
            .name(name)
            .route_name(route)
            .input_type(input)
            .output_type(output)
            .codec_path("crate::codec::PlainCodec")
    };
    let describe = method(
        "describe",
        "Describe",
        "crate::describe::DescribeRequest",
        "crate::describe::Describe",
    );
    let prepare = method(
        "prepare",
        "Prepare",
        "crate::describe::Prepare",
        "crate::describe::Prepared",
    );
    let execute = method("execute", "Execute", "bytes::Bytes", "bytes::Bytes")
        .codec_path("crate::codec::BytesCodec")
        .client_streaming()
        .server_streaming();
    manual::Service::builder()
        .name("Shard")
        .package("headrace.v1")
        .method(describe.build())
        .method(prepare.build())
        .method(execute.build())
        .build()
}

fn write_if_changed(path: &Path, content: &[u8]) -> io::Result<()> {
    if fs::read(path).is_ok_and(|old| old == content) {
        return Ok(());
    }
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder)?;
    }
    // Whole or not at all: a shard of another build may be reading it.
    let partial = path.with_extension(format!("{}.partial", std::process::id()));
    fs::write(&partial, content)?;
    fs::rename(&partial, path)
}
