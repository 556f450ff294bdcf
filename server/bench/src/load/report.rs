//! The tables and the JSON of a load test.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::recorder::Measured;
use crate::stats::Summary;
use crate::table::{self, ms};

#[derive(Debug, Serialize, Deserialize)]
pub struct LoadReport {
    pub url: String,
    pub model: Option<String>,
    /// Requests of all runs; `ok` and `failed` add up to them.
    pub requests: u64,
    pub ok: u64,
    pub failed: u64,
    pub runs: Vec<LoadRun>,
}

#[derive(Debug, Serialize, Deserialize)]
pub struct LoadRun {
    /// Users; of a ramp the most.
    pub concurrency: u32,
    pub requests: u64,
    pub ok: u64,
    /// Those that met the limits of `--goodput`.
    pub good: Option<u64>,
    pub failed: u64,
    /// The failed ones by kind.
    pub failures: BTreeMap<String, u64>,
    /// What the first failure of each kind said.
    pub examples: BTreeMap<String, String>,
    pub success_rate: f64,
    pub seconds: f64,
    /// Answered requests a second.
    pub req_s: f64,
    /// New tokens of answered requests a second.
    pub tok_s: f64,
    pub prompt_tok_s: f64,
    /// Seconds.
    #[serde(skip_deserializing)]
    pub latency: Summary,
    #[serde(skip_deserializing)]
    pub ttft: Summary,
    #[serde(skip_deserializing)]
    pub itl: Summary,
}

impl LoadRun {
    pub fn new(concurrency: u32, mut measured: Measured) -> Self {
        let per_second = |n: u64| n as f64 / measured.seconds.max(1e-9);
        Self {
            concurrency,
            requests: measured.sent,
            ok: measured.ok,
            good: measured.good,
            success_rate: if measured.sent == 0 {
                1.0
            } else {
                measured.ok as f64 / measured.sent as f64
            },
            seconds: measured.seconds,
            req_s: per_second(measured.ok),
            tok_s: per_second(measured.completion_tokens),
            prompt_tok_s: per_second(measured.prompt_tokens),
            latency: Summary::of(&mut measured.latency),
            ttft: Summary::of(&mut measured.ttft),
            itl: Summary::of(&mut measured.itl),
            failed: measured.failed.values().sum(),
            failures: measured.failed,
            examples: measured.examples,
        }
    }
}

impl LoadReport {
    pub fn new(url: String, model: Option<String>, runs: Vec<LoadRun>) -> Self {
        let total = |of: fn(&LoadRun) -> u64| runs.iter().map(of).sum();
        Self {
            url,
            model,
            requests: total(|run| run.requests),
            ok: total(|run| run.ok),
            failed: total(|run| run.failed),
            runs,
        }
    }

    pub fn print(&self) {
        self.print_throughput();
        self.print_times("Latency, ms", |run| &run.latency);
        if self.runs.iter().any(|run| run.ttft.count > 0) {
            self.print_times("Time to first token, ms", |run| &run.ttft);
            self.print_times("Inter-token latency, ms", |run| &run.itl);
        }
        self.print_failures();
    }

    fn print_throughput(&self) {
        let rows: Vec<Vec<String>> = self
            .runs
            .iter()
            .map(|run| {
                vec![
                    run.concurrency.to_string(),
                    run.requests.to_string(),
                    run.ok.to_string(),
                    format!("{:.2} %", 100.0 * run.success_rate),
                    run.good.map_or("-".to_owned(), |good| {
                        format!("{:.2} %", 100.0 * good as f64 / run.requests.max(1) as f64)
                    }),
                    format!("{:.1}", run.seconds),
                    format!("{:.2}", run.req_s),
                    format!("{:.1}", run.tok_s),
                    format!("{:.1}", run.prompt_tok_s),
                ]
            })
            .collect();
        table::print(
            &format!("Load on {}", self.url),
            &[
                "concurrency",
                "requests",
                "ok",
                "success",
                "good",
                "seconds",
                "req/s",
                "tok/s",
                "prompt tok/s",
            ],
            &rows,
        );
    }

    fn print_times(&self, title: &str, of: impl Fn(&LoadRun) -> &Summary) {
        let rows: Vec<Vec<String>> = self
            .runs
            .iter()
            .map(|run| {
                let s = of(run);
                let times = [s.min, s.p50, s.p90, s.p95, s.p99, s.max, s.mean];
                std::iter::once(run.concurrency.to_string())
                    .chain(times.map(ms))
                    .collect()
            })
            .collect();
        table::print(
            title,
            &[
                "concurrency",
                "min",
                "P50",
                "P90",
                "P95",
                "P99",
                "max",
                "mean",
            ],
            &rows,
        );
    }

    fn print_failures(&self) {
        let rows: Vec<Vec<String>> = self
            .runs
            .iter()
            .flat_map(|run| {
                run.failures.iter().map(|(kind, count)| {
                    let example = run.examples.get(kind).map_or("", String::as_str);
                    vec![
                        run.concurrency.to_string(),
                        kind.clone(),
                        count.to_string(),
                        example.chars().take(120).collect(),
                    ]
                })
            })
            .collect();
        if !rows.is_empty() {
            let head = ["concurrency", "failure", "count", "the first one said"];
            table::print("Failures", &head, &rows);
        }
    }
}
