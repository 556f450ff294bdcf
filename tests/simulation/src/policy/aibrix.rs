//! AIBrix's APA: every 10 s, where the mean share of KV cache in use is outside of 10 % around the
//! target, the replicas that bring it there, at most twice or half as many; down to the most of what
//! was wanted in 300 s.

use stoker_autoscaler::Dials;

use super::window::Window;
use super::{action, ceil};
use crate::fleet::{Action, Policy, View};

const PERIOD: f64 = 10.0;
const TOLERANCE: f64 = 0.1;
const MOST: f64 = 2.0;
const DOWN_COOLDOWN: f64 = 300.0;

pub(super) struct Apa {
    target: f64,
    dials: Dials,
    wanted: Window,
}

impl Apa {
    pub fn new(target: f64, dials: Dials) -> Self {
        Apa {
            target,
            dials,
            wanted: Window::new(DOWN_COOLDOWN),
        }
    }
}

impl Policy for Apa {
    fn period(&self) -> f64 {
        PERIOD
    }

    fn decide(&mut self, view: &View) -> Action {
        let used: f64 = view.ready().map(|(_, gauge)| gauge.kv_use()).sum();
        let ready = view.ready_count().max(1);
        let n = f64::from(ready);
        let ratio = used / n / self.target;
        let wanted = if (ratio - 1.0).abs() <= TOLERANCE {
            ready
        } else {
            ceil(n * ratio).clamp(ceil(n / MOST), (n * MOST) as u32)
        };
        if self.wanted.is_empty() {
            // It begins with what it finds.
            self.wanted.push(view.now, n);
        }
        self.wanted.push(view.now, f64::from(wanted));
        action(
            wanted.max((self.wanted.max() as u32).min(view.desired)),
            self.dials,
        )
    }
}
