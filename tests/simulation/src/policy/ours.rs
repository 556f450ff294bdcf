//! stoker-autoscaler's `decide()`, called as the operator calls it.

use stoker_autoscaler::{DialRange, Dials, Limits, Memory, Objectives, Outlook, decide};

use super::action;
use crate::fleet::{Action, Policy, Setup, View};

/// Seconds between two looks, as in the operator.
const PERIOD: f64 = 2.0;
/// Ranges of the dials, as the CRD's defaults have them.
const SEQS: (u32, u32) = (1, 256);
const TOKENS: (u32, u32) = (64, 8192);

pub struct Stoker {
    objectives: Objectives,
    limits: Limits,
    memory: Memory,
    reason: Option<String>,
    outlooks: Vec<Outlook>,
}

impl Stoker {
    /// With the CRD's defaults: nothing to tune. The dials start at the setup's.
    pub fn new(setup: &Setup) -> Self {
        let range = |(min, max): (u32, u32), initial: u32| DialRange { min, max, initial };
        Stoker {
            objectives: setup.goals.objectives(),
            limits: Limits {
                min_replicas: setup.min_replicas,
                idle_seconds: 0.0,
                max_replicas: setup.max_replicas,
                max_num_seqs: range(SEQS, setup.dials.max_num_seqs),
                max_num_batched_tokens: range(TOKENS, setup.dials.max_num_batched_tokens),
                scale_down_stabilization_seconds: 75.0,
            },
            memory: Memory::default(),
            reason: None,
            outlooks: Vec::new(),
        }
    }

    /// Both dials as they are: what the policy does with replicas alone.
    pub fn with_dials_held(mut self, dials: Dials) -> Self {
        let held = |at: u32| DialRange {
            min: at,
            max: at,
            initial: at,
        };
        self.limits.max_num_seqs = held(dials.max_num_seqs);
        self.limits.max_num_batched_tokens = held(dials.max_num_batched_tokens);
        self
    }

    /// So many replicas, whatever it thinks: to compare what it expects with what comes.
    pub fn with_replicas_held(mut self, replicas: u32) -> Self {
        self.limits.min_replicas = replicas;
        self.limits.max_replicas = replicas;
        self
    }

    /// What it expected at each look.
    pub fn outlooks(&self) -> &[Outlook] {
        &self.outlooks
    }

    /// The token budget as it is; the cap moves.
    pub fn with_budget_held(mut self, budget: u32) -> Self {
        self.limits.max_num_batched_tokens = DialRange {
            min: budget,
            max: budget,
            initial: budget,
        };
        self
    }
}

impl Policy for Stoker {
    fn period(&self) -> f64 {
        PERIOD
    }

    fn decide(&mut self, view: &View) -> Action {
        let observation = view.observation();
        let decision = decide(
            &observation,
            &self.objectives,
            &self.limits,
            &mut self.memory,
        );
        self.reason = Some(decision.reason.message);
        self.outlooks.extend(decision.outlook);
        let overrides = decision.overrides.iter();
        Action {
            overrides: overrides
                .filter_map(|(id, dials)| Some((crate::fleet::number(id)?, *dials)))
                .collect(),
            ..action(decision.replicas, decision.dials)
        }
    }

    /// What is stored of the memory comes back.
    fn restart(&mut self) {
        let stored = serde_json::to_string(&self.memory);
        let restored = stored
            .ok()
            .and_then(|text| serde_json::from_str(&text).ok());
        self.memory = restored.unwrap_or_default();
    }

    fn reason(&self) -> Option<String> {
        self.reason.clone()
    }
}
