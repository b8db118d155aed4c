//! Compiles the .proto files with protox, so that no protoc is needed.

use std::error::Error;
use std::path::Path;

const FILES: [&str; 6] = [
    "proto/us/v1/fragments.proto",
    "proto/us/v1/membership.proto",
    "proto/us/v1/session.proto",
    "proto/us/v1/admin.proto",
    "proto/us/v1/recovery.proto",
    "proto/us/v1/registry.proto",
];

fn main() -> Result<(), Box<dyn Error>> {
    for file in FILES {
        println!("cargo::rerun-if-changed={file}");
        if !Path::new(file).exists() {
            return Err(format!("{file} is missing").into());
        }
    }
    let descriptors = protox::compile(FILES, ["proto"])?;
    tonic_prost_build::configure().bytes(".").compile_fds(descriptors)?;
    Ok(())
}
