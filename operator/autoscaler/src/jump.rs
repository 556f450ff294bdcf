//! Load that jumped within the newest seconds.

use std::collections::VecDeque;

use crate::history::{Arrivals, Bucket, GRAIN, Trend};

/// Seconds of a bucket, and how many are kept.
const FINE: f64 = 2.0;
const KEPT: usize = 6;
/// A jump is for sure where chance makes one such in so many: the logarithm.
const SURE: f64 = 14.0;

/// The newest seconds in fine buckets, each with its number.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Fine(VecDeque<(i64, Bucket)>);

impl Fine {
    /// Adds what came to the buckets in which it did.
    pub fn spread(&mut self, come: &Arrivals) {
        let (from, to) = (come.from, come.to);
        let length = (to - from).max(1e-9);
        let last = (to / FINE).ceil() as i64;
        let newest = (self.0.back()).map_or(last, |(step, _)| last.max(*step + 1));
        for step in (newest - KEPT as i64)..last {
            let start = FINE * step as f64;
            let inside = (to.min(start + FINE) - from.max(start)).max(0.0);
            if inside <= 0.0 {
                continue;
            }
            let place = self.0.partition_point(|(other, _)| *other < step);
            if self.0.get(place).is_none_or(|(other, _)| *other != step) {
                self.0.insert(place, (step, Bucket::default()));
            }
            if let Some((_, bucket)) = self.0.get_mut(place) {
                bucket.0 += come.requests * (inside / length).min(1.0);
                bucket.1 = (bucket.1 + come.share * inside).min(FINE);
            }
        }
        while self.0.len() > KEPT {
            self.0.pop_front();
        }
    }

    /// When the first bucket began.
    pub fn start(&self) -> Option<f64> {
        self.0.front().map(|(step, _)| FINE * *step as f64)
    }

    /// The rate since load jumped, where it did beyond chance, and when: of all ways to divide these seconds from
    /// the ones `before` (requests, and seconds watched), the most likely one (a likelihood ratio of two
    /// Poisson processes).
    pub fn jump(&self, before: (f64, f64)) -> Option<(Trend, f64)> {
        let (mut n, mut watched) = before;
        let mut best: Option<(f64, Trend, f64)> = None;
        for (place, (step, bucket)) in self.0.iter().enumerate() {
            let newest = self.0.iter().skip(place);
            let (after, seconds) = newest.fold((0.0, 0.0), |sum, (_, bucket)| {
                (sum.0 + bucket.0, sum.1 + bucket.1)
            });
            if watched >= GRAIN && seconds >= 0.5 * FINE && after * watched > n * seconds {
                let all = (n + after) / (watched + seconds);
                let told = |n: f64, seconds: f64| n * (n.max(1e-9) / (seconds * all)).ln();
                let ratio = told(after, seconds) + told(n, watched);
                if ratio > SURE && best.as_ref().is_none_or(|(most, _, _)| ratio > *most) {
                    let jump = Trend {
                        level: (after + after.sqrt()) / seconds,
                        error: after.sqrt() / seconds,
                        slope: 0.0,
                        jumped_from: Some(n / watched),
                    };
                    best = Some((ratio, jump, FINE * *step as f64));
                }
            }
            n += bucket.0;
            watched += bucket.1;
        }
        best.map(|(_, jump, at)| (jump, at))
    }
}
