//! How well several routers that don't talk to each other share a fleet: a simulation in
//! virtual time through the router's own `choose`.
//!
//! Replicas generate one token a step for each running request; a step takes longer the more
//! run, and a new prompt takes its share of the device first. Each router knows its own
//! requests exactly and the others' from reports of every half second. Prints, for each policy
//! and number of routers, the 95th percentile of the time to first token and of the whole
//! latency, and the mean spread of tokens to do between the fullest and the emptiest replica.

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use stoker_router::choose::{Candidate, Policy, choose};

const REPLICAS: usize = 5;
const CAP: usize = 24;
const STEP: f64 = 0.01;
const SECONDS: f64 = 600.0;
const REPORT_EVERY: f64 = 0.5;
/// Requests a second for the whole fleet: about 80 % of what it carries.
const RATE: f64 = 7.0;

#[derive(Clone)]
struct Request {
    router: usize,
    arrived: f64,
    prompt: f64,
    output: f64,
    first: Option<f64>,
}

impl Request {
    fn left(&self) -> f64 {
        self.prompt + self.output
    }
}

#[derive(Clone, Copy, PartialEq)]
enum Knowledge {
    /// Nothing of other routers.
    Own,
    /// What replicas last reported.
    Reports,
    /// The truth: what one router would know.
    Perfect,
}

struct Outcome {
    ttft: f64,
    latency: f64,
    spread: f64,
}

fn simulate(routers: usize, policy: Option<Policy>, knowledge: Knowledge, seed: u64) -> Outcome {
    let mut random = StdRng::seed_from_u64(seed);
    let mut replicas: Vec<Vec<Request>> = vec![Vec::new(); REPLICAS];
    // Tokens of others, by router and replica, as of the last report.
    let mut reported = vec![[0.0; REPLICAS]; routers];
    let mut waiting: Vec<Request> = Vec::new();
    let mut done = Vec::new();
    let (mut spread, mut samples) = (0.0, 0);
    let mut next_report = vec![[0.0; REPLICAS]; routers];
    let mut now = 0.0;
    while now < SECONDS {
        now += STEP;
        if random.random_bool(RATE * STEP) {
            let prompt = 50.0 * (random.random_range(0.0..4.0f64)).exp();
            let output = 20.0 * (random.random_range(0.0..3.5f64)).exp();
            waiting.push(Request {
                router: random.random_range(0..routers),
                arrived: now,
                prompt,
                output,
                first: None,
            });
        }
        for router in 0..routers {
            for replica in 0..REPLICAS {
                if now < next_report[router][replica] {
                    continue;
                }
                next_report[router][replica] = now + REPORT_EVERY * random.random_range(0.8..1.2);
                let others = replicas[replica].iter().filter(|r| r.router != router);
                reported[router][replica] = others.map(Request::left).sum();
            }
        }
        waiting.retain(|request| {
            let candidates: Vec<(usize, Candidate)> = (0..REPLICAS)
                .filter(|place| replicas[*place].len() < CAP + CAP / 8)
                .map(|place| {
                    let tokens = |own: bool| {
                        let all = replicas[place].iter();
                        let chosen = all.filter(|r| (r.router == request.router) == own);
                        chosen.map(Request::left).sum::<f64>()
                    };
                    let others_tokens = match knowledge {
                        Knowledge::Own => 0.0,
                        Knowledge::Reports => reported[request.router][place],
                        Knowledge::Perfect => tokens(false),
                    };
                    let candidate = Candidate {
                        own_tokens: tokens(true) + request.left(),
                        others_tokens,
                        cached_tokens: 0.0,
                        weight: 1.0,
                        tried: false,
                    };
                    (place, candidate)
                })
                .collect();
            let chosen = match policy {
                Some(policy) => choose(&candidates, policy, &mut random),
                None if candidates.is_empty() => None,
                None => Some(random.random_range(0..candidates.len())),
            };
            let Some(chosen) = chosen else { return true };
            replicas[candidates[chosen].0].push(request.clone());
            false
        });
        for replica in &mut replicas {
            // Prompts first, in order, at 4000 tokens/s; the rest of the step generates.
            let mut prompt_tokens = 4000.0 * STEP;
            for request in replica.iter_mut().take(CAP) {
                let computed = request.prompt.min(prompt_tokens);
                request.prompt -= computed;
                prompt_tokens -= computed;
            }
            let running = replica.len().min(CAP) as f64;
            let share = prompt_tokens / (4000.0 * STEP);
            let tokens = STEP * share.max(0.3) / (0.025 + 0.001 * running);
            for request in replica.iter_mut().take(CAP) {
                if request.prompt <= 0.0 {
                    request.first.get_or_insert(now);
                    request.output -= tokens;
                }
            }
            replica.retain(|request| {
                if request.output > 0.0 {
                    return true;
                }
                let first = request.first.unwrap_or(now);
                done.push((first - request.arrived, now - request.arrived));
                false
            });
        }
        let totals = replicas
            .iter()
            .map(|r| r.iter().map(Request::left).sum::<f64>());
        let totals: Vec<f64> = totals.collect();
        let most = totals.iter().copied().fold(0.0, f64::max);
        spread += most - totals.iter().copied().fold(f64::MAX, f64::min);
        samples += 1;
    }
    let p95 = |pick: fn(&(f64, f64)) -> f64| {
        let mut times: Vec<f64> = done.iter().map(pick).collect();
        times.sort_by(f64::total_cmp);
        times
            .get(times.len() * 95 / 100)
            .copied()
            .unwrap_or(f64::NAN)
    };
    Outcome {
        ttft: p95(|times| times.0),
        latency: p95(|times| times.1),
        spread: spread / f64::from(samples),
    }
}

fn main() {
    let policies = [
        ("random", None, Knowledge::Own),
        (
            "least, own requests only",
            Some(Policy::Least),
            Knowledge::Own,
        ),
        (
            "least, with reports",
            Some(Policy::Least),
            Knowledge::Reports,
        ),
        (
            "two choices, with reports",
            Some(Policy::TwoChoices),
            Knowledge::Reports,
        ),
        (
            "least, perfect knowledge",
            Some(Policy::Least),
            Knowledge::Perfect,
        ),
    ];
    println!("{REPLICAS} replicas, {RATE} requests/s, reports every {REPORT_EVERY} s");
    println!(
        "{:28}{:>8}{:>12}{:>14}{:>16}",
        "policy", "routers", "TTFT p95 s", "latency p95 s", "spread tokens"
    );
    for routers in [1, 2, 3, 6] {
        for (name, policy, knowledge) in policies {
            let runs: Vec<Outcome> = (0..5)
                .map(|seed| simulate(routers, policy, knowledge, seed))
                .collect();
            let mean =
                |pick: fn(&Outcome) -> f64| runs.iter().map(pick).sum::<f64>() / runs.len() as f64;
            let (ttft, latency) = (mean(|run| run.ttft), mean(|run| run.latency));
            let spread = mean(|run| run.spread);
            println!("{name:28}{routers:>8}{ttft:>12.2}{latency:>14.1}{spread:>16.0}");
        }
    }
}
