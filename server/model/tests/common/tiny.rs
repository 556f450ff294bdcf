//! A Llama with random weights, small enough for plain loops, as a GGUF file.

use std::{collections::BTreeMap, path::Path};

use candle_core::{
    Device, Tensor,
    quantized::{
        GgmlDType, QTensor,
        gguf_file::{self, Value},
    },
};

pub const LAYERS: usize = 3;
pub const HIDDEN: usize = 64;
pub const HEADS: usize = 6;
pub const KV_HEADS: usize = 2;
pub const HEAD_SIZE: usize = 16;
pub const INNER: usize = 96;
pub const VOCAB: usize = 300;
pub const CONTEXT: u32 = 256;
pub const ROPE_BASE: f32 = 5000.0;
pub const EPSILON: f32 = 1e-5;

pub struct TinyFile {
    pub metadata: BTreeMap<String, Value>,
    pub tensors: BTreeMap<String, (Vec<usize>, GgmlDType)>,
}

impl TinyFile {
    /// Tied to the embedding, without rope factors.
    pub fn new() -> Self {
        let mut tokens: Vec<String> = (33..=126u8)
            .chain(161..=172)
            .chain(174..=255)
            .map(|b| char::from(b).to_string())
            .collect();
        tokens.extend(('\u{100}'..).take(256 - tokens.len()).map(String::from));
        tokens.extend((256..VOCAB).map(|i| format!("<|{i}|>")));
        let types = (0..VOCAB).map(|i| Value::I32(if i < 256 { 1 } else { 3 }));
        let string = |s: &str| Value::String(s.into());
        let size = |n: usize| Value::U32(n as u32);
        let metadata = [
            ("general.architecture", string("llama")),
            ("general.name", string("tiny")),
            ("llama.block_count", size(LAYERS)),
            ("llama.context_length", Value::U32(CONTEXT)),
            ("llama.embedding_length", size(HIDDEN)),
            ("llama.feed_forward_length", size(INNER)),
            ("llama.attention.head_count", size(HEADS)),
            ("llama.attention.head_count_kv", size(KV_HEADS)),
            ("llama.attention.key_length", size(HEAD_SIZE)),
            ("llama.attention.value_length", size(HEAD_SIZE)),
            (
                "llama.attention.layer_norm_rms_epsilon",
                Value::F32(EPSILON),
            ),
            ("llama.rope.freq_base", Value::F32(ROPE_BASE)),
            ("llama.rope.dimension_count", size(HEAD_SIZE)),
            ("tokenizer.ggml.model", string("gpt2")),
            ("tokenizer.ggml.pre", string("smollm")),
            (
                "tokenizer.ggml.tokens",
                Value::Array(tokens.into_iter().map(Value::String).collect()),
            ),
            ("tokenizer.ggml.token_type", Value::Array(types.collect())),
            ("tokenizer.ggml.merges", Value::Array(vec![])),
            ("tokenizer.ggml.eos_token_id", Value::U32(299)),
        ];
        let mut file = Self {
            metadata: metadata.map(|(k, v)| (k.to_owned(), v)).into(),
            tensors: BTreeMap::new(),
        };
        let (queries, keys) = (HEADS * HEAD_SIZE, KV_HEADS * HEAD_SIZE);
        file.tensor("token_embd.weight", &[VOCAB, HIDDEN], GgmlDType::Q8_0);
        file.tensor("output_norm.weight", &[HIDDEN], GgmlDType::F32);
        for layer in 0..LAYERS {
            for (name, shape, dtype) in [
                ("attn_norm", &[HIDDEN][..], GgmlDType::F32),
                ("attn_q", &[queries, HIDDEN], GgmlDType::F16),
                ("attn_k", &[keys, HIDDEN], GgmlDType::Q4_1),
                ("attn_v", &[keys, HIDDEN], GgmlDType::BF16),
                ("attn_output", &[HIDDEN, queries], GgmlDType::F32),
                ("ffn_norm", &[HIDDEN], GgmlDType::F32),
                ("ffn_gate", &[INNER, HIDDEN], GgmlDType::Q4_0),
                ("ffn_up", &[INNER, HIDDEN], GgmlDType::Q5_1),
                ("ffn_down", &[HIDDEN, INNER], GgmlDType::Q8_0),
            ] {
                file.tensor(&format!("blk.{layer}.{name}.weight"), shape, dtype);
            }
        }
        file
    }

    pub fn tensor(&mut self, name: &str, shape: &[usize], dtype: GgmlDType) {
        self.tensors.insert(name.into(), (shape.to_vec(), dtype));
    }

    pub fn write(&self, path: &Path) {
        let tensors: Vec<(&str, QTensor)> = self
            .tensors
            .iter()
            .zip(1u64..)
            .map(|((name, (shape, dtype)), seed)| {
                let norm = shape.len() == 1;
                let cols = *shape.last().unwrap() as f32;
                let values: Vec<f32> = random(seed, shape.iter().product())
                    .map(|v| {
                        if norm {
                            1.0 + v / 2.0
                        } else {
                            v * 2.0 / cols.sqrt()
                        }
                    })
                    .collect();
                let tensor = Tensor::from_vec(values, shape.as_slice(), &Device::Cpu).unwrap();
                (name.as_str(), QTensor::quantize(&tensor, *dtype).unwrap())
            })
            .collect();
        let tensors: Vec<(&str, &QTensor)> = tensors.iter().map(|(n, t)| (*n, t)).collect();
        let metadata: Vec<(&str, &Value)> =
            self.metadata.iter().map(|(k, v)| (k.as_str(), v)).collect();
        let mut file = std::fs::File::create(path).unwrap();
        gguf_file::write(&mut file, &metadata, &tensors).unwrap();
    }
}

/// Numbers in -1..1 (xorshift64*).
pub fn random(seed: u64, len: usize) -> impl Iterator<Item = f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    (0..len).map(move |_| {
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        (state.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 40) as f32 / (1u32 << 23) as f32 - 1.0
    })
}
