//! Table A of the reference study, made anew: each peer tuned in hindsight on each trace, in
//! replica-hours beside the study's.
//!
//! `cargo run --release -p stoker-simulation --bin reproduce -- --trace tests/traces/…csv`

mod named;

use std::path::PathBuf;

use anyhow::Result;
use clap::Parser;
use stoker_simulation::fleet::TAIL;
use stoker_simulation::policy::Peer;
use stoker_simulation::score::Score;
use stoker_simulation::tuning::Setting;
use stoker_simulation::{Backend, Mix, Setup, Shape, Trace, oracle, tuning};

#[derive(Parser)]
#[command(about = "Table A of the reference study, made anew")]
struct Args {
    /// The trace that gives the mix, and is the first column.
    #[arg(long)]
    trace: PathBuf,
    /// Only these columns.
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// Instead of all that: what the recorded trace's settings that the study names do.
    #[arg(long)]
    named: bool,
    /// Print every setting's figures, not only the best one's.
    #[arg(long)]
    all: bool,
    #[arg(long, default_value_t = 600)]
    oracle_runs: u32,
    /// engine, or lockstep: the scheduler that the study had (faster, too).
    #[arg(long, default_value = "lockstep")]
    backend: String,
    /// Of the arrivals of all but the recorded trace.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    #[arg(long, default_value_t = 2)]
    threads: usize,
}

/// The study's figure: x oracle at 99 % good, or below 0 the best good % where that is never
/// reached.
const STUDY: [(Peer, [f64; 6]); 11] = [
    (Peer::Fixed, [1.39, 1.54, 1.37, 1.62, 2.40, 1.89]),
    (Peer::Kpa, [1.44, 1.36, 1.52, -96.9, -90.2, -40.2]),
    (Peer::HpaWaiting, [-95.8, -97.2, 2.14, -98.9, -74.5, -36.2]),
    (Peer::HpaInflight, [1.17, 1.24, 1.68, 3.54, 6.36, -36.4]),
    (Peer::KubeAi, [1.21, 1.66, 1.59, -96.8, -87.6, -33.2]),
    (Peer::WvaV1, [1.49, 1.23, 1.53, 2.34, 2.80, -27.1]),
    (Peer::WvaV2, [1.81, 1.46, 2.18, -97.7, -83.1, -38.0]),
    (Peer::AibrixApa, [1.32, 1.36, 1.86, 3.59, 5.56, 4.22]),
    (Peer::Dynamo, [1.06, 1.17, 1.68, 3.84, 4.56, 5.01]),
    (Peer::RayServe, [1.20, 1.39, 1.71, 7.44, -90.3, -63.9]),
    (Peer::ProductionStack, [1.16, 1.19, 1.47, 2.87, -93.2, 2.94]),
];
const COLUMNS: [&str; 6] = ["conv", "diurnal", "sawtooth", "step", "spike", "onoff"];
/// Replicas of the study's best fixed fleets.
const FIXED: [f64; 6] = [7.0, 6.0, 6.0, 6.0, 8.0, 6.0];

/// The hours of the study's oracle, which its figures are multiples of: what its fixed fleet costs by
/// that fleet's multiple. (For the recorded trace it says 4.99 itself.)
fn study_oracle(column: usize, duration: f64) -> f64 {
    let fleet = FIXED.get(column).copied().unwrap_or(f64::NAN) * (duration + TAIL) / 3600.0;
    let (_, multiples) = STUDY[0];
    fleet / multiples.get(column).copied().unwrap_or(f64::NAN)
}

/// The study's grids, as far as its figures tell: the best settings named there are among them, what
/// lies between those isn't, and each begins where a peer is best on jumps. Finer ones find cheaper
/// settings.
fn parameters(peer: Peer) -> &'static [f64] {
    match peer {
        Peer::Fixed => peer.grid(),
        Peer::Kpa | Peer::ProductionStack => &[3.0, 4.0, 5.0, 6.0, 8.0, 10.0, 12.0, 14.0, 16.0],
        Peer::HpaInflight => &[2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0, 12.0, 14.0, 16.0],
        Peer::KubeAi => &[2.5, 3.0, 4.0, 6.0, 10.0, 14.0],
        Peer::RayServe => &[1.0, 2.0, 4.0, 6.0, 8.0, 10.0, 12.0, 14.0, 16.0],
        Peer::HpaWaiting => &[0.1, 0.2, 0.5, 1.0, 2.0, 5.0],
        Peer::WvaV1 => &[
            5.1, 5.3, 5.5, 5.6, 5.65, 5.7, 5.77, 10.1, 10.3, 10.5, 10.6, 10.65,
        ],
        Peer::WvaV2 => &[0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.85],
        Peer::AibrixApa => &[0.03, 0.07, 0.1, 0.2, 0.3, 0.4, 0.5],
        Peer::Dynamo => &[0.2, 0.4, 0.5, 0.6, 0.8, 1.0],
    }
}

