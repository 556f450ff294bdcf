//! Our policy on the recorded trace and the generated ones: what it costs and where it loses,
//! beside the oracle and good fleets with the same dials.
//!
//! `cargo run --release -p stoker-simulation --bin evaluate -- --trace FILE`

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use clap::Parser;
use stoker_autoscaler::Dials;
use stoker_simulation::flags::World;
use stoker_simulation::policy::{Advised, Peer, Stoker};
use stoker_simulation::report::{self, Losses, Row};
use stoker_simulation::tuning::{self, Setting};
use stoker_simulation::{
    Backend, Mix, Outcome, Score, Setup, Shape, Trace, Unseen, oracle, simulate,
};

#[derive(Parser)]
#[command(about = "Our policy on many traces: cost, and where it loses")]
struct Args {
    /// The trace that is one of the cases and gives the mix of the others.
    #[arg(long)]
    trace: PathBuf,
    /// Cases: recorded, a shape, or code-completion, long-chat, up-and-down, classifier.
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "recorded,diurnal,sawtooth,step,spike,onoff"
    )]
    cases: Vec<String>,
    /// So many times in a row; figures of each round.
    #[arg(long, default_value_t = 1)]
    repeat: u32,
    #[command(flatten)]
    world: World,
    /// Runs of the oracle's search; 0 leaves it out.
    #[arg(long, default_value_t = 600)]
    oracle_runs: u32,
    /// Our budget, for the fleets beside ours.
    #[arg(long, default_value_t = 288)]
    budget: u32,
    /// Only ours (and the oracle).
    #[arg(long)]
    only_ours: bool,
    /// Instead of all that: the misses expected of fleets of constant size, and those measured.
    #[arg(long)]
    calibration: bool,
    /// Instead of all that: each peer at the one setting that does best on all cases together, with
    /// caps and budgets from these lists, on the surrogate.
    #[arg(long, value_delimiter = ',')]
    peers_at_budgets: Vec<u32>,
    #[arg(long, value_delimiter = ',', default_value = "32")]
    peers_at_caps: Vec<u32>,
    /// One setting for all of these seeds, instead of one for --seed.
    #[arg(long, value_delimiter = ',')]
    peers_over_seeds: Vec<u64>,
    /// Instead of all that: this stoker-advise on each case, cold, and what the peers do there for no
    /// more replica-hours, at the best of their settings in hindsight (with the budgets given).
    #[arg(long)]
    advise: Option<PathBuf>,
    /// Instead of all that: of step and spike the best that comes of an order so many seconds after
    /// load jumped, at cap 43 and our budget.
    #[arg(long)]
    reaction: Option<f64>,
    #[arg(long, default_value_t = 2)]
    threads: usize,
}

fn main() -> Result<()> {
    let args = Args::parse();
    let recorded = Trace::read(&args.trace)?;
    let mix = Mix::of(&recorded);
    let setup = args.world.setup();
    if args.calibration {
        calibrate(&setup, &mix, args.threads);
        return Ok(());
    }
    let traces = (args.cases.iter())
        .map(|case| {
            Ok((
                case.as_str(),
                case_of(case, &recorded, &mix, args.world.seed)?,
            ))
        })
        .collect::<Result<Vec<_>>>()?;
    if let Some(program) = &args.advise {
        for (case, trace) in &traces {
            advised(case, trace, &setup, program, &args)?;
        }
        return Ok(());
    }
    if let Some(delay) = args.reaction {
        react(&traces, &setup.with_dials(43, args.budget), delay);
        return Ok(());
    }
    if !args.peers_at_budgets.is_empty() {
        let seeds = if args.peers_over_seeds.is_empty() {
            vec![args.world.seed]
        } else {
            args.peers_over_seeds.clone()
        };
        let worlds = (seeds.into_iter())
            .flat_map(|seed| args.cases.iter().map(move |case| (seed, case)))
            .map(|(seed, case)| {
                let trace = case_of(case, &recorded, &mix, seed)?;
                let setup = Setup {
                    seed,
                    ..setup.clone()
                };
                Ok((setup, trace))
            })
            .collect::<Result<Vec<_>>>()?;
        peers(&worlds, &args);
        return Ok(());
    }
    for (case, trace) in &traces {
        evaluate(case, trace, &setup, &args);
    }
    Ok(())
}

