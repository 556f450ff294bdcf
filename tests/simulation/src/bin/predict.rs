//! What the simulator expects of `decide()` on a part of a trace, and that part as a file, for
//! tests/bench-autoscaler.py, which has the same come true on the local cluster.

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Parser;
use serde_json::json;
use stoker_simulation::fleet::Point;
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
    /// Seconds that a replica which goes is still there at least.
    #[arg(long, default_value_t = 0.0)]
    leave_seconds: f64,
    /// Without a router's queue: every request goes to a replica at once.
    #[arg(long)]
    no_queue: bool,
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
        device: Device::t4(),
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
        leave_seconds: args.leave_seconds,
        routing: if args.no_queue {
            Routing::LeastOutstanding
        } else {
            Routing::Router
        },
        seed: args.seed,
        ..Setup::study()
    };
    let mut policy = Stoker::new(&setup).expecting_start(args.start_seconds);
    let outcome = simulate(&setup, &part.delayed(args.lead), &mut policy);
    let begun = |point: &&Point| point.t >= args.lead;
    let points: Vec<&Point> = outcome.timeline.iter().filter(begun).collect();
    // Until the first request comes there are the first replicas, which nobody counts live.
    let before = f64::from(args.min_replicas) * args.lead / 3600.0;
    let mean = |of: fn(&stoker_autoscaler::Dials) -> u32| {
        let sum: f64 = points.iter().map(|point| f64::from(of(&point.dials))).sum();
        sum / points.len().max(1) as f64
    };
    let score = &outcome.score;
    println!(
        "{}",
        json!({
            "requests": part.requests.len(),
            "good_percent": score.good,
            "failed": score.failed + score.timeouts,
            "replica_hours": score.replica_hours - before,
            "max_num_seqs": mean(|dials| dials.max_num_seqs),
            "max_num_batched_tokens": mean(|dials| dials.max_num_batched_tokens),
            "most_ready": points.iter().map(|point| point.ready).max(),
        })
    );
    Ok(())
}
