//! Load that comes back: what it did a period ago, where it repeats itself.

use serde::{Deserialize, Serialize};

use crate::slots::{LEAST_COMPARED, MEASURED, Noted, Slots};

/// Slots that are kept: four hours.
const KEPT: usize = 480;
/// Shortest period that is looked for, in slots.
const SHORTEST: usize = 12;
/// What people and schedulers repeat things by, in slots: needs no proof but that nothing speaks
/// against it.
const HOUR: usize = 120;
/// Slots that are compared at most.
const COMPARED: usize = 120;
/// Correlation, and ratio of the highest to the lowest slot, that make a period of its own.
const CORRELATION: f64 = 0.8;
const SWING: f64 = 2.0;
/// Standard deviations that make a rise: of the thousand pairs of slots that an hour has, some differ by
/// nearly so many by chance.
const BEYOND: f64 = 3.0;
/// Times a span that must have been watched for it to be known how much load rises within one.
const SPANS: f64 = 2.0;

/// Load of the last hours, and the period by which it comes back.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Recurrence {
    slots: Slots<{ MEASURED as u32 }, KEPT>,
    /// In slots.
    period: Option<usize>,
    /// Load was seen to rise and fall by it.
    proven: bool,
}

impl Recurrence {
    /// `rate` is that of so many seconds before `until`, where it is known.
    pub fn note(&mut self, until: f64, rate: impl FnOnce(f64) -> Option<f64>) {
        match self.slots.note(until, || rate(MEASURED)) {
            Noted::Nothing => {}
            Noted::Slot => (self.period, self.proven) = self.find(),
            Noted::Anew => (self.period, self.proven) = (None, false),
        }
    }

    /// Requests a second that were to be expected at most about now.
    pub fn expected(&self, now: f64) -> f64 {
        self.ahead(now - MEASURED, 3.0 * MEASURED)
    }

    /// Whether load was seen to rise and fall as it did a period before.
    pub fn is_proven(&self) -> bool {
        self.proven
    }

    /// Requests a second that are to be expected at most within so many seconds from `now`; 0 where
    /// nothing repeats itself.
    pub fn ahead(&self, now: f64, seconds: f64) -> f64 {
        let ahead = |period| self.slots.ahead(now, seconds, period);
        self.period.map_or(0.0, ahead)
    }

    /// The most by which load rose beyond chance within so many seconds of the last hour, in requests a
    /// second; `None` where it wasn't watched for long enough to know.
    pub fn rise(&self, seconds: f64) -> Option<f64> {
        let (first, end) = (self.slots.len().saturating_sub(HOUR), self.slots.len());
        let watched = self.slots.known(first, end).count();
        if MEASURED * (watched as f64) < SPANS * seconds {
            return None;
        }
        let span = ((seconds / MEASURED).round() as usize).max(1);
        let rises = self.slots.known(first, end).flat_map(|(place, now)| {
            let earlier = (self.slots).known(place.saturating_sub(span).max(first), place);
            earlier.map(move |(_, then)| now - then - BEYOND * ((now + then) / MEASURED).sqrt())
        });
        Some(rises.fold(0.0, f64::max))
    }

    /// The shortest period by which load repeats itself, or the hour; and whether that is proven.
    fn find(&self) -> (Option<usize>, bool) {
        let longest = self.slots.len().saturating_sub(LEAST_COMPARED);
        let own = (SHORTEST..=longest.min(KEPT / 2))
            .find(|&period| self.slots.alike(period, COMPARED) && self.swings(period));
        let hour = || (HOUR <= longest && self.slots.alike(HOUR, COMPARED)).then_some(HOUR);
        (own.or_else(hour), own.is_some())
    }

    /// Whether load rose and fell within a period, and did so the one before: what only rises, or more slowly,
    /// is like what it was any while ago.
    fn swings(&self, period: usize) -> bool {
        let rates = self.slots.pairs(period, COMPARED).map(|(_, now, _)| now);
        let (low, high) = rates.fold((f64::INFINITY, 0.0), |(low, high), now| {
            (now.min(low), now.max(high))
        });
        high >= SWING * f64::max(low, 0.2)
            && self.correlation(period) >= CORRELATION
            && (1..period).any(|shorter| self.correlation(shorter) <= 0.5 * CORRELATION)
    }

