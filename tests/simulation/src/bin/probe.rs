use clap::Parser;
use std::path::PathBuf;
use stoker_simulation::policy::Stoker;
use stoker_simulation::{Backend, Device, Mix, Setup, Shape, Trace, oracle, simulate};
#[derive(Parser)]
struct Args {
    #[arg(long)]
    trace: PathBuf,
    #[arg(long, default_value = "recorded")]
    case: String,
    #[arg(long, default_value_t = 60.0)]
    every: f64,
    #[arg(long, default_value_t = 1)]
    repeat: u32,
    #[arg(long, default_value = "study-t4")]
    device: String,
    #[arg(long, default_value = "")]
    held: String,
    #[arg(long, default_value_t = 0.0)]
    from: f64,
    #[arg(long, default_value_t = 1e9)]
    to: f64,
}
fn main() {
    let a = Args::parse();
    let rec = Trace::read(&a.trace).unwrap();
    let trace = match Shape::by_name(&a.case) {
        Some(s) => s.generate(s.study_peak(), &Mix::of(&rec), 1),
        None => rec,
    };
    let setup = Setup {
        device: Device::by_name(&a.device).unwrap(),
        ..Setup::study()
    }
    .with_backend(Backend::Surrogate);
    let setup = setup.with_replicas(oracle::first_fleet(&setup, &trace));
    let trace = trace.repeated(a.repeat);
    let mut ours = Stoker::new(&setup);
    if a.held == "cap" {
        ours = ours.with_budget_held(2048);
    }
    if a.held == "both" {
        ours = ours.with_dials_held(setup.dials);
    }
    let o = simulate(&setup, &trace, &mut ours);
    let mut last = -1e9;
    let mut was = 0;
    for p in &o.timeline {
        if p.t < a.from || p.t > a.to {
            continue;
        }
        if p.t - last >= a.every || p.desired != was {
            last = p.t;
            was = p.desired;
            let n = o
                .ledger
                .flights
                .iter()
                .filter(|f| f.arrival >= p.t && f.arrival < p.t + 60.0)
                .count();
            let bad = o
                .ledger
                .flights
                .iter()
                .filter(|f| f.arrival >= p.t && f.arrival < p.t + 60.0 && !f.good(&setup.goals))
                .count();
            println!(
                "{:5.0} next {:.1}/s bad {bad} | want {} ready {} pods {} {:?}/{:?} run {} wait {} {}",
                p.t,
                n as f64 / 60.0,
                p.desired,
                p.ready,
                p.pods,
                p.dials.max_num_seqs,
                p.dials.max_num_batched_tokens,
                p.running,
                p.waiting,
                p.reason.as_deref().unwrap_or("")
            );
        }
    }
    println!("{:?}", o.score);
}
