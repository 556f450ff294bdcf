//! What HTTP keeps of the engine's own speed.

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Args;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::direct::DirectReport;
use crate::load::LoadReport;
use crate::table;

#[derive(Args)]
pub struct CompareArgs {
    /// JSON that `direct` wrote
    #[arg(long)]
    direct: PathBuf,
    /// JSON that `load` wrote, at concurrencies that `direct` has as batches
    #[arg(long)]
    load: PathBuf,
    /// Where to write the comparison
    #[arg(long)]
    json: Option<PathBuf>,
    /// Fail below this share of the direct figure, or when a request was not answered
    #[arg(long)]
    min_share: Option<f64>,
}

#[derive(Serialize)]
struct Comparison {
    model: String,
    direct: Vec<Direct>,
    load: Vec<Load>,
}

#[derive(Serialize)]
struct Direct {
    batch: u32,
    tok_s: f64,
}

#[derive(Serialize)]
struct Load {
    concurrency: u32,
    requests: u64,
    ok: u64,
    tok_s: f64,
    of_direct: f64,
}

pub fn run(args: CompareArgs) -> Result<bool> {
    let direct: DirectReport = read(&args.direct)?;
    let load: LoadReport = read(&args.load)?;
    let tok_s = |batch: u32| {
        let run = direct.runs.iter().find(|run| run.batch == batch);
        run.map(|run| run.tok_s)
            .with_context(|| format!("{} has no batch {batch}", args.direct.display()))
    };
    let comparison = Comparison {
        load: load
            .runs
            .iter()
            .map(|run| {
                let direct = tok_s(run.concurrency)?;
                Ok(Load {
                    concurrency: run.concurrency,
                    requests: run.requests,
                    ok: run.ok,
                    tok_s: round(run.tok_s, 10.0),
                    of_direct: round(run.tok_s / direct, 1e4),
                })
            })
            .collect::<Result<_>>()?,
        direct: direct
            .runs
            .iter()
            .map(|run| Direct {
                batch: run.batch,
                tok_s: round(run.tok_s, 10.0),
            })
            .collect(),
        model: direct.model.clone(),
    };
    let rows: Vec<Vec<String>> = comparison
        .load
        .iter()
        .zip(&load.runs)
        .map(|(row, run)| {
            vec![
                row.concurrency.to_string(),
                format!("{} / {}", row.ok, row.requests),
                format!("{:.1}", run.tok_s / row.of_direct.max(1e-9)),
                format!("{:.1}", row.tok_s),
                format!("{:.2} %", 100.0 * row.of_direct),
            ]
        })
        .collect();
    table::print(
        &format!("HTTP's share of the direct figure: {}", comparison.model),
        &[
            "concurrency",
            "answered",
            "direct tok/s",
            "HTTP tok/s",
            "share",
        ],
        &rows,
    );
    if let Some(path) = &args.json {
        crate::write_json(path, &comparison)?;
    }
    let Some(min_share) = args.min_share else {
        return Ok(true);
    };
    let held = comparison
        .load
        .iter()
        .all(|run| run.ok == run.requests && run.of_direct >= min_share);
    if !held {
        eprintln!(
            "a bar does not hold: every request answered, at least {:.0} % of direct",
            100.0 * min_share
        );
    }
    Ok(held)
}

fn round(value: f64, scale: f64) -> f64 {
    (value * scale).round() / scale
}

fn read<T: DeserializeOwned>(path: &PathBuf) -> Result<T> {
    let text =
        std::fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
    serde_json::from_str(&text).with_context(|| format!("reading {}", path.display()))
}
