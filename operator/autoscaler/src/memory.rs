//! What the policy remembers between two calls.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use stoker_law::Law;

use crate::burst::Burst;
use crate::days::Days;
use crate::demand::Demand;
use crate::dials::Motion;
use crate::fleet::Tracks;
use crate::history::History;
use crate::lowering::{Low, Turns};
use crate::misses::Misses;
use crate::mix::Mix;
use crate::observation::Dials;
use crate::probe::Probe;
use crate::raising::Looks;
use crate::recurrence::Recurrence;
use crate::starts::Starts;

/// Seconds without a call after which nothing is known to have lasted.
const GAP: f64 = 30.0;
/// Seconds without a call after which load must be watched anew, and not only for longer.
const LONG_GAP: f64 = 300.0;
/// Seconds within which the known mix follows that of the last minute.
const MIX_FOLLOWS: f64 = 120.0;

/// Carried from one call of [`crate::decide`] to the next by the caller, who may store it as JSON
/// (under 8 KB): recent samples are left out, so that after a restart rates are measured anew while
/// everything stays as it is.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Memory {
    /// Dials that the fleet was last told to use; `None` before the first decision.
    pub dials: Option<Dials>,
    /// Replicas that were last asked for; `None` before the first decision.
    pub replicas: Option<u32>,
    /// When the last decision was made.
    pub(crate) decided_at: f64,
    pub(crate) mix: Option<Mix>,
    pub(crate) fleet: Option<Known>,
    pub(crate) motion: Motion,
    pub(crate) low: Low,
    pub(crate) raised_at: Option<f64>,
    pub(crate) lowered_at: Option<f64>,
    pub(crate) turns: Turns,
    pub(crate) misses: Misses,
    pub(crate) history: History,
    pub(crate) recurrence: Recurrence,
    pub(crate) days: Days,
    pub(crate) burst: Burst,
    pub(crate) starts: Starts,

    /// The dials were set by somebody who knew more: they stay until the mix is known again.
    pub(crate) inherited: bool,

    /// The ready replicas got more than they carry when the last call looked.
    #[serde(skip)]
    pub(crate) pressed: bool,

    #[serde(skip)]
    pub(crate) without: Without,

    #[serde(skip)]
    pub(crate) tracks: Tracks,
    /// What was tried while no law is known.
    #[serde(skip)]
    pub(crate) probe: Probe,
    /// Own dials of unlike replicas.
    #[serde(skip)]
    pub(crate) own: BTreeMap<String, (Dials, Motion)>,
    #[serde(skip)]
    pub(crate) looks: Looks,
    /// What else than was decided the Deployment is asked for, and since when.
    #[serde(skip)]
    pub(crate) differs: Option<(u32, f64)>,
}

/// What the policy is to do without, to see what it is worth.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Without {
    /// Load is taken to stay as it is.
    pub forecast: bool,
    /// What came back before isn't expected again.
    pub recurrence: bool,
    /// No replica's dials are tried where no law is known.
    pub probing: bool,
}

/// The fleet's law and memory as they were last known.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Known {
    pub law: Law,
    pub kv_capacity_tokens: u64,
    pub ceilings: Dials,
}

impl Memory {
    /// Of the stored form: another one means something else by the same names.
    pub const VERSION: u32 = 2;

    /// A stored memory, with what the object's status tells of the time since it was stored.
    pub fn restored(self, desired_replicas: u32, dials: Option<Dials>) -> Self {
        Memory {
            dials: dials.or(self.dials),
            replicas: Some(desired_replicas),
            ..self
        }
    }

    /// The memory of an operator that was restarted without a stored one: it knows from the
    /// object's status what was last asked for, so that it doesn't start from the initial dials.
    pub fn seeded(desired_replicas: u32, dials: Option<Dials>, now: f64) -> Self {
        let now = if now.is_finite() { now } else { 0.0 };
        Memory {
            dials,
            replicas: Some(desired_replicas),
            inherited: dials.is_some(),
            decided_at: now,
            misses: Misses {
                judged_at: now,
                shortage_at: now,
                ..Misses::default()
            },
            ..Memory::default()
        }
    }

    /// The same memory of a policy that lacks something.
    pub fn without(self, without: Without) -> Self {
        Memory { without, ..self }
    }

    /// The same memory, told how many seconds a replica takes to start, until starts were seen.
    pub fn expecting_start(mut self, seconds: f64) -> Self {
        self.starts.expect(seconds);
        self
    }

