//! stoker-bench: how fast an engine is by itself (`direct`), how fast a server is over HTTP
//! (`load`), and what share of the first the second keeps (`compare`).

mod compare;
mod direct;
mod load;
mod prompts;
mod stats;
mod table;

use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};
use serde::Serialize;

#[derive(Parser)]
#[command(
    version,
    about = "Benchmarks of the engine and of the server",
    max_term_width = 100
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Loads a server over HTTP: so many virtual users, each sending its next request when the
    /// one before is answered
    Load(load::LoadArgs),
    /// Runs the engine in this process, without HTTP
    Direct(direct::DirectArgs),
    /// Prints and writes what share of the direct figures a load test reached
    Compare(compare::CompareArgs),
}

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Load(args) => load::run(args),
        Command::Direct(args) => direct::run(args),
        Command::Compare(args) => compare::run(args),
    };
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::from(2)
        }
    }
}

/// Writes a report as JSON, making its folder.
fn write_json(path: &Path, report: &impl Serialize) -> Result<()> {
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder).with_context(|| format!("making {}", folder.display()))?;
    }
    let text = serde_json::to_string_pretty(report)? + "\n";
    std::fs::write(path, text).with_context(|| format!("writing {}", path.display()))
}
