//! Zero replicas while nobody asks, and back.

use crate::Scene;
use crate::decision::{Reason, ReasonCode};
use crate::observation::Queue;
use crate::replicas::bounded;

/// What to do at zero replicas or at the last one; `None` where that is not the question.
///
/// Only the router can tell that somebody asks while no replica runs: without its word a service
/// stays as it is.
pub(crate) fn plan(scene: &Scene, queue: Option<Queue>, current: u32) -> Option<(u32, Reason)> {
    let reason = |code, message: String| Reason { code, message };
    let waiting = queue.map_or(0, |queue| queue.requests);
    if current == 0 {
        return Some(match waiting {
            0 => {
                let message = "Asleep at 0 replicas: the next request starts one.";
                (0, reason(ReasonCode::ScaledToZero, message.to_owned()))
            }
            n => {
                let message = format!("From 0 to 1 replica: requests wait for one ({n}).");
                (
                    bounded(1, scene.limits),
                    reason(ReasonCode::ScaleUp, message),
                )
            }
        });
    }
    let census = &scene.census;
    let last = current == 1 && scene.limits.min_replicas == 0;
    let quiet = queue.filter(|queue| {
        queue.requests == 0
            && queue.outstanding_requests == 0
            && queue.idle_seconds >= scene.limits.idle_seconds
    })?;
    let busy = census.running() + census.waiting() > 0;
    if !last || busy || census.heard.is_empty() || !census.complete() {
        return None;
    }
    let message = format!(
        "From 1 to 0 replicas: no request has come for {:.0} s; the next one starts a replica.",
        quiet.idle_seconds
    );
    Some((0, reason(ReasonCode::ScaledToZero, message)))
}
