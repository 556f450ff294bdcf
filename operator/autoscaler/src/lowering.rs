//! What a scale-down goes by: for how long how many replicas were needed, and how often the fleet has
//! turned.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

/// When the number of replicas turned from growing to shrinking or back.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Turns {
    at: VecDeque<f64>,
    upwards: Option<bool>,
}

impl Turns {
    const REMEMBERED: f64 = 3600.0;

    pub fn note(&mut self, now: f64, upwards: bool) {
        if self
            .upwards
            .replace(upwards)
            .is_some_and(|was| was != upwards)
        {
            self.at.push_back(now.round());
        }
        self.at
            .retain(|at| (0.0..Self::REMEMBERED).contains(&(now - at)));
        // However the clock jumps.
        while self.at.len() > 32 {
            self.at.pop_front();
        }
    }

    /// In the last hour.
    pub fn count(&self, now: f64) -> u32 {
        let of_late = |at: &&f64| (0.0..Self::REMEMBERED).contains(&(now - **at));
        self.at.iter().filter(of_late).count() as u32
    }

    /// Seconds until a scale-down wouldn't turn or has no more than so many turns within the hour
    /// before it.
    pub fn wait(&self, now: f64, most: usize) -> f64 {
        let last = self.at.len().checked_sub(most + 1);
        let last = last.filter(|_| self.was_upwards());
        let passes = last.and_then(|place| Some(self.at.get(place)? + Self::REMEMBERED - now));
        passes.unwrap_or(0.0)
    }

    /// Whether a scale-down would turn.
    pub fn was_upwards(&self) -> bool {
        self.upwards == Some(true)
    }
}

/// How many replicas were needed over the stabilization time, as the maxima of a few slots.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Low {
    slots: VecDeque<(f64, u32)>,
}

impl Low {
    pub fn note(&mut self, now: f64, needed: u32, stabilization: f64) {
        match self.slots.back_mut() {
            Some((start, most)) if now - *start < stabilization / 36.0 => *most = needed.max(*most),
            _ => self.slots.push_back((now, needed)),
        }
        while (self.slots.get(1)).is_some_and(|(start, _)| now - start >= stabilization) {
            self.slots.pop_front();
        }
        // Slots can't be more than this however the clock jumps.
        while self.slots.len() > 40 {
            self.slots.pop_front();
        }
    }

    /// For how many seconds no more than `replicas` have been needed.
    pub fn lasted(&self, now: f64, replicas: u32) -> f64 {
        let above = self.slots.iter().rposition(|(_, most)| *most > replicas);
        let since = match above {
            None => self.slots.front(),
            Some(i) => self.slots.get(i + 1),
        };
        since.map_or(0.0, |(start, _)| (now - start).max(0.0))
    }

    /// The most that was needed within so many seconds.
    pub fn most(&self, now: f64, seconds: f64) -> u32 {
        let first = self
            .slots
            .partition_point(|(start, _)| now - start > seconds);
        let slots = self.slots.iter().skip(first.saturating_sub(1));
        slots.map(|(_, most)| *most).max().unwrap_or(0)
    }

    /// The most that was needed no longer ago than it was needed for, within so many seconds.
    pub fn worth_keeping(&self, now: f64, seconds: f64) -> u32 {
        let numbers = self.slots.iter().map(|(_, most)| *most);
        let kept = numbers.filter(|number| self.kept_for(now, seconds, *number) >= 0.0);
        kept.max().unwrap_or(0)
    }

    /// For how many seconds more that holds for `replicas`.
    pub fn kept_for(&self, now: f64, seconds: f64, replicas: u32) -> f64 {
        let ends = (self.slots.iter().skip(1).map(|(start, _)| *start)).chain([now]);
        let slots = self.slots.iter().zip(ends);
        let needed = slots.filter(|((_, most), _)| *most >= replicas);
        let (lasted, last) = needed.fold((0.0, f64::NEG_INFINITY), |sum, ((start, _), end)| {
            (sum.0 + end - start, end.max(sum.1))
        });
        lasted.min(seconds) - (now - last)
    }

    /// So many seconds weren't watched: they don't count, and what was before still does.
    pub fn skip(&mut self, seconds: f64) {
        for (start, _) in &mut self.slots {
            *start += seconds;
        }
    }

    pub fn forget(&mut self) {
        self.slots.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn low_demand_must_have_lasted() {
        let mut low = Low::default();
        for i in 0..=20 {
            let now = f64::from(i) * 2.0;
            low.note(now, if i < 5 { 4 } else { 2 }, 60.0);
        }
        assert_eq!(low.lasted(40.0, 4), 40.0);
        assert_eq!(low.lasted(40.0, 3), 30.0);
        assert_eq!(low.lasted(40.0, 1), 0.0);
        low.note(42.0, 3, 60.0);
        assert_eq!(low.lasted(42.0, 2), 0.0);
    }

    #[test]
    fn what_was_needed_for_a_moment_is_worth_keeping_for_a_moment() {
        let mut low = Low::default();
        for i in 0..100 {
            let t = 5.0 * f64::from(i);
            // Seven for 20 s, five for 150 s, two before and after.
            let needed = match t as u32 {
                230..250 => 7,
                150..300 => 5,
                _ => 2,
            };
            low.note(t, needed, 500.0);
            let kept = low.worth_keeping(t, 120.0);
            // The slots are of 15 s, and the last one isn't over.
            match t as u32 {
                0..130 => assert_eq!(kept, 2, "{t}"),
                240..260 => assert_eq!(kept, 7, "{t}"),
                290..400 => {
                    assert_eq!(kept, 5, "{t}");
                    let left = low.kept_for(t, 120.0, 5);
                    assert!((left - (420.0 - t.max(300.0))).abs() <= 15.0, "{t}: {left}");
                }
                440.. => assert_eq!(kept, 2, "{t}"),
                _ => {}
            }
        }
    }

    #[test]
    fn turns_are_counted_and_waited_for() {
        let mut turns = Turns::default();
        for i in 0..8 {
            turns.note(100.0 * f64::from(i), i % 2 == 1);
        }
        assert_eq!(turns.count(800.0), 7);
        // Fewer than seven when the first one, at 100 s, is an hour old.
        assert_eq!(turns.wait(800.0, 6), 2900.0);
        assert_eq!(turns.wait(800.0, 7), 0.0);
        turns.note(900.0, false);
        assert_eq!(turns.wait(900.0, 6), 0.0, "no turn");
    }
}
