//! The scaling policy: observation in, decision and reason out. Pure: no clock, no I/O, no Kubernetes.

pub mod decision;
pub mod memory;
pub mod observation;

use std::collections::BTreeMap;

pub use decision::{Decision, Load, Reason, ReasonCode};
pub use memory::Memory;
pub use observation::{
    Counters, DialRange, Dials, Histogram, ItlOf, Limits, Objectives, Observation, Phase, Replica,
    Sample,
};

/// Decides how many replicas a service should have and how their dials should stand.
///
/// Deterministic: the same observations with the same memory give the same decisions. Never
/// panics, whatever the numbers are, and never leaves `limits`.
pub fn decide(
    observation: &Observation,
    _objectives: &Objectives,
    limits: &Limits,
    memory: &mut Memory,
) -> Decision {
    let dials = memory.dials.unwrap_or(Dials {
        max_num_seqs: limits.max_num_seqs.initial,
        max_num_batched_tokens: limits.max_num_batched_tokens.initial,
    });
    let replicas = memory
        .replicas
        .unwrap_or(observation.desired_replicas)
        .min(limits.max_replicas)
        .max(limits.min_replicas);
    memory.replicas = Some(replicas);
    memory.dials = Some(dials);
    Decision {
        replicas,
        dials,
        overrides: BTreeMap::new(),
        reason: Reason {
            code: ReasonCode::NoData,
            message: "No replica has given two samples yet.".to_owned(),
        },
        load: None,
    }
}
