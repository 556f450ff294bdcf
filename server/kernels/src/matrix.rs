//! Weights in the layout that the kernels read.

use std::ops::Range;

use half::{f16, slice::HalfFloatSliceExt};
use rayon::prelude::*;

use crate::{buffer::F16Buffer, error::KernelError, tile::LANES};

/// Panels that one task packs: small enough that its f32 rows stay in the cache.
const PANELS_PER_TASK: usize = 4;

/// A weight matrix `[rows, cols]` in f16: rows in groups of 16 (the last one filled up with zeros),
/// each group (a panel) stored column by column, so that 16 outputs lie side by side.
#[derive(Debug)]
pub struct Matrix {
    rows: usize,
    cols: usize,
    data: F16Buffer,
}

impl Matrix {
    /// Packs a matrix from row-major f32 rows. `rows_of` is asked for ranges of rows, from several
    /// threads at once, and gives `range.len() * cols` values.
    pub fn from_rows<E: From<KernelError> + Send>(
        rows: usize,
        cols: usize,
        rows_of: impl Fn(Range<usize>) -> Result<Vec<f32>, E> + Sync,
    ) -> Result<Self, E> {
        let mut data = F16Buffer::zeroed(rows.div_ceil(LANES) * LANES * cols);
        let chunk = PANELS_PER_TASK * LANES;
        data.as_mut_slice()
            .par_chunks_mut((chunk * cols).max(1))
            .enumerate()
            .try_for_each(|(i, panels)| -> Result<(), E> {
                let range = i * chunk..((i + 1) * chunk).min(rows);
                let values = rows_of(range.clone())?;
                crate::error::check("rows of a matrix", values.len(), range.len() * cols)?;
                let mut halves = vec![f16::ZERO; values.len()];
                halves.convert_from_f32_slice(&values);
                for (r, row) in halves.chunks_exact(cols.max(1)).enumerate() {
                    let panel = &mut panels[r / LANES * LANES * cols..];
                    for (k, &value) in row.iter().enumerate() {
                        panel[k * LANES + r % LANES] = value;
                    }
                }
                Ok(())
            })?;
        Ok(Self { rows, cols, data })
    }

    /// Outputs.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Inputs.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Distance between two rows of this matrix's output: its rows rounded up to whole panels. The
    /// elements past `rows()` are written, as zeros.
    pub fn out_stride(&self) -> usize {
        self.panels() * LANES
    }

    pub fn bytes(&self) -> usize {
        size_of_val(self.data.as_slice())
    }

    /// One row as f32: a token's embedding, where this is the embedding table.
    pub fn read_row(&self, row: usize, out: &mut [f32]) -> Result<(), KernelError> {
        crate::error::check("a matrix row", out.len(), self.cols)?;
        if row >= self.rows {
            return Err(KernelError::Row {
                row,
                rows: self.rows,
            });
        }
        let panel = self.panel(row / LANES);
        for (value, lanes) in out.iter_mut().zip(panel.chunks_exact(LANES)) {
            *value = lanes[row % LANES].to_f32();
        }
        Ok(())
    }

    pub(crate) fn panels(&self) -> usize {
        self.rows.div_ceil(LANES)
    }

    pub(crate) fn panel(&self, index: usize) -> &[f16] {
        let len = LANES * self.cols;
        &self.data.as_slice()[index * len..(index + 1) * len]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_come_back_as_they_were_packed() {
        for (rows, cols) in [(1, 1), (16, 3), (67, 20), (130, 33)] {
            let value = |r: usize, c: usize| (r * cols + c) as f32 / 4.0;
            let matrix = Matrix::from_rows::<KernelError>(rows, cols, |range| {
                Ok(range
                    .flat_map(|r| (0..cols).map(move |c| value(r, c)))
                    .collect())
            })
            .unwrap();
            assert_eq!(matrix.out_stride() % 16, 0);
            let mut row = vec![0.0; cols];
            for r in 0..rows {
                matrix.read_row(r, &mut row).unwrap();
                let expected: Vec<f32> = (0..cols)
                    .map(|c| f16::from_f32(value(r, c)).to_f32())
                    .collect();
                assert_eq!(row, expected);
            }
            assert!(matrix.read_row(rows, &mut row).is_err());
        }
    }

    #[test]
    fn a_source_that_fails_or_gives_too_little_is_an_error() {
        let short = Matrix::from_rows::<KernelError>(20, 4, |_| Ok(vec![0.0; 3]));
        assert!(matches!(short, Err(KernelError::Shape { found: 3, .. })));
        let failing = Matrix::from_rows(20, 4, |_| Err(KernelError::HeadSize { found: 1 }));
        assert_eq!(failing.unwrap_err(), KernelError::HeadSize { found: 1 });
    }
}
