//! Requests over time: where load stands, where it goes, and how far such forecasts were off.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

use crate::jump::Fine;

/// Seconds of a bucket.
pub(crate) const GRAIN: f64 = 10.0;
/// Buckets that are kept: the longest window of [`WINDOWS`].
const KEPT: usize = 32;
/// Seconds that tell where load is now.
pub(crate) const NEWEST: f64 = 20.0;
/// Seconds over which a level or a line may be fitted, shortest first.
const WINDOWS: [f64; 5] = [NEWEST, 40.0, 80.0, 160.0, 320.0];
/// Windows shorter than this tell a level but no trend.
const TREND_FROM: f64 = 80.0;
/// Seconds before the newest ones that a jump is measured against.
const BEFORE: f64 = 60.0;
/// Standard deviations by which the newest seconds may differ from a longer window's line before
/// that window is taken to be of another time.
const BREAK: f64 = 3.0;
/// The same for the newest bucket alone, upwards.
const JUMP: f64 = 4.0;
/// Chi squared by which a step must be the better explanation.
const STEP: f64 = 12.0;
/// Seconds within which errors of forecasts count half.
const ERROR_HALF_LIFE: f64 = 900.0;
/// Relative standard error of a forecast before any was checked.
const FIRST_ERROR: f64 = 0.12;
/// What an error counts at most: a jump is no error of a trend.
const MOST_ERROR: f64 = 0.4;
/// Share of a bucket that must have been watched for it to tell a rate.
const LEAST_WATCHED: f64 = 0.25;
/// Seconds either side over which a forecast is checked.
const CHECKED_OVER: f64 = 30.0;

/// Requests that came to a replica within an interval.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Arrivals {
    pub from: f64,
    pub to: f64,
    pub requests: f64,
    /// Of the replicas that take requests: those that tell nothing get as much as the others.
    pub share: f64,
}

/// Requests in a bucket, and how many of its seconds were watched: a fleet of which half tells
/// something counts half.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Bucket(pub f64, pub f64);

/// A straight line through the load of late.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Trend {
    /// Requests a second now.
    pub level: f64,
    /// Their standard error.
    pub error: f64,
    /// Requests a second, per second; 0 where chance explains it.
    pub slope: f64,
    /// Requests a second before the newest seconds, where these have more than chance could make of it.
    pub jumped_from: Option<f64>,
}

impl Trend {
    /// Requests a second in so many seconds. A line isn't drawn to more than twice the level.
    pub fn ahead(&self, seconds: f64) -> f64 {
        (self.level + self.slope * seconds).clamp(0.0, 2.0 * self.level)
    }
}

/// Recent load, and how forecasts of it fared.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct History {
    /// When the first bucket began.
    start: f64,
    buckets: VecDeque<Bucket>,
    /// The newest seconds once more.
    #[serde(skip)]
    fine: Fine,
    /// The rate since load jumped within these, where it did beyond chance.
    #[serde(skip)]
    jump: Option<Trend>,
    /// When it last jumped: what was before is of another time.
    #[serde(skip)]
    jumped_at: Option<f64>,
    /// Everything up to here is known.
    until: f64,
    /// Forecasts to be checked: for when, and requests a second.
    forecasts: VecDeque<(f64, f64)>,
    /// Sum of weighted squared errors upwards, and of weights.
    errors: (f64, f64),
}

impl History {
    /// Takes in what came; all of it is known up to `until`.
    pub fn note(&mut self, arrivals: &[Arrivals], until: f64) {
        let ends = arrivals.iter().map(|a| a.to).fold(until, f64::max);
        if !ends.is_finite() || ends - self.start > 1e7 || ends < self.start {
            *self = History::default();
        }
        if self.buckets.is_empty() {
            let Some(first) = arrivals.iter().map(|a| a.from).reduce(f64::min) else {
                return;
            };
            self.start = (first / GRAIN).floor() * GRAIN;
        }
        while self.start + GRAIN * self.buckets.len() as f64 <= ends
            && self.buckets.len() < 4 * KEPT
        {
            self.buckets.push_back(Bucket::default());
        }
        for come in arrivals {
            self.spread(come);
            self.fine.spread(come);
        }
        self.until = self.until.max(until);
        let found = self.find_jump();
        self.jumped_at = found.map(|(_, at)| at).or(self.jumped_at);
        self.jump = found.map(|(jump, _)| jump);
        while self.buckets.len() > KEPT {
            self.buckets.pop_front();
            self.start += GRAIN;
        }
    }

