//! Where a run loses against the oracle: replica-hours too many or too few, by what load was doing,
//! and the kinds of misses.

use std::fmt;

use crate::fleet::Outcome;
use crate::flight::State;

/// Seconds either side over which load is compared to tell whether it rises or falls.
const SPAN: f64 = 240.0;
/// Relative change that counts.
const CHANGE: f64 = 0.12;

/// Replica-hours above the oracle's while load rose, fell, or did neither; and percent of requests.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Losses {
    pub rising: f64,
    pub falling: f64,
    pub level: f64,
    /// Replica-hours below the oracle's, at any time.
    pub below: f64,
    /// Requests that came too late with their first token, or with the others, or never.
    pub late_first: f64,
    pub slow: f64,
    pub lost: f64,
}

impl Losses {
    pub fn new(outcome: &Outcome, oracle: &Outcome) -> Self {
        let flights = &outcome.ledger.flights;
        let arrivals = |from: f64, to: f64| {
            let start = flights.partition_point(|flight| flight.arrival < from);
            let end = flights.partition_point(|flight| flight.arrival < to);
            (end - start) as f64
        };
        let mut losses = Losses::default();
        let pairs = outcome.timeline.iter().zip(&oracle.timeline);
        let grain = (outcome.timeline.get(1)).map_or(0.0, |second| second.t) / 3600.0;
        for (point, best) in pairs {
            let more = (f64::from(point.pods) - f64::from(best.pods)) * grain;
            let before = arrivals(point.t - SPAN, point.t).max(1.0);
            let change = arrivals(point.t, point.t + SPAN) / before - 1.0;
            if more < 0.0 {
                losses.below -= more;
            } else if change > CHANGE {
                losses.rising += more;
            } else if change < -CHANGE {
                losses.falling += more;
            } else {
                losses.level += more;
            }
        }
        let goals = &outcome.ledger.goals;
        let each = 100.0 / flights.len().max(1) as f64;
        for flight in flights.iter().filter(|flight| !flight.good(goals)) {
            if flight.state != State::Done {
                losses.lost += each;
            } else if !flight.meets_ttft(goals) {
                losses.late_first += each;
            } else {
                losses.slow += each;
            }
        }
        losses
    }
}

impl fmt::Display for Losses {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "replica-h above the oracle: {:.2} while load rose, {:.2} while it fell, {:.2} else; \
             {:.2} below. Missed: {:.2} % late first tokens, {:.2} % slow, {:.2} % lost",
            self.rising,
            self.falling,
            self.level,
            self.below,
            self.late_first,
            self.slow,
            self.lost
        )
    }
}
