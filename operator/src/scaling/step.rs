//! From the number that was decided to the next single, safe change of the Deployment.

use super::Fleet;
use crate::actuate::{Candidate, choose_victim};

/// What to do next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    Stay,
    /// Ask the Deployment for this many.
    To(u32),
    /// Mark this pod as the one to go and wait until the watch echoes it.
    Mark(Candidate),
}

/// The pods of a service, as far as a scale-down is concerned.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Standing {
    pub ready: Vec<Candidate>,
    /// Pods on their way up, which a ReplicaSet removes before any ready one.
    pub not_ready: u32,
    /// Pods on their way out.
    pub terminating: u32,
}

/// More replicas are asked for at once, and pods that aren't ready yet go at once. Ready ones go one at a
/// time: never during a rollout, never before the last one is gone, and only once the pod carries the mark
/// by which the ReplicaSet picks it, and has been out of rotation for `proof_seconds`: if the others can't
/// do without it, the decision changes meanwhile and it comes back.
pub fn next(
    current: u32,
    decided: u32,
    fleet: Fleet,
    standing: &Standing,
    proof_seconds: u64,
) -> Step {
    if decided > current {
        return Step::To(decided);
    }
    let busy = !fleet.settled() || fleet.wanted != current || standing.terminating > 0;
    if decided == current || busy {
        return Step::Stay;
    }
    if standing.not_ready > 0 {
        return Step::To(decided.max(current.saturating_sub(standing.not_ready)));
    }
    match choose_victim(&standing.ready) {
        Some(victim) => match victim.marked_seconds {
            None => Step::Mark(victim.clone()),
            Some(seconds) if seconds >= proof_seconds => Step::To(current - 1),
            Some(_) => Step::Stay,
        },
        None => Step::Stay,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn settled(n: u32) -> Fleet {
        Fleet {
            observed: true,
            wanted: n,
            created: n,
            updated: n,
            ready: n,
        }
    }

    fn ready(requests: &[u32]) -> Standing {
        let pod = |(i, r): (usize, &u32)| Candidate {
            uid: format!("u{i}"),
            name: format!("p{i}"),
            marked_seconds: None,
            requests: Some(*r),
            ready_seconds: 100,
        };
        Standing {
            ready: requests.iter().enumerate().map(pod).collect(),
            ..Standing::default()
        }
    }

    #[test]
    fn marks_first_then_takes_one() {
        let mut standing = ready(&[4, 0, 2]);
        let Step::Mark(victim) = next(3, 1, settled(3), &standing, 0) else {
            panic!("no mark");
        };
        assert_eq!(victim.name, "p1");
        standing.ready[1].marked_seconds = Some(9);
        assert_eq!(
            next(3, 1, settled(3), &standing, 10),
            Step::Stay,
            "on trial"
        );
        standing.ready[1].marked_seconds = Some(10);
        assert_eq!(next(3, 1, settled(3), &standing, 10), Step::To(2));
    }

    #[test]
    fn waits_for_rollouts_and_for_the_last_one_to_be_gone() {
        let mut standing = ready(&[0, 0]);
        standing.ready[0].marked_seconds = Some(0);
        let rollout = Fleet {
            updated: 1,
            ..settled(2)
        };
        assert_eq!(next(2, 1, rollout, &standing, 0), Step::Stay);
        let unseen = Fleet {
            observed: false,
            ..settled(2)
        };
        assert_eq!(next(2, 1, unseen, &standing, 0), Step::Stay);
        // The last change hasn't reached the Deployment yet.
        assert_eq!(next(2, 1, settled(3), &standing, 0), Step::Stay);
        standing.terminating = 1;
        assert_eq!(next(2, 1, settled(2), &standing, 0), Step::Stay);
    }

    #[test]
    fn pods_that_never_came_up_go_at_once_and_without_a_mark() {
        let mut standing = ready(&[3]);
        standing.not_ready = 1;
        assert_eq!(next(2, 1, settled(2), &standing, 0), Step::To(1));
        standing.not_ready = 5;
        assert_eq!(next(6, 3, settled(6), &standing, 0), Step::To(3));
        let mut standing = ready(&[3, 1, 2]);
        standing.not_ready = 2;
        assert_eq!(next(5, 1, settled(5), &standing, 0), Step::To(3));
    }

    proptest! {
        #[test]
        fn never_more_than_one_ready_down_and_never_past_the_decision(
            current in 0_u32..9, decided in 0_u32..9, not_ready in 0_u32..3, terminating in 0_u32..2,
            marked in any::<bool>(), observed in any::<bool>(),
            created in 0_u32..9, updated in 0_u32..9, requests in proptest::collection::vec(0_u32..9, 0..5),
        ) {
            let mut standing = Standing { not_ready, terminating, ..ready(&requests) };
            if let Some(first) = standing.ready.first_mut() {
                first.marked_seconds = marked.then_some(0);
            }
            let fleet = Fleet { observed, wanted: current, created, updated, ready: 0 };
            match next(current, decided, fleet, &standing, 0) {
                Step::To(n) if n < current => {
                    prop_assert!(current - n <= not_ready.max(1));
                    prop_assert!(n >= decided && fleet.settled() && terminating == 0);
                    prop_assert!(not_ready > 0 || standing.ready.iter().any(|pod| pod.marked_seconds.is_some()));
                }
                Step::To(n) => prop_assert_eq!(n, decided),
                Step::Mark(_) => prop_assert!(decided < current),
                Step::Stay => {}
            }
        }
    }
}
