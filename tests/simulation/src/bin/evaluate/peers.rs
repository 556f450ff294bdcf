//! Peers at the settings that are best in hindsight: one for all cases, or beside ours as a program.

use std::path::Path;

use anyhow::Result;
use stoker_autoscaler::Dials;
use stoker_simulation::policy::{Advised, Peer};
use stoker_simulation::tuning::{self, Setting};
use stoker_simulation::{Backend, Outcome, Score, Setup, Trace, oracle, simulate};

use crate::Args;

/// A peer's settings that are tried on the real engine, of those that do best on the surrogate, and how
/// many times our hours these may cost there.
const TRIED: usize = 10;
const ABOUT_AS_CHEAP: f64 = 1.1;

/// Every peer at its best single setting for all cases and seeds: the cheapest that is good enough on
/// each, or where none is the one whose worst is best.
pub fn one_setting(worlds: &[(Setup, Trace)], args: &Args) {
    let goal = worlds
        .first()
        .map_or(99.0, |(setup, _)| setup.goals.good_percent);
    println!(
        "| peer | cap / budget, parameter | hours of each seed | good % @ hours of each case |"
    );
    println!("| --- | --- | --- | --- |");
    for peer in Peer::ALL {
        let settings = tuning::grid(&[peer], &args.peers_at_caps, &args.peers_at_budgets);
        let key = |scores: &Scores| match scores.worst() {
            good if good >= goal => (0, scores.hours()),
            good => (1, -good),
        };
        let all = on_all(&settings, worlds, Some(Backend::Surrogate), args.threads);
        let best = all.into_iter().min_by(|(_, a), (_, b)| {
            let (a, b) = (key(a), key(b));
            a.0.cmp(&b.0).then(a.1.total_cmp(&b.1))
        });
        let Some((setting, Scores(each))) = best else {
            continue;
        };
        let by_seed = each.chunks(args.cases.len().max(1)).map(|cases| {
            let hours: f64 = cases.iter().map(|score| score.replica_hours).sum();
            format!("{hours:.2}")
        });
        let by_case =
            (each.iter()).map(|score| format!("{:.2} @ {:.2}", score.good, score.replica_hours));
        println!(
            "| {} | {} | {} | {} |",
            peer.name(),
            named(&setting),
            by_seed.collect::<Vec<_>>().join(", "),
            by_case.collect::<Vec<_>>().join(", ")
        );
    }
}

/// The program on one case with several seeds, and every peer that reacts at the one setting that is best
/// on them at no more cost.
pub fn beside(program: &Path, case: &str, worlds: &[(Setup, Trace)], args: &Args) -> Result<()> {
    let outcomes = (worlds.iter())
        .map(|(setup, trace)| {
            let setup = setup.with_replicas(oracle::first_fleet(setup, trace));
            let mut advised = Advised::new(program, &setup)?;
            let outcome = simulate(&setup, trace, &mut advised);
            advised.end()?;
            Ok(outcome)
        })
        .collect::<Result<Vec<Outcome>>>()?;
    let requests: Vec<String> = (worlds.iter())
        .map(|(_, trace)| trace.requests.len().to_string())
        .collect();
    println!("## {case}: {} requests\n", requests.join(", "));
    println!("| policy | setting | good % | of each seed | strict % | replica-h | reversals |");
    println!("| --- | --- | ---: | --- | ---: | ---: | ---: |");
    let usual = |of: fn(&Dials) -> u32| {
        let points = outcomes.iter().flat_map(|outcome| &outcome.timeline);
        let mut values: Vec<u32> = points.map(|point| of(&point.dials)).collect();
        values.sort_unstable();
        values.get(values.len() / 2).copied().unwrap_or(0)
    };
    let cap = usual(|dials| dials.max_num_seqs);
    let budget = usual(|dials| dials.max_num_batched_tokens);
    let ours = Scores(outcomes.iter().map(|outcome| outcome.score).collect());
    println!(
        "| stoker-advise | mostly {cap} / {budget} | {} |",
        ours.row()
    );
    let mut budgets = args.peers_at_budgets.clone();
    budgets.push(budget);
    budgets.sort_unstable();
    budgets.dedup();
    for peer in Peer::ALL.into_iter().filter(|p| *p != Peer::Fixed) {
        let settings = tuning::grid(&[peer], &args.peers_at_caps, &budgets);
        let best = best_within(ours.hours(), &settings, worlds, args.threads);
        match best {
            Some((setting, scores)) => {
                println!(
                    "| {} | {} | {} |",
                    peer.name(),
                    named(&setting),
                    scores.row()
                );
            }
            None => println!("| {} | none as cheap | | | | | |", peer.name()),
        }
    }
    println!();
    Ok(())
}

/// Of one peer's settings the one with the most good requests at no more than so many hours.
fn best_within(
    hours: f64,
    settings: &[Setting],
    worlds: &[(Setup, Trace)],
    threads: usize,
) -> Option<(Setting, Scores)> {
    let mut near = on_all(settings, worlds, Some(Backend::Surrogate), threads);
    near.retain(|(_, scores)| scores.hours() <= ABOUT_AS_CHEAP * hours);
    near.sort_by(|(_, a), (_, b)| b.good().total_cmp(&a.good()));
    let near: Vec<Setting> = near.iter().take(TRIED).map(|(s, _)| *s).collect();
    (on_all(&near, worlds, None, threads).into_iter())
        .filter(|(_, scores)| scores.hours() <= hours)
        .max_by(|(_, a), (_, b)| a.good().total_cmp(&b.good()))
}

/// Each setting in each world, there on its own backend or on another one.
fn on_all(
    settings: &[Setting],
    worlds: &[(Setup, Trace)],
    backend: Option<Backend>,
    threads: usize,
) -> Vec<(Setting, Scores)> {
    let mut all: Vec<_> = settings.iter().map(|s| (*s, Scores::default())).collect();
    for (setup, trace) in worlds {
        let backend = backend.unwrap_or(setup.backend);
        let scores = tuning::scores(settings, setup, trace, backend, threads);
        for ((_, before), (_, score)) in all.iter_mut().zip(scores) {
            before.0.push(score);
        }
    }
    all
}

/// A setting as tables name it: cap, budget and parameter.
fn named(setting: &Setting) -> String {
    let (cap, budget) = (setting.max_num_seqs, setting.max_num_batched_tokens);
    format!("{cap} / {budget}, {}", setting.parameter)
}

/// What came of one policy in several worlds.
#[derive(Default)]
struct Scores(Vec<Score>);

impl Scores {
    fn sum(&self, of: fn(&Score) -> f64) -> f64 {
        self.0.iter().map(of).sum()
    }

    fn good(&self) -> f64 {
        self.sum(|score| score.good) / self.0.len() as f64
    }

    fn worst(&self) -> f64 {
        self.0.iter().map(|score| score.good).fold(100.0, f64::min)
    }

    fn hours(&self) -> f64 {
        self.sum(|score| score.replica_hours)
    }

    fn row(&self) -> String {
        let each: Vec<String> = (self.0.iter())
            .map(|score| format!("{:.2}", score.good))
            .collect();
        format!(
            "{:.2} | {} | {:.2} | {:.2} | {}",
            self.good(),
            each.join(", "),
            self.sum(|score| score.strict) / self.0.len() as f64,
            self.hours(),
            self.sum(|score| f64::from(score.reversals))
        )
    }
}
