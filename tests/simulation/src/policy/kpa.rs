//! Knative's pod autoscaler (KPA): every 2 s the replicas that hold the mean number of requests of
//! the last 60 s at the target; in panic, when those of the last 6 s would need twice as many as
//! are ready, the mean of these and never fewer than before, until 60 s after panic's last cause.

use stoker_autoscaler::Dials;

use super::window::Window;
use super::{action, ceil};
use crate::fleet::{Action, Policy, View};

const PERIOD: f64 = 2.0;
const STABLE: f64 = 60.0;
const PANIC: f64 = 6.0;
const PANIC_THRESHOLD: f64 = 2.0;
const MAX_UP: f64 = 1000.0;
const MAX_DOWN: f64 = 2.0;

pub(super) struct Kpa {
    target: f64,
    dials: Dials,
    stable: Window,
    panic: Window,
    /// When panic's cause was last seen, and the most replicas that were wanted since it began.
    panicking: Option<(f64, u32)>,
}

impl Kpa {
    /// `target`: requests a replica, utilization included.
    pub fn new(target: f64, dials: Dials) -> Self {
        Kpa {
            target,
            dials,
            stable: Window::new(STABLE),
            panic: Window::new(PANIC),
            panicking: None,
        }
    }
}

impl Policy for Kpa {
    fn period(&self) -> f64 {
        PERIOD
    }

    fn decide(&mut self, view: &View) -> Action {
        let concurrency = f64::from(view.running() + view.waiting());
        self.stable.push(view.now, concurrency);
        self.panic.push(view.now, concurrency);
        let ready = f64::from(view.ready_count().max(1));
        let (low, high) = ((ready / MAX_DOWN).floor(), (ready * MAX_UP).ceil());
        let wanted = |mean: f64| (mean / self.target).clamp(low, high);
        let stable = ceil(wanted(self.stable.mean()));
        let panic = ceil(wanted(self.panic.mean()));
        if f64::from(panic) / ready >= PANIC_THRESHOLD {
            let most = self.panicking.map_or(0, |(_, most)| most);
            self.panicking = Some((view.now, most));
        }
        if (self.panicking).is_some_and(|(since, _)| view.now - since >= STABLE) {
            self.panicking = None;
        }
        let replicas = match &mut self.panicking {
            Some((_, most)) => {
                *most = panic.max(stable).max(*most).max(view.ready_count());
                *most
            }
            None => stable,
        };
        action(replicas, self.dials)
    }
}
