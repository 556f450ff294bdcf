//! Where all tensors of a model lie, found and checked before any of them is read.

use std::collections::HashSet;

use crate::{
    architecture::PairOrder, checkpoint::Checkpoint, config::ModelConfig, error::LoadError,
    tensor::TensorHandle,
};

/// The places of a model's tensors. Reading queries and keys by these handles gives rows in the
/// order that backends want ([`PairOrder::Adjacent`]), whatever the file's.
#[derive(Clone, Debug)]
pub struct Tensors {
    /// `[vocab, hidden]`
    pub embedding: TensorHandle,
    pub layers: Vec<LayerTensors>,
    /// `[hidden]`
    pub output_norm: TensorHandle,
    /// `[vocab, hidden]`; `None` where the head is the embedding.
    pub output: Option<TensorHandle>,
    /// `[rotated / 2]`
    pub rope_factors: Option<TensorHandle>,
}

#[derive(Clone, Debug)]
pub struct LayerTensors {
    /// `[hidden]`
    pub attention_norm: TensorHandle,
    /// Queries `[heads * head_size, hidden]`, keys and values `[kv_heads * head_size, hidden]`.
    pub qkv: [TensorHandle; 3],
    /// Biases of the three, if the architecture has them.
    pub qkv_bias: Option<[TensorHandle; 3]>,
    /// Norms of a query's and a key's head, `[head_size]`, if the architecture has them.
    pub head_norms: Option<[TensorHandle; 2]>,
    /// `[hidden, heads * head_size]`
    pub attention_output: TensorHandle,
    /// `[hidden]`
    pub ffn_norm: TensorHandle,
    /// `[inner, hidden]`
    pub gate: TensorHandle,
    /// `[inner, hidden]`
    pub up: TensorHandle,
    /// `[hidden, inner]`
    pub down: TensorHandle,
}

impl Tensors {
    /// Finds what the architecture needs, checks shapes, and refuses a file that has more than
    /// that: what would be ignored would be missing from the answers.
    pub fn find(checkpoint: &Checkpoint, config: &ModelConfig) -> Result<Self, LoadError> {
        let names = &config.architecture.tensors;
        let ModelConfig {
            hidden,
            vocab,
            rotated,
            ..
        } = *config;
        let output = match checkpoint.is_tied() {
            true => None,
            false => optional(checkpoint, names.output, &[vocab, hidden])?,
        };
        let tensors = Self {
            embedding: checkpoint.tensor(names.embedding, &[vocab, hidden])?,
            layers: (0..config.layers)
                .map(|layer| LayerTensors::find(checkpoint, config, layer))
                .collect::<Result<_, _>>()?,
            output_norm: checkpoint.tensor(names.output_norm, &[hidden])?,
            output,
            rope_factors: optional(checkpoint, names.rope_factors, &[rotated / 2])?,
        };
        if tensors.output.is_none() && !checkpoint.may_be_tied() {
            return Err(LoadError::MissingTensor {
                name: "lm_head.weight".to_owned(),
            });
        }
        tensors.check_all_used(checkpoint)?;
        Ok(tensors)
    }

    /// Every tensor.
    pub fn all(&self) -> impl Iterator<Item = &TensorHandle> {
        let ends = [&self.embedding, &self.output_norm];
        ends.into_iter()
            .chain(&self.output)
            .chain(&self.rope_factors)
            .chain(self.layers.iter().flat_map(LayerTensors::all))
    }

    fn check_all_used(&self, checkpoint: &Checkpoint) -> Result<(), LoadError> {
        let used: HashSet<&str> = self.all().map(|tensor| tensor.name.as_str()).collect();
        let mut unused = checkpoint.tensor_names();
        unused.retain(|name| !used.contains(name) && !checkpoint.is_superfluous(name));
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

impl LayerTensors {
    fn find(
        checkpoint: &Checkpoint,
        config: &ModelConfig,
        layer: usize,
    ) -> Result<Self, LoadError> {
        let names = &config.architecture.tensors;
        let options = config.architecture.options;
        let shape = config.attention;
        let (hidden, inner) = (config.hidden, config.inner);
        let queries = shape.heads * shape.head_size;
        let keys = shape.kv_heads * shape.head_size;
        let find =
            |name: &str, shape: &[usize]| checkpoint.tensor(&format!("blk.{layer}.{name}"), shape);
        let rotated = |name: &str, dims: &[usize]| {
            let tensor = find(name, dims)?;
            Ok::<_, LoadError>(match config.pairs {
                PairOrder::Adjacent => tensor,
                PairOrder::Halves => tensor.from_halves(shape.head_size, config.rotated),
            })
        };
        Ok(Self {
            attention_norm: find(names.attention_norm, &[hidden])?,
            qkv: [
                rotated(names.query, &[queries, hidden])?,
                rotated(names.key, &[keys, hidden])?,
                find(names.value, &[keys, hidden])?,
            ],
            qkv_bias: match options.qkv_bias {
                true => Some([
                    rotated(names.query_bias, &[queries])?,
                    rotated(names.key_bias, &[keys])?,
                    find(names.value_bias, &[keys])?,
                ]),
                false => None,
            },
            head_norms: match options.head_norms {
                true => Some([
                    rotated(names.query_norm, &[shape.head_size])?,
                    rotated(names.key_norm, &[shape.head_size])?,
                ]),
                false => None,
            },
            attention_output: find(names.attention_output, &[hidden, queries])?,
            ffn_norm: find(names.ffn_norm, &[hidden])?,
            gate: find(names.gate, &[inner, hidden])?,
            up: find(names.up, &[inner, hidden])?,
            down: find(names.down, &[hidden, inner])?,
        })
    }

    fn all(&self) -> impl Iterator<Item = &TensorHandle> {
        let plain = [
            &self.attention_norm,
            &self.attention_output,
            &self.ffn_norm,
            &self.gate,
            &self.up,
            &self.down,
        ];
        plain
            .into_iter()
            .chain(&self.qkv)
            .chain(self.qkv_bias.iter().flatten())
            .chain(self.head_norms.iter().flatten())
    }
}

fn optional(
    checkpoint: &Checkpoint,
    name: &str,
    shape: &[usize],
) -> Result<Option<TensorHandle>, LoadError> {
    match checkpoint.has_tensor(name) {
        true => checkpoint.tensor(name, shape).map(Some),
        false => Ok(None),
    }
}
