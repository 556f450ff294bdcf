//! What the policy knows when it decides.

use serde::{Deserialize, Serialize};
use stoker_law::Law;

/// The two dials of an engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dials {
    pub max_num_seqs: u32,
    pub max_num_batched_tokens: u32,
}

/// All that is known about a service's replicas at one moment.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Observation {
    /// Seconds since the Unix epoch: comparable across restarts of the operator.
    pub now: f64,
    /// Replicas that the Deployment is asked for at present.
    pub desired_replicas: u32,
    pub replicas: Vec<Replica>,
    /// What waits in front of the replicas; `None` where no router tells.
    #[serde(default)]
    pub queue: Option<Queue>,
}

/// Requests that a router holds until a replica has room for them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Queue {
    pub requests: u32,
    pub prompt_tokens: u64,
    /// Of the request that has waited longest.
    pub oldest_age_seconds: f64,
    /// Requests at replicas, by the router's count.
    pub outstanding_requests: u32,
    /// Since the last request came.
    pub idle_seconds: f64,
}

/// One pod.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Replica {
    /// The pod's uid.
    pub id: String,
    pub phase: Phase,
    /// Seconds since the pod was created.
    pub age_seconds: f64,
    /// Seconds since it became ready; 0 while it isn't.
    pub ready_seconds: f64,
    /// `None` where the last scrape failed or is older than its deadline.
    pub sample: Option<Sample>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Phase {
    /// The scheduler found no node for it.
    Unschedulable,
    /// On its way: scheduled or about to be, image, weights.
    Starting,
    Ready,
    /// Told to go, or not ready any more.
    Draining,
}

/// What a replica said of itself. Counters and histograms are cumulative since its start.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Sample {
    /// When it was taken, on the clock of [`Observation::now`].
    pub at: f64,
    pub running: u32,
    pub waiting: u32,
    /// Prompt tokens accepted and not yet computed.
    pub waiting_prompt_tokens: u64,
    pub kv_tokens: u64,
    pub kv_capacity_tokens: u64,
    /// Dials in force.
    pub dials: Dials,
    /// The largest dials that the replica's device accepts.
    pub ceilings: Dials,
    pub law: Law,
    /// 0..=1.
    pub law_confidence: f64,
    pub counters: Counters,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Counters {
    pub requests_received: f64,
    pub prompt_tokens_received: f64,
    pub prompt_tokens: f64,
    pub generation_tokens: f64,
    pub requests_finished: f64,
    pub preemptions: f64,
    pub all_met: f64,
    pub all_missed: f64,
    pub ttft_met: f64,
    pub ttft_missed: f64,
    pub itl_met: f64,
    pub itl_missed: f64,
    /// Time to first token, seconds.
    pub ttft: Histogram,
    /// Inter-token latency, seconds.
    pub itl: Histogram,
    pub prompt_length: Histogram,
    pub generation_length: Histogram,
}

/// Cumulative buckets, as Prometheus gives them.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Histogram {
    /// (upper bound, count of values up to it), ascending; the last bound is infinite.
    pub buckets: Vec<(f64, f64)>,
    pub sum: f64,
    pub count: f64,
}

/// What the owner of the service wants.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Objectives {
    pub good_percent: f64,
    pub ttft_seconds: f64,
    pub ttft_free_prompt_tokens: f64,
    pub ttft_seconds_per_prompt_token: f64,
    pub itl_seconds: f64,
    pub itl_of: ItlOf,
}

/// Which figure of a request's gaps between tokens the objective is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ItlOf {
    Mean,
    P95,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DialRange {
    pub min: u32,
    pub max: u32,
    pub initial: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Limits {
    pub min_replicas: u32,
    pub max_replicas: u32,
    pub max_num_seqs: DialRange,
    pub max_num_batched_tokens: DialRange,
    pub scale_down_stabilization_seconds: f64,
    /// With `min_replicas` 0: seconds without a request after which the last replica goes.
    #[serde(default)]
    pub idle_seconds: f64,
}
