//! Peers tuned by grid: on the fast surrogate, the best checked with the real engine.

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::fleet::{Outcome, Setup, simulate};
use crate::oracle::first_fleet;
use crate::policy::Peer;
use crate::replica::Backend;
use crate::score::Score;
use crate::trace::Trace;

/// A peer with its setting.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Setting {
    pub peer: Peer,
    pub parameter: f64,
    pub max_num_seqs: u32,
    pub max_num_batched_tokens: u32,
}

impl Setting {
    /// The world in which it starts: the fleet that its dials need.
    pub fn setup(&self, setup: &Setup, trace: &Trace) -> Setup {
        let setup = setup.with_dials(self.max_num_seqs, self.max_num_batched_tokens);
        let replicas = match self.peer {
            Peer::Fixed => self.parameter as u32,
            _ => first_fleet(&setup, trace),
        };
        setup.with_replicas(replicas)
    }

    pub fn run(&self, setup: &Setup, trace: &Trace) -> Outcome {
        let setup = self.setup(setup, trace);
        let mut policy = self.peer.policy(self.parameter, setup.dials);
        simulate(&setup, trace, policy.as_mut())
    }
}

/// Each peer at each of its grid's parameters, with these caps and budgets.
pub fn grid(peers: &[Peer], caps: &[u32], budgets: &[u32]) -> Vec<Setting> {
    let each = peers.iter();
    each.flat_map(|&peer| settings(peer, peer.grid(), caps, budgets))
        .collect()
}

/// A peer at each of these parameters, with these caps and budgets.
pub fn settings(peer: Peer, parameters: &[f64], caps: &[u32], budgets: &[u32]) -> Vec<Setting> {
    let mut settings = Vec::new();
    for &max_num_seqs in caps {
        for &max_num_batched_tokens in budgets {
            settings.extend(parameters.iter().map(|&parameter| Setting {
                peer,
                parameter,
                max_num_seqs,
                max_num_batched_tokens,
            }));
        }
    }
    settings
}

/// Runs all settings on the surrogate, on so many threads.
pub fn scores(
    settings: &[Setting],
    setup: &Setup,
    trace: &Trace,
    backend: Backend,
    threads: usize,
) -> Vec<(Setting, Score)> {
    let fast = setup.with_backend(backend);
    parallel(settings, threads, |setting| {
        (*setting, setting.run(&fast, trace).score)
    })
}

/// The cheapest that reaches `good` percent, or where none does the best one.
pub fn best<'a>(
    scores: impl Iterator<Item = &'a (Setting, Score)>,
    good: f64,
    of: fn(&Score) -> f64,
) -> Option<&'a (Setting, Score)> {
    scores.min_by(|(_, a), (_, b)| {
        let key = |score: &Score| {
            if of(score) >= good {
                (0, score.replica_hours)
            } else {
                (1, -of(score))
            }
        };
        let (a, b) = (key(a), key(b));
        a.0.cmp(&b.0).then(a.1.total_cmp(&b.1))
    })
}

/// The best setting of a peer, on the setup's own backend: of those that reach the goal on the
/// surrogate the cheapest that reaches it there, too.
pub fn verified(
    scores: &[(Setting, Score)],
    setup: &Setup,
    trace: &Trace,
) -> Option<(Setting, Outcome)> {
    let goal = setup.goals.good_percent;
    // Near misses on the surrogate may be hits on the engine.
    let mut hopeful: Vec<&(Setting, Score)> = (scores.iter())
        .filter(|(_, score)| score.good >= goal - 0.15)
        .collect();
    hopeful.sort_by(|(_, a), (_, b)| a.replica_hours.total_cmp(&b.replica_hours));
    let found = hopeful.iter().take(12).find_map(|(setting, _)| {
        let outcome = setting.run(setup, trace);
        (outcome.score.good >= goal).then_some((*setting, outcome))
    });
    found.or_else(|| {
        let (setting, _) = best(scores.iter(), goal, |score| score.good)?;
        Some((*setting, setting.run(setup, trace)))
    })
}

/// `work` for each item, in the items' order, on so many threads.
pub fn parallel<T: Sync, R: Send>(
    items: &[T],
    threads: usize,
    work: impl Fn(&T) -> R + Sync,
) -> Vec<R> {
    let next = AtomicUsize::new(0);
    let results: Mutex<Vec<(usize, R)>> = Mutex::new(Vec::with_capacity(items.len()));
    std::thread::scope(|scope| {
        for _ in 0..threads.max(1) {
            scope.spawn(|| {
                loop {
                    let index = next.fetch_add(1, Ordering::Relaxed);
                    let Some(item) = items.get(index) else {
                        return;
                    };
                    let result = work(item);
                    if let Ok(mut results) = results.lock() {
                        results.push((index, result));
                    }
                }
            });
        }
    });
    let mut results = results.into_inner().unwrap_or_default();
    results.sort_by_key(|(index, _)| *index);
    results.into_iter().map(|(_, result)| result).collect()
}
