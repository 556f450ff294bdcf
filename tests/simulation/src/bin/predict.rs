//! What the simulator expects of `decide()` on a part of a trace, and that part as a file, for
//! tests/bench-autoscaler.py, which has the same come true on the local cluster.

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Parser;
use serde_json::json;
use stoker_autoscaler::Dials;
use stoker_simulation::fleet::{Point, Policy};
use stoker_simulation::policy::Stoker;
use stoker_simulation::{Device, Mix, Routing, Setup, Shape, Starts, Trace, simulate};

#[derive(Parser)]
#[command(about = "What the simulator expects on a part of a trace")]
struct Args {
    /// A CSV file with TIMESTAMP, ContextTokens, GeneratedTokens.
    #[arg(long)]
    trace: PathBuf,
    /// Instead of the trace itself, load of this shape from its mix.
    #[arg(long, value_parser = |name: &str| Shape::by_name(name).ok_or("no such shape"))]
    shape: Option<Shape>,
    /// Highest rate of that shape, requests a second.
    #[arg(long)]
    peak: Option<f64>,
    /// In so short a part of the time: every n-th request, n times as soon.
    #[arg(long, default_value_t = 1)]
    hasten: u32,
    /// From which second.
    #[arg(long, default_value_t = 0.0)]
    from: f64,
    /// For how many seconds.
    #[arg(long, default_value_t = 600.0)]
    seconds: f64,
    #[arg(long, default_value_t = 1)]
    min_replicas: u32,
    #[arg(long, default_value_t = 8)]
    max_replicas: u32,
    /// Seconds that a replica takes to start.
    #[arg(long)]
    start_seconds: f64,
    /// Seconds that the first replicas have been ready when the first request comes.
    #[arg(long, default_value_t = 0.0)]
    lead: f64,
    /// Seconds that a replica is out of rotation before it is told to go.
    #[arg(long, default_value_t = 0.0)]
    trial_seconds: f64,
    /// Seconds that one which was told to go is still there at least.
    #[arg(long, default_value_t = 0.0)]
    leave_seconds: f64,
    /// Without a router's queue: every request goes to a replica at once.
    #[arg(long)]
    no_queue: bool,
    /// Runs that the figures are means of: chance decides how far the operator is between two looks
    /// when load begins, and which replica gets which request.
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..))]
    runs: u32,
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Where the requests go, as CSV.
    #[arg(long)]
    write: PathBuf,
}

fn main() -> Result<()> {
    let args = Args::parse();
    let recorded = Trace::read(&args.trace).context(args.trace.display().to_string())?;
    let whole = match args.shape {
        Some(shape) => {
            let peak = args.peak.unwrap_or(shape.study_peak());
            shape.generate(peak, &Mix::of(&recorded), args.seed)
        }
        None => recorded,
    };
    let part = whole.hastened(args.hasten);
    let part = part.between(args.from, args.from + args.seconds);
    (part.write(&args.write)).with_context(|| format!("writing {}", args.write.display()))?;

    let setup = Setup {
        device: Device::served_t4()?,
        // Every replica starts alike: the local node is there.
        starts: Starts {
            warm_nodes: args.max_replicas,
            warm_seconds: args.start_seconds,
            cold_seconds: args.start_seconds,
        },
        min_replicas: args.min_replicas,
        max_replicas: args.max_replicas,
        replicas: args.min_replicas,
        settling: 0.0,
        trial_seconds: args.trial_seconds,
        leave_seconds: args.leave_seconds,
        routing: if args.no_queue {
            Routing::LeastOutstanding
        } else {
            Routing::Router
        },
        ..Setup::study()
    };
    let runs: Vec<BTreeMap<&str, f64>> = (0..args.runs)
        .map(|run| {
            let setup = Setup {
                seed: args.seed + u64::from(run),
                ..setup.clone()
            };
            let policy = Stoker::new(&setup).expecting_start(args.start_seconds);
            let later = policy.period() * f64::from(run) / f64::from(args.runs);
            figures(&setup, policy, &part, args.lead + later)
        })
        .collect();
    let over = |name: &str, of: fn(f64, f64) -> f64| runs.iter().map(|run| run[name]).reduce(of);
    let mut answer = BTreeMap::from([("requests", json!(part.requests.len()))]);
    let mut ranges = BTreeMap::new();
    for name in runs[0].keys() {
        let sum = over(name, |a, b| a + b).unwrap_or(0.0);
        answer.insert(name, json!(sum / f64::from(args.runs)));
        ranges.insert(*name, [over(name, f64::min), over(name, f64::max)]);
    }
    answer.insert("ranges", json!(ranges));
    println!("{}", json!(answer));
    Ok(())
}

/// What comes of one run whose first request comes after so many seconds.
fn figures(
    setup: &Setup,
    mut policy: Stoker,
    part: &Trace,
    lead: f64,
) -> BTreeMap<&'static str, f64> {
    let outcome = simulate(setup, &part.delayed(lead), &mut policy);
    let begun = |point: &&Point| point.t >= lead;
    let points: Vec<&Point> = outcome.timeline.iter().filter(begun).collect();
    // Until the first request comes there are the first replicas, which nobody counts live.
    let before = f64::from(setup.min_replicas) * lead / 3600.0;
    let mean = |of: fn(&Dials) -> u32| {
        let sum: f64 = points.iter().map(|point| f64::from(of(&point.dials))).sum();
        sum / points.len().max(1) as f64
    };
    let most_ready = points.iter().map(|point| point.ready).max();
    let score = &outcome.score;
    BTreeMap::from([
        ("good_percent", score.good),
        ("failed", (score.failed + score.timeouts) as f64),
        ("replica_hours", score.replica_hours - before),
        ("max_num_seqs", mean(|dials| dials.max_num_seqs)),
        (
            "max_num_batched_tokens",
            mean(|dials| dials.max_num_batched_tokens),
        ),
        ("most_ready", most_ready.map_or(0.0, f64::from)),
    ])
}
