//! Ours beside its peers and an oracle on a trace: a table, and a page with charts.
//!
//! `cargo run --release -p stoker-simulation --bin compare -- --trace FILE --html report.html`

use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use clap::Parser;
use stoker_simulation::flags::World;
use stoker_simulation::policy::{Peer, Stoker};
use stoker_simulation::report::{self, Row};
use stoker_simulation::tuning::{self, Setting};
use stoker_simulation::{Backend, Mix, Setup, Shape, Trace, Unseen, oracle, simulate};

#[derive(Parser)]
#[command(about = "Ours beside its peers and an oracle on a trace")]
struct Args {
    /// A CSV file with TIMESTAMP, ContextTokens, GeneratedTokens.
    #[arg(long)]
    trace: PathBuf,
    /// Instead of the trace itself, load of this shape from its mix: steady, step, spike, ramp,
    /// diurnal, sawtooth, onoff, swing, mixshift; or code-completion, long-chat, up-and-down.
    #[arg(long)]
    shape: Option<String>,
    /// Highest rate of that shape, requests a second.
    #[arg(long)]
    peak: Option<f64>,
    /// So many times in a row.
    #[arg(long, default_value_t = 1)]
    repeat: u32,
    /// So many times as many requests.
    #[arg(long, default_value_t = 1)]
    thicken: u32,
    #[command(flatten)]
    world: World,
    /// Tune every peer on this trace by grid, at caps 8, 32 and 128, with budget 2,048 and ours.
    /// Without it: documented defaults, at caps 8 and 32.
    #[arg(long)]
    tune: bool,
    /// Runs of the oracle's search at each cap; 0 leaves it out.
    #[arg(long, default_value_t = 600)]
    oracle_runs: u32,
    /// Only ours and the oracle.
    #[arg(long)]
    no_peers: bool,
    /// Ours built up part by part, too.
    #[arg(long)]
    ablations: bool,
    #[arg(long, default_value_t = 2)]
    threads: usize,
    /// Where the page goes.
    #[arg(long)]
    html: Option<PathBuf>,
}

/// Caps of the oracle.
const ORACLE_CAPS: [u32; 2] = [24, 48];

fn main() -> Result<()> {
    let args = Args::parse();
    let trace = load(&args)?;
    let setup = args.world.setup();

    let ours = ours(&setup, &trace);
    let budget = usual_budget(&ours);
    let mut rows = Vec::new();
    let mut hours = None;
    if args.oracle_runs > 0 {
        let found = tuning::parallel(&ORACLE_CAPS, args.threads, |&cap| {
            oracle::search(&setup.with_dials(cap, 2048), &trace, args.oracle_runs)
        });
        let cost = |o: &oracle::Oracle| o.outcome.score.replica_hours;
        let best = found
            .into_iter()
            .flatten()
            .min_by(|a, b| cost(a).total_cmp(&cost(b)));
        if let Some(best) = best {
            hours = Some(cost(&best));
            rows.push(Row {
                name: "oracle".into(),
                setting: format!("{} / 2048", best.setup.dials.max_num_seqs),
                outcome: best.outcome,
            });
        }
    }
    let place = rows.len();
    rows.push(ours);
    let mut drawn = vec![place];
    if args.ablations {
        // The last one is the whole.
        let mut parts = Stoker::ablations(&setup);
        parts.pop();
        for (what, setup, mut policy) in parts {
            let setup = setup.with_replicas(oracle::first_fleet(&setup, &trace));
            rows.push(Row {
                name: "stoker in part".into(),
                setting: what.into(),
                outcome: simulate(&setup, &trace, &mut policy),
            });
        }
    }
    if !args.no_peers {
        let peers = if args.tune {
            tuned(&args, &setup, &trace, budget)
        } else {
            defaults(&args, &setup, &trace)
        };
        // The cheapest that reaches the goal is drawn beside ours, or else the best.
        let best = (peers.iter().enumerate()).min_by(|(_, a), (_, b)| {
            let key = |row: &Row| {
                let score = &row.outcome.score;
                let reached = score.good >= setup.goals.good_percent;
                (
                    !reached,
                    if reached {
                        score.replica_hours
                    } else {
                        -score.good
                    },
                )
            };
            let (a, b) = (key(a), key(b));
            a.0.cmp(&b.0).then(a.1.total_cmp(&b.1))
        });
        drawn.extend(best.map(|(index, _)| rows.len() + index));
        rows.extend(peers);
    }
    if place > 0 {
        drawn.push(0);
    }

    println!("{}", report::table(&rows, hours));
    if let Some(path) = &args.html {
        let starts = &setup.starts;
        let about = format!(
            "{} requests over {:.0} minutes on replicas of the profile {}; a replica starts within \
             {:.0} s on one of {} warm nodes, else {:.0} s. Good: time to first token within 2 s \
             plus 1 ms for each prompt token above 1,000, and mean inter-token latency within \
             100 ms. Strict: at most 5 % of a request's gaps above 150 ms. Cost: replica-hours from \
             a pod's creation until it is gone. Setting: max_num_seqs / max_num_batched_tokens, \
             parameter.",
            trace.requests.len(),
            trace.duration / 60.0,
            setup.device.profile.name,
            starts.warm_seconds,
            starts.warm_nodes,
            starts.cold_seconds,
        );
        let title = format!("Autoscaling on {}", trace.name);
        let page = report::page(&title, &about, &rows, &drawn, hours);
        std::fs::write(path, page).with_context(|| format!("can't write {}", path.display()))?;
    }
    Ok(())
}

