//! Order statistics of samples.

use serde::Serialize;

/// What a set of samples looks like, in the samples' unit. All 0 when there are none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Summary {
    pub count: usize,
    pub mean: f64,
    pub min: f64,
    pub p50: f64,
    pub p90: f64,
    pub p95: f64,
    pub p99: f64,
    pub max: f64,
}

impl Summary {
    /// Sorts `samples`.
    pub fn of(samples: &mut [f64]) -> Self {
        samples.sort_unstable_by(f64::total_cmp);
        let (Some(min), Some(max)) = (samples.first(), samples.last()) else {
            return Self::default();
        };
        Self {
            count: samples.len(),
            mean: samples.iter().sum::<f64>() / samples.len() as f64,
            min: *min,
            p50: quantile(samples, 0.50),
            p90: quantile(samples, 0.90),
            p95: quantile(samples, 0.95),
            p99: quantile(samples, 0.99),
            max: *max,
        }
    }
}

/// The nearest-rank quantile of sorted samples: the smallest that at least `q` of them don't
/// exceed. 0 when there are none.
pub fn quantile(sorted: &[f64], q: f64) -> f64 {
    let rank = (q * sorted.len() as f64).ceil() as usize;
    sorted
        .get(rank.saturating_sub(1))
        .copied()
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn nearest_rank() {
        let samples: Vec<f64> = (1..=100).map(f64::from).collect();
        assert_eq!(quantile(&samples, 0.5), 50.0);
        assert_eq!(quantile(&samples, 0.99), 99.0);
        assert_eq!(quantile(&samples, 1.0), 100.0);
        assert_eq!(quantile(&[7.0], 0.01), 7.0);
        assert_eq!(Summary::of(&mut []), Summary::default());
    }

    proptest! {
        #[test]
        fn the_quantile_splits_the_samples(mut samples in prop::collection::vec(-1e3f64..1e3, 1..200), q in 0.01f64..1.0) {
            samples.sort_unstable_by(f64::total_cmp);
            let value = quantile(&samples, q);
            let not_above = samples.iter().filter(|s| **s <= value).count() as f64;
            let below = samples.iter().filter(|s| **s < value).count() as f64;
            let n = samples.len() as f64;
            prop_assert!(not_above / n >= q && below / n < q);
        }
    }
}
