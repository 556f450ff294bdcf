//! Our policy on the recorded trace and the generated ones: what it costs and where it loses,
//! beside the oracle and good fleets with the same dials.
//!
//! `cargo run --release -p stoker-simulation --bin evaluate -- --trace FILE`

use std::path::PathBuf;

use anyhow::{Result, bail};
use clap::Parser;
use stoker_simulation::policy::{Peer, Stoker};
use stoker_simulation::report::{self, Losses, Row};
use stoker_simulation::tuning::{self, Setting};
use stoker_simulation::{
    Backend, Device, Mix, Outcome, Score, Setup, Shape, Starts, Trace, Unseen, oracle, simulate,
};

#[derive(Parser)]
#[command(about = "Our policy on many traces: cost, and where it loses")]
struct Args {
    /// The trace that is one of the cases and gives the mix of the others.
    #[arg(long)]
    trace: PathBuf,
    /// Cases: recorded, a shape, or code-completion, long-chat, up-and-down.
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "recorded,diurnal,sawtooth,step,spike,onoff"
    )]
    cases: Vec<String>,
    /// So many times in a row; figures of each round.
    #[arg(long, default_value_t = 1)]
    repeat: u32,
    #[arg(long, default_value = "study-t4")]
    device: String,
    #[arg(long, default_value_t = 2)]
    warm_nodes: u32,
    #[arg(long, default_value_t = 75.0)]
    warm_seconds: f64,
    #[arg(long, default_value_t = 240.0)]
    cold_seconds: f64,
    /// engine, or surrogate: some fifteen times faster.
    #[arg(long, default_value = "engine")]
    backend: String,
    /// Runs of the oracle's search; 0 leaves it out.
    #[arg(long, default_value_t = 600)]
    oracle_runs: u32,
    /// Our budget, for the fleets beside ours.
    #[arg(long, default_value_t = 288)]
    budget: u32,
    /// Only ours (and the oracle).
    #[arg(long)]
    only_ours: bool,
    #[arg(long, default_value_t = 1)]
    seed: u64,
    #[arg(long, default_value_t = 2)]
    threads: usize,
}

fn main() -> Result<()> {
    let args = Args::parse();
    let recorded = Trace::read(&args.trace)?;
    let mix = Mix::of(&recorded);
    let Some(device) = Device::by_name(&args.device) else {
        bail!(
            "--device {:?}: choose study-t4, unhidden-t4, t4 or h100",
            args.device
        );
    };
    let setup = Setup {
        device,
        backend: match args.backend.as_str() {
            "engine" => Backend::Engine,
            "surrogate" => Backend::Surrogate,
            other => bail!("--backend {other:?}: choose engine or surrogate"),
        },
        starts: Starts {
            warm_nodes: args.warm_nodes,
            warm_seconds: args.warm_seconds,
            cold_seconds: args.cold_seconds,
        },
        seed: args.seed,
        ..Setup::study()
    };
    for case in &args.cases {
        let unseen = Unseen::ALL.into_iter().find(|kind| kind.name() == case);
        let trace = match (case.as_str(), Shape::by_name(case), unseen) {
            ("recorded", ..) => recorded.clone(),
            (_, Some(shape), _) => shape.generate(shape.study_peak(), &mix, args.seed),
            (_, _, Some(unseen)) => unseen.generate(&mix, args.seed),
            _ => bail!("--cases {case:?}: choose recorded, a shape or an unseen kind"),
        };
        evaluate(case, &trace, &setup, &args);
    }
    Ok(())
}

fn evaluate(case: &str, once: &Trace, setup: &Setup, args: &Args) {
    let trace = once.repeated(args.repeat.max(1));
    let setup = &setup.with_replicas(oracle::first_fleet(setup, once));
    // The oracle knows one round: what it costs holds for each.
    let best = (args.oracle_runs > 0)
        .then(|| oracle::search(&setup.with_dials(24, 2048), once, args.oracle_runs))
        .flatten();
    let hours = best.as_ref().map(|best| best.outcome.score.replica_hours);
    let rounds = f64::from(args.repeat.max(1));

    let mut ours = vec![("the whole", setup.clone(), Stoker::new(setup))];
    if !args.only_ours {
        ours = Stoker::ablations(setup);
        ours.reverse();
    }
    let runs: Vec<_> = ours
        .into_iter()
        .map(|run| std::sync::Mutex::new(Some(run)))
        .collect();
    let mut rows: Vec<Row> = tuning::parallel(&runs, args.threads, |run| {
        let (what, setup, mut policy) = run.lock().ok()?.take()?;
        Some(Row {
            name: "stoker".into(),
            setting: what.into(),
            outcome: simulate(&setup, &trace, &mut policy),
        })
    })
    .into_iter()
    .flatten()
    .collect();
    if !args.only_ours {
        rows.extend(beside(setup, &trace, args));
    }
    println!("## {case}\n");
    if let Some(best) = &best {
        let score = &best.outcome.score;
        println!(
            "oracle: {:.2} h a round, {:.2} % good\n",
            score.replica_hours, score.good
        );
    }
    println!(
        "{}",
        report::table(&rows, hours.map(|hours| hours * rounds))
    );
    if let (Some(best), Some(first), 1) = (&best, rows.first(), args.repeat) {
        println!("{}\n", Losses::new(&first.outcome, &best.outcome));
    }
    if args.repeat > 1 {
        for row in rows.iter().take(1) {
            by_round(&row.outcome, once.duration, args.repeat, hours);
        }
    }
}

fn by_round(outcome: &Outcome, duration: f64, rounds: u32, oracle: Option<f64>) {
    for round in 0..rounds {
        let from = f64::from(round) * duration;
        let score = Score::part(outcome, from, from + duration);
        let x = oracle.map_or(f64::NAN, |hours| score.replica_hours / hours);
        println!(
            "round {}: {:.2} % good, {:.2} % strict, {:.2} h, {x:.2} x oracle, {} changes, {} reversals",
            round + 1,
            score.good,
            score.strict,
            score.replica_hours,
            score.changes,
            score.reversals
        );
    }
    println!();
}

/// The smallest fixed fleet that is good enough, and the best single setting of a peer, with our
/// budget.
fn beside(setup: &Setup, trace: &Trace, args: &Args) -> Vec<Row> {
    let setting = |peer: Peer, parameter: f64| Setting {
        peer,
        parameter,
        max_num_seqs: 32,
        max_num_batched_tokens: args.budget,
    };
    let fast = setup.with_backend(Backend::Surrogate);
    let fixed = (1..=setup.max_replicas)
        .map(|n| setting(Peer::Fixed, f64::from(n)))
        .find(|fixed| fixed.run(&fast, trace).score.good >= setup.goals.good_percent);
    let settings: Vec<Setting> = (fixed.into_iter())
        .chain([
            setting(Peer::ProductionStack, 14.0),
            setting(Peer::HpaInflight, 12.0),
        ])
        .collect();
    tuning::parallel(&settings, args.threads, |setting| Row {
        name: setting.peer.name().into(),
        setting: format!("{}, {} / {}", setting.parameter, 32, args.budget),
        outcome: setting.run(setup, trace),
    })
}
