//! What clients ask for, and when.

mod csv;
mod generate;
mod unseen;

pub use csv::TraceError;
pub use generate::{Mix, Shape};
pub use unseen::Unseen;

/// A request as its client sees it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Request {
    /// Seconds since the trace began.
    pub arrival: f64,
    pub prompt: u32,
    /// Tokens that will be generated; at least 1.
    pub output: u32,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Trace {
    pub name: String,
    /// In the order of arrival.
    pub requests: Vec<Request>,
    /// Seconds; no request arrives later.
    pub duration: f64,
}

impl Trace {
    /// Sorts the requests by arrival.
    pub fn new(name: impl Into<String>, mut requests: Vec<Request>) -> Self {
        requests.sort_by(|a, b| a.arrival.total_cmp(&b.arrival));
        Trace {
            name: name.into(),
            duration: requests.last().map_or(0.0, |last| last.arrival),
            requests,
        }
    }

    /// The same requests `times` times in a row.
    pub fn repeated(&self, times: u32) -> Self {
        let requests = (0..times).flat_map(|round| {
            let offset = f64::from(round) * self.duration;
            self.requests.iter().map(move |request| Request {
                arrival: request.arrival + offset,
                ..*request
            })
        });
        Trace {
            name: format!("{} x{times}", self.name),
            requests: requests.collect(),
            duration: self.duration * f64::from(times),
        }
    }

    /// The same, so many seconds later.
    pub fn delayed(&self, seconds: f64) -> Self {
        let later = |request: &Request| Request {
            arrival: request.arrival + seconds,
            ..*request
        };
        Trace {
            name: self.name.clone(),
            requests: self.requests.iter().map(later).collect(),
            duration: self.duration + seconds,
        }
    }

    /// `factor` times as many requests in the same time: each is asked that often, a moment apart.
    pub fn thickened(&self, factor: u32) -> Self {
        let requests = self.requests.iter().flat_map(|request| {
            (0..factor).map(move |copy| Request {
                arrival: request.arrival + f64::from(copy) * 0.37,
                ..*request
            })
        });
        Trace::new(format!("{} *{factor}", self.name), requests.collect())
    }

    /// The same shape of load in a `factor`-th of the time: every `factor`-th request, so that the
    /// rates stay.
    pub fn hastened(&self, factor: u32) -> Self {
        let factor = factor.max(1);
        let requests = self.requests.iter().step_by(factor as usize);
        Trace {
            name: format!("{} /{factor}", self.name),
            requests: requests
                .map(|request| Request {
                    arrival: request.arrival / f64::from(factor),
                    ..*request
                })
                .collect(),
            duration: self.duration / f64::from(factor),
        }
    }

    /// The first `seconds` of the trace.
    pub fn first(&self, seconds: f64) -> Self {
        self.between(0.0, seconds)
    }

    /// What arrives from one second to another.
    pub fn between(&self, from: f64, to: f64) -> Self {
        let inside = |r: &&Request| (from..to).contains(&r.arrival);
        let requests = self.requests.iter().filter(inside).map(|request| Request {
            arrival: request.arrival - from,
            ..*request
        });
        Trace {
            name: self.name.clone(),
            requests: requests.collect(),
            duration: self.duration.min(to) - from,
        }
    }

    /// The longest time, in seconds, in which no request arrives.
    pub fn longest_pause(&self) -> f64 {
        let arrivals = self.requests.iter().map(|r| r.arrival);
        let ends = arrivals.clone().skip(1).chain([self.duration]);
        arrivals.zip(ends).map(|(a, b)| b - a).fold(0.0, f64::max)
    }
}
