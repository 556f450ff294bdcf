//! Kubernetes' horizontal pod autoscaler on an external metric with an average value, as KEDA sets
//! it up: every 15 s the replicas that hold the metric's sum at the target, unless that is within
//! 10 % of what is there; up at once (at most four or as many again in 15 s), down to the most of
//! what was wanted in 300 s.

use stoker_autoscaler::Dials;

use super::window::Window;
use super::{action, ceil};
use crate::fleet::{Action, Policy, View};

const PERIOD: f64 = 15.0;
const TOLERANCE: f64 = 0.1;
const STABILIZATION: f64 = 300.0;

#[derive(Clone, Copy, Debug)]
enum Metric {
    Waiting,
    Running,
    Inflight,
}

pub(super) struct Hpa {
    metric: Metric,
    target: f64,
    dials: Dials,
    /// Seconds between two steps of a single replica, up and down; `None` for HPA's own pace.
    pace: Option<(f64, f64)>,
    stepped: f64,
    wanted: Window,
}

impl Hpa {
    fn new(metric: Metric, target: f64, dials: Dials, pace: Option<(f64, f64)>) -> Self {
        Hpa {
            metric,
            target,
            dials,
            pace,
            stepped: f64::NEG_INFINITY,
            wanted: Window::new(STABILIZATION),
        }
    }

    pub fn on_waiting(target: f64, dials: Dials) -> Self {
        Self::new(Metric::Waiting, target, dials, None)
    }

    pub fn on_inflight(target: f64, dials: Dials) -> Self {
        Self::new(Metric::Inflight, target, dials, None)
    }

    /// vLLM production-stack's ScaledObject: running requests, one replica a minute either way. A
    /// minute is over at the look after it, going down.
    pub fn production_stack(target: f64, dials: Dials) -> Self {
        Self::new(Metric::Running, target, dials, Some((60.0, 75.0)))
    }
}

impl Policy for Hpa {
    fn period(&self) -> f64 {
        PERIOD
    }

    fn decide(&mut self, view: &View) -> Action {
        let sum = f64::from(match self.metric {
            Metric::Waiting => view.waiting(),
            Metric::Running => view.running(),
            Metric::Inflight => view.running() + view.waiting(),
        });
        let current = view.desired.max(1);
        let ratio = sum / (self.target * f64::from(current));
        let wanted = if (ratio - 1.0).abs() <= TOLERANCE {
            current
        } else {
            ceil(sum / self.target)
        };
        if self.wanted.is_empty() {
            // It begins with what it finds.
            self.wanted.push(view.now, f64::from(current));
        }
        self.wanted.push(view.now, f64::from(wanted));
        // Going down waits for what was wanted in the window; going up doesn't.
        let replicas = wanted.max((self.wanted.max() as u32).min(current));
        let replicas = match self.pace {
            None => replicas.min((current + 4).max(2 * current)),
            Some(_) => replicas.clamp(current - 1, current + 1),
        };
        if replicas != current {
            let pace = self
                .pace
                .map_or(0.0, |(up, down)| if replicas < current { down } else { up });
            if view.now - self.stepped < pace {
                return action(view.desired, self.dials);
            }
            self.stepped = view.now;
        }
        action(replicas, self.dials)
    }
}
