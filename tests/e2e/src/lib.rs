//! Helpers of the end-to-end tests. They run against the real API server that `KUBECONFIG` names,
//! with the chart installed; `tests/run.sh` prepares both.

pub mod cluster;
pub mod load;
pub mod process;
pub mod router;
pub mod service;

pub use cluster::{Cluster, eventually};
pub use load::{Load, Report};
pub use service::Service;

/// A path below the repository's root.
pub fn repository(path: &str) -> std::path::PathBuf {
    std::path::Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../..")
        .join(path)
}

/// A binary of this workspace, built by the same profile as the tests.
pub fn binary(name: &str) -> anyhow::Result<std::path::PathBuf> {
    // The test itself lies in <target>/release/deps.
    let test = std::env::current_exe()?;
    let path = test
        .ancestors()
        .nth(2)
        .map(|folder| folder.join(name))
        .filter(|path| path.exists());
    path.ok_or_else(|| {
        anyhow::anyhow!("{name} is not built: run `cargo build --release -p {name}`")
    })
}
