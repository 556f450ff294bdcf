//! docs/openapi.json is what the server says.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::path::Path;

use common::Server;
use serde_json::Value;

#[tokio::test]
async fn the_committed_description_is_the_served_one() {
    let server = Server::launch(&["--device", "simulated"]);
    let (status, served) = server.get("/openapi.json").await;
    assert_eq!(status, 200);
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/openapi.json");
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        std::fs::write(&path, &served).unwrap();
    }
    let committed = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(
        served == committed,
        "docs/openapi.json is out of date: run UPDATE_GOLDEN=1 cargo test --release \
         -p stoker-server --test openapi, and commit it"
    );
    let api: Value = serde_json::from_str(&served).unwrap();
    for path in [
        "/v1/models",
        "/v1/completions",
        "/v1/chat/completions",
        "/health",
        "/ready",
        "/live",
        "/metrics",
        "/openapi.json",
        "/control/v1/limits",
        "/control/v1/state",
        "/control/v1/drain",
        "/control/v1/profile",
    ] {
        assert!(api["paths"].get(path).is_some(), "{path}");
    }
}