    fn spread(&mut self, come: &Arrivals) {
        let (from, to) = (come.from, come.to);
        let first = (((from - self.start) / GRAIN).floor().max(0.0)) as usize;
        let length = (to - from).max(1e-9);
        for (place, bucket) in self.buckets.iter_mut().enumerate().skip(first) {
            let start = self.start + GRAIN * place as f64;
            if start >= to {
                break;
            }
            let inside = (to.min(start + GRAIN) - from.max(start)).max(0.0);
            bucket.0 += come.requests * (inside / length).min(1.0);
            bucket.1 = (bucket.1 + come.share * inside).min(GRAIN);
        }
    }

    fn find_jump(&self) -> Option<(Trend, f64)> {
        let age = self.until - self.fine.start()?;
        let before = (self
            .within(BEFORE + age)
            .filter(|(other, _, _)| *other > age))
        .fold((0.0, 0.0), |sum, (_, n, w)| (sum.0 + n, sum.1 + w));
        self.fine.jump(before)
    }

    /// Buckets of the `seconds` before the end: seconds before the end of their middle, requests,
    /// and watched seconds.
    fn within(&self, seconds: f64) -> impl Iterator<Item = (f64, f64, f64)> {
        let buckets = self.buckets.iter().enumerate().rev();
        buckets
            .map(|(place, bucket)| {
                let start = self.start + GRAIN * place as f64;
                let middle = start + 0.5 * GRAIN.min((self.until - start).max(0.0));
                (self.until - middle, bucket.0, bucket.1)
            })
            .skip_while(|(_, _, watched)| *watched < LEAST_WATCHED * GRAIN)
            .take_while(move |(age, _, _)| *age < seconds)
            .filter(|(_, _, watched)| *watched >= LEAST_WATCHED * GRAIN)
    }

    /// Requests, watched seconds and their mean age, of the `seconds` before the end.
    fn sum(&self, seconds: f64) -> (f64, f64, f64) {
        let (n, watched, aged) = (self.within(seconds))
            .fold((0.0, 0.0, 0.0), |sum, (age, n, watched)| {
                (sum.0 + n, sum.1 + watched, sum.2 + age * watched)
            });
        (n, watched, aged / f64::max(watched, 1e-9))
    }

    /// Requests a second in the `seconds` before the end; `None` where half of them weren't watched.
    pub fn rate(&self, seconds: f64) -> Option<f64> {
        let (n, watched, _) = self.sum(seconds);
        (watched >= 0.5 * seconds).then(|| n / watched)
    }

    /// The line through the longest stretch that the newest seconds fit. `None` before anything was
    /// watched.
    pub fn trend(&self) -> Option<Trend> {
        let (newest, watched, _) = self.sum(NEWEST);
        if watched <= 0.0 {
            return None;
        }
        let mut best = Trend {
            level: newest / watched,
            error: newest.max(1.0).sqrt() / watched,
            ..Trend::default()
        };
        let mut before = 0;
        for seconds in WINDOWS {
            let buckets = self.within(seconds).count();
            let jumped = |at| self.until - seconds < at - GRAIN;
            if buckets == before || (before > 0 && self.jumped_at.is_some_and(jumped)) {
                break;
            }
            before = buckets;
            let Some(trend) = self.line(seconds) else {
                break;
            };
            // The newest 20 and 40 seconds must fit the line.
            let fits = WINDOWS[..2].iter().all(|&newest| {
                let (n, watched, age) = self.sum(newest);
                let expected = (trend.level - trend.slope * age).max(0.0) * watched;
                (n - expected).abs() <= BREAK * expected.max(1.0).sqrt()
            });
            if !fits || self.is_a_step(seconds, trend) {
                break;
            }
            best = trend;
        }
        // A jump is seen at once.
        let (n, watched, age) = self.sum(GRAIN);
        let expected = (best.level - best.slope * age).max(0.0) * watched;
        if watched > 0.0 && n > expected + JUMP * expected.max(1.0).sqrt() {
            best = Trend {
                level: n / watched,
                error: n.sqrt() / watched,
                ..Trend::default()
            };
        }
        Some(match self.jump {
            Some(jump) if jump.level > best.level => jump,
            _ => best,
        })
    }

