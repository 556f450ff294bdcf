//! Weights out of a checkpoint: turned into f16, or kept as a GGUF file's quantised numbers.

use std::{
    cell::{Cell, RefCell},
    ops::Range,
};

use half::f16;
use stoker_kernels::cuda::{self, Buffer, Format, Kernels, Quantised};

use super::{
    ggml,
    staging::{RawRow, Staging},
    weights::{Layer, Matrix, Weights},
};
use crate::{
    checkpoint::Checkpoint,
    config::ModelConfig,
    error::LoadError,
    load::Dtype,
    tensor::TensorHandle,
    tensors::{LayerTensors, Tensors},
};

/// Bytes of a part that is copied at once.
const STAGED: usize = 64 << 20;

/// Gates, then ups, that stand together (see `interleave_gate_up`).
const GATE_GROUP: usize = 8;

impl Weights {
    /// Reads all tensors; `progress` is given the share that is done.
    pub(crate) fn load(
        kernels: &Kernels,
        checkpoint: &Checkpoint,
        config: &ModelConfig,
        dtype: Dtype,
        progress: &dyn Fn(f32),
    ) -> Result<Self, LoadError> {
        let tensors = Tensors::find(checkpoint, config)?;
        let elements = |tensor: &TensorHandle| (tensor.rows * tensor.cols) as u64;
        let largest = tensors.all().map(elements).max().unwrap_or(0);
        let gpu = kernels.gpu();
        let reader = Reader {
            kernels,
            checkpoint,
            dtype,
            staging: RefCell::new(Staging::new(gpu, STAGED.min(4 * largest as usize))?),
            done: Cell::new(0),
            total: tensors.all().map(elements).sum(),
            progress,
        };
        let rope_factors = match &tensors.rope_factors {
            Some(tensor) => Some(reader.values(tensor)?),
            None => config
                .rope_scaling
                .factors(config.rope_base, config.rotated),
        };
        let weights = Self {
            embedding: reader.matrix(Parts::Stacked(&[&tensors.embedding]))?,
            layers: tensors
                .layers
                .iter()
                .map(|layer| reader.layer(layer))
                .collect::<Result<_, _>>()?,
            output_norm: reader.vector(&[&tensors.output_norm])?,
            output: match &tensors.output {
                Some(tensor) => Some(reader.matrix(Parts::Stacked(&[tensor]))?),
                None => None,
            },
            rope_factors,
        };
        reader.staging.borrow().stream.synchronize()?;
        Ok(weights)
    }
}

/// Tensors of the same number of columns that make one matrix.
#[derive(Clone, Copy)]
enum Parts<'a> {
    /// Their rows one after the other.
    Stacked(&'a [&'a TensorHandle]),
    /// Gate and up rows interleaved.
    GateUp(&'a TensorHandle, &'a TensorHandle),
}

impl<'a> Parts<'a> {
    fn tensors(self) -> Vec<&'a TensorHandle> {
        match self {
            Self::Stacked(tensors) => tensors.to_vec(),
            Self::GateUp(gate, up) => vec![gate, up],
        }
    }

    /// What makes the matrix's row `at` and those after it, before `end`, that follow it in the
    /// same tensor.
    fn run(self, at: usize, end: usize) -> Option<(&'a TensorHandle, Range<usize>)> {
        match self {
            Self::Stacked(tensors) => {
                let mut first = 0;
                for tensor in tensors {
                    if at < first + tensor.rows {
                        return Some((tensor, at - first..(end - first).min(tensor.rows)));
                    }
                    first += tensor.rows;
                }
                None
            }
            Self::GateUp(gate, up) => {
                let (group, row) = (at / (2 * GATE_GROUP), at % (2 * GATE_GROUP));
                let tensor = if row < GATE_GROUP { gate } else { up };
                let first = group * GATE_GROUP + row % GATE_GROUP;
                let rows = (GATE_GROUP - row % GATE_GROUP).min(end - at);
                Some((tensor, first..first + rows))
            }
        }
    }
}

struct Reader<'a> {
    kernels: &'a Kernels,
    checkpoint: &'a Checkpoint,
    dtype: Dtype,
    staging: RefCell<Staging>,
    /// Elements read, of `total`.
    done: Cell<u64>,
    total: u64,
    progress: &'a dyn Fn(f32),
}