    /// Notes a scale-down.
    pub(crate) fn lower(&mut self, now: f64) {
        self.lowered_at = Some(now);
        self.turns.note(now, false);
    }

    /// The mix that decisions go by: it follows within two minutes, or at once where the last minute's
    /// can't be the same.
    pub(crate) fn remember_mix(&mut self, demand: &Demand, seconds: f64) {
        if !demand.mix_known {
            return;
        }
        let share = if seconds.is_finite() {
            (seconds / MIX_FOLLOWS).clamp(0.0, 1.0)
        } else {
            0.0
        };
        self.mix = Some(match self.mix {
            None => demand.mix,
            Some(old) if old != demand.mix => demand.mix,
            Some(old) => old.towards(demand.fresh_mix, share),
        });
    }

    /// Brings the memory to the present and returns it: what wasn't watched isn't known to have
    /// lasted, and a clock that went back by far makes every time meaningless.
    pub(crate) fn resume(&mut self, now: f64) -> f64 {
        let before = self.decided_at;
        let now = if now.is_finite() { now } else { before };
        let first = before == 0.0;
        let now = if now < before && before - now < GAP {
            before
        } else {
            now
        };
        if first || now < before {
            // What was learnt stays; what has a time of its own doesn't.
            self.motion = Motion::default();
            self.raised_at = None;
            self.lowered_at = None;
            self.turns = Turns::default();
            self.misses.judged_at = now;
            self.misses.shortage_at = now;
            self.tracks = Tracks::default();
            self.probe = Probe::default();
            self.history = History::default();
            self.recurrence = Recurrence::default();
            self.days = Days::default();
            self.burst = Burst::default();
            self.differs = None;
            self.low.forget();
        } else if now - before > GAP {
            self.misses.shortage_at = now;
            if now - before < LONG_GAP {
                self.low.skip(now - before);
            } else {
                self.low.forget();
            }
        }
        self.decided_at = now;
        now
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn after_a_day_and_more_it_is_still_small() {
        let mut memory = Memory::seeded(4, None, 1.7e9);
        memory.mix = Some(Mix::UNKNOWN.towards(Mix::default(), 1.0 / 3.0));
        for i in 0..50_000_u32 {
            let now = 1.7e9 + 2.0 * f64::from(i);
            let rate = 12.345_678 + f64::from(i % 1000) / 3.0;
            let come = crate::history::Arrivals {
                from: now - 2.0,
                to: now,
                requests: 2.0 * rate,
                share: 1.0,
            };
            memory.history.note(&[come], now);
            memory.history.judge(rate, 75.123_456);
            let history = &memory.history;
            memory.recurrence.note(now, |seconds| history.rate(seconds));
            memory.days.note(now, history.rate(30.0));
            memory.low.note(now, i % 7, 225.0);
            memory.turns.note(now, i % 100 < 50);
        }
        let stored = serde_json::to_string(&memory).unwrap();
        assert!((4000..8192).contains(&stored.len()), "{}", stored.len());
    }

    #[test]
    fn a_short_gap_is_left_out_of_what_has_lasted() {
        let mut memory = Memory::seeded(4, None, 900.0);
        for now in [1000.0, 1020.0, 1040.0] {
            memory.resume(now);
            memory.low.note(now, 1, 30.0);
        }
        let now = memory.resume(1100.0);
        assert_eq!(memory.low.lasted(now, 1), 40.0);
    }

    #[test]
    fn a_gap_or_a_clock_gone_back_makes_low_demand_unknown() {
        for later in [1000.0 + GAP + 1.0, 100.0, f64::NAN] {
            let mut memory = Memory::seeded(4, None, 900.0);
            memory.resume(1000.0);
            memory.low.note(1000.0, 1, 30.0);
            let now = memory.resume(later);
            assert!(now.is_finite());
            let lasted = memory.low.lasted(now, 1);
            assert_eq!(lasted, 0.0);
        }
    }

    #[test]
    fn the_stored_form_is_small_and_brings_the_decisions_back() {
        let mut memory = Memory::seeded(4, None, 900.0);
        for i in 0..1000 {
            memory.low.note(1000.0 + f64::from(i), 3, 300.0);
        }
        memory.mix = Some(Mix::UNKNOWN);
        let stored = serde_json::to_string(&memory).unwrap();
        assert!(stored.len() < 2048, "{}", stored.len());
        assert_eq!(serde_json::from_str::<Memory>(&stored).unwrap(), memory);
        assert_eq!(
            serde_json::from_str::<Memory>("{}").unwrap(),
            Memory::default()
        );
    }
}
