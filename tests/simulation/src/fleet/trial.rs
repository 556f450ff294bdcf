//! How a ready replica goes as the operator has it: out of rotation on trial first, from which it comes
//! back where the others can't do without it.

use std::cmp::Reverse;

use stoker_autoscaler::Phase;

use super::alive;
use super::run::Fleet;

impl Fleet<'_> {
    /// Replicas to ask for where so many were decided: fewer come one at a time, when the last one is
    /// gone; what doesn't serve yet goes at once.
    pub(super) fn after_trial(&mut self, decided: u32) -> u32 {
        let (trial, now, desired) = (self.setup.trial_seconds, self.now, self.desired);
        let pods = &mut self.pods.list;
        if decided >= desired || trial == 0.0 {
            pods.iter_mut().for_each(|pod| pod.on_trial = None);
            return decided;
        }
        if pods.iter().any(|pod| pod.phase == Phase::Draining) {
            return desired;
        }
        if pods.iter().any(|pod| alive(pod.phase) && !pod.ready()) {
            return desired - 1;
        }
        if let Some(since) = pods.iter().find_map(|pod| pod.on_trial) {
            return if now - since >= trial {
                desired - 1
            } else {
                desired
            };
        }
        let victim = (pods.iter_mut()).min_by_key(|pod| (pod.outstanding, Reverse(pod.id)));
        if let Some(pod) = victim {
            pod.on_trial = Some(now);
        }
        desired
    }
}
