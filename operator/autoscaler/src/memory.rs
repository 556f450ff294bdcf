//! What the policy remembers between two calls.

use serde::{Deserialize, Serialize};

use crate::observation::Dials;

/// Carried from one call of [`crate::decide`] to the next by the caller, who may store it as JSON.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Memory {
    /// Dials that the fleet was last told to use; `None` before the first decision.
    pub dials: Option<Dials>,
    /// Replicas that were last asked for; `None` before the first decision.
    pub replicas: Option<u32>,
}

impl Memory {
    /// The memory of an operator that was restarted without a stored one: it knows from the
    /// object's status what was last asked for, so that it doesn't start from the initial dials.
    pub fn seeded(desired_replicas: u32, dials: Option<Dials>, _now: f64) -> Self {
        Memory {
            dials,
            replicas: Some(desired_replicas),
        }
    }
}
