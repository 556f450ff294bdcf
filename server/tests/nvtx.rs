//! The engine's phases reach a profiler as NVTX ranges: a stand-in for its library writes them down.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use common::Server;
use serde_json::json;

/// The profiler's library, compiled as a shared one.
fn recorder(folder: &Path) -> PathBuf {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/stand_ins/nvtx_recorder.rs");
    let library = folder.join("libnvtx_recorder.so");
    let status = Command::new(std::env::var_os("RUSTC").unwrap_or("rustc".into()))
        .args(["--edition", "2024", "--crate-type", "cdylib", "-o"])
        .args([&library, &source])
        .status()
        .unwrap();
    assert!(status.success());
    library
}

#[tokio::test]
async fn a_profiler_sees_the_phases_of_every_step() {
    let folder = tempfile::tempdir().unwrap();
    let (library, record) = (recorder(folder.path()), folder.path().join("ranges"));
    let environment = [
        ("NVTX_INJECTION64_PATH", library.to_str().unwrap()),
        ("NVTX_RECORD", record.to_str().unwrap()),
    ];
    let server = Server::launch_with(&["--device", "simulated"], &environment);
    server.wait_ready().await;
    server
        .complete(json!({"prompt": [1, 2, 3], "max_tokens": 5}))
        .await;
    server.terminate();
    assert!(server.wait_exit().await.success());

    let mut open: HashMap<String, Vec<String>> = HashMap::new();
    let mut seen: HashMap<String, usize> = HashMap::new();
    for line in std::fs::read_to_string(&record).unwrap().lines() {
        let (thread, what) = line.split_once(' ').unwrap();
        let stack = open.entry(thread.to_owned()).or_default();
        match what.strip_prefix("> ") {
            Some(name) => stack.push(name.to_owned()),
            None => {
                let name = stack.pop().expect("a range ends that has begun");
                *seen.entry(name).or_default() += 1;
            }
        }
    }
    assert!(open.values().all(Vec::is_empty), "{open:?}");
    assert_eq!(seen["prefill"], 1, "{seen:?}");
    assert!(seen["decode"] >= 4, "{seen:?}");
    for phase in ["schedule", "wait", "commit", "answer"] {
        assert!(seen[phase] >= 5, "{phase}: {seen:?}");
    }
}

#[tokio::test]
async fn a_library_that_isnt_there_harms_nobody() {
    let environment = [("NVTX_INJECTION64_PATH", "/nowhere/libprofiler.so")];
    let server = Server::launch_with(&["--device", "simulated"], &environment);
    server.wait_ready().await;
    server
        .complete(json!({"prompt": "a", "max_tokens": 2}))
        .await;
}
