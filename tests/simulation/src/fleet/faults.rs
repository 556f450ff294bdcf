//! What goes wrong. Times are seconds since the trace began.

use std::ops::Range;

#[derive(Clone, Debug, PartialEq)]
pub enum Fault {
    /// A ready replica dies. The router sends what had no token yet to others; the rest fails.
    Dies { at: f64 },
    /// Scrapes are lost with this probability.
    ScrapesLost { share: f64, during: Range<f64> },
    /// Samples come, but so many seconds late.
    ScrapesLate { seconds: f64, during: Range<f64> },
    /// No new nodes come; pods wait for one that is warm or free.
    NoNodes { during: Range<f64> },
    /// The `nth` replica that was made is slower by this factor, and says so.
    Slow { nth: u32, factor: f64 },
    /// The `nth` replica's counters and law are nonsense.
    Nonsense { nth: u32 },
    /// The counters of every replica start anew at zero.
    CountersReset { at: f64 },
    /// Every so many seconds the policy's program is started anew.
    Restarts { every: f64 },
    /// The API server refuses to change the number of replicas.
    WritesRefused { during: Range<f64> },
}

/// Questions to a list of faults.
pub(super) trait Faults {
    fn lost_share(&self, now: f64) -> f64;
    fn lateness(&self, now: f64) -> f64;
    /// Until when no nodes come; `None` while they do.
    fn nodes_from(&self, now: f64) -> Option<f64>;
    fn slowness(&self, nth: u32) -> f64;
    fn nonsense(&self, nth: u32) -> bool;
    fn writes_refused(&self, now: f64) -> bool;
    fn restarts(&self) -> Option<f64>;
    /// Whether some samples have to be kept to be told late.
    fn ever_late(&self) -> bool;
}

impl Faults for [Fault] {
    fn lost_share(&self, now: f64) -> f64 {
        let shares = self.iter().map(|fault| match fault {
            Fault::ScrapesLost { share, during } if during.contains(&now) => *share,
            _ => 0.0,
        });
        shares.fold(0.0, f64::max)
    }

    fn lateness(&self, now: f64) -> f64 {
        let seconds = self.iter().map(|fault| match fault {
            Fault::ScrapesLate { seconds, during } if during.contains(&now) => *seconds,
            _ => 0.0,
        });
        seconds.fold(0.0, f64::max)
    }

    fn nodes_from(&self, now: f64) -> Option<f64> {
        let ends = self.iter().filter_map(|fault| match fault {
            Fault::NoNodes { during } if during.contains(&now) => Some(during.end),
            _ => None,
        });
        ends.reduce(f64::max)
    }

    fn slowness(&self, nth: u32) -> f64 {
        let factors = self.iter().map(|fault| match fault {
            Fault::Slow { nth: n, factor } if *n == nth => *factor,
            _ => 1.0,
        });
        factors.product()
    }

    fn nonsense(&self, nth: u32) -> bool {
        self.contains(&Fault::Nonsense { nth })
    }

    fn writes_refused(&self, now: f64) -> bool {
        self.iter().any(|fault| match fault {
            Fault::WritesRefused { during } => during.contains(&now),
            _ => false,
        })
    }

    fn restarts(&self) -> Option<f64> {
        self.iter().find_map(|fault| match fault {
            Fault::Restarts { every } => Some(*every),
            _ => None,
        })
    }

    fn ever_late(&self) -> bool {
        let mut faults = self.iter();
        faults.any(|fault| matches!(fault, Fault::ScrapesLate { .. }))
    }
}
