//! Keeps what people read from flickering.

use std::time::Duration;

use stoker_autoscaler::{Decision, Reason, ReasonCode};
use tokio::time::Instant;

/// A replica that the kubelet calls ready but that hasn't answered for so long is silent.
pub const SILENCE: Duration = Duration::from_secs(10);
/// A finding must last so long before it is believed.
const PERSIST: Duration = Duration::from_secs(10);
/// A reason stays so long before another replaces it.
const DWELL: Duration = Duration::from_secs(6);

/// Takes a new value over once it has lasted for [`PERSIST`].
#[derive(Clone, Debug, Default)]
pub struct Debounced<T> {
    value: T,
    candidate: Option<(T, Instant)>,
}

impl<T: Copy + PartialEq> Debounced<T> {
    pub fn new(value: T) -> Self {
        Debounced {
            value,
            candidate: None,
        }
    }

    pub fn update(&mut self, new: T, now: Instant) -> T {
        match self.candidate {
            _ if new == self.value => self.candidate = None,
            Some((candidate, since)) if candidate == new => {
                if now.duration_since(since) >= PERSIST {
                    self.value = new;
                    self.candidate = None;
                }
            }
            _ => self.candidate = Some((new, now)),
        }
        self.value
    }
}

/// The reason to show: a change of replicas and the end of a silence at once, lost samples only when they stay lost, others
/// when the shown one has had its time. The message is always the latest of its code.
#[derive(Clone, Debug, Default)]
pub struct ShownReason {
    shown: Option<(Reason, Instant)>,
    lost_since: Option<Instant>,
}

impl ShownReason {
    /// `None` at first, while nothing is known and that may still pass: an operator that was just
    /// started has nothing to say yet.
    pub fn update(&mut self, new: Reason, now: Instant) -> Option<Reason> {
        let lost = new.code == ReasonCode::NoData;
        let lost_since = *self.lost_since.get_or_insert(now);
        if !lost {
            self.lost_since = None;
        }
        let stays_lost = lost && now.duration_since(lost_since) >= PERSIST;
        let Some((shown, since)) = &mut self.shown else {
            if !lost || stays_lost {
                self.shown = Some((new, now));
            }
            return self.shown.as_ref().map(|(reason, _)| reason.clone());
        };
        let at_once = matches!(
            new.code,
            ReasonCode::ScaleUp | ReasonCode::ScaleDown | ReasonCode::ScaledToZero
        ) || shown.code == ReasonCode::NoData;
        let due = match lost {
            true => stays_lost,
            false => at_once || now.duration_since(*since) >= DWELL,
        };
        if new.code == shown.code {
            shown.message = new.message;
        } else if due {
            (*shown, *since) = (new, now);
        }
        Some(shown.clone())
    }
}

/// Why there are to be fewer replicas, for as long as there are more: each is on trial before it
/// goes, and what is decided meanwhile explains less.
#[derive(Clone, Debug, Default)]
pub struct Lowering(Option<Reason>);

impl Lowering {
    /// The reason to tell of a decision where `desired` replicas are asked for now.
    pub fn reason(&mut self, decision: &Decision, desired: u32) -> Reason {
        let code = decision.reason.code;
        if decision.replicas >= desired {
            self.0 = None;
        } else if matches!(code, ReasonCode::ScaleDown | ReasonCode::ScaledToZero) {
            self.0 = Some(decision.reason.clone());
        }
        self.0.clone().unwrap_or_else(|| decision.reason.clone())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use stoker_autoscaler::Dials;

    use super::*;

    fn reason(code: ReasonCode, message: &str) -> Reason {
        Reason {
            code,
            message: message.to_owned(),
        }
    }

    #[test]
    fn a_finding_must_last() {
        let start = Instant::now();
        let at = |s: u64| start + Duration::from_secs(s);
        let mut met = Debounced::<Option<bool>>::default();
        assert_eq!(met.update(Some(true), at(0)), None);
        assert_eq!(met.update(Some(false), at(8)), None, "another candidate");
        assert_eq!(met.update(Some(true), at(9)), None);
        assert_eq!(met.update(Some(true), at(19)), Some(true));
        assert_eq!(met.update(Some(false), at(20)), Some(true));
        assert_eq!(met.update(Some(true), at(21)), Some(true));
        assert_eq!(met.update(Some(false), at(31)), Some(true), "counts anew");
        assert_eq!(met.update(Some(false), at(41)), Some(false));
    }

    #[test]
    fn reasons_stay_readable() {
        use ReasonCode::{DialsMoved, NoData, ScaleUp, Steady};
        let start = Instant::now();
        let at = |s: u64| start + Duration::from_secs(s);
        let mut shown = ShownReason::default();
        let mut update = |code, message, s| shown.update(reason(code, message), at(s));
        assert_eq!(update(NoData, "-", 0), None, "just started");
        assert_eq!(update(Steady, "a", 0).unwrap().code, Steady);
        assert_eq!(update(DialsMoved, "b", 2).unwrap().code, Steady);
        assert_eq!(update(Steady, "c", 4).unwrap().message, "c");
        assert_eq!(update(ScaleUp, "d", 5).unwrap().code, ScaleUp);
        assert_eq!(update(DialsMoved, "e", 11).unwrap().code, DialsMoved);
        assert_eq!(update(NoData, "f", 30).unwrap().code, DialsMoved);
        assert_eq!(update(NoData, "f", 40).unwrap().code, NoData);
        assert_eq!(update(Steady, "g", 42).unwrap().code, Steady);
    }

    #[test]
    fn a_replica_on_trial_goes_for_the_reason_of_the_decision() {
        let decision = |replicas, code| Decision {
            replicas,
            dials: Dials {
                max_num_seqs: 8,
                max_num_batched_tokens: 512,
            },
            overrides: BTreeMap::new(),
            weights: BTreeMap::new(),
            reason: reason(code, ""),
            load: None,
            outlook: None,
        };
        use ReasonCode::{ScaleDown, ScaleUp, Stabilizing, Steady};
        let mut lowering = Lowering::default();
        let mut told =
            |replicas, code, desired| lowering.reason(&decision(replicas, code), desired).code;
        assert_eq!(told(3, Steady, 3), Steady);
        assert_eq!(told(1, ScaleDown, 3), ScaleDown);
        assert_eq!(told(1, Stabilizing, 3), ScaleDown);
        assert_eq!(told(1, Steady, 2), ScaleDown);
        assert_eq!(told(1, Steady, 1), Steady);
        assert_eq!(told(1, ScaleDown, 2), ScaleDown);
        assert_eq!(told(4, ScaleUp, 2), ScaleUp, "it was needed after all");
        assert_eq!(told(4, Steady, 4), Steady);
    }

    #[test]
    fn a_service_that_never_gave_data_says_so_in_time() {
        let start = Instant::now();
        let mut shown = ShownReason::default();
        let mut update = |s| {
            let now = start + Duration::from_secs(s);
            shown.update(reason(ReasonCode::NoData, "no replica is ready"), now)
        };
        assert_eq!(update(0), None);
        assert_eq!(update(8), None);
        assert_eq!(update(10).unwrap().code, ReasonCode::NoData);
    }
}
