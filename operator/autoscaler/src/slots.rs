//! Load slot by slot, and how it compares with what it was a period before.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

/// Seconds over which every slot's rate is measured: the shortest slot.
pub(crate) const MEASURED: f64 = 30.0;
/// Slots that must have been compared for anything to be alike.
pub(crate) const LEAST_COMPARED: usize = 20;
/// Share of them that must be alike.
const ALIKE: f64 = 0.9;
/// Beyond chance, slots may differ by this share and be alike.
const TOLERANCE: f64 = 0.15;

/// What became of a look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Noted {
    /// The slot goes on.
    Nothing,
    /// A slot is over.
    Slot,
    /// What was known can't be joined to it.
    Anew,
}

/// Requests a second in the last `KEPT` slots of so many seconds; below 0 where nobody watched.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Slots<const SECONDS: u32, const KEPT: usize> {
    /// When the first one began.
    start: f64,
    rates: VecDeque<f32>,
}

impl<const SECONDS: u32, const KEPT: usize> Slots<SECONDS, KEPT> {
    const SECONDS: f64 = SECONDS as f64;

    /// `rate` is that of the slot that is over, where one is.
    pub fn note(&mut self, until: f64, rate: impl FnOnce() -> Option<f64>) -> Noted {
        let end = self.start + Self::SECONDS * self.rates.len() as f64;
        let known = end - Self::SECONDS..=end + Self::SECONDS * KEPT as f64;
        if self.rates.is_empty() || !known.contains(&until) {
            self.start = (until / Self::SECONDS).floor() * Self::SECONDS;
            self.rates = VecDeque::from([-1.0]);
            return Noted::Anew;
        }
        let due = ((until - end) / Self::SECONDS).floor();
        if due < 1.0 {
            return Noted::Nothing;
        }
        for _ in 1..due as usize {
            self.rates.push_back(-1.0);
        }
        let rate = rate().filter(|rate| rate.is_finite());
        self.rates.push_back(rate.map_or(-1.0, rounded));
        while self.rates.len() > KEPT {
            self.rates.pop_front();
            self.start += Self::SECONDS;
        }
        Noted::Slot
    }

    pub fn len(&self) -> usize {
        self.rates.len()
    }

    /// From one slot to before another: each with its place, where it was watched.
    pub fn known(&self, from: usize, to: usize) -> impl Iterator<Item = (usize, f64)> {
        let slots = (from..to).zip(self.rates.range(from.min(to)..to));
        slots
            .map(|(place, rate)| (place, f64::from(*rate)))
            .filter(|(_, rate)| *rate >= 0.0)
    }

    /// The highest rate a period before the `seconds` from `now` on.
    pub fn ahead(&self, now: f64, seconds: f64, period: usize) -> f64 {
        let place = |t: f64| (t - self.start) / Self::SECONDS - period as f64;
        let (from, to) = (place(now).floor().max(0.0), place(now + seconds).ceil());
        let slots = self.rates.range((from as usize).min(self.rates.len())..);
        let expected = slots.take((to - from).max(0.0) as usize).map(|&rate| {
            let rate = f64::from(rate.max(0.0));
            // The highest of several is high by chance, too.
            rate - (rate / MEASURED).sqrt()
        });
        expected.fold(0.0, f64::max)
    }

    /// Of the newest `most` slots those that were watched, as the one a period before was: each with its
    /// place, and that one's rate.
    pub fn pairs(&self, period: usize, most: usize) -> impl Iterator<Item = (usize, f64, f64)> {
        let first = (self.rates.len().saturating_sub(most)).max(period);
        let now = self.rates.range(first.min(self.rates.len())..);
        let then = self.rates.range(first - period..);
        (first..)
            .zip(now)
            .zip(then)
            .filter_map(|((place, now), then)| {
                let known = *now >= 0.0 && *then >= 0.0;
                known.then(|| (place, f64::from(*now), f64::from(*then)))
            })
    }

    /// Whether the newest `most` slots are like those a period before.
    pub fn alike(&self, period: usize, most: usize) -> bool {
        let at = |place: usize| self.rates.get(place).map_or(-1.0, |rate| f64::from(*rate));
        let (mut n, mut alike) = (0.0, 0.0);
        for (place, now, then) in self.pairs(period, most) {
            // An edge may fall into the slot beside.
            let beside = [
                then,
                at((place - period).saturating_sub(1)),
                at(place - period + 1),
            ];
            let beside = beside.iter().filter(|rate| **rate >= 0.0);
            let least = beside.clone().copied().fold(then, f64::min);
            let most = beside.copied().fold(then, f64::max);
            let tolerance = |rate: f64| TOLERANCE * rate + 2.5 * (rate / MEASURED).sqrt() + 0.1;
            n += 1.0;
            if now >= least - tolerance(least) && now <= most + tolerance(most) {
                alike += 1.0;
            }
        }
        n >= LEAST_COMPARED as f64 && alike >= ALIKE * n
    }
}

/// To what is far within chance: memories are stored as text.
fn rounded(rate: f64) -> f32 {
    let parts = match rate {
        ..10.0 => 100.0,
        10.0..100.0 => 10.0,
        _ => 1.0,
    };
    ((parts * rate).round() / parts) as f32
}
