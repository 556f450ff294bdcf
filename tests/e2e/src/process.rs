//! Finding and killing a container's process, as the kernel's OOM killer would.

use std::fs;

use anyhow::{Context, Result, bail};
use k8s_openapi::api::core::v1::Pod;

/// SIGKILLs the main process of a pod's only container. Works where the node is this host.
pub fn kill_container(pod: &Pod) -> Result<u32> {
    let status = pod
        .status
        .as_ref()
        .and_then(|status| status.container_statuses.as_ref());
    let id = status
        .and_then(|containers| containers.first())
        .and_then(|container| container.container_id.as_deref())
        .and_then(|id| id.split("://").nth(1))
        .context("the pod has no running container")?;
    let pid = first_process(id)?;
    let killed = std::process::Command::new("kill")
        .args(["-KILL", &pid.to_string()])
        .status()?;
    if !killed.success() {
        bail!("kill -KILL {pid} failed");
    }
    Ok(pid)
}

/// The lowest pid whose cgroup belongs to the container.
fn first_process(container: &str) -> Result<u32> {
    fs::read_dir("/proc")?
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<u32>().ok())
        .filter(|pid| {
            fs::read_to_string(format!("/proc/{pid}/cgroup"))
                .is_ok_and(|cgroups| cgroups.contains(container))
        })
        .min()
        .with_context(|| format!("no process of container {container} on this host"))
}
