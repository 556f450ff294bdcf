//! Weights out of a GGUF file, dequantised and packed.

use std::{cell::Cell, collections::HashSet, ops::Range};

use rayon::ThreadPool;
use stoker_kernels::{Matrix, Norm};

use crate::{
    config::ModelConfig,
    error::LoadError,
    gguf::{GgufFile, TensorHandle},
};

#[derive(Debug)]
pub struct Weights {
    pub embedding: Matrix,
    pub layers: Vec<Layer>,
    pub output_norm: Norm,
    /// `None` where the head is the embedding.
    output: Option<Matrix>,
    pub rope_factors: Option<Vec<f32>>,
}

#[derive(Debug)]
pub struct Layer {
    pub attention_norm: Norm,
    /// Query, key and value rows, one after the other.
    pub qkv: Matrix,
    pub output: Matrix,
    pub ffn_norm: Norm,
    pub gate: Matrix,
    pub up: Matrix,
    pub down: Matrix,
}

impl Weights {
    /// Reads all tensors on the threads of `pool`; `progress` is given the share that is done.
    pub fn load(
        file: &GgufFile,
        config: &ModelConfig,
        pool: &ThreadPool,
        progress: &dyn Fn(f32),
    ) -> Result<Self, LoadError> {
        let names = &config.architecture.tensors;
        let reader = Reader {
            file,
            pool,
            epsilon: config.norm_epsilon,
            used: Cell::default(),
            done: Cell::new(0),
            total: file.parameters(),
            progress,
        };
        let ModelConfig {
            hidden,
            inner,
            vocab,
            ..
        } = *config;
        let heads = config.attention.heads * config.attention.head_size;
        let kv_heads = config.attention.kv_heads * config.attention.head_size;

        let embedding = reader.matrix(&[(names.embedding, vocab)], hidden)?;
        let layers = (0..config.layers)
            .map(|layer| {
                let of = |name: &str| format!("blk.{layer}.{name}");
                let matrix = |name, rows, cols| reader.matrix(&[(&of(name), rows)], cols);
                Ok(Layer {
                    attention_norm: reader.norm(&of(names.attention_norm), hidden)?,
                    qkv: reader.matrix(
                        &[
                            (&of(names.query), heads),
                            (&of(names.key), kv_heads),
                            (&of(names.value), kv_heads),
                        ],
                        hidden,
                    )?,
                    output: matrix(names.attention_output, hidden, heads)?,
                    ffn_norm: reader.norm(&of(names.ffn_norm), hidden)?,
                    gate: matrix(names.gate, inner, hidden)?,
                    up: matrix(names.up, inner, hidden)?,
                    down: matrix(names.down, hidden, inner)?,
                })
            })
            .collect::<Result<Vec<_>, LoadError>>()?;
        let output_norm = reader.norm(names.output_norm, hidden)?;
        let output = match file.has_tensor(names.output) {
            true => Some(reader.matrix(&[(names.output, vocab)], hidden)?),
            false => None,
        };
        let rope_factors = match file.has_tensor(names.rope_factors) {
            true => Some(reader.vector(names.rope_factors, config.rotated / 2)?),
            false => None,
        };
        reader.check_all_used()?;
        Ok(Self {
            embedding,
            layers,
            output_norm,
            output,
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
    file: &'a GgufFile,
    pool: &'a ThreadPool,
    epsilon: f32,
    used: Cell<HashSet<String>>,
    done: Cell<u64>,
    total: u64,
    progress: &'a dyn Fn(f32),
}

impl Reader<'_> {
    /// Reads tensors of `cols` columns as one matrix, their rows one after the other.
    fn matrix(&self, tensors: &[(&str, usize)], cols: usize) -> Result<Matrix, LoadError> {
        let handles = tensors
            .iter()
            .map(|&(name, rows)| self.file.tensor(name, &[rows, cols]))
            .collect::<Result<Vec<_>, _>>()?;
        let rows = handles.iter().map(|handle| handle.rows).sum();
        let matrix = self.pool.install(|| {
            Matrix::from_rows(rows, cols, |range| stacked_rows(self.file, &handles, range))
        })?;
        self.finished(&handles);
        Ok(matrix)
    }

    fn vector(&self, name: &str, len: usize) -> Result<Vec<f32>, LoadError> {
        let handle = self.file.tensor(name, &[len])?;
        let values = self.file.rows(&handle, 0..1)?;
        self.finished(&[handle]);
        Ok(values)
    }

    fn norm(&self, name: &str, len: usize) -> Result<Norm, LoadError> {
        Ok(Norm {
            weight: self.vector(name, len)?,
            epsilon: self.epsilon,
        })
    }

    fn finished(&self, handles: &[TensorHandle]) {
        let mut used = self.used.take();
        for handle in handles {
            used.insert(handle.name.clone());
            let parameters = (handle.rows * handle.cols) as u64;
            self.done.set(self.done.get() + parameters);
        }
        self.used.set(used);
        (self.progress)(self.done.get() as f32 / self.total.max(1) as f32);
    }

    fn check_all_used(&self) -> Result<(), LoadError> {
        let used = self.used.take();
        let mut unused: Vec<&str> = self
            .file
            .tensor_names()
            .filter(|name| !used.contains(*name))
            .collect();
        if unused.is_empty() {
            return Ok(());
        }
        unused.sort_unstable();
        let more = unused.len().saturating_sub(5);
        unused.truncate(5);
        let mut names = unused.join(", ");
        if more > 0 {
            names += &format!(" and {more} more");
        }
        Err(LoadError::UnusedTensors { names })
    }
}

/// Rows of several tensors that stand one below the other.
fn stacked_rows(
    file: &GgufFile,
    handles: &[TensorHandle],
    range: Range<usize>,
) -> Result<Vec<f32>, LoadError> {
    let mut values = Vec::new();
    let mut first = 0;
    for handle in handles {
        let start = range.start.clamp(first, first + handle.rows) - first;
        let end = range.end.clamp(first, first + handle.rows) - first;
        if start < end {
            let rows = file.rows(handle, start..end)?;
            if values.is_empty() {
                values = rows;
            } else {
                values.extend(rows);
            }
        }
        first += handle.rows;
    }
    Ok(values)
}
