//! Weights out of a checkpoint, dequantised and packed.

use std::{cell::Cell, ops::Range};

use rayon::ThreadPool;
use stoker_kernels::{Matrix, Norm};

use crate::{
    checkpoint::Checkpoint,
    config::ModelConfig,
    error::LoadError,
    tensor::TensorHandle,
    tensors::{LayerTensors, Tensors},
};

/// The largest number that f16 holds.
const F16_MAX: f32 = 65504.0;

#[derive(Debug)]
pub struct Weights {
    pub embedding: Matrix,
    pub layers: Vec<Layer>,
    pub output_norm: Norm,
    /// `None` where the head is the embedding.
    output: Option<Matrix>,
    /// What divides rope's frequencies, one a pair.
    pub rope_factors: Option<Vec<f32>>,
}

#[derive(Debug)]
pub struct Layer {
    pub attention_norm: Norm,
    /// Query, key and value rows, one after the other.
    pub qkv: Matrix,
    /// Of all rows of `qkv`.
    pub qkv_bias: Option<Vec<f32>>,
    pub head_norms: Option<HeadNorms>,
    pub output: Matrix,
    pub ffn_norm: Norm,
    pub gate: Matrix,
    pub up: Matrix,
    pub down: Matrix,
}

/// Norms of a single head.
#[derive(Debug)]
pub struct HeadNorms {
    pub query: Norm,
    pub key: Norm,
}

impl Weights {
    /// Reads all tensors on the threads of `pool`; `progress` is given the share that is done.
    pub fn load(
        checkpoint: &Checkpoint,
        config: &ModelConfig,
        pool: &ThreadPool,
        progress: &dyn Fn(f32),
    ) -> Result<Self, LoadError> {
        let tensors = Tensors::find(checkpoint, config)?;
        let elements = |tensor: &TensorHandle| (tensor.rows * tensor.cols) as u64;
        let reader = Reader {
            checkpoint,
            pool,
            epsilon: config.norm_epsilon,
            done: Cell::new(0),
            total: tensors.all().map(elements).sum(),
            progress,
        };
        let rope_factors = match &tensors.rope_factors {
            Some(tensor) => Some(reader.vector(tensor)?),
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
            output_norm: reader.norm(&tensors.output_norm)?,
            output: match &tensors.output {
                Some(tensor) => Some(reader.matrix(&[tensor])?),
                None => None,
            },
            rope_factors,
        })
    }

    /// The language-model head, `[vocab, hidden]`.
    pub fn head(&self) -> &Matrix {
        self.output.as_ref().unwrap_or(&self.embedding)
    }

    /// Memory that the matrices take.
    pub fn bytes(&self) -> usize {
        let layers = self.layers.iter().flat_map(|layer| {
            [
                &layer.qkv,
                &layer.output,
                &layer.gate,
                &layer.up,
                &layer.down,
            ]
        });
        layers
            .chain([&self.embedding])
            .chain(&self.output)
            .map(Matrix::bytes)
            .sum()
    }
}

struct Reader<'a> {
    checkpoint: &'a Checkpoint,
    pool: &'a ThreadPool,
    epsilon: f32,
    /// Elements read, of `total`.
    done: Cell<u64>,
    total: u64,
    progress: &'a dyn Fn(f32),
}

impl Reader<'_> {
    fn layer(&self, tensors: &LayerTensors) -> Result<Layer, LoadError> {
        let [query, key, value] = &tensors.qkv;
        Ok(Layer {
            attention_norm: self.norm(&tensors.attention_norm)?,
            qkv: self.matrix(&[query, key, value])?,
            qkv_bias: match &tensors.qkv_bias {
                Some(biases) => {
                    let parts = biases.iter().map(|bias| self.vector(bias));
                    Some(parts.collect::<Result<Vec<_>, _>>()?.concat())
                }
                None => None,
            },
            head_norms: match &tensors.head_norms {
                Some([query, key]) => Some(HeadNorms {
                    query: self.norm(query)?,
                    key: self.norm(key)?,
                }),
                None => None,
            },
            output: self.matrix(&[&tensors.attention_output])?,
            ffn_norm: self.norm(&tensors.ffn_norm)?,
            gate: self.matrix(&[&tensors.gate])?,
            up: self.matrix(&[&tensors.up])?,
            down: self.matrix(&[&tensors.down])?,
        })
    }

    /// Reads tensors of the same number of columns as one matrix, their rows one after the other.
    fn matrix(&self, tensors: &[&TensorHandle]) -> Result<Matrix, LoadError> {
        let rows = tensors.iter().map(|tensor| tensor.rows).sum();
        let cols = tensors.first().map_or(0, |tensor| tensor.cols);
        let matrix = self.pool.install(|| {
            Matrix::from_rows(rows, cols, |range| {
                stacked_rows(self.checkpoint, tensors, range)
            })
        })?;
        self.finished(tensors);
        Ok(matrix)
    }

    fn vector(&self, tensor: &TensorHandle) -> Result<Vec<f32>, LoadError> {
        let values = self.checkpoint.rows(tensor, 0..1)?;
        self.finished(&[tensor]);
        Ok(values)
    }

    fn norm(&self, tensor: &TensorHandle) -> Result<Norm, LoadError> {
        Ok(Norm {
            weight: self.vector(tensor)?,
            epsilon: self.epsilon,
        })
    }

    fn finished(&self, tensors: &[&TensorHandle]) {
        let elements: usize = tensors.iter().map(|tensor| tensor.rows * tensor.cols).sum();
        self.done.set(self.done.get() + elements as u64);
        (self.progress)(self.done.get() as f32 / self.total.max(1) as f32);
    }
}

/// Rows of several tensors that stand one below the other.
fn stacked_rows(
    checkpoint: &Checkpoint,
    tensors: &[&TensorHandle],
    range: Range<usize>,
) -> Result<Vec<f32>, LoadError> {
    let mut values = Vec::new();
    let mut first = 0;
    for tensor in tensors {
        let start = range.start.clamp(first, first + tensor.rows) - first;
        let end = range.end.clamp(first, first + tensor.rows) - first;
        if start < end {
            let rows = checkpoint.rows(tensor, start..end)?;
            check_range(tensor, &rows)?;
            if values.is_empty() {
                values = rows;
            } else {
                values.extend(rows);
            }
        }
        first += tensor.rows;
    }
    Ok(values)
}

/// Weights become f16, which bf16 and f32 outgrow.
fn check_range(tensor: &TensorHandle, values: &[f32]) -> Result<(), LoadError> {
    // False of a NaN as well.
    let fits = |value: &f32| value.abs() <= F16_MAX;
    match values.iter().find(|value| !fits(value)) {
        None => Ok(()),
        Some(&value) => Err(LoadError::Overflow {
            name: tensor.name.clone(),
            value,
        }),
    }
}
