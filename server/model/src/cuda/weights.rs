//! A model's weights on the GPU.

use std::{ops::Range, sync::Arc};

use half::{f16, slice::HalfFloatSliceExt};
use rayon::prelude::*;
use stoker_kernels::cuda::{self, Buffer, CudaError, Gpu, Kernels, Stream, interleave_gate_up};

use crate::{config::ModelConfig, error::LoadError, gguf::GgufFile};

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
        file: &GgufFile,
        config: &ModelConfig,
        progress: &dyn Fn(f32),
    ) -> Result<Self, LoadError> {
        let names = &config.architecture.tensors;
        let ModelConfig {
            hidden,
            inner,
            vocab,
            ..
        } = *config;
        let heads = config.attention.heads * config.attention.head_size;
        let kv_heads = config.attention.kv_heads * config.attention.head_size;
        let reader = Reader { gpu, file };
        let stacked = |parts: &[(String, usize)], cols| {
            let mut first = 0;
            let places: Vec<(String, usize, Place)> = parts
                .iter()
                .map(|(name, rows)| {
                    first += rows;
                    (name.clone(), *rows, Place::From(first - rows))
                })
                .collect();
            reader.matrix(&places, cols)
        };
        let one = |name: String, rows, cols| stacked(&[(name, rows)], cols);
        let embedding = one(names.embedding.to_owned(), vocab, hidden)?;
        progress(0.1);
        let mut layers = Vec::with_capacity(config.layers);
        for layer in 0..config.layers {
            let of = |name: &str| format!("blk.{layer}.{name}");
            layers.push(Layer {
                attention_norm: reader.vector(&of(names.attention_norm), hidden)?,
                qkv: stacked(
                    &[
                        (of(names.query), heads),
                        (of(names.key), kv_heads),
                        (of(names.value), kv_heads),
                    ],
                    hidden,
                )?,
                output: one(of(names.attention_output), hidden, heads)?,
                ffn_norm: reader.vector(&of(names.ffn_norm), hidden)?,
                gate_up: reader.matrix(
                    &[
                        (of(names.gate), inner, Place::Gate),
                        (of(names.up), inner, Place::Up),
                    ],
                    hidden,
                )?,
                down: one(of(names.down), hidden, inner)?,
            });
            progress(0.1 + 0.85 * (layer + 1) as f32 / config.layers as f32);
        }
        let output = match file.has_tensor(names.output) {
            true => Some(one(names.output.to_owned(), vocab, hidden)?),
            false => None,
        };
        let rope_factors = match file.has_tensor(names.rope_factors) {
            true => {
                let handle = file.tensor(names.rope_factors, &[config.rotated / 2])?;
                Some(file.rows(&handle, 0..1)?)
            }
            false => None,
        };
        progress(1.0);
        Ok(Self {
            embedding,
            layers,
            output_norm: reader.vector(names.output_norm, hidden)?,
            output,
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
    file: &'a GgufFile,
}

impl Reader<'_> {
    fn matrix(
        &self,
        tensors: &[(String, usize, Place)],
        cols: usize,
    ) -> Result<cuda::Weights, LoadError> {
        let rows = tensors.iter().map(|t| t.1).sum();
        let mut values = vec![f16::ZERO; rows * cols];
        for (name, rows, place) in tensors {
            let handle = self.file.tensor(name, &[*rows, cols])?;
            let read = |range: Range<usize>| -> Result<Vec<f16>, LoadError> {
                let floats = self.file.rows(&handle, range)?;
                let mut halves = vec![f16::ZERO; floats.len()];
                halves.convert_from_f32_slice(&floats);
                match halves.iter().position(|v| !v.is_finite()) {
                    None => Ok(halves),
                    Some(at) => Err(LoadError::Overflow {
                        name: name.clone(),
                        value: floats[at],
                    }),
                }
            };
            let chunks: Vec<usize> = (0..*rows).step_by(ROWS_PER_TASK).collect();
            let parts = chunks
                .par_iter()
                .map(|&first| Ok((first, read(first..(first + ROWS_PER_TASK).min(*rows))?)))
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
        }
        let matrix = cuda::Weights::zeroed(self.gpu, rows, cols)?;
        matrix.values().write(&values)?;
        Ok(matrix)
    }

    fn vector(&self, name: &str, len: usize) -> Result<Buffer<f32>, LoadError> {
        let handle = self.file.tensor(name, &[len])?;
        let values = self.file.rows(&handle, 0..1)?;
        Ok(Buffer::from_slice(self.gpu, "weights", &values)?)
    }
}
