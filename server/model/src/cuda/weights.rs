//! A model's weights on the GPU.

use std::{cell::Cell, ops::Range, sync::Arc};

use half::{f16, slice::HalfFloatSliceExt};
use rayon::prelude::*;
use stoker_kernels::cuda::{self, Buffer, CudaError, Gpu, Kernels, Stream, interleave_gate_up};

use crate::{
    checkpoint::Checkpoint,
    config::ModelConfig,
    error::LoadError,
    tensor::TensorHandle,
    tensors::{LayerTensors, Tensors},
};

/// Rows that one task reads and dequantises.
const ROWS_PER_TASK: usize = 64;

pub struct Weights {
    pub embedding: cuda::Weights,
    pub layers: Vec<Layer>,
    pub output_norm: Buffer<f32>,
    /// `None` where the head is the embedding.
    output: Option<cuda::Weights>,
    pub rope_factors: Option<Vec<f32>>,
}

pub struct Layer {
    pub attention_norm: Buffer<f32>,
    /// Query, key and value rows, one after the other.
    pub qkv: cuda::Weights,
    pub output: cuda::Weights,
    pub ffn_norm: Buffer<f32>,
    /// Gate and up rows, interleaved.
    pub gate_up: cuda::Weights,
    pub down: cuda::Weights,
}

impl Weights {
    /// Reads all tensors; `progress` is given the share that is done.
    pub(crate) fn load(
        gpu: &Arc<Gpu>,
        checkpoint: &Checkpoint,
        config: &ModelConfig,
        progress: &dyn Fn(f32),
    ) -> Result<Self, LoadError> {
        let tensors = Tensors::find(checkpoint, config)?;
        let elements = |tensor: &TensorHandle| (tensor.rows * tensor.cols) as u64;
        let reader = Reader {
            gpu,
            checkpoint,
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
        Ok(Self {
            embedding: reader.matrix(&[&tensors.embedding])?,
            layers: tensors
                .layers
                .iter()
                .map(|layer| reader.layer(layer))
                .collect::<Result<_, _>>()?,
            output_norm: reader.vector(&tensors.output_norm)?,
            output: match &tensors.output {
                Some(tensor) => Some(reader.matrix(&[tensor])?),
                None => None,
            },
            rope_factors,
        })
    }

    /// Random weights whose activations neither vanish nor explode, for benches.
    pub fn random(kernels: &Kernels, config: &ModelConfig) -> Result<Self, CudaError> {
        let gpu = kernels.gpu();
        let stream = Stream::new(gpu)?;
        let seed = std::cell::Cell::new(0);
        let matrix = |rows, cols: usize| {
            let matrix = cuda::Weights::zeroed(gpu, rows, cols)?;
            seed.set(seed.get() + 1);
            let size = 1.0 / (cols as f32).sqrt();
            kernels.fill(&stream, matrix.values(), seed.get(), size)?;
            Ok::<_, CudaError>(matrix)
        };
        let norm = || Buffer::from_slice(gpu, "weights", &vec![1.0; config.hidden]);
        let shape = config.attention;
        let weights = Self {
            embedding: matrix(config.vocab, config.hidden)?,
            layers: (0..config.layers)
                .map(|_| {
                    Ok(Layer {
                        attention_norm: norm()?,
                        qkv: matrix(shape.qkv_width(), config.hidden)?,
                        output: matrix(config.hidden, shape.out_width())?,
                        ffn_norm: norm()?,
                        gate_up: matrix(2 * config.inner, config.hidden)?,
                        down: matrix(config.hidden, config.inner)?,
                    })
                })
                .collect::<Result<_, CudaError>>()?,
            output_norm: norm()?,
            output: None,
            rope_factors: None,
        };
        stream.synchronize()?;
        Ok(weights)
    }

    /// The language-model head, `[vocab, hidden]`.
    pub fn head(&self) -> &cuda::Weights {
        self.output.as_ref().unwrap_or(&self.embedding)
    }

    /// Memory that the matrices take.
    pub fn bytes(&self) -> u64 {
        let layers = self
            .layers
            .iter()
            .flat_map(|layer| [&layer.qkv, &layer.output, &layer.gate_up, &layer.down]);
        layers
            .chain([&self.embedding])
            .chain(&self.output)
            .map(cuda::Weights::bytes)
            .sum()
    }
}

/// Where a tensor's rows go in their matrix.
#[derive(Clone, Copy)]
enum Place {
    /// One after the other, from this row on.
    From(usize),
    Gate,
    Up,
}

struct Reader<'a> {
    gpu: &'a Arc<Gpu>,
    checkpoint: &'a Checkpoint,
    /// Elements read, of `total`.
    done: Cell<u64>,
    total: u64,
    progress: &'a dyn Fn(f32),
}

