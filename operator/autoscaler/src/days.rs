//! Load that comes back at the same time of the day.

use serde::{Deserialize, Serialize};

use crate::slots::{Noted, Slots};

/// Seconds of a slot, and slots of a day.
const SECONDS: u32 = 300;
const DAY: usize = 288;
/// Slots that are compared with those of the day before: two hours.
const COMPARED: usize = 24;

/// The highest load of every slot of the last day, and whether today is like it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Days {
    slots: Slots<SECONDS, { DAY + COMPARED }>,
    /// Requests a second at most in the slot that goes on.
    highest: Option<f64>,
    /// The last two hours were like those a day before.
    repeat: bool,
}

impl Days {
    /// `rate` is that of the seconds before `until`, where it is known.
    pub fn note(&mut self, until: f64, rate: Option<f64>) {
        self.highest = self.highest.into_iter().chain(rate).reduce(f64::max);
        let highest = self.highest;
        match self.slots.note(until, || highest) {
            Noted::Nothing => return,
            Noted::Slot => self.repeat = self.slots.alike(DAY, COMPARED),
            Noted::Anew => self.repeat = false,
        }
        self.highest = None;
    }

    /// Requests a second that were to be expected at most about now.
    pub fn expected(&self, now: f64) -> f64 {
        let slot = f64::from(SECONDS);
        self.ahead(now - slot, 3.0 * slot)
    }

    /// Requests a second that are to be expected at most within so many seconds from `now`, as a day ago; 0
    /// where today isn't like that day.
    pub fn ahead(&self, now: f64, seconds: f64) -> f64 {
        match self.repeat {
            true => self.slots.ahead(now, seconds, DAY),
            false => 0.0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: f64 = 3600.0;

    /// At nine o'clock load jumps for an hour.
    fn office(t: f64) -> f64 {
        let hour = t % (24.0 * HOUR) / HOUR;
        if (9.0..10.0).contains(&hour) {
            8.0
        } else {
            1.0
        }
    }

    fn feed(days: &mut Days, from: f64, to: f64, rate: impl Fn(f64) -> f64) {
        let mut t = from;
        while t < to {
            t += 30.0;
            days.note(t, Some(rate(t - 15.0)));
        }
    }

    #[test]
    fn what_came_yesterday_is_expected_today_at_the_same_time() {
        let mut days = Days::default();
        feed(&mut days, 0.0, 25.0 * HOUR, office);
        assert!(!days.repeat, "an hour is too short to know");
        feed(&mut days, 25.0 * HOUR, 32.9 * HOUR, office);
        assert!(days.repeat);
        assert_eq!(days.ahead(32.9 * HOUR, 60.0).round(), 1.0);
        assert!(days.ahead(32.9 * HOUR, 600.0) > 7.0);
        feed(&mut days, 32.9 * HOUR, 34.2 * HOUR, office);
        assert!(days.repeat && days.ahead(34.2 * HOUR, 600.0) < 2.0);
    }

    #[test]
    fn a_day_that_goes_otherwise_is_left_alone() {
        let mut days = Days::default();
        feed(&mut days, 0.0, 33.0 * HOUR, office);
        assert!(days.ahead(33.0 * HOUR, 600.0) > 7.0);
        feed(&mut days, 33.0 * HOUR, 33.4 * HOUR, |_| 1.0);
        assert!(!days.repeat);
        assert_eq!(days.ahead(33.4 * HOUR, 600.0), 0.0);
    }
}
