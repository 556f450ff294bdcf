use stoker_autoscaler::Dials;

use super::action;
use crate::fleet::{Action, Policy, View};

/// Replicas as they were planned beforehand, one number a slot of time.
#[derive(Clone, Debug, PartialEq)]
pub struct Schedule {
    /// Seconds a slot.
    pub slot: f64,
    /// The last one holds to the end.
    pub replicas: Vec<u32>,
    pub dials: Dials,
}

impl Policy for Schedule {
    fn period(&self) -> f64 {
        self.slot
    }

    fn decide(&mut self, view: &View) -> Action {
        let slot = (view.now / self.slot + 0.5) as usize;
        let planned = self.replicas.get(slot).or(self.replicas.last());
        action(planned.copied().unwrap_or(view.desired), self.dials)
    }
}
