//! The way into the GPU: two places in pinned memory, of which one is filled by all processors while
//! the copy engine takes the other.

use std::{ops::Range, sync::Arc};

use half::f16;
use rayon::prelude::*;
use stoker_kernels::cuda::{
    CudaError, EIGHT, Event, Format, Gpu, Order, Pinned, Quantised, Slice, Stream,
};

use super::ggml;
use crate::{error::LoadError, tensor::TensorHandle};

/// Rows that one task reads.
const ROWS_PER_TASK: usize = 64;
/// Units that one task packs: a K-quant's block has four.
const UNITS_PER_TASK: usize = 4;

pub(super) struct Staging {
    pub stream: Stream,
    places: [(Pinned<u8>, Event); 2],
    next: usize,
}

/// Writes the elements of some rows.
type Fill<'a> = dyn Fn(Range<usize>, &mut [f16]) -> Result<(), LoadError> + Sync + 'a;

/// Gives some rows as their files have them.
type Read<'a> = dyn Fn(Range<usize>) -> Result<Vec<RawRow<'a>>, LoadError> + Sync + 'a;

/// A row as its file has it.
pub(super) struct RawRow<'a> {
    pub tensor: &'a TensorHandle,
    pub bytes: Vec<u8>,
}

impl Staging {
    pub fn new(gpu: &Arc<Gpu>, bytes: usize) -> Result<Self, CudaError> {
        let place = || Ok::<_, CudaError>((Pinned::zeroed(gpu, bytes)?, Event::new(gpu)?));
        Ok(Self {
            stream: Stream::new(gpu)?,
            places: [place()?, place()?],
            next: 0,
        })
    }

    /// Rows of so many bytes that are copied at once.
    fn rows_at_once(&self, row_bytes: usize) -> usize {
        let rows = self.places[0].0.len() / row_bytes.max(1);
        (rows / EIGHT * EIGHT).max(EIGHT)
    }

    /// Copies a matrix that `fill` gives some rows of.
    pub fn copy(
        &mut self,
        rows: usize,
        cols: usize,
        to: Slice<f16>,
        fill: &Fill<'_>,
    ) -> Result<(), LoadError> {
        let at_once = self.rows_at_once(cols * size_of::<f16>());
        for first in (0..rows).step_by(at_once) {
            let (pinned, copied) = &mut self.places[self.next];
            copied.synchronize()?;
            let count = at_once.min(rows - first);
            pinned
                .as_mut_slice_of::<f16>(count * cols)?
                .par_chunks_mut(ROWS_PER_TASK * cols)
                .enumerate()
                .try_for_each(|(i, out)| {
                    let start = first + i * ROWS_PER_TASK;
                    fill(start..start + out.len() / cols, out)
                })?;
            let part = to.slice(first * cols..(first + count) * cols)?;
            self.stream
                .upload(pinned, part.as_bytes().len(), part.as_bytes())?;
            self.stream.record(copied)?;
            self.next = 1 - self.next;
        }
        Ok(())
    }

    /// Packs a matrix that `read` gives some rows of, and copies that.
    pub fn pack(&mut self, to: &Quantised, read: &Read<'_>) -> Result<(), LoadError> {
        let format = to.format();
        let (units, unit) = (to.cols() / format.unit(), format.unit_bytes());
        let at_once = self.rows_at_once(units * unit / EIGHT);
        for first in (0..to.rows()).step_by(at_once) {
            let count = at_once.min(to.rows() - first);
            let rows = (first..first + count)
                .into_par_iter()
                .step_by(ROWS_PER_TASK)
                .map(|start| read(start..(start + ROWS_PER_TASK).min(first + count)))
                .collect::<Result<Vec<_>, _>>()?;
            let rows: Vec<RawRow> = rows.into_iter().flatten().collect();
            let (pinned, copied) = &mut self.places[self.next];
            copied.synchronize()?;
            // Of a unit's columns all rows stand together.
            let run = count / EIGHT * unit;
            pinned
                .as_mut_slice_of::<u8>(units * run)?
                .par_chunks_mut(UNITS_PER_TASK * run)
                .enumerate()
                .try_for_each(|(i, out)| {
                    let first = i * UNITS_PER_TASK;
                    pack_units(format, to.order(), &rows, first, out)
                })?;
            let values = to.values();
            let part = values.slice(first / EIGHT * unit..values.len())?;
            let pitch = to.rows() / EIGHT * unit;
            self.stream.upload_runs(pinned, (units, run), part, pitch)?;
            self.stream.record(copied)?;
            self.next = 1 - self.next;
        }
        Ok(())
    }
}

/// Packs all rows' units from the `first` on, as many as `out` has room for.
fn pack_units(
    format: Format,
    order: Order,
    rows: &[RawRow],
    first: usize,
    out: &mut [u8],
) -> Result<(), LoadError> {
    let mut values = format.unit_row();
    let run = rows.len() / EIGHT * format.unit_bytes();
    for (i, out) in out.chunks_exact_mut(run).enumerate() {
        let eights = rows.chunks_exact(EIGHT);
        for (eight, unit) in eights.zip(out.chunks_exact_mut(format.unit_bytes())) {
            for (row, RawRow { tensor, bytes }) in eight.iter().enumerate() {
                if !ggml::unit_row(tensor.dtype, bytes, first + i, &mut values) {
                    return Err(LoadError::TensorType {
                        name: tensor.name.clone(),
                        found: format!("{:?}", tensor.dtype),
                    });
                }
                let largest = ggml::largest(format, &values);
                if largest.is_nan() || largest > f16::MAX.to_f32() {
                    return Err(LoadError::Overflow {
                        name: tensor.name.clone(),
                        value: largest,
                    });
                }
                format.pack(order, row, &values, unit);
            }
        }
    }
    Ok(())
}
