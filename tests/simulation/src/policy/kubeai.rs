//! KubeAI: every 10 s the replicas that hold the mean number of requests of the last ten minutes
//! at the target; down after three lower results in a row.

use stoker_autoscaler::Dials;

use super::window::Window;
use super::{action, ceil};
use crate::fleet::{Action, Policy, View};

const PERIOD: f64 = 10.0;
const AVERAGED: f64 = 600.0;
const CONSECUTIVE: u32 = 3;

pub(super) struct KubeAi {
    target: f64,
    dials: Dials,
    active: Window,
    lower: u32,
}

impl KubeAi {
    pub fn new(target: f64, dials: Dials) -> Self {
        KubeAi {
            target,
            dials,
            active: Window::new(AVERAGED),
            lower: 0,
        }
    }
}

impl Policy for KubeAi {
    fn period(&self) -> f64 {
        PERIOD
    }

    fn decide(&mut self, view: &View) -> Action {
        let active = f64::from(view.running() + view.waiting());
        self.active.push(view.now, active);
        let wanted = ceil(self.active.mean() / self.target);
        let mut replicas = wanted;
        if wanted < view.desired {
            self.lower += 1;
            if self.lower < CONSECUTIVE {
                replicas = view.desired;
            }
        }
        if wanted >= view.desired || replicas < view.desired {
            self.lower = 0;
        }
        action(replicas, self.dials)
    }
}
