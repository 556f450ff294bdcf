//! Which law the fleet goes by, and which replicas are unlike the rest.

use crate::census::{Census, Told};
use crate::memory::Known;
use crate::mix::Mix;
use crate::model::{ReplicaModel, usable};
use crate::observation::{Dials, Objectives};

/// Below this confidence a replica's law isn't acted upon.
pub(crate) const TRUSTED: f64 = 0.5;
/// Replicas whose steps differ by less than this factor share their dials.
const LIKE: f64 = 1.15;
/// The same for KV memory, which binds the cap only.
const LIKE_MEMORY: f64 = 1.25;

/// Replicas whose law can be acted upon.
pub(crate) fn trusted<'a>(census: &Census<'a>) -> Vec<(&'a str, Told)> {
    (census.heard.iter().copied())
        .filter(|(_, told)| told.law_confidence >= TRUSTED && usable(&told.law))
        .collect()
}

pub(crate) fn known(told: Told) -> Known {
    Known {
        law: told.law,
        kv_capacity_tokens: told.kv_capacity_tokens,
        ceilings: told.ceilings,
    }
}

/// The law of the replica in the middle: one that reports nonsense doesn't move it. `before`
/// breaks the tie between two, so that the fleet's law doesn't jump between them.
pub(crate) fn typical(
    trusted: &[(&str, Told)],
    mix: Mix,
    objectives: Objectives,
    dials: Dials,
    before: Option<Known>,
) -> Option<Known> {
    let seconds = |k: Known| steps(k, mix, objectives, dials).1;
    let mut laws: Vec<(f64, Known)> = (trusted.iter())
        .map(|(_, told)| (seconds(known(*told)), known(*told)))
        .collect();
    laws.sort_by(|a, b| a.0.total_cmp(&b.0));
    let middle = laws.len() / 2;
    let upper = laws.get(middle)?;
    if laws.len() % 2 == 1 {
        return Some(upper.1);
    }
    let lower = laws.get(middle - 1)?;
    let nearer = before.is_some_and(|k| {
        let was = seconds(k);
        (lower.0 - was).abs() < (upper.0 - was).abs()
    });
    Some(if nearer { lower.1 } else { upper.1 })
}

/// Whether a replica needs dials of its own.
pub(crate) fn unlike(
    own: Known,
    fleet: Known,
    mix: Mix,
    objectives: Objectives,
    dials: Dials,
) -> bool {
    let apart = |a: f64, b: f64, factor: f64| a > b * factor || b > a * factor;
    let (decode, mixed) = steps(own, mix, objectives, dials);
    let (fleet_decode, fleet_mixed) = steps(fleet, mix, objectives, dials);
    apart(decode, fleet_decode, LIKE)
        || apart(mixed, fleet_mixed, LIKE)
        || apart(
            own.kv_capacity_tokens as f64,
            fleet.kv_capacity_tokens as f64,
            LIKE_MEMORY,
        )
        || own.ceilings != fleet.ceilings
}

/// Seconds of a step that only decodes, and of one that is full of prompt work.
fn steps(known: Known, mix: Mix, objectives: Objectives, dials: Dials) -> (f64, f64) {
    let model = ReplicaModel::new(known.law, mix, objectives, known.kv_capacity_tokens);
    let running = f64::from(dials.max_num_seqs);
    let budget = f64::from(dials.max_num_batched_tokens).max(running);
    (
        model.step_seconds(running, running),
        model.step_seconds(running, budget),
    )
}