    /// How the newest slots go with those a period before: Pearson's coefficient.
    fn correlation(&self, period: usize) -> f64 {
        let (mut n, mut x, mut y, mut xx, mut yy, mut xy) = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0);
        for (_, now, then) in self.slots.pairs(period, COMPARED) {
            n += 1.0;
            x += now;
            y += then;
            xx += now * now;
            yy += then * then;
            xy += now * then;
        }
        let spread = |square: f64, sum: f64| (square - sum * sum / n).max(1e-12);
        (xy - x * y / n) / (spread(xx, x) * spread(yy, y)).sqrt()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn feed(recurrence: &mut Recurrence, from: f64, seconds: f64, rate: impl Fn(f64) -> f64) {
        let mut t = from;
        while t < from + seconds {
            t += 2.0;
            recurrence.note(t, |slot| Some(rate(t - slot / 2.0)));
        }
    }

    fn onoff(t: f64) -> f64 {
        if t % 960.0 < 360.0 { 5.0 } else { 0.0 }
    }

    #[test]
    fn a_pattern_seen_twice_is_expected_a_third_time() {
        let mut recurrence = Recurrence::default();
        feed(&mut recurrence, 0.0, 1000.0, onoff);
        assert_eq!(recurrence.ahead(1000.0, 900.0), 0.0);
        feed(&mut recurrence, 1000.0, 700.0, onoff);
        // Off, and on again at 1920 s.
        assert_eq!(recurrence.ahead(1700.0, 120.0), 0.0);
        assert!(recurrence.ahead(1700.0, 270.0) > 4.0);
        feed(&mut recurrence, 1700.0, 400.0, onoff);
        assert!(recurrence.ahead(2100.0, 60.0) > 4.0);
        assert_eq!(recurrence.ahead(2350.0, 60.0), 0.0);
    }

    #[test]
    fn what_was_an_hour_ago_may_come_again_unless_it_did_not() {
        let step = |t: f64| {
            if (1200.0..2700.0).contains(&t) {
                7.0
            } else {
                1.4
            }
        };
        let mut recurrence = Recurrence::default();
        feed(&mut recurrence, 0.0, 3600.0, step);
        feed(&mut recurrence, 3600.0, 1000.0, |t| step(t - 3600.0));
        assert!(recurrence.ahead(4600.0, 270.0) > 6.0);
        assert!(recurrence.ahead(4600.0, 60.0) < 2.0);
        // This hour it doesn't come.
        feed(&mut recurrence, 4600.0, 700.0, |_| 1.4);
        assert_eq!(recurrence.ahead(5300.0, 270.0), 0.0);
    }

    #[test]
    fn a_rise_is_known_once_two_such_spans_were_watched_and_chance_makes_none() {
        let wave = |t: f64| 4.0 - 2.0 * (std::f64::consts::TAU * t / 480.0).cos();
        let mut recurrence = Recurrence::default();
        feed(&mut recurrence, 0.0, 400.0, wave);
        assert_eq!(recurrence.rise(240.0), None);
        feed(&mut recurrence, 400.0, 200.0, wave);
        // From 2 to 6 requests a second, less three standard deviations of both slots.
        let rise = recurrence.rise(240.0).unwrap();
        assert!((1.8..2.6).contains(&rise), "{rise}");
        assert!(recurrence.rise(60.0).unwrap() < 0.5 * rise);
        // An hour later it counts no more, and what differs by less than chance makes isn't one.
        feed(&mut recurrence, 600.0, 4000.0, |t| {
            if t % 300.0 < 30.0 { 5.0 } else { 4.0 }
        });
        assert_eq!(recurrence.rise(240.0), Some(0.0));
    }

    #[test]
    fn what_rises_once_repeats_nothing() {
        let hump = |t: f64| 0.3 + 1.5 * (std::f64::consts::PI * t / 4500.0).sin();
        let mut recurrence = Recurrence::default();
        for minute in 0..75 {
            feed(&mut recurrence, 60.0 * f64::from(minute), 60.0, hump);
            assert!(!recurrence.is_proven(), "{minute}");
        }
    }

    #[test]
    fn a_steady_load_has_no_period_and_a_gap_is_no_load() {
        let mut recurrence = Recurrence::default();
        feed(&mut recurrence, 0.0, 3000.0, |_| 3.0);
        assert_eq!(recurrence.ahead(3000.0, 300.0), 0.0);
        recurrence.note(3600.0, |_| None);
        assert_eq!(
            recurrence.slots.known(100, recurrence.slots.len()).count(),
            0
        );
        recurrence.note(100.0, |_| Some(1.0));
        assert_eq!(recurrence.slots.len(), 1);
    }
}