fn main() -> Result<()> {
    let args = Args::parse();
    let conv = Trace::read(&args.trace)?;
    let mix = Mix::of(&conv);
    let backend = match args.backend.as_str() {
        "engine" => Backend::Engine,
        _ => Backend::Lockstep,
    };
    // The study's replicas are vLLM's, those that its oracle is searched on, too; and its policies start
    // with what the first two minutes need as a whole.
    let study = Setup::study();
    let setup = Setup {
        device: study.device.clone().first_come(),
        opening_parts: 1,
        ..study.with_backend(backend)
    };
    if args.named {
        named::print(&setup, &conv, args.threads);
        return Ok(());
    }
    for (column, name) in COLUMNS.iter().enumerate() {
        if !args.only.is_empty() && !args.only.iter().any(|only| only == name) {
            continue;
        }
        let trace = match Shape::by_name(name) {
            Some(shape) => shape.generate(shape.study_peak(), &mix, args.seed),
            None => conv.clone(),
        };
        let caps = [24, 48];
        let found = tuning::parallel(&caps, args.threads, |&cap| {
            oracle::search(&setup.with_dials(cap, 2048), &trace, args.oracle_runs)
        });
        let oracles = found.into_iter().flatten();
        let hours = (oracles.map(|o| o.outcome.score.replica_hours)).fold(f64::INFINITY, f64::min);
        let study_hours = study_oracle(column, trace.duration);
        println!(
            "\n{name}: {} requests, oracle {hours:.2} h, the study's {study_hours:.2} h",
            trace.requests.len()
        );
        let settings: Vec<Setting> = (STUDY.iter())
            .flat_map(|(peer, _)| {
                tuning::settings(*peer, parameters(*peer), &[8, 32, 128], &[2048])
            })
            .collect();
        let scores = tuning::scores(&settings, &setup, &trace, Backend::Lockstep, args.threads);
        if args.all {
            for (setting, score) in &scores {
                println!(
                    "{} {}, {}: {:.2} % good, {:.2} x, {} changes, {} reversals",
                    setting.peer.name(),
                    setting.max_num_seqs,
                    setting.parameter,
                    score.good,
                    score.replica_hours / study_hours,
                    score.changes,
                    score.reversals
                );
            }
        }
        println!("| policy | setting | hours here | the study's | |");
        println!("| --- | --- | --- | --- | --- |");
        for (peer, figures) in &STUDY {
            let group: Vec<_> = (scores.iter())
                .filter(|(setting, _)| setting.peer == *peer)
                .copied()
                .collect();
            let best = match backend {
                Backend::Engine => tuning::verified(&group, &setup, &trace)
                    .map(|(setting, outcome)| (setting, outcome.score)),
                _ => tuning::best(group.iter(), 99.0, |score| score.good).copied(),
            };
            if let (Some((setting, score)), Some(study)) = (best, figures.get(column)) {
                let here = figure(&score);
                let study = if *study < 0.0 {
                    *study
                } else {
                    study * study_hours
                };
                println!(
                    "| {} | {}, {} | {} | {} | {} |",
                    peer.name(),
                    setting.max_num_seqs,
                    setting.parameter,
                    words(here),
                    words(study),
                    verdict(here, study)
                );
            }
        }
    }
    Ok(())
}

/// Hours, or below 0 the good % where that isn't 99.
fn figure(score: &Score) -> f64 {
    if score.good >= 99.0 {
        score.replica_hours
    } else {
        -score.good
    }
}

fn words(figure: f64) -> String {
    if figure < 0.0 {
        format!("({:.1})", -figure)
    } else {
        format!("{figure:.2}")
    }
}

/// How far apart both are; figures of different kinds can't be compared.
fn verdict(here: f64, study: f64) -> String {
    if (here < 0.0) != (study < 0.0) {
        return "differs".into();
    }
    let off = 100.0 * (here / study - 1.0);
    let holds = if off.abs() <= 10.0 { "holds" } else { "off" };
    format!("{holds}, {off:+.0} %")
}