fn load(args: &Args) -> Result<Trace> {
    let path = args.trace.display();
    let recorded = Trace::read(&args.trace).with_context(|| format!("{path}"))?;
    let trace = match &args.shape {
        None => recorded,
        Some(name) => {
            let mix = Mix::of(&recorded);
            let unseen = Unseen::ALL.into_iter().find(|kind| kind.name() == name);
            match (Shape::by_name(name), unseen) {
                (Some(shape), _) => {
                    let peak = args.peak.unwrap_or(shape.study_peak());
                    shape.generate(peak, &mix, args.world.seed)
                }
                (None, Some(unseen)) => unseen.generate(&mix, args.world.seed),
                (None, None) => {
                    let names = Shape::ALL.map(Shape::name).join(", ");
                    let unseen = Unseen::ALL.map(Unseen::name).join(", ");
                    bail!("--shape {name:?}: choose one of {names}, {unseen}");
                }
            }
        }
    };
    let trace = if args.thicken > 1 {
        trace.thickened(args.thicken)
    } else {
        trace
    };
    Ok(if args.repeat > 1 {
        trace.repeated(args.repeat)
    } else {
        trace
    })
}

fn ours(setup: &Setup, trace: &Trace) -> Row {
    let setup = setup.with_replicas(oracle::first_fleet(setup, trace));
    let outcome = simulate(&setup, trace, &mut Stoker::new(&setup));
    let mut row = Row {
        name: "stoker".into(),
        setting: String::new(),
        outcome,
    };
    row.setting = format!(
        "{} / {}",
        usual(&row, |d| d.max_num_seqs),
        usual_budget(&row)
    );
    row
}

/// The value that a dial had for most of the time.
fn usual(row: &Row, of: fn(&stoker_autoscaler::Dials) -> u32) -> u32 {
    let mut values: Vec<u32> = row.outcome.timeline.iter().map(|p| of(&p.dials)).collect();
    values.sort_unstable();
    values.get(values.len() / 2).copied().unwrap_or(0)
}

fn usual_budget(row: &Row) -> u32 {
    usual(row, |dials| dials.max_num_batched_tokens)
}

fn row(setting: &Setting, outcome: stoker_simulation::Outcome) -> Row {
    Row {
        name: setting.peer.name().into(),
        setting: format!(
            "{} / {}, {}",
            setting.max_num_seqs, setting.max_num_batched_tokens, setting.parameter
        ),
        outcome,
    }
}

fn defaults(args: &Args, setup: &Setup, trace: &Trace) -> Vec<Row> {
    let mut settings = Vec::new();
    for peer in Peer::ALL {
        for max_num_seqs in [8, 32] {
            settings.extend(
                peer.default_parameter(max_num_seqs)
                    .map(|parameter| Setting {
                        peer,
                        parameter,
                        max_num_seqs,
                        max_num_batched_tokens: 2048,
                    }),
            );
        }
    }
    tuning::parallel(&settings, args.threads, |setting| {
        row(setting, setting.run(setup, trace))
    })
}

/// Each peer's best setting with budget 2,048, and with ours.
fn tuned(args: &Args, setup: &Setup, trace: &Trace, ours: u32) -> Vec<Row> {
    let budgets = [2048, ours];
    let settings = tuning::grid(&Peer::ALL, &[8, 32, 128], &budgets);
    let scores = tuning::scores(&settings, setup, trace, Backend::Surrogate, args.threads);
    let mut groups = Vec::new();
    for peer in Peer::ALL {
        for budget in budgets {
            let group = scores.iter().filter(|(setting, _)| {
                setting.peer == peer && setting.max_num_batched_tokens == budget
            });
            groups.push(group.copied().collect::<Vec<_>>());
        }
    }
    let best = tuning::parallel(&groups, args.threads, |group| {
        tuning::verified(group, setup, trace)
    });
    let found = best.into_iter().flatten();
    found
        .map(|(setting, outcome)| row(&setting, outcome))
        .collect()
}
