//! Weight matrices on the GPU.

use std::sync::Arc;

use half::f16;

use super::{
    driver::Gpu,
    error::CudaError,
    memory::{Buffer, Slice},
};

/// Rows of gates, then of ups, in a group of gate and up rows.
const GATE_GROUP: usize = 8;

/// A matrix `[rows, cols]` in f16, row-major.
#[derive(Debug)]
pub struct Weights {
    data: Buffer<f16>,
    rows: usize,
    cols: usize,
}

impl Weights {
    pub fn zeroed(gpu: &Arc<Gpu>, rows: usize, cols: usize) -> Result<Self, CudaError> {
        if rows < 16 || cols == 0 || !cols.is_multiple_of(64) {
            return Err(CudaError::Matrix { rows, cols });
        }
        Ok(Self {
            data: Buffer::zeroed(gpu, "weights", rows * cols)?,
            rows,
            cols,
        })
    }

    /// Outputs.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Inputs.
    pub fn cols(&self) -> usize {
        self.cols
    }

    pub fn bytes(&self) -> u64 {
        self.data.bytes()
    }

    /// All values.
    pub fn values(&self) -> Slice<'_, f16> {
        self.data.all()
    }
}

/// Where a row of the gate (or of the up) projection stands in the two's common matrix: groups of
/// eight gates, then the eight ups of the same outputs, so that one lane of a tensor core's result
/// has both.
pub fn interleave_gate_up(row: usize, up: bool) -> usize {
    row / GATE_GROUP * 2 * GATE_GROUP + row % GATE_GROUP + if up { GATE_GROUP } else { 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gates_and_ups_alternate_in_groups_of_eight() {
        let mut places: Vec<usize> = (0..24)
            .flat_map(|row| {
                [
                    interleave_gate_up(row, false),
                    interleave_gate_up(row, true),
                ]
            })
            .collect();
        assert_eq!(interleave_gate_up(7, false), 7);
        assert_eq!(interleave_gate_up(0, true), 8);
        assert_eq!(interleave_gate_up(8, false), 16);
        places.sort_unstable();
        assert_eq!(places, (0..48).collect::<Vec<_>>());
    }
}
