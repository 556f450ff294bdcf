//! Differences and summaries of Prometheus histograms.

use crate::observation::Histogram;

impl Histogram {
    /// What was counted between `earlier` and `self`; empty where the two don't have the same
    /// buckets or don't grow.
    pub(crate) fn since(&self, earlier: &Histogram) -> Histogram {
        if earlier.buckets.is_empty() {
            return self.clone();
        }
        let same_bounds = self.buckets.len() == earlier.buckets.len()
            && (self.buckets.iter().zip(&earlier.buckets)).all(|(a, b)| a.0 == b.0);
        let delta = Histogram {
            buckets: (self.buckets.iter().zip(&earlier.buckets))
                .map(|(a, b)| (a.0, a.1 - b.1))
                .collect(),
            sum: self.sum - earlier.sum,
            count: self.count - earlier.count,
        };
        if same_bounds && delta.is_sound() {
            delta
        } else {
            Histogram::default()
        }
    }

    /// Adds another histogram's counts; one with other buckets is left out.
    pub(crate) fn add(&mut self, other: &Histogram) {
        if other.buckets.is_empty() {
            return;
        }
        if self.buckets.is_empty() {
            *self = other.clone();
            return;
        }
        let same_bounds = self.buckets.len() == other.buckets.len()
            && (self.buckets.iter().zip(&other.buckets)).all(|(a, b)| a.0 == b.0);
        if same_bounds {
            for (mine, theirs) in self.buckets.iter_mut().zip(&other.buckets) {
                mine.1 += theirs.1;
            }
            self.sum += other.sum;
            self.count += other.count;
        }
    }

    /// Counts are finite, not negative and don't fall from bucket to bucket; bounds rise.
    pub(crate) fn is_sound(&self) -> bool {
        let finite = |x: f64| x.is_finite() && (0.0..=1e15).contains(&x);
        finite(self.sum)
            && finite(self.count)
            && self.buckets.iter().all(|b| !b.0.is_nan() && finite(b.1))
            && (self.buckets.windows(2)).all(|w| w[0].0 < w[1].0 && w[0].1 <= w[1].1)
    }

    /// Number of values.
    pub(crate) fn total(&self) -> f64 {
        self.buckets.last().map_or(0.0, |b| b.1)
    }

    /// Quantile by linear interpolation within its bucket, as Prometheus' `histogram_quantile`;
    /// beyond the last finite bound that bound. `None` when there are no values.
    pub(crate) fn quantile(&self, q: f64) -> Option<f64> {
        let total = self.total();
        if total < 1.0 {
            return None;
        }
        let rank = q * total;
        let (mut lower, mut below) = (0.0, 0.0);
        for &(upper, count) in &self.buckets {
            if count >= rank {
                if !upper.is_finite() {
                    return Some(lower);
                }
                let inside = count - below;
                let share = if inside > 0.0 {
                    (rank - below) / inside
                } else {
                    1.0
                };
                return Some(lower + (upper - lower) * share);
            }
            (lower, below) = (upper, count);
        }
        Some(lower)
    }

    /// Squared coefficient of variation, each value taken as the middle of its bucket. `None`
    /// when there are fewer than two values.
    pub(crate) fn squared_variation(&self) -> Option<f64> {
        let total = self.total();
        if total < 2.0 {
            return None;
        }
        let (mut lower, mut below) = (0.0, 0.0);
        let (mut sum, mut squares) = (0.0, 0.0);
        for &(upper, count) in &self.buckets {
            let middle = if upper.is_finite() {
                f64::midpoint(lower, upper)
            } else {
                lower
            };
            let inside = count - below;
            sum += inside * middle;
            squares += inside * middle * middle;
            (lower, below) = (upper, count);
        }
        let mean = sum / total;
        (mean > 0.0).then(|| (squares / total / (mean * mean) - 1.0).max(0.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn histogram(counts: &[(f64, f64)], sum: f64) -> Histogram {
        Histogram {
            buckets: counts.to_vec(),
            sum,
            count: counts.last().map_or(0.0, |c| c.1),
        }
    }

    #[test]
    fn quantiles_interpolate_as_prometheus_does() {
        let h = histogram(
            &[
                (0.1, 10.0),
                (0.2, 90.0),
                (0.4, 100.0),
                (f64::INFINITY, 100.0),
            ],
            16.0,
        );
        assert!((h.quantile(0.5).unwrap() - 0.15).abs() < 1e-12);
        assert!((h.quantile(0.95).unwrap() - 0.3).abs() < 1e-12);
        let above = histogram(&[(0.1, 0.0), (f64::INFINITY, 5.0)], 9.0);
        assert_eq!(above.quantile(0.95), Some(0.1));
        assert_eq!(Histogram::default().quantile(0.95), None);
    }

    #[test]
    fn a_difference_of_unlike_or_shrunken_histograms_is_empty() {
        let old = histogram(&[(1.0, 4.0), (f64::INFINITY, 6.0)], 9.0);
        let new = histogram(&[(1.0, 5.0), (f64::INFINITY, 9.0)], 20.0);
        assert_eq!(
            new.since(&old).buckets,
            vec![(1.0, 1.0), (f64::INFINITY, 3.0)]
        );
        assert_eq!(old.since(&new), Histogram::default());
        let other = histogram(&[(2.0, 5.0), (f64::INFINITY, 9.0)], 20.0);
        assert_eq!(other.since(&old), Histogram::default());
        assert_eq!(new.since(&Histogram::default()), new);
    }

    #[test]
    fn variation_is_zero_for_equal_lengths_and_grows_with_the_spread() {
        let equal = histogram(&[(50.0, 0.0), (100.0, 30.0), (f64::INFINITY, 30.0)], 3000.0);
        assert_eq!(equal.squared_variation(), Some(0.0));
        let spread = histogram(
            &[(100.0, 80.0), (5000.0, 100.0), (f64::INFINITY, 100.0)],
            60_000.0,
        );
        assert!(spread.squared_variation().unwrap() > 2.0);
    }
}
