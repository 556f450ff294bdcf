//! Load that comes back: what it did a period ago, where it repeats itself.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

/// Seconds of a slot.
const SLOT: f64 = 30.0;
/// Slots that are kept: four hours.
const KEPT: usize = 480;
/// Shortest period that is looked for, in slots.
const SHORTEST: usize = 12;
/// What people and schedulers repeat things by, in slots: needs no proof but that nothing speaks
/// against it.
const HOUR: usize = 120;
/// Slots that must have been compared, and at most are.
const COMPARED: (usize, usize) = (20, 120);
/// Share of them that must be alike.
const ALIKE: f64 = 0.9;
/// Beyond chance, slots may differ by this share and be alike.
const TOLERANCE: f64 = 0.15;
/// Correlation, and ratio of the highest to the lowest slot, that make a period of its own.
const CORRELATION: f64 = 0.8;
const SWING: f64 = 2.0;
/// Standard deviations that make a rise: of the thousand pairs of slots that an hour has, some differ by
/// nearly so many by chance.
const BEYOND: f64 = 3.0;
/// Times a span that must have been watched for it to be known how much load rises within one.
const SPANS: f64 = 2.0;

/// Requests a second, slot by slot; below 0 where nobody watched.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Recurrence {
    /// When the first slot began.
    start: f64,
    slots: VecDeque<f32>,
    /// In slots.
    period: Option<usize>,
    /// Load was seen to rise and fall by it.
    proven: bool,
}

impl Recurrence {
    /// `rate` is that of the [`SLOT`] before `until`, which is negative where it isn't known.
    pub fn note(&mut self, until: f64, rate: impl FnOnce(f64) -> Option<f64>) {
        let end = self.start + SLOT * self.slots.len() as f64;
        if self.slots.is_empty() || until < end - SLOT || until > end + SLOT * KEPT as f64 {
            self.slots.clear();
            (self.period, self.proven) = (None, false);
            self.start = (until / SLOT).floor() * SLOT;
            self.slots.push_back(-1.0);
            return;
        }
        let due = ((until - end) / SLOT).floor();
        if due < 1.0 {
            return;
        }
        for _ in 1..due as usize {
            self.slots.push_back(-1.0);
        }
        let rate = rate(SLOT).filter(|rate| rate.is_finite());
        let rounded = rate.map_or(-1.0, |rate| ((100.0 * rate).round() / 100.0) as f32);
        self.slots.push_back(rounded);
        while self.slots.len() > KEPT {
            self.slots.pop_front();
            self.start += SLOT;
        }
        (self.period, self.proven) = self.find();
    }

    /// Whether nothing is known to repeat itself.
    pub fn is_unknown(&self) -> bool {
        self.period.is_none()
    }

    /// Whether load was seen to rise and fall as it did a period before.
    pub fn is_proven(&self) -> bool {
        self.proven
    }

    /// Requests a second that are to be expected at most within so many seconds from `now`; 0 where
    /// nothing repeats itself.
    pub fn ahead(&self, now: f64, seconds: f64) -> f64 {
        let Some(period) = self.period else {
            return 0.0;
        };
        let place = |t: f64| (t - self.start) / SLOT - period as f64;
        let (from, to) = (place(now).floor().max(0.0), place(now + seconds).ceil());
        let slots = self.slots.range((from as usize).min(self.slots.len())..);
        let expected = slots.take((to - from).max(0.0) as usize).map(|&rate| {
            let rate = f64::from(rate.max(0.0));
            // The highest of several is high by chance, too.
            rate - (rate / SLOT).sqrt()
        });
        expected.fold(0.0, f64::max)
    }

    /// The most by which load rose beyond chance within so many seconds of the last hour, in requests a
    /// second; `None` where it wasn't watched for long enough to know.
    pub fn rise(&self, seconds: f64) -> Option<f64> {
        let first = self.slots.len().saturating_sub(HOUR);
        let known = |from: usize, to: usize| {
            let slots = self.slots.range(from..to).map(|rate| f64::from(*rate));
            slots.enumerate().filter(|(_, rate)| *rate >= 0.0)
        };
        let watched = known(first, self.slots.len()).count();
        if SLOT * (watched as f64) < SPANS * seconds {
            return None;
        }
        let span = ((seconds / SLOT).round() as usize).max(1);
        let rises = known(first, self.slots.len()).flat_map(|(place, now)| {
            let place = first + place;
            let earlier = known(place.saturating_sub(span).max(first), place);
            earlier.map(move |(_, then)| now - then - BEYOND * ((now + then) / SLOT).sqrt())
        });
        Some(rises.fold(0.0, f64::max))
    }

    /// The shortest period by which load repeats itself, or the hour; and whether that is proven.
    fn find(&self) -> (Option<usize>, bool) {
        let longest = self.slots.len().saturating_sub(COMPARED.0);
        let own = (SHORTEST..=longest.min(KEPT / 2)).find(|&period| self.repeats(period, true));
        let hour = || (HOUR <= longest && self.repeats(HOUR, false)).then_some(HOUR);
        (own.or_else(hour), own.is_some())
    }

    /// Whether the newest slots are like those a period before; with `proof` also that load rose and
    /// fell meanwhile, and did so then: what only rises, or more slowly, is like what it was any while ago.
    fn repeats(&self, period: usize, proof: bool) -> bool {
        let at = |place: usize| self.slots.get(place).map_or(-1.0, |rate| f64::from(*rate));
        let (mut n, mut alike) = (0.0, 0.0);
        let (mut low, mut high) = (f64::INFINITY, 0.0f64);
        for (place, now, then) in self.pairs(period) {
            // An edge may fall into the slot beside.
            let beside = [
                then,
                at((place - period).saturating_sub(1)),
                at(place - period + 1),
            ];
            let beside = beside.iter().filter(|rate| **rate >= 0.0);
            let least = beside.clone().copied().fold(then, f64::min);
            let most = beside.copied().fold(then, f64::max);
            let tolerance = |rate: f64| TOLERANCE * rate + 2.5 * (rate / SLOT).sqrt() + 0.1;
            n += 1.0;
            if now >= least - tolerance(least) && now <= most + tolerance(most) {
                alike += 1.0;
            }
            (low, high) = (low.min(now), high.max(now));
        }
        if n < COMPARED.0 as f64 || alike < ALIKE * n {
            return false;
        }
        !proof
            || (high >= SWING * low.max(0.2)
                && self.correlation(period) >= CORRELATION
                && (1..period).any(|shorter| self.correlation(shorter) <= 0.5 * CORRELATION))
    }

    /// The newest slots, each with its place and the one a period before.
    fn pairs(&self, period: usize) -> impl Iterator<Item = (usize, f64, f64)> {
        let first = self.slots.len().saturating_sub(COMPARED.1).max(period);
        let now = self.slots.range(first..);
        let then = self.slots.range(first - period..);
        (first..)
            .zip(now)
            .zip(then)
            .filter_map(|((place, now), then)| {
                let known = *now >= 0.0 && *then >= 0.0;
                known.then(|| (place, f64::from(*now), f64::from(*then)))
            })
    }

    /// How the newest slots go with those a period before: Pearson's coefficient.
    fn correlation(&self, period: usize) -> f64 {
        let (mut n, mut x, mut y, mut xx, mut yy, mut xy) = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0);
        for (_, now, then) in self.pairs(period) {
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
        assert_eq!(recurrence.slots.back(), Some(&-1.0));
        recurrence.note(100.0, |_| Some(1.0));
        assert_eq!(recurrence.slots.len(), 1);
    }
}
