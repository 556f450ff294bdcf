//! Ours on one case, beside the oracle and good fleets with the same dials.

use stoker_simulation::policy::{Peer, Stoker};
use stoker_simulation::report::{self, Losses, Row};
use stoker_simulation::tuning::{self, Setting};
use stoker_simulation::{Backend, Outcome, Score, Setup, Trace, oracle, simulate};

use crate::Args;

pub fn evaluate(case: &str, once: &Trace, setup: &Setup, args: &Args) {
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
