//! What the tests of several modules share.

use crate::{KernelError, Matrix};

/// splitmix64.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// Values in -1..1.
    pub(crate) fn values(&mut self, len: usize) -> Vec<f32> {
        (0..len)
            .map(|_| (self.next() >> 40) as f32 / (1u32 << 23) as f32 - 1.0)
            .collect()
    }

    /// A matrix and its values as f32, after rounding to f16.
    pub(crate) fn matrix(&mut self, rows: usize, cols: usize) -> (Matrix, Vec<f32>) {
        let values: Vec<f32> = self
            .values(rows * cols)
            .into_iter()
            .map(|v| half::f16::from_f32(v).to_f32())
            .collect();
        let matrix = Matrix::from_rows::<KernelError>(rows, cols, |range| {
            Ok(values[range.start * cols..range.end * cols].to_vec())
        });
        (matrix.unwrap(), values)
    }
}

/// Compares element by element, relative to the larger of 1 and the expected size.
#[track_caller]
pub(crate) fn assert_close(found: &[f32], expected: &[f32], tolerance: f32) {
    assert_eq!(found.len(), expected.len());
    for (i, (f, e)) in found.iter().zip(expected).enumerate() {
        let error = (f - e).abs() / e.abs().max(1.0);
        assert!(error <= tolerance, "element {i}: {f}, expected {e}");
    }
}
