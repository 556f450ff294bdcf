use stoker_autoscaler::Dials;

use super::action;
use crate::fleet::{Action, Policy, View};

/// Always as many.
#[derive(Clone, Debug)]
pub struct Fixed {
    replicas: u32,
    dials: Dials,
}

impl Fixed {
    pub fn new(replicas: u32, dials: Dials) -> Self {
        Fixed { replicas, dials }
    }
}

impl Policy for Fixed {
    fn period(&self) -> f64 {
        60.0
    }

    fn decide(&mut self, _: &View) -> Action {
        action(self.replicas, self.dials)
    }
}
