//! What the policy answers.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::observation::Dials;

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Decision {
    pub replicas: u32,
    /// Dials for new replicas, and for every replica not named in `overrides`.
    pub dials: Dials,
    /// Dials of replicas that differ from the rest, by replica id.
    pub overrides: BTreeMap<String, Dials>,
    /// Requests that replicas unlike the rest should have in flight, in those of an ordinary one, by
    /// replica id. 0: it can't keep the objectives, and should get none while another is ready.
    #[serde(default)]
    pub weights: BTreeMap<String, f64>,
    pub reason: Reason,
    /// The load that the decision rests on; `None` before two samples are in.
    pub load: Option<Load>,
    /// What the law says about that load; `None` where no law or no load is known.
    pub outlook: Option<Outlook>,
}

/// What the model expects of the replicas that are ready.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Outlook {
    /// Requests a second that one of them carries within its objectives.
    pub one_carries: f64,
    /// Share of the requests that will meet all objectives at the load of the moment, in percent.
    pub good_percent: f64,
}

/// Why, for programs and for people.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reason {
    /// CamelCase, a small closed set.
    pub code: ReasonCode,
    /// One sentence with its numbers.
    pub message: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ReasonCode {
    /// Nothing to change.
    Steady,
    /// Samples are missing or stale: everything is left as it is.
    NoData,
    /// More replicas are on order.
    ScaleUp,
    /// Fewer replicas are needed, and have been for the stabilization time.
    ScaleDown,
    /// Fewer replicas would do; waiting for the stabilization time.
    Stabilizing,
    /// Demand asks for more than maxReplicas.
    AtMaxReplicas,
    /// Pods find no node: the dials carry the load alone.
    WaitingForAccelerator,
    /// Only the dials moved.
    DialsMoved,
    /// Nobody asks: no replica runs.
    ScaledToZero,
}

/// Fleet load over the last window.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Load {
    pub requests_per_second: f64,
    /// Generated tokens.
    pub tokens_per_second: f64,
    /// Share of finished requests that met all objectives; `None` when none finished.
    pub good_percent: Option<f64>,
    pub ttft_p95_seconds: Option<f64>,
    pub itl_p95_seconds: Option<f64>,
    pub running: u32,
    pub waiting: u32,
}
