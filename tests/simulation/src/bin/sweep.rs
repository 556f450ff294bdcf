use anyhow::Result;
use clap::Parser;
use std::path::PathBuf;
use stoker_simulation::policy::Stoker;
use stoker_simulation::{Backend, Device, Mix, Setup, Shape, Trace, simulate};

#[derive(Parser)]
struct Args {
    #[arg(long)]
    trace: PathBuf,
    #[arg(long, default_value = "study-t4")]
    device: String,
    #[arg(long, value_delimiter = ',', default_value = "1,2,4,8")]
    fleets: Vec<u32>,
    #[arg(long, default_value_t = 48)]
    cap: u32,
    #[arg(long, default_value_t = 288)]
    budget: u32,
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "0.8,1.0,1.2,1.3,1.4,1.5,1.6,1.7,1.8,1.9"
    )]
    rates: Vec<f64>,
    #[arg(long, default_value_t = 1.0)]
    prompts: f64,
    #[arg(long, default_value_t = 1.0)]
    outputs: f64,
}
fn main() -> Result<()> {
    let a = Args::parse();
    let mix = Mix::of(&Trace::read(&a.trace)?).scaled(a.prompts, a.outputs);
    let device = Device::by_name(&a.device).unwrap();
    println!("fleet rate good strict ttft99 itl inflight");
    for &n in &a.fleets {
        for &r in &a.rates {
            let trace = Shape::Steady
                .generate(r * f64::from(n) / 0.7, &mix, 1)
                .repeated(1);
            let setup = Setup {
                device: device.clone(),
                ..Setup::study()
            }
            .with_backend(Backend::Surrogate)
            .with_dials(a.cap, a.budget)
            .with_replicas(n);
            let mut ours = Stoker::new(&setup)
                .with_replicas_held(n)
                .with_dials_held(setup.dials);
            let o = simulate(&setup, &trace, &mut ours);
            let s = o.score;
            let fl: f64 = o
                .timeline
                .iter()
                .map(|p| f64::from(p.running + p.waiting))
                .sum::<f64>()
                / o.timeline.len() as f64
                / f64::from(n);
            let k = ours.outlooks().len() as f64;
            let exp = ours.outlooks().iter().map(|x| x.good_percent).sum::<f64>() / k;
            let one = ours.outlooks().iter().map(|x| x.one_carries).sum::<f64>() / k;
            println!(
                "{n} {r:.2} good {:.2} expected {exp:.2} ratio {:.2} carries {one:.2} | {:.2} {:.2} {:.0} {fl:.1}",
                s.good,
                (100.0 - exp) / (100.0 - s.good),
                s.strict,
                s.ttft_p99,
                s.itl_mean * 1e3
            );
        }
    }
    Ok(())
}
