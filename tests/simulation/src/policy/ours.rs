//! stoker-autoscaler's `decide()`, called as the operator calls it.

use stoker_autoscaler::{DialRange, Dials, Limits, Memory, Objectives, Outlook, Without, decide};

use super::action;
use crate::fleet::{Action, EPOCH, Policy, Setup, View};

/// Seconds between two looks, as in the operator.
const PERIOD: f64 = 2.0;
/// Seconds between two times that the operator stores a memory, and from its start until the latest of
/// its services is due.
const STORED_EVERY: f64 = 60.0;
const LATEST_FIRST: f64 = 30.0;
/// Ranges of the dials, as the CRD's defaults have them.
const SEQS: (u32, u32) = (1, 256);
const TOKENS: (u32, u32) = (64, 8192);

pub struct Stoker {
    objectives: Objectives,
    limits: Limits,
    memory: Memory,
    /// Whether the memory is stored now and then, for a restart to find.
    stores: bool,
    stored: Option<String>,
    /// When it is stored next.
    due: f64,
    /// When it was decided last, and what.
    stands: Option<(f64, u32, Dials)>,
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
            stores: false,
            stored: None,
            due: LATEST_FIRST,
            stands: None,
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

    /// The policy built up part by part: name, the world it starts in, and the policy.
    pub fn ablations(setup: &Setup) -> Vec<(&'static str, Setup, Self)> {
        let setup = &setup.with_dials(32, 2048);
        let without = |forecast: bool, recurrence: bool, probing: bool| {
            let without = Without {
                forecast,
                recurrence,
                probing,
            };
            let stoker = Stoker::new(setup);
            Stoker {
                memory: stoker.memory.without(without),
                ..stoker
            }
        };
        let dials = setup.dials;
        let budget = dials.max_num_batched_tokens;
        let parts = [
            (
                "replicas only",
                without(true, true, true).with_dials_held(dials),
            ),
            ("+ cap", without(true, true, true).with_budget_held(budget)),
            ("+ budget", without(true, true, true)),
            ("+ forecast", without(false, true, true)),
            ("+ memory", without(false, false, true)),
            ("+ probing: the whole", without(false, false, false)),
        ];
        let parts = parts.into_iter();
        parts
            .map(|(name, ours)| (name, setup.clone(), ours))
            .collect()
    }

    /// So many replicas, whatever it thinks: to compare what it expects with what comes.
    pub fn with_replicas_held(mut self, replicas: u32) -> Self {
        self.limits.min_replicas = replicas;
        self.limits.max_replicas = replicas;
        self
    }

    /// Told how many seconds a replica takes to start, as it would have seen of the first ones.
    pub fn expecting_start(mut self, seconds: f64) -> Self {
        self.memory = self.memory.expecting_start(seconds);
        self
    }

    /// Its memory outlives restarts, as old as the operator lets it get.
    pub fn with_stored_memory(mut self) -> Self {
        self.stores = true;
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
        if self.stores && view.now >= self.due {
            self.due = view.now + STORED_EVERY;
            self.stored = serde_json::to_string(&self.memory).ok();
        }
        self.reason = Some(decision.reason.message);
        self.outlooks.extend(decision.outlook);
        let number = crate::fleet::number;
        let overrides = decision.overrides.iter();
        let weights = decision.weights.iter();
        self.stands = Some((view.now, decision.replicas, decision.dials));
        Action {
            overrides: overrides
                .filter_map(|(id, dials)| Some((number(id)?, *dials)))
                .collect(),
            weights: weights
                .filter_map(|(id, weight)| Some((number(id)?, *weight)))
                .collect(),
            ..action(decision.replicas, decision.dials)
        }
    }

    /// What the operator finds comes back: what it had stored, or what the object's status tells.
    fn restart(&mut self) {
        let Some((now, replicas, dials)) = self.stands else {
            self.memory = Memory::default();
            return;
        };
        let stored: Option<Memory> =
            (self.stored.as_deref()).and_then(|text| serde_json::from_str(text).ok());
        self.memory = match stored {
            Some(memory) => memory.restored(replicas, Some(dials)),
            None => Memory::seeded(replicas, Some(dials), EPOCH + now),
        };
        self.due = now + LATEST_FIRST;
    }

    fn reason(&self) -> Option<String> {
        self.reason.clone()
    }
}