fn case_of(case: &str, recorded: &Trace, mix: &Mix, seed: u64) -> Result<Trace> {
    let unseen = Unseen::ALL.into_iter().find(|kind| kind.name() == case);
    Ok(match (case, Shape::by_name(case), unseen) {
        ("recorded", ..) => recorded.clone(),
        (_, Some(shape), _) => shape.generate(shape.study_peak(), mix, seed),
        (_, _, Some(unseen)) => unseen.generate(mix, seed),
        _ => bail!("--cases {case:?}: choose recorded, a shape or an unseen kind"),
    })
}

fn advised(case: &str, trace: &Trace, setup: &Setup, program: &Path, args: &Args) -> Result<()> {
    let setup = setup.with_replicas(oracle::first_fleet(setup, trace));
    let mut advised = Advised::new(program, &setup)?;
    let outcome = simulate(&setup, trace, &mut advised);
    advised.end()?;
    let ours = outcome.score;
    let usual = |of: fn(&Dials) -> u32| {
        let mut values: Vec<u32> = outcome.timeline.iter().map(|p| of(&p.dials)).collect();
        values.sort_unstable();
        values.get(values.len() / 2).copied().unwrap_or(0)
    };
    let budget = usual(|dials| dials.max_num_batched_tokens);
    println!(
        "## {case}: {} requests in {:.0} min\n",
        trace.requests.len(),
        trace.duration / 60.0
    );
    println!("| policy | setting | good % | strict % | replica-h | reversals |");
    println!("| --- | --- | ---: | ---: | ---: | ---: |");
    let line = |name: &str, setting: &str, score: &Score| {
        println!(
            "| {name} | {setting} | {:.2} | {:.2} | {:.2} | {} |",
            score.good, score.strict, score.replica_hours, score.reversals
        );
    };
    let cap = usual(|dials| dials.max_num_seqs);
    line("stoker-advise", &format!("mostly {cap} / {budget}"), &ours);
    let mut budgets = args.peers_at_budgets.clone();
    budgets.push(budget);
    budgets.sort_unstable();
    budgets.dedup();
    let reactive: Vec<Peer> = Peer::ALL
        .into_iter()
        .filter(|p| *p != Peer::Fixed)
        .collect();
    let settings = tuning::grid(&reactive, &args.peers_at_caps, &budgets);
    let scores = tuning::scores(&settings, &setup, trace, setup.backend, args.threads);
    for peer in reactive {
        let of = scores.iter().filter(|(setting, score)| {
            setting.peer == peer && score.replica_hours <= ours.replica_hours
        });
        match of.max_by(|a, b| a.1.good.total_cmp(&b.1.good)) {
            Some((setting, score)) => {
                let (cap, budget) = (setting.max_num_seqs, setting.max_num_batched_tokens);
                line(
                    peer.name(),
                    &format!("{cap} / {budget}, {}", setting.parameter),
                    score,
                );
            }
            None => println!("| {} | none as cheap | | | | |", peer.name()),
        }
    }
    println!();
    Ok(())
}

fn react(traces: &[(&str, Trace)], setup: &Setup, delay: f64) {
    for (case, trace) in traces {
        let jump = Shape::by_name(case).and_then(Shape::jump);
        let best = jump.and_then(|jump| oracle::after_jump(setup, trace, jump, delay));
        if let Some((before, after, outcome)) = best {
            let good = outcome.score.good;
            println!(
                "{case}: {before} to {after} replicas {delay} s after the jump: {good:.2} % good"
            );
        }
    }
}

