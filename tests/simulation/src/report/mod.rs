//! Runs side by side: as a table, and as a page with charts that needs no network.

mod chart;
mod html;
mod losses;
mod series;

pub use html::page;
pub use losses::Losses;

use crate::fleet::Outcome;

/// A policy's run.
#[derive(Clone, Debug)]
pub struct Row {
    pub name: String,
    /// Dials and parameter, in words.
    pub setting: String,
    pub outcome: Outcome,
}

/// Columns of the table.
const HEADER: [&str; 11] = [
    "policy",
    "setting",
    "good %",
    "strict %",
    "TTFT p99 s",
    "ITL mean ms",
    "replica-h",
    "x oracle",
    "changes",
    "reversals",
    "time-outs",
];

/// The figures of a row; `oracle` is the oracle's replica-hours, where there is one.
fn cells(row: &Row, oracle: Option<f64>) -> [String; 11] {
    let score = &row.outcome.score;
    let lost = match score.failed {
        0 => String::new(),
        failed => format!(" (+{failed} failed)"),
    };
    [
        row.name.clone(),
        row.setting.clone(),
        format!("{:.2}", score.good),
        format!("{:.2}", score.strict),
        format!("{:.2}", score.ttft_p99),
        format!("{:.1}", score.itl_mean * 1e3),
        format!("{:.2}", score.replica_hours),
        oracle.map_or("-".into(), |hours| {
            format!("{:.2}", score.replica_hours / hours)
        }),
        score.changes.to_string(),
        score.reversals.to_string(),
        format!("{}{lost}", score.timeouts),
    ]
}

/// A table in Markdown.
pub fn table(rows: &[Row], oracle: Option<f64>) -> String {
    let lines = rows.iter().map(|row| cells(row, oracle).to_vec());
    let header: Vec<String> = HEADER.iter().map(ToString::to_string).collect();
    let all: Vec<Vec<String>> = std::iter::once(header).chain(lines).collect();
    let width = |column: usize| {
        let cells = all.iter().filter_map(|line| line.get(column));
        cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..HEADER.len()).map(width).collect();
    let mut text = String::new();
    for (number, line) in all.iter().enumerate() {
        for (column, (cell, &width)) in line.iter().zip(&widths).enumerate() {
            // Words to the left, numbers to the right.
            text += &if column < 2 {
                format!("| {cell:<width$} ")
            } else {
                format!("| {cell:>width$} ")
            };
        }
        text += "|\n";
        if number == 0 {
            for (column, &width) in widths.iter().enumerate() {
                text += &if column < 2 {
                    format!("| {:-<width$} ", "")
                } else {
                    format!("| {:->width$} ", ":")
                };
            }
            text += "|\n";
        }
    }
    text
}
