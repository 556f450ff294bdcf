//! Architectures as data: which fused blocks a layer runs, and what its tensors are called.
//!
//! A backend executes the plan; adding a model that is made of these blocks adds a value to
//! [`ARCHITECTURES`], no code.

use crate::error::LoadError;

/// A fused block of a layer; each has a function of its name in `stoker-kernels`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Block {
    NormQkv,
    RopeAttention,
    OutputResidual,
    NormGateUp,
    DownResidual,
}

#[derive(Debug)]
pub struct Architecture {
    /// `general.architecture`, and the prefix of the model's metadata keys.
    pub name: &'static str,
    /// What a layer runs, in order. Before the first layer stands the embedding, after the last
    /// one norm, head and sampling.
    pub layer: &'static [Block],
    pub tensors: TensorNames,
}

/// Tensor names; those of a layer without their `blk.<layer>.`.
#[derive(Debug)]
pub struct TensorNames {
    pub embedding: &'static str,
    pub output_norm: &'static str,
    /// Absent from the file where the head is tied to the embedding.
    pub output: &'static str,
    /// Divisors of the rope frequencies; optional.
    pub rope_factors: &'static str,
    pub attention_norm: &'static str,
    pub query: &'static str,
    pub key: &'static str,
    pub value: &'static str,
    pub attention_output: &'static str,
    pub ffn_norm: &'static str,
    pub gate: &'static str,
    pub up: &'static str,
    pub down: &'static str,
}

/// Llama (1 to 3.x, SmolLM2, and others of its shape). GGUF's converter has put the rotated pairs
/// of queries and keys side by side.
pub const LLAMA: Architecture = Architecture {
    name: "llama",
    layer: &[
        Block::NormQkv,
        Block::RopeAttention,
        Block::OutputResidual,
        Block::NormGateUp,
        Block::DownResidual,
    ],
    tensors: TensorNames {
        embedding: "token_embd.weight",
        output_norm: "output_norm.weight",
        output: "output.weight",
        rope_factors: "rope_freqs.weight",
        attention_norm: "attn_norm.weight",
        query: "attn_q.weight",
        key: "attn_k.weight",
        value: "attn_v.weight",
        attention_output: "attn_output.weight",
        ffn_norm: "ffn_norm.weight",
        gate: "ffn_gate.weight",
        up: "ffn_up.weight",
        down: "ffn_down.weight",
    },
};

pub const ARCHITECTURES: &[&Architecture] = &[&LLAMA];

pub fn find(name: &str) -> Result<&'static Architecture, LoadError> {
    ARCHITECTURES
        .iter()
        .find(|architecture| architecture.name == name)
        .copied()
        .ok_or_else(|| LoadError::Architecture {
            found: name.to_owned(),
            supported: ARCHITECTURES
                .iter()
                .map(|architecture| architecture.name)
                .collect::<Vec<_>>()
                .join(", "),
        })
}
