//! AIBrix's APA: every 10 s, where the mean share of KV cache in use is outside of 10 % around the
//! target, the replicas that bring it there, at most twice or half as many; down only 300 s after
//! the last change.

use stoker_autoscaler::Dials;

use super::window::Window;
use super::{action, ceil};
use crate::fleet::{Action, Policy, View};

const PERIOD: f64 = 10.0;
const AVERAGED: f64 = 60.0;
const TOLERANCE: f64 = 0.1;
const MOST: f64 = 2.0;
const DOWN_COOLDOWN: f64 = 300.0;

pub(super) struct Apa {
    target: f64,
    dials: Dials,
    used: Window,
    changed: f64,
}

impl Apa {
    pub fn new(target: f64, dials: Dials) -> Self {
        Apa {
            target,
            dials,
            used: Window::new(AVERAGED),
            changed: f64::NEG_INFINITY,
        }
    }
}

impl Policy for Apa {
    fn period(&self) -> f64 {
        PERIOD
    }

    fn decide(&mut self, view: &View) -> Action {
        let used: f64 = view.ready().map(|(_, gauge)| gauge.kv_use()).sum();
        self.used.push(view.now, used);
        let current = view.desired.max(1);
        let n = f64::from(current);
        let ratio = self.used.mean() / n / self.target;
        let mut replicas = current;
        if ratio > 1.0 + TOLERANCE {
            replicas = ceil(n * ratio).min((n * MOST) as u32);
        } else if ratio < 1.0 - TOLERANCE && view.now - self.changed >= DOWN_COOLDOWN {
            replicas = ceil(n * ratio).max(ceil(n / MOST));
        }
        if replicas != current {
            self.changed = view.now;
        }
        action(replicas, self.dials)
    }
}
