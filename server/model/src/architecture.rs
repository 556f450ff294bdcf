//! Architectures as data: which fused blocks a layer runs, and what its tensors are called.
//!
//! A backend executes the plan; adding a model that is made of these blocks adds a value to
//! [`ARCHITECTURES`], no code. What a single model of an architecture may choose (sizes, rope
//! scaling, a sliding window) is in its [`ModelConfig`](crate::config::ModelConfig).

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
    /// `general.architecture` in GGUF, and the prefix of the model's metadata keys.
    pub name: &'static str,
    /// The item of `architectures` in a Hugging Face config.json.
    pub class: &'static str,
    /// What a layer runs, in order. Before the first layer stands the embedding, after the last
    /// one norm, head and sampling.
    pub layer: &'static [Block],
    pub options: BlockOptions,
    pub tensors: TensorNames,
    /// How a GGUF file orders the rows of queries and keys. Hugging Face's order is always
    /// [`PairOrder::Halves`].
    pub gguf_pairs: PairOrder,
}

/// What the blocks of an architecture do beside their plain work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockOptions {
    /// [`Block::NormQkv`] adds a bias to queries, keys and values.
    pub qkv_bias: bool,
    /// [`Block::NormQkv`] ends with a norm of each head of queries and keys.
    pub head_norms: bool,
}

/// Which dimensions of a head rope rotates together. Backends only ever see
/// [`PairOrder::Adjacent`]: rows in the other order are rearranged while they are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PairOrder {
    /// (0, 1), (2, 3), …
    Adjacent,
    /// (0, n/2), (1, n/2 + 1), … of the n rotated dimensions.
    Halves,
}

/// Tensor names of GGUF, by which a tensor goes whatever its file calls it; those of a layer
/// without their `blk.<layer>.`.
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
    pub query_bias: &'static str,
    pub key_bias: &'static str,
    pub value_bias: &'static str,
    pub query_norm: &'static str,
    pub key_norm: &'static str,
    pub attention_output: &'static str,
    pub ffn_norm: &'static str,
    pub gate: &'static str,
    pub up: &'static str,
    pub down: &'static str,
}

/// Names that all architectures below share.
const TENSORS: TensorNames = TensorNames {
    embedding: "token_embd.weight",
    output_norm: "output_norm.weight",
    output: "output.weight",
    rope_factors: "rope_freqs.weight",
    attention_norm: "attn_norm.weight",
    query: "attn_q.weight",
    key: "attn_k.weight",
    value: "attn_v.weight",
    query_bias: "attn_q.bias",
    key_bias: "attn_k.bias",
    value_bias: "attn_v.bias",
    query_norm: "attn_q_norm.weight",
    key_norm: "attn_k_norm.weight",
    attention_output: "attn_output.weight",
    ffn_norm: "ffn_norm.weight",
    gate: "ffn_gate.weight",
    up: "ffn_up.weight",
    down: "ffn_down.weight",
};

const LAYER: &[Block] = &[
    Block::NormQkv,
    Block::RopeAttention,
    Block::OutputResidual,
    Block::NormGateUp,
    Block::DownResidual,
];

/// Llama (1 to 3.x, SmolLM2, and others of its shape). GGUF's converter has put the rotated pairs
/// of queries and keys side by side.
pub const LLAMA: Architecture = Architecture {
    name: "llama",
    class: "LlamaForCausalLM",
    layer: LAYER,
    options: BlockOptions {
        qkv_bias: false,
        head_norms: false,
    },
    tensors: TENSORS,
    gguf_pairs: PairOrder::Adjacent,
};

/// Mistral: Llama's blocks, with a sliding window where its config has one. In GGUF files it goes
/// by the name of Llama.
pub const MISTRAL: Architecture = Architecture {
    name: "mistral",
    class: "MistralForCausalLM",
    ..LLAMA
};

/// Qwen2 and Qwen2.5.
pub const QWEN2: Architecture = Architecture {
    name: "qwen2",
    class: "Qwen2ForCausalLM",
    options: BlockOptions {
        qkv_bias: true,
        head_norms: false,
    },
    gguf_pairs: PairOrder::Halves,
    ..LLAMA
};

pub const QWEN3: Architecture = Architecture {
    name: "qwen3",
    class: "Qwen3ForCausalLM",
    options: BlockOptions {
        qkv_bias: false,
        head_norms: true,
    },
    gguf_pairs: PairOrder::Halves,
    ..LLAMA
};

pub const ARCHITECTURES: &[&Architecture] = &[&LLAMA, &MISTRAL, &QWEN2, &QWEN3];

/// The architecture of a GGUF file.
pub fn find(name: &str) -> Result<&'static Architecture, LoadError> {
    by("general.architecture", name, |architecture| {
        architecture.name
    })
}

/// The architecture of a Hugging Face checkpoint, by the class that config.json names.
pub fn find_class(class: &str) -> Result<&'static Architecture, LoadError> {
    by("config.json: architectures", class, |architecture| {
        architecture.class
    })
}

fn by(
    key: &'static str,
    found: &str,
    name: impl Fn(&Architecture) -> &'static str,
) -> Result<&'static Architecture, LoadError> {
    let known = ARCHITECTURES.iter().copied();
    known
        .clone()
        .find(|architecture| name(architecture) == found)
        .ok_or_else(|| LoadError::Architecture {
            key,
            found: found.to_owned(),
            supported: known.map(&name).collect::<Vec<_>>().join(", "),
        })
}
