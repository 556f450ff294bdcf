//! A closed-loop load by `stoker-bench load`, in a process of its own.

use std::path::PathBuf;
use std::process::Stdio;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use tokio::process::{Child, Command};

use crate::{binary, repository};

pub struct Load {
    child: Child,
    json: PathBuf,
    progress: PathBuf,
}

/// What the load generator counted.
#[derive(Debug)]
pub struct Report(pub Value);

impl Report {
    pub fn requests(&self) -> u64 {
        self.0["requests"].as_u64().unwrap_or_default()
    }

    pub fn failed(&self) -> u64 {
        self.requests() - self.0["ok"].as_u64().unwrap_or_default()
    }

    /// Requests that failed in one way.
    pub fn failures(&self, kind: &str) -> u64 {
        let runs = self.0["runs"].as_array().into_iter().flatten();
        runs.filter_map(|run| run["failures"][kind].as_u64()).sum()
    }
}

impl Load {
    /// `ramp` is the generator's own notation: users and seconds of each stage, `2:10s,80:60s`.
    pub fn start(name: &str, url: &str, model: &str, ramp: &str, more: &[&str]) -> Result<Self> {
        let folder = repository("target/e2e");
        std::fs::create_dir_all(&folder)?;
        let json = folder.join(format!("{name}.json"));
        let progress = folder.join(format!("{name}-progress.jsonl"));
        let _ = std::fs::remove_file(&progress);
        let log = std::fs::File::create(folder.join(format!("{name}.log")))?;
        let child = Command::new(binary("stoker-bench")?)
            .args(["load", "--url", url, "--model", model, "--ramp", ramp])
            .args(more)
            .arg("--json")
            .arg(&json)
            .arg("--progress-jsonl")
            .arg(&progress)
            .stdout(Stdio::from(log.try_clone()?))
            .stderr(Stdio::from(log))
            .kill_on_drop(true)
            .spawn()?;
        Ok(Self {
            child,
            json,
            progress,
        })
    }

    /// The last progress line; `None` before the first.
    pub fn progress(&self) -> Option<Value> {
        let text = std::fs::read_to_string(&self.progress).ok()?;
        text.lines()
            .rev()
            .find_map(|line| serde_json::from_str(line).ok())
    }

    pub fn is_running(&mut self) -> Result<bool> {
        Ok(self.child.try_wait()?.is_none())
    }

    pub async fn finish(mut self) -> Result<Report> {
        let status = self.child.wait().await?;
        ensure!(
            status.success(),
            "stoker-bench ended with {status}: see {}",
            self.json.with_extension("log").display()
        );
        let text =
            std::fs::read_to_string(&self.json).with_context(|| self.json.display().to_string())?;
        Ok(Report(serde_json::from_str(&text)?))
    }
}