impl Reader<'_> {
    fn layer(&self, tensors: &LayerTensors) -> Result<Layer, LoadError> {
        let [query, key, value] = &tensors.qkv;
        let gate_up = [(&tensors.gate, Place::Gate), (&tensors.up, Place::Up)];
        Ok(Layer {
            attention_norm: self.vector(&tensors.attention_norm)?,
            qkv: self.matrix(&[query, key, value])?,
            output: self.matrix(&[&tensors.attention_output])?,
            ffn_norm: self.vector(&tensors.ffn_norm)?,
            gate_up: self.placed(&gate_up)?,
            down: self.matrix(&[&tensors.down])?,
        })
    }

    /// Tensors of the same number of columns as one matrix, their rows one after the other.
    fn matrix(&self, tensors: &[&TensorHandle]) -> Result<cuda::Weights, LoadError> {
        let mut first = 0;
        let placed: Vec<(&TensorHandle, Place)> = tensors
            .iter()
            .map(|tensor| {
                first += tensor.rows;
                (*tensor, Place::From(first - tensor.rows))
            })
            .collect();
        self.placed(&placed)
    }

    fn placed(&self, tensors: &[(&TensorHandle, Place)]) -> Result<cuda::Weights, LoadError> {
        let rows = tensors.iter().map(|(tensor, _)| tensor.rows).sum();
        let cols = tensors.first().map_or(0, |(tensor, _)| tensor.cols);
        let mut values = vec![f16::ZERO; rows * cols];
        for (tensor, place) in tensors {
            let chunks: Vec<usize> = (0..tensor.rows).step_by(ROWS_PER_TASK).collect();
            let parts = chunks
                .par_iter()
                .map(|&first| {
                    let rows = first..(first + ROWS_PER_TASK).min(tensor.rows);
                    Ok((first, self.halves(tensor, rows)?))
                })
                .collect::<Result<Vec<_>, LoadError>>()?;
            for (first, part) in parts {
                for (row, part) in (first..).zip(part.chunks_exact(cols)) {
                    let at = match place {
                        Place::From(start) => start + row,
                        Place::Gate => interleave_gate_up(row, false),
                        Place::Up => interleave_gate_up(row, true),
                    };
                    values[at * cols..(at + 1) * cols].copy_from_slice(part);
                }
            }
            self.finished(tensor);
        }
        let matrix = cuda::Weights::zeroed(self.gpu, rows, cols)?;
        matrix.values().write(&values)?;
        Ok(matrix)
    }

    fn halves(&self, tensor: &TensorHandle, rows: Range<usize>) -> Result<Vec<f16>, LoadError> {
        let floats = self.checkpoint.rows(tensor, rows)?;
        let mut halves = vec![f16::ZERO; floats.len()];
        halves.convert_from_f32_slice(&floats);
        match halves.iter().position(|v| !v.is_finite()) {
            None => Ok(halves),
            Some(at) => Err(LoadError::Overflow {
                name: tensor.name.clone(),
                value: floats[at],
            }),
        }
    }

    fn values(&self, tensor: &TensorHandle) -> Result<Vec<f32>, LoadError> {
        let values = self.checkpoint.rows(tensor, 0..1)?;
        self.finished(tensor);
        Ok(values)
    }

    fn vector(&self, tensor: &TensorHandle) -> Result<Buffer<f32>, LoadError> {
        Ok(Buffer::from_slice(
            self.gpu,
            "weights",
            &self.values(tensor)?,
        )?)
    }

    fn finished(&self, tensor: &TensorHandle) {
        let elements = (tensor.rows * tensor.cols) as u64;
        self.done.set(self.done.get() + elements);
        (self.progress)(self.done.get() as f32 / self.total.max(1) as f32);
    }
}
