//! What a scale-up goes by: looks that agree.

use std::collections::VecDeque;

/// Seconds for which looks must agree that more replicas are needed: what chance makes of the newest
/// requests is gone by then, and to a start they add little.
const AGREED_FOR: f64 = 4.0;

/// What the last looks wanted to order.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Looks(VecDeque<(f64, u32)>);

impl Looks {
    /// Notes what a look wants.
    pub fn note(&mut self, now: f64, up: u32) {
        self.0.retain(|(at, _)| *at <= now);
        self.0.push_back((now, up));
        while (self.0.get(1)).is_some_and(|(at, _)| now - at >= AGREED_FOR) {
            self.0.pop_front();
        }
    }

    /// What the newest one wanted.
    pub fn last(&self) -> Option<u32> {
        self.0.back().map(|(_, up)| *up)
    }

    /// What all of them wanted; 0 where they tell of too short a time.
    pub fn agreed(&self) -> u32 {
        let ends = self.0.front().zip(self.0.back());
        let long = ends.is_some_and(|((first, _), (last, _))| last - first >= AGREED_FOR);
        let least = self.0.iter().map(|(_, up)| *up).min();
        least.filter(|_| long).unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_look_or_two_want_is_not_agreed() {
        let mut looks = Looks::default();
        let mut agreed = |now, up| {
            looks.note(now, up);
            looks.agreed()
        };
        let seen = [
            (0.0, 3, 0),
            (2.0, 3, 0),
            (4.0, 3, 3),
            (6.0, 9, 3),
            (8.0, 9, 3),
            (10.0, 4, 4),
            // After a pause the last look counts, after a clock that went back nothing does.
            (60.0, 6, 4),
            (5.0, 6, 0),
            (9.0, 6, 6),
        ];
        for (now, up, expected) in seen {
            assert_eq!(agreed(now, up), expected, "{now}");
        }
    }
}
