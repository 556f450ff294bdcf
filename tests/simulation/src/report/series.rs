//! What happened over time, from a run's requests and timeline.

use crate::fleet::Outcome;
use crate::score::quantile;

/// Points of a line: seconds and value. NaN where there is nothing to tell: the line breaks.
pub type Line = Vec<(f64, f64)>;

/// Seconds that are summed up to one point.
const BIN: f64 = 30.0;

fn bins(outcome: &Outcome, of: impl Fn(&mut Vec<usize>) -> f64) -> Line {
    let flights = &outcome.ledger.flights;
    let last = flights.last().map_or(0.0, |flight| flight.arrival);
    let mut members: Vec<Vec<usize>> = vec![Vec::new(); (last / BIN) as usize + 1];
    for (request, flight) in flights.iter().enumerate() {
        if let Some(bin) = members.get_mut((flight.arrival / BIN) as usize) {
            bin.push(request);
        }
    }
    let points = members.iter_mut().enumerate();
    points
        .map(|(bin, requests)| ((bin as f64 + 0.5) * BIN, of(requests)))
        .collect()
}

/// Arrivals a second.
pub fn load(outcome: &Outcome) -> Line {
    bins(outcome, |requests| requests.len() as f64 / BIN)
}

/// Percent of the requests that arrived then.
pub fn good(outcome: &Outcome) -> Line {
    let ledger = &outcome.ledger;
    bins(outcome, |requests| {
        let flights = requests.iter().filter_map(|&r| ledger.flights.get(r));
        let good = flights.filter(|f| f.good(&ledger.goals)).count();
        if requests.is_empty() {
            f64::NAN
        } else {
            100.0 * good as f64 / requests.len() as f64
        }
    })
}

/// 95th percentile, in seconds, of the requests that arrived then.
pub fn ttft(outcome: &Outcome) -> Line {
    let ledger = &outcome.ledger;
    percentile(outcome, |request| {
        let ttft = ledger.flights.get(request)?.ttft();
        Some(if ttft.is_finite() {
            ttft
        } else {
            ledger.goals.timeout
        })
    })
}

/// 95th percentile of the requests' mean gaps, in milliseconds.
pub fn itl(outcome: &Outcome) -> Line {
    let flights = &outcome.ledger.flights;
    percentile(outcome, |request| {
        let itl = flights.get(request)?.mean_itl();
        (itl > 0.0).then_some(1e3 * itl)
    })
}

fn percentile(outcome: &Outcome, of: impl Fn(usize) -> Option<f64>) -> Line {
    bins(outcome, |requests| {
        let mut values: Vec<f64> = requests.iter().filter_map(|&r| of(r)).collect();
        if values.is_empty() {
            f64::NAN
        } else {
            quantile(&mut values, 0.95)
        }
    })
}

/// A figure of the timeline.
pub fn timeline(outcome: &Outcome, of: impl Fn(&crate::fleet::Point) -> f64) -> Line {
    let points = outcome.timeline.iter();
    points.map(|point| (point.t, of(point))).collect()
}