impl Reader<'_> {
    fn layer(&self, tensors: &LayerTensors) -> Result<Layer, LoadError> {
        let [query, key, value] = &tensors.qkv;
        Ok(Layer {
            attention_norm: self.vector(&[&tensors.attention_norm])?,
            qkv: self.matrix(Parts::Stacked(&[query, key, value]))?,
            qkv_bias: match &tensors.qkv_bias {
                Some([query, key, value]) => Some(self.vector(&[query, key, value])?),
                None => None,
            },
            head_norms: match &tensors.head_norms {
                Some([query, key]) => Some([self.vector(&[query])?, self.vector(&[key])?]),
                None => None,
            },
            output: self.matrix(Parts::Stacked(&[&tensors.attention_output]))?,
            ffn_norm: self.vector(&[&tensors.ffn_norm])?,
            gate_up: self.matrix(Parts::GateUp(&tensors.gate, &tensors.up))?,
            down: self.matrix(Parts::Stacked(&[&tensors.down]))?,
        })
    }

    fn matrix(&self, parts: Parts) -> Result<Matrix, LoadError> {
        let tensors = parts.tensors();
        let rows = tensors.iter().map(|tensor| tensor.rows).sum();
        let cols = tensors.first().map_or(0, |tensor| tensor.cols);
        let checkpoint = self.checkpoint;
        let mut staging = self.staging.borrow_mut();
        let matrix = match self.kept(&tensors).filter(|format| format.fits(rows, cols)) {
            Some(format) => {
                let weights = Quantised::zeroed(self.kernels, format, rows, cols)?;
                staging.pack(&weights, &|rows| raw(checkpoint, parts, rows))?;
                Matrix::Quantised(weights)
            }
            None => {
                let weights = cuda::Weights::zeroed(self.kernels.gpu(), rows, cols)?;
                staging.copy(rows, cols, weights.values(), &|rows, out| {
                    fill(checkpoint, parts, rows, out)
                })?;
                Matrix::new(self.kernels, &staging.stream, weights, self.made())?
            }
        };
        for tensor in tensors {
            self.finished(tensor);
        }
        Ok(matrix)
    }

    /// What f16 weights are turned into.
    fn made(&self) -> Option<Format> {
        match self.dtype {
            Dtype::Auto | Dtype::Float16 => None,
            Dtype::Int8 => Some(Format::INT8),
            Dtype::Int4 => Some(Format::INT4),
        }
    }

    /// The format that a matrix of these tensors is kept in, where it isn't to become another one:
    /// that of all of them.
    fn kept(&self, tensors: &[&TensorHandle]) -> Option<Format> {
        let mut formats = tensors.iter().map(|tensor| ggml::format(tensor.dtype));
        let first = formats.next()??;
        (self.dtype == Dtype::Auto && formats.all(|format| format == Some(first))).then_some(first)
    }

    fn values(&self, tensor: &TensorHandle) -> Result<Vec<f32>, LoadError> {
        let values = self.checkpoint.rows(tensor, 0..1)?;
        self.finished(tensor);
        Ok(values)
    }

    /// Vectors, one after the other.
    fn vector(&self, tensors: &[&TensorHandle]) -> Result<Buffer<f32>, LoadError> {
        let parts = tensors.iter().map(|tensor| self.values(tensor));
        let values = parts.collect::<Result<Vec<_>, _>>()?.concat();
        Ok(Buffer::from_slice(self.kernels.gpu(), "weights", &values)?)
    }

    fn finished(&self, tensor: &TensorHandle) {
        let elements = (tensor.rows * tensor.cols) as u64;
        self.done.set(self.done.get() + elements);
        (self.progress)(self.done.get() as f32 / self.total.max(1) as f32);
    }
}

/// Some rows of a matrix as the files have them.
fn raw<'a>(
    checkpoint: &Checkpoint,
    parts: Parts<'a>,
    rows: Range<usize>,
) -> Result<Vec<RawRow<'a>>, LoadError> {
    let mut found = Vec::with_capacity(rows.len());
    while found.len() < rows.len()
        && let Some((tensor, run)) = parts.run(rows.start + found.len(), rows.end)
    {
        let mut bytes = vec![0; run.len() * tensor.row_bytes];
        checkpoint.bytes(tensor, run, &mut bytes)?;
        found.extend(bytes.chunks_exact(tensor.row_bytes).map(|bytes| RawRow {
            tensor,
            bytes: bytes.to_vec(),
        }));
    }
    Ok(found)
}

/// Some rows of a matrix as f16.
fn fill(
    checkpoint: &Checkpoint,
    parts: Parts,
    rows: Range<usize>,
    out: &mut [f16],
) -> Result<(), LoadError> {
    let cols = out.len() / rows.len().max(1);
    let (mut at, mut rest) = (rows.start, out);
    while let Some((tensor, run)) = (at < rows.end).then(|| parts.run(at, rows.end)).flatten() {
        let (values, after) = rest.split_at_mut(run.len() * cols);
        checkpoint.halves(tensor, run.clone(), values)?;
        if let Some(bad) = values.iter().position(|value| !value.is_finite()) {
            let row = run.start + bad / cols;
            let exact = checkpoint.rows(tensor, row..row + 1)?;
            return Err(LoadError::Overflow {
                name: tensor.name.clone(),
                value: exact.get(bad % cols).copied().unwrap_or(f32::NAN),
            });
        }
        at += run.len();
        rest = after;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use candle_core::quantized::GgmlDType;
    use stoker_kernels::cuda::interleave_gate_up;

    use super::*;

    fn tensor(name: &str, rows: usize) -> TensorHandle {
        TensorHandle::new(name, &[rows, 64], GgmlDType::F16, 0, 0).unwrap()
    }

    /// Every row of the matrix as (tensor, row), asked for in runs that end anywhere.
    fn rows(parts: Parts, count: usize, step: usize) -> Vec<(String, usize)> {
        let mut found = Vec::new();
        for end in (step..=count).step_by(step).chain([count]) {
            while found.len() < end {
                let (tensor, run) = parts.run(found.len(), end).unwrap();
                assert!(!run.is_empty());
                found.extend(run.map(|row| (tensor.name.clone(), row)));
            }
            assert_eq!(found.len(), end);
        }
        found
    }

    #[test]
    fn runs_make_stacked_and_interleaved_matrices() {
        let (q, k, v) = (tensor("q", 48), tensor("k", 16), tensor("v", 16));
        for step in [1, 7, 64, 80] {
            let found = rows(Parts::Stacked(&[&q, &k, &v]), 80, step);
            assert_eq!(found[47], ("q".to_owned(), 47));
            assert_eq!(found[48], ("k".to_owned(), 0));
            assert_eq!(found[79], ("v".to_owned(), 15));
            let (gate, up) = (tensor("gate", 40), tensor("up", 40));
            let found = rows(Parts::GateUp(&gate, &up), 80, step);
            for row in 0..40 {
                assert_eq!(
                    found[interleave_gate_up(row, false)],
                    ("gate".to_owned(), row)
                );
                assert_eq!(found[interleave_gate_up(row, true)], ("up".to_owned(), row));
            }
        }
    }
}
