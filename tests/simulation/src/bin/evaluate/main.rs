//! Our policy on the recorded trace and the generated ones: what it costs and where it loses,
//! beside the oracle and good fleets with the same dials.
//!
//! `cargo run --release -p stoker-simulation --bin evaluate -- --trace FILE`

mod calibration;
mod ours;
mod peers;

use std::path::PathBuf;

use anyhow::{Result, bail};
use clap::Parser;
use stoker_simulation::flags::World;
use stoker_simulation::{Mix, Setup, Shape, Trace, Unseen, oracle};

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
    /// more replica-hours, at the best of their settings in hindsight (with the budgets given): one for
    /// all of --peers-over-seeds.
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
        calibration::calibrate(&setup, &mix, args.threads);
        return Ok(());
    }
    let worlds = |seed: u64| {
        let setup = Setup {
            seed,
            ..setup.clone()
        };
        (args.cases.iter())
            .map(|case| Ok((setup.clone(), case_of(case, &recorded, &mix, seed)?)))
            .collect::<Result<Vec<(Setup, Trace)>>>()
    };
    let seeds = match args.peers_over_seeds.as_slice() {
        [] => &[args.world.seed],
        seeds => seeds,
    };
    if args.advise.is_none() && args.peers_at_budgets.is_empty() {
        for (case, (setup, trace)) in args.cases.iter().zip(worlds(args.world.seed)?) {
            match args.reaction {
                Some(delay) => react(case, &trace, &setup.with_dials(43, args.budget), delay),
                None => ours::evaluate(case, &trace, &setup, &args),
            }
        }
        return Ok(());
    }
    let by_seed = (seeds.iter())
        .map(|seed| worlds(*seed))
        .collect::<Result<Vec<_>>>()?;
    let Some(program) = &args.advise else {
        peers::one_setting(&by_seed.concat(), &args);
        return Ok(());
    };
    for (place, case) in args.cases.iter().enumerate() {
        let seeds = by_seed.iter().filter_map(|cases| cases.get(place));
        peers::beside(program, case, &seeds.cloned().collect::<Vec<_>>(), &args)?;
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

fn react(case: &str, trace: &Trace, setup: &Setup, delay: f64) {
    let jump = Shape::by_name(case).and_then(Shape::jump);
    let best = jump.and_then(|jump| oracle::after_jump(setup, trace, jump, delay));
    if let Some((before, after, outcome)) = best {
        let good = outcome.score.good;
        println!("{case}: {before} to {after} replicas {delay} s after the jump: {good:.2} % good");
    }
}