    /// Whether two levels, one after the other, explain the `seconds` before the end better than this line
    /// by more than what chance makes of it (chi squared, of counts).
    fn is_a_step(&self, seconds: f64, line: Trend) -> bool {
        let off = |n: f64, expected: f64| (n - expected).powi(2) / expected.max(1.0);
        let buckets: Vec<_> = self.within(seconds).collect();
        let by_line: f64 = (buckets.iter())
            .map(|&(age, n, watched)| off(n, (line.level - line.slope * age).max(0.0) * watched))
            .sum();
        let by_level = |part: &[(f64, f64, f64)]| {
            let (n, watched) = part
                .iter()
                .fold((0.0, 0.0), |sum, &(_, n, w)| (sum.0 + n, sum.1 + w));
            let level = n / f64::max(watched, 1e-9);
            let offs = part.iter().map(|&(_, n, w)| off(n, level * w));
            offs.sum::<f64>()
        };
        let steps = (1..buckets.len()).map(|place| {
            let (after, before) = buckets.split_at(place);
            by_level(after) + by_level(before)
        });
        by_line - steps.fold(f64::INFINITY, f64::min) > STEP
    }

    fn line(&self, seconds: f64) -> Option<Trend> {
        let (n, watched, age) = self.sum(seconds);
        if watched <= 0.0 {
            return None;
        }
        let mean = n / watched;
        let (spread, product) = (self.within(seconds)).fold((0.0, 0.0), |sum, (a, n, w)| {
            let x = age - a;
            (sum.0 + w * x * x, sum.1 + x * (n - mean * w))
        });
        // As for counts: the variance of a bucket is its number.
        let variance = n.max(1.0) / watched;
        let (mut slope, mut slope_variance) = (0.0, 0.0);
        if seconds >= TREND_FROM && spread > 0.0 {
            slope = product / spread;
            slope_variance = variance / spread;
            // Drawn towards none by as much as chance alone would make of it.
            let certainty = 1.0 - slope_variance / (slope * slope).max(1e-300);
            slope *= certainty.max(0.0);
        }
        Some(Trend {
            level: (mean + slope * age).max(0.0),
            error: (variance / watched + slope_variance * age * age).sqrt(),
            slope,
            jumped_from: None,
        })
    }

    /// Requests a second in the [`NEWEST`].
    pub fn newest(&self) -> f64 {
        let (n, watched, _) = self.sum(NEWEST);
        n / f64::max(watched, 1e-9)
    }

    /// Seconds of these that were watched.
    pub fn watched(&self) -> f64 {
        self.sum(NEWEST).1
    }

    /// Remembers what is forecast for a time, once a bucket, and checks what has come true.
    pub fn judge(&mut self, rate: f64, horizon: f64) {
        let due = self.until + horizon;
        if self
            .forecasts
            .back()
            .is_none_or(|last| due - last.0 >= GRAIN)
        {
            self.forecasts.push_back((due, rate));
        }
        while self.forecasts.len() > 64 {
            self.forecasts.pop_front();
        }
        while let Some((due, forecast)) = self.forecasts.front().copied() {
            if self.until < due + CHECKED_OVER {
                break;
            }
            self.forecasts.pop_front();
            let since = self.until - due;
            let (n, watched) = (self.within(since + CHECKED_OVER))
                .filter(|(age, _, _)| *age > since - CHECKED_OVER)
                .fold((0.0, 0.0), |sum, (_, n, w)| (sum.0 + n, sum.1 + w));
            let expected = forecast * watched;
            if watched < CHECKED_OVER || expected < 1.0 {
                continue;
            }
            // Half a normal distribution's square is its variance; chance isn't the forecast's fault.
            let error = (n / expected).max(1e-3).ln().clamp(0.0, MOST_ERROR);
            let by_chance = 0.5 / expected;
            let keep = (-GRAIN / ERROR_HALF_LIFE).exp2();
            self.errors.0 = keep * self.errors.0 + (error * error - by_chance);
            self.errors.1 = keep * self.errors.1 + 1.0;
        }
    }