/// Every peer at its best single setting for all cases and seeds: the cheapest that is good enough on
/// each, or where none is the one whose worst is best.
fn peers(worlds: &[(Setup, Trace)], args: &Args) {
    let settings = tuning::grid(&Peer::ALL, &args.peers_at_caps, &args.peers_at_budgets);
    let scores: Vec<_> = (worlds.iter())
        .map(|(setup, trace)| {
            tuning::scores(&settings, setup, trace, Backend::Surrogate, args.threads)
        })
        .collect();
    let of = |place: usize| scores.iter().filter_map(move |on| Some(on.get(place)?.1));
    let goal = worlds
        .first()
        .map_or(99.0, |(setup, _)| setup.goals.good_percent);
    println!(
        "| peer | cap / budget, parameter | hours of each seed | good % @ hours of each case |"
    );
    println!("| --- | --- | --- | --- |");
    for peer in Peer::ALL {
        let places = (0..settings.len()).filter(|place| {
            settings
                .get(*place)
                .is_some_and(|setting| setting.peer == peer)
        });
        let hours = |place: usize| of(place).map(|score| score.replica_hours).sum::<f64>();
        let worst = |place: usize| of(place).map(|score| score.good).fold(100.0, f64::min);
        let best = places.min_by(|&a, &b| {
            let key = |place: usize| match worst(place) {
                good if good >= goal => (0, hours(place)),
                good => (1, -good),
            };
            let (a, b) = (key(a), key(b));
            a.0.cmp(&b.0).then(a.1.total_cmp(&b.1))
        });
        let Some((place, setting)) = best.and_then(|p| Some((p, settings.get(p)?))) else {
            continue;
        };
        let each: Vec<Score> = of(place).collect();
        let by_seed = each.chunks(args.cases.len().max(1)).map(|cases| {
            let hours: f64 = cases.iter().map(|score| score.replica_hours).sum();
            format!("{hours:.2}")
        });
        let each =
            (each.iter()).map(|score| format!("{:.2} @ {:.2}", score.good, score.replica_hours));
        println!(
            "| {} | {} / {}, {} | {} | {} |",
            peer.name(),
            setting.max_num_seqs,
            setting.max_num_batched_tokens,
            setting.parameter,
            by_seed.collect::<Vec<_>>().join(", "),
            each.collect::<Vec<_>>().join(", ")
        );
    }
}

/// Steady loads on fleets of constant size whose dials ours sets, from few to many misses.
fn calibrate(setup: &Setup, mix: &Mix, threads: usize) {
    const SIZES: [u32; 4] = [1, 2, 4, 8];
    const LOADS: [f64; 6] = [0.5, 0.7, 0.8, 0.9, 1.0, 1.1];
    let setup = &setup.with_dials(32, 288);
    let cases: Vec<(u32, f64)> = SIZES
        .into_iter()
        .flat_map(|size| LOADS.map(|load| (size, load)))
        .collect();
    let rows = tuning::parallel(&cases, threads, |&(size, load)| {
        let setup = setup.with_replicas(size);
        // The load is told in shares of what a replica says that it carries.
        let run = |rate: f64, seconds: f64| {
            let trace = Shape::Steady.generate(rate * f64::from(size) / 0.7, mix, setup.seed);
            let mut ours = Stoker::new(&setup).with_replicas_held(size);
            let outcome = simulate(&setup, &trace.first(seconds), &mut ours);
            (outcome, ours)
        };
        let (_, probe) = run(0.5, 600.0);
        let carries = probe.outlooks().last().map_or(1.0, |o| o.one_carries);
        let (outcome, ours) = run(load * carries, 3600.0);
        let after = ours.outlooks().len() / 10;
        let outlooks = ours.outlooks().get(after..).unwrap_or(&[]);
        let expected: f64 = outlooks.iter().map(|o| 100.0 - o.good_percent).sum();
        let dials = outcome.timeline.last().map(|point| point.dials);
        let measured = 100.0 - Score::part(&outcome, 360.0, 3600.0).good;
        let flights = outcome.ledger.flights.iter().filter(|f| f.arrival >= 360.0);
        let goals = &outcome.ledger.goals;
        let (late, slow, all) = flights.fold((0.0, 0.0, 0.0), |(late, slow, all), f| {
            let is = |no: bool| f64::from(u8::from(no));
            (
                late + is(!f.meets_ttft(goals)),
                slow + is(!f.meets_itl(goals)),
                all + 1.0,
            )
        });
        let measured = (measured, 100.0 * late / all, 100.0 * slow / all);
        let expected = expected / outlooks.len() as f64;
        (size, load, carries, dials, expected, measured)
    });
    println!(
        "| replicas | load | requests/s each | cap / budget | expected % | measured % | of which late, slow % | ratio |"
    );
    println!("| ---: | ---: | ---: | --- | ---: | ---: | ---: | ---: |");
    for (size, load, carries, dials, expected, (measured, late, slow)) in rows {
        let dials = dials.map_or(String::new(), |d| {
            format!("{} / {}", d.max_num_seqs, d.max_num_batched_tokens)
        });
        println!(
            "| {size} | {load} | {:.2} | {dials} | {expected:.2} | {measured:.2} | {late:.2}, {slow:.2} | {:.2} |",
            load * carries,
            expected / measured
        );
    }
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
