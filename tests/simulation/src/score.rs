//! The figures by which policies are compared.

use crate::fleet::{Outcome, Point};
use crate::flight::{Flight, Goals, Ledger, State};

#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Score {
    /// Percent of all requests.
    pub good: f64,
    /// Percent that keep time to first token and the strict form of the inter-token goal.
    pub strict: f64,
    /// Seconds; a request without a token counts as the clients' time-out.
    pub ttft_p99: f64,
    /// Seconds, averaged over requests.
    pub itl_mean: f64,
    /// From a pod's creation until it is gone.
    pub replica_hours: f64,
    /// Changes of the number of replicas asked for, and those that went the other way than the one
    /// before.
    pub changes: u32,
    pub reversals: u32,
    pub timeouts: u32,
    /// Requests that a replica lost or refused.
    pub failed: u32,
}

impl Score {
    pub fn new(ledger: &Ledger, replica_hours: f64, changes: u32, reversals: u32) -> Self {
        Self::of(
            &ledger.flights,
            &ledger.goals,
            replica_hours,
            changes,
            reversals,
        )
    }

    /// The figures of a part of a run: requests that arrived within it, and what the fleet cost
    /// and did meanwhile, to within the timeline's grain.
    pub fn part(outcome: &Outcome, from: f64, to: f64) -> Self {
        let flights = &outcome.ledger.flights;
        let start = flights.partition_point(|flight| flight.arrival < from);
        let end = flights.partition_point(|flight| flight.arrival < to);
        let inside = |point: &&Point| (from..to).contains(&point.t);
        let points: Vec<&Point> = outcome.timeline.iter().filter(inside).collect();
        let pods: f64 = points.iter().map(|point| f64::from(point.pods)).sum();
        let hours = pods / points.len().max(1) as f64 * (to - from) / 3600.0;
        let mut ways: Vec<bool> = (points.windows(2))
            .filter_map(|pair| match pair {
                [a, b] if a.desired != b.desired => Some(b.desired > a.desired),
                _ => None,
            })
            .collect();
        let changes = ways.len() as u32;
        ways.dedup();
        let reversals = ways.len().saturating_sub(1) as u32;
        let flights = flights.get(start..end).unwrap_or(&[]);
        Self::of(flights, &outcome.ledger.goals, hours, changes, reversals)
    }

    fn of(
        flights: &[Flight],
        goals: &Goals,
        replica_hours: f64,
        changes: u32,
        reversals: u32,
    ) -> Self {
        let n = flights.len().max(1) as f64;
        let count = |state: State| flights.iter().filter(|f| f.state == state).count() as u32;
        let percent = |number: usize| 100.0 * number as f64 / n;
        let mut ttft: Vec<f64> = (flights.iter())
            .map(|flight| match flight.ttft() {
                ttft if ttft.is_finite() => ttft,
                _ => goals.timeout,
            })
            .collect();
        let done = (flights.iter()).filter(|f| f.state == State::Done && f.output > 1);
        let (gaps, answered) = done.fold((0.0, 0.0), |(sum, n), f| (sum + f.mean_itl(), n + 1.0));
        Score {
            good: percent(flights.iter().filter(|f| f.good(goals)).count()),
            strict: percent(flights.iter().filter(|f| f.strict(goals)).count()),
            ttft_p99: quantile(&mut ttft, 0.99),
            itl_mean: gaps / f64::max(answered, 1.0),
            replica_hours,
            changes,
            reversals,
            timeouts: count(State::TimedOut),
            failed: count(State::Failed),
        }
    }
}

/// Nearest rank; 0 where there are no values.
pub fn quantile(values: &mut [f64], q: f64) -> f64 {
    if values.is_empty() {
        return 0.0;
    }
    let rank = (q * values.len() as f64).ceil() as usize;
    let place = rank.saturating_sub(1).min(values.len() - 1);
    *values.select_nth_unstable_by(place, f64::total_cmp).1
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fleet::{Setup, simulate};
    use crate::policy::Fixed;
    use crate::replica::Backend;
    use crate::trace::{Mix, Shape};

    #[test]
    fn parts_add_up_to_the_whole() {
        let trace = Shape::Steady.generate(3.0, &Mix::fixed(800, 100), 1);
        let setup = Setup::study()
            .with_backend(Backend::Surrogate)
            .with_replicas(3);
        let outcome = simulate(&setup, &trace, &mut Fixed::new(3, setup.dials));
        let parts: Vec<Score> = (0..3)
            .map(|n| Score::part(&outcome, 1200.0 * f64::from(n), 1200.0 * f64::from(n + 1)))
            .collect();
        let hours: f64 = parts.iter().map(|part| part.replica_hours).sum();
        // The watch ends a minute after the last arrival's minute.
        assert!((hours - 3.0).abs() < 0.01, "{hours}");
        assert!((outcome.score.replica_hours - 3.05).abs() < 0.01);
        let good = parts.iter().map(|part| part.good).sum::<f64>() / 3.0;
        assert!((good - outcome.score.good).abs() < 0.5, "{good}");
        assert!(parts.iter().all(|part| part.changes == 0));
    }

    #[test]
    fn quantiles_are_nearest_ranks() {
        let mut values: Vec<f64> = (1..=100).rev().map(f64::from).collect();
        assert_eq!(quantile(&mut values, 0.99), 99.0);
        assert_eq!(quantile(&mut values, 1.0), 100.0);
        assert_eq!(quantile(&mut [], 0.5), 0.0);
    }
}
