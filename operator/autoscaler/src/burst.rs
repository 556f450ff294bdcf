//! Load that jumps and is soon gone again. What came too late for it is of no use; what came in time stays for
//! the next one, while more requests of late missed than may.

use serde::{Deserialize, Serialize};

use crate::history::{NEWEST, Trend};

/// Times the load before that make a burst of a jump.
const TIMES: f64 = 2.0;
/// Share of a burst's load below which it is over.
const OVER: f64 = 0.5;
/// Standard deviations of the newest seconds' load by which it must be less for that.
const BEYOND: f64 = 2.0;
/// Starts that a burst lasts at most. Of load that stays for longer replicas that are ordered when it comes serve
/// the most.
const STARTS: f64 = 4.0;
/// Seconds since load was last there for which a burst is remembered.
const REMEMBERED: f64 = 1800.0;

/// The largest burst of late.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Burst {
    /// Requests a second, at the highest.
    pub rate: f64,
    /// Replicas that carried it.
    pub replicas: u32,
    /// Seconds that it lasted.
    lasted: f64,
    /// When load was last there.
    last: f64,
    /// When it came, while it is there.
    came: Option<f64>,
}

impl Burst {
    /// `level` is the load of the newest seconds, of which so many replicas were ready for all. What was
    /// `expected` is no burst.
    pub fn note(&mut self, now: f64, trend: Trend, level: f64, expected: f64, settled: u32) {
        if !(0.0..=REMEMBERED).contains(&(now - self.last)) {
            *self = Burst {
                last: now,
                ..Burst::default()
            };
        }
        let jumped = |before: f64| trend.level >= TIMES * before && expected < OVER * trend.level;
        if self.came.is_none() && trend.jumped_from.is_some_and(jumped) {
            self.came = Some(now);
        }
        let Some(came) = self.came else {
            return;
        };
        // The highest of many is high by chance, too, and the lowest low.
        let chance = (level / NEWEST).sqrt();
        self.rate = self.rate.max(level - chance);
        if level + BEYOND * chance >= OVER * self.rate {
            self.lasted = self.lasted.max(now - came);
            self.replicas = self.replicas.max(settled);
            self.last = now;
        } else if trend.jumped_from.is_none() {
            self.came = None;
        }
    }

    /// Whether one was there within so many seconds, and isn't any more.
    pub fn is_over(&self, now: f64, within: f64) -> bool {
        self.rate > 0.0 && self.came.is_none() && now - self.last <= within
    }

    /// Whether load was gone before replicas that take so many seconds to start could serve the most of it.
    pub fn was_short(&self, start: f64) -> bool {
        self.rate > 0.0 && self.lasted < STARTS * start
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Sixty seconds of 12 requests a second, out of 2.
    fn told(burst: &mut Burst, now: f64, lasts: f64, expected: f64) {
        let age = now - 1000.0;
        let is_there = (0.0..lasts).contains(&age);
        let trend = Trend {
            level: if is_there { 12.0 } else { 2.0 },
            jumped_from: (0.0..12.0).contains(&age).then_some(2.0),
            ..Trend::default()
        };
        let settled = if age > 40.0 { 8 } else { 2 };
        burst.note(
            now,
            trend,
            if is_there { 12.0 } else { 2.0 },
            expected,
            settled,
        );
    }

    fn after(lasts: f64, seconds: u32) -> Burst {
        after_expected(lasts, seconds, 2.0)
    }

    fn after_expected(lasts: f64, seconds: u32, expected: f64) -> Burst {
        let mut burst = Burst::default();
        for now in (900..1000 + seconds).step_by(2) {
            told(&mut burst, f64::from(now), lasts, expected);
        }
        burst
    }

    #[test]
    fn a_burst_is_over_when_load_is_gone_and_is_remembered_for_half_an_hour() {
        let during = after(60.0, 40);
        assert!(!during.is_over(1040.0, 75.0), "{during:?}");
        let over = after(60.0, 64);
        assert!(over.is_over(1064.0, 75.0), "{over:?}");
        assert!(!over.is_over(1264.0, 75.0), "{over:?}");
        assert!((11.0..12.0).contains(&over.rate), "{over:?}");
        assert_eq!(over.replicas, 8);
        assert!(after(60.0, 1800).was_short(20.0));
        assert!(!after(60.0, 1900).was_short(20.0), "forgotten");
    }

    #[test]
    fn what_stays_for_many_starts_is_no_burst() {
        assert!(after(60.0, 100).was_short(20.0));
        assert!(!after(60.0, 100).was_short(10.0));
        assert!(!after(900.0, 1000).was_short(75.0));
    }

    #[test]
    fn what_was_expected_is_no_burst() {
        assert_eq!(after_expected(60.0, 100, 11.0).rate, 0.0);
        assert!(after_expected(60.0, 100, 4.0).rate > 11.0);
    }

    #[test]
    fn what_rises_by_half_is_none_and_a_clock_that_goes_back_forgets() {
        let mut burst = Burst::default();
        let rise = Trend {
            level: 3.0,
            jumped_from: Some(2.0),
            ..Trend::default()
        };
        burst.note(1000.0, rise, 3.0, 2.0, 2);
        assert_eq!(burst.rate, 0.0);
        let mut burst = after(60.0, 100);
        burst.note(10.0, Trend::default(), 2.0, 2.0, 2);
        assert_eq!(burst.rate, 0.0);
    }
}
