//! Ray Serve: the replicas that hold the mean number of ongoing requests of the last 30 s at the
//! target; up when more were wanted for 30 s, down when fewer were for 600 s.

use stoker_autoscaler::Dials;

use super::window::Window;
use super::{action, ceil};
use crate::fleet::{Action, Policy, View};

/// Its loop runs ten times a second; nothing that counts here changes that fast.
const PERIOD: f64 = 5.0;
const LOOK_BACK: f64 = 30.0;
const UPSCALE_DELAY: f64 = 30.0;
const DOWNSCALE_DELAY: f64 = 600.0;
/// `max_ongoing_requests`: what a replica takes at once at most, by default 2.5 times the target; no
/// less with a lower one.
const MAX_ONGOING: u32 = 5;

pub(super) struct RayServe {
    target: f64,
    dials: Dials,
    ongoing: Window,
    /// Since when more, or fewer, are wanted.
    since: Option<(bool, f64)>,
}

impl RayServe {
    pub fn new(target: f64, dials: Dials) -> Self {
        let most = MAX_ONGOING.max(ceil(2.5 * target));
        RayServe {
            target,
            dials: Dials {
                max_num_seqs: dials.max_num_seqs.min(most),
                ..dials
            },
            ongoing: Window::new(LOOK_BACK),
            since: None,
        }
    }
}

impl Policy for RayServe {
    fn period(&self) -> f64 {
        PERIOD
    }

    fn decide(&mut self, view: &View) -> Action {
        let ongoing = f64::from(view.running() + view.waiting());
        self.ongoing.push(view.now, ongoing);
        let wanted = ceil(self.ongoing.mean() / self.target);
        if wanted == view.desired {
            self.since = None;
            return action(view.desired, self.dials);
        }
        let up = wanted > view.desired;
        let since = match self.since {
            Some((direction, since)) if direction == up => since,
            _ => view.now,
        };
        self.since = Some((up, since));
        let delay = if up { UPSCALE_DELAY } else { DOWNSCALE_DELAY };
        if view.now - since < delay {
            return action(view.desired, self.dials);
        }
        self.since = None;
        action(wanted, self.dials)
    }
}