    /// Relative standard error of forecasts.
    pub fn error(&self) -> f64 {
        // What is assumed at first counts like five minutes.
        let first = 30.0;
        let sum = 2.0 * self.errors.0 + first * FIRST_ERROR * FIRST_ERROR;
        (sum / (self.errors.1 + first)).clamp(0.0, 1.0).sqrt()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn feed(history: &mut History, from: f64, seconds: f64, rate: impl Fn(f64) -> f64) {
        let mut t = from;
        while t < from + seconds {
            let come = Arrivals {
                from: t,
                to: t + 2.0,
                requests: 2.0 * rate(t + 1.0),
                share: 1.0,
            };
            history.note(&[come], t + 2.0);
            t += 2.0;
        }
    }

    #[test]
    fn a_steady_load_has_no_trend_and_a_ramp_has_its_own() {
        let mut history = History::default();
        feed(&mut history, 1000.0, 400.0, |_| 5.0);
        let trend = history.trend().unwrap();
        assert!((trend.level - 5.0).abs() < 1e-6, "{trend:?}");
        assert_eq!(trend.slope, 0.0);
        assert!(trend.error < 0.3, "{trend:?}");
        let mut history = History::default();
        feed(&mut history, 1000.0, 400.0, |t| 2.0 + (t - 1000.0) * 0.01);
        let trend = history.trend().unwrap();
        assert!((trend.level - 6.0).abs() < 0.1, "{trend:?}");
        assert!((trend.slope - 0.01).abs() < 0.001, "{trend:?}");
        assert!((trend.ahead(100.0) - 7.0).abs() < 0.2);
    }

    #[test]
    fn a_jump_is_the_new_level_at_the_first_look_and_for_as_long_as_it_lasts() {
        let mut history = History::default();
        feed(&mut history, 0.0, 400.0, |_| 2.0);
        for look in 1..=10 {
            feed(&mut history, 398.0 + 2.0 * f64::from(look), 2.0, |_| 10.0);
            let trend = history.trend().unwrap();
            // A standard error is added while it is new.
            assert!((9.5..14.5).contains(&trend.level), "{look}: {trend:?}");
            assert!(trend.jumped_from.is_some(), "{look}: {trend:?}");
        }
        feed(&mut history, 420.0, 20.0, |_| 1.0);
        let trend = history.trend().unwrap();
        assert!((trend.level - 1.0).abs() < 0.2, "{trend:?}");
    }

    #[test]
    fn a_step_is_not_the_beginning_of_a_rise() {
        for (before, after) in [(2.0, 10.0), (0.0, 6.0), (5.0, 10.0)] {
            let mut history = History::default();
            feed(&mut history, 0.0, 400.0, |_| before);
            for look in 1..=60 {
                feed(&mut history, 398.0 + 2.0 * f64::from(look), 2.0, |_| after);
                let trend = history.trend().unwrap();
                let ahead = trend.ahead(240.0);
                assert!(
                    ahead < 1.45 * after,
                    "{before} to {after}, {look}: {trend:?}"
                );
            }
        }
    }

    #[test]
    fn what_chance_makes_is_no_jump() {
        // Twice the load for two seconds comes every few minutes by chance.
        for rate in [0.2, 2.0, 20.0, 200.0] {
            let mut history = History::default();
            let much: f64 = rate + 3.5 * f64::sqrt(rate / 2.0);
            feed(&mut history, 0.0, 400.0, |t| {
                if t % 40.0 > 38.0 { much } else { rate }
            });
            let trend = history.trend().unwrap();
            assert!(trend.jumped_from.is_none(), "{rate}: {trend:?}");
        }
    }

    #[test]
    fn forecasts_that_came_true_make_the_error_small_and_others_large() {
        let mut history = History::default();
        for i in 0..200 {
            feed(&mut history, 10.0 * f64::from(i), 10.0, |_| 8.0);
            history.judge(8.0, 60.0);
        }
        assert!(history.error() < 0.06, "{}", history.error());
        for i in 200..400 {
            let rate = if i % 2 == 0 { 12.0 } else { 6.0 };
            feed(&mut history, 10.0 * f64::from(i), 10.0, |_| 9.0);
            history.judge(rate, 60.0);
        }
        assert!(history.error() > 0.2, "{}", history.error());
    }

    #[test]
    fn what_wasnt_watched_is_not_a_lull() {
        let mut history = History::default();
        feed(&mut history, 0.0, 200.0, |_| 4.0);
        feed(&mut history, 260.0, 100.0, |_| 4.0);
        let trend = history.trend().unwrap();
        assert!((trend.level - 4.0).abs() < 0.3, "{trend:?}");
    }
}
