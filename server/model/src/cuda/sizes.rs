//! What a model's executor is made for.

/// The most that the executor is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sizes {
    pub max_model_len: usize,
    /// Sequences of a step.
    pub max_sequences: usize,
    /// Tokens of a step.
    pub max_rows: usize,
}

/// Batches that graphs are made for, up to `most` decoding sequences: each one to 8, then such
/// that less than 12 % of a batch stays empty.
pub(super) fn buckets(most: usize) -> Vec<usize> {
    let mut buckets = Vec::new();
    let mut next = 1usize;
    while buckets.last().is_none_or(|&last| last < most) {
        buckets.push(next.min(most));
        let after = next + 1;
        let widest = (after * 100 - 1) / 88;
        // Powers of two are what people ask for.
        let largest = after.next_power_of_two();
        next = if next < 8 {
            after
        } else {
            widest.min(largest).max(after)
        };
    }
    buckets
}

/// The smallest bucket that holds so many.
pub(super) fn bucket_of(buckets: &[usize], sequences: usize) -> Option<usize> {
    let at = buckets.partition_point(|&bucket| bucket < sequences);
    (sequences > 0 && at < buckets.len()).then_some(at)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn little_of_a_batch_stays_empty() {
        for most in [1, 5, 8, 9, 33, 100, 256, 300] {
            let buckets = buckets(most);
            assert_eq!(buckets.last(), Some(&most));
            for sequences in 1..=most {
                let bucket = buckets[bucket_of(&buckets, sequences).unwrap()];
                assert!(bucket >= sequences);
                let empty = (bucket - sequences) as f64 / bucket as f64;
                assert!(empty < 0.12, "{sequences} of {bucket}");
                assert!(sequences > 8 || bucket == sequences);
            }
            assert_eq!(bucket_of(&buckets, 0), None);
            assert_eq!(bucket_of(&buckets, most + 1), None);
        }
        for power in [16, 32, 64, 128, 256] {
            assert!(buckets(256).contains(&power));
        }
        assert!(buckets(256).len() < 50);
    }
}
