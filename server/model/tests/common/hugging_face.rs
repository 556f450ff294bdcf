//! A checkpoint as Hugging Face's hub has it, small and with random weights: config.json, sharded
//! safetensors, tokenizer.json, tokenizer_config.json, generation_config.json. The server's tests
//! use it as well.

#![allow(
    dead_code,
    clippy::unwrap_used,
    reason = "each test file uses a part; a failed helper fails its test"
)]

use std::{
    collections::{BTreeMap, HashMap},
    path::Path,
};

use half::{bf16, f16};
use serde_json::{Value, json};

pub const HIDDEN: usize = 64;
pub const LAYERS: usize = 3;
pub const INNER: usize = 96;
pub const VOCAB: usize = 288;
pub const CONTEXT: usize = 256;

/// Ids of the control tokens; those below are bytes, those above have no text.
pub const BOS: u32 = 256;
pub const IM_START: u32 = 257;
pub const IM_END: u32 = 258;

pub const CHAT_TEMPLATE: &str = "{{ bos_token }}{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dtype {
    F16,
    BF16,
    F32,
}

#[derive(Clone)]
pub struct HuggingFace {
    pub config: Value,
    pub dtype: Dtype,
    /// Files that the weights are spread over; 1: `model.safetensors` without an index.
    pub shards: usize,
    pub tensors: BTreeMap<String, Tensor>,
}

#[derive(Clone)]
pub struct Tensor {
    pub shape: Vec<usize>,
    pub values: Vec<f32>,
}

impl HuggingFace {
    /// Llama 3.1 to 3.3 with its rope scaling, a head of its own.
    pub fn llama3() -> Self {
        let mut model = Self::new("LlamaForCausalLM", 4, 2, 16);
        model.set(json!({
            "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
            "rope_theta": 10000.0, "tie_word_embeddings": false,
        }));
        model.tensor("lm_head.weight", &[VOCAB, HIDDEN]);
        model
    }

    /// Llama's blocks, tied, three heads to a KV head.
    pub fn smollm2() -> Self {
        let mut model = Self::new("LlamaForCausalLM", 3, 1, 16);
        model.set(json!({"rope_theta": 100000.0, "tie_word_embeddings": true}));
        model.config["hidden_size"] = json!(48);
        model.tensors.clear();
        model.add_tensors(48, 3, 1, 16);
        model
    }

    /// A sliding window of 12 tokens and heads that don't add up to the hidden size.
    pub fn mistral() -> Self {
        let mut model = Self::new("MistralForCausalLM", 4, 2, 32);
        model.set(json!({"rope_theta": 10000.0, "sliding_window": 12, "head_dim": 32}));
        model.tensor("lm_head.weight", &[VOCAB, HIDDEN]);
        model
    }

    pub fn qwen2() -> Self {
        let mut model = Self::new("Qwen2ForCausalLM", 4, 2, 16);
        model.set(
            json!({"rope_theta": 1000000.0, "tie_word_embeddings": true, "sliding_window": 64,
            "use_sliding_window": false, "max_window_layers": 3}),
        );
        for layer in 0..LAYERS {
            for (name, size) in [("q", 64), ("k", 32), ("v", 32)] {
                model.tensor(
                    &format!("model.layers.{layer}.self_attn.{name}_proj.bias"),
                    &[size],
                );
            }
        }
        model
    }

    pub fn qwen3() -> Self {
        let mut model = Self::new("Qwen3ForCausalLM", 6, 2, 32);
        model.set(
            json!({"rope_theta": 1000000.0, "tie_word_embeddings": true, "head_dim": 32,
            "attention_bias": false, "sliding_window": null, "use_sliding_window": false,
            "max_window_layers": 3}),
        );
        for layer in 0..LAYERS {
            for name in ["q_norm", "k_norm"] {
                model.tensor(
                    &format!("model.layers.{layer}.self_attn.{name}.weight"),
                    &[32],
                );
            }
        }
        model
    }

    /// The same plan in sizes that the GPU's kernels take: heads of 64, columns in groups of 128.
    pub fn for_gpu(mut self) -> Self {
        const HIDDEN: usize = 256;
        const INNER: usize = 384;
        const SIZE: usize = 64;
        let heads = self.size("num_attention_heads") * SIZE;
        let keys = self.size("num_key_value_heads") * SIZE;
        self.set(json!({"hidden_size": HIDDEN, "intermediate_size": INNER, "head_dim": SIZE}));
        let names: Vec<String> = self.tensors.keys().cloned().collect();
        for name in names {
            let part = name.trim_end_matches(".weight").rsplit('.').next();
            let shape = match part.unwrap() {
                "embed_tokens" | "lm_head" => vec![VOCAB, HIDDEN],
                "q_proj" => vec![heads, HIDDEN],
                "k_proj" | "v_proj" => vec![keys, HIDDEN],
                "o_proj" => vec![HIDDEN, heads],
                "gate_proj" | "up_proj" => vec![INNER, HIDDEN],
                "down_proj" => vec![HIDDEN, INNER],
                "q_norm" | "k_norm" => vec![SIZE],
                "bias" if name.contains("q_proj") => vec![heads],
                "bias" => vec![keys],
                _ => vec![HIDDEN],
            };
            self.tensor(&name, &shape);
        }
        self
    }

    fn new(class: &str, heads: usize, kv_heads: usize, head_size: usize) -> Self {
        let mut model = Self {
            config: json!({
                "architectures": [class], "hidden_act": "silu", "hidden_size": HIDDEN,
                "intermediate_size": INNER, "num_hidden_layers": LAYERS,
                "num_attention_heads": heads, "num_key_value_heads": kv_heads,
                "vocab_size": VOCAB, "max_position_embeddings": CONTEXT, "rms_norm_eps": 1e-5,
                "eos_token_id": IM_END,
            }),
            dtype: Dtype::BF16,
            shards: 1,
            tensors: BTreeMap::new(),
        };
        model.add_tensors(HIDDEN, heads, kv_heads, head_size);
        model
    }

    fn add_tensors(&mut self, hidden: usize, heads: usize, kv_heads: usize, head_size: usize) {
        self.tensor("model.embed_tokens.weight", &[VOCAB, hidden]);
        self.tensor("model.norm.weight", &[hidden]);
        for layer in 0..LAYERS {
            for (name, shape) in [
                ("input_layernorm", vec![hidden]),
                ("self_attn.q_proj", vec![heads * head_size, hidden]),
                ("self_attn.k_proj", vec![kv_heads * head_size, hidden]),
                ("self_attn.v_proj", vec![kv_heads * head_size, hidden]),
                ("self_attn.o_proj", vec![hidden, heads * head_size]),
                ("post_attention_layernorm", vec![hidden]),
                ("mlp.gate_proj", vec![INNER, hidden]),
                ("mlp.up_proj", vec![INNER, hidden]),
                ("mlp.down_proj", vec![hidden, INNER]),
            ] {
                self.tensor(&format!("model.layers.{layer}.{name}.weight"), &shape);
            }
        }
    }

    pub fn set(&mut self, fields: Value) {
        for (key, value) in fields.as_object().unwrap() {
            self.config[key] = value.clone();
        }
    }

    pub fn size(&self, key: &str) -> usize {
        self.config[key].as_u64().unwrap() as usize
    }

    /// Adds a tensor of random values that f16 and bf16 hold alike.
    pub fn tensor(&mut self, name: &str, shape: &[usize]) {
        let scale = match shape {
            [_, cols] => 2.0 / (*cols as f32).sqrt(),
            _ => 0.5,
        };
        let around = if name.ends_with("norm.weight") {
            1.0
        } else {
            0.0
        };
        let seed = name
            .bytes()
            .fold(7u64, |seed, b| seed.wrapping_mul(31) + u64::from(b));
        let values = random(seed, shape.iter().product())
            .map(|v| bf16::from_f32(around + v * scale).to_f32())
            .collect();
        let tensor = Tensor {
            shape: shape.to_vec(),
            values,
        };
        self.tensors.insert(name.to_owned(), tensor);
    }

    pub fn write(&self, folder: &Path) {
        let json = |name: &str, value: &Value| {
            std::fs::write(folder.join(name), serde_json::to_vec_pretty(value).unwrap()).unwrap();
        };
        json("config.json", &self.config);
        json("generation_config.json", &json!({"eos_token_id": [IM_END]}));
        json("tokenizer.json", &tokenizer());
        json(
            "tokenizer_config.json",
            &json!({"bos_token": "<s>", "eos_token": {"content": "<|im_end|>"},
                "chat_template": CHAT_TEMPLATE}),
        );
        self.write_weights(folder);
    }

    fn write_weights(&self, folder: &Path) {
        let mut files: Vec<BTreeMap<&str, &Tensor>> = vec![BTreeMap::new(); self.shards];
        for (i, (name, tensor)) in self.tensors.iter().enumerate() {
            files[i % self.shards].insert(name, tensor);
        }
        let mut weight_map = HashMap::new();
        for (i, tensors) in files.iter().enumerate() {
            let name = match self.shards {
                1 => "model.safetensors".to_owned(),
                n => format!("model-{:05}-of-{n:05}.safetensors", i + 1),
            };
            std::fs::write(folder.join(&name), safetensors(tensors, self.dtype)).unwrap();
            weight_map.extend(
                tensors
                    .keys()
                    .map(|&tensor| (tensor.to_owned(), name.clone())),
            );
        }
        if self.shards > 1 {
            let index = json!({"metadata": {}, "weight_map": weight_map});
            let path = folder.join("model.safetensors.index.json");
            std::fs::write(path, index.to_string()).unwrap();
        }
    }
}

/// The bytes of a safetensors file.
pub fn safetensors(tensors: &BTreeMap<&str, &Tensor>, dtype: Dtype) -> Vec<u8> {
    let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
    header.insert("__metadata__".into(), json!({"format": "pt"}));
    for (name, tensor) in tensors {
        let start = data.len();
        for &value in &tensor.values {
            match dtype {
                Dtype::F16 => data.extend(f16::from_f32(value).to_le_bytes()),
                Dtype::BF16 => data.extend(bf16::from_f32(value).to_le_bytes()),
                Dtype::F32 => data.extend(value.to_le_bytes()),
            }
        }
        let info = json!({"dtype": format!("{dtype:?}"), "shape": tensor.shape,
            "data_offsets": [start, data.len()]});
        header.insert((*name).to_owned(), info);
    }
    let header = Value::Object(header).to_string();
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header.as_bytes());
    file.extend(data);
    file
}

/// One token a byte, and three control tokens.
fn tokenizer() -> Value {
    let printable = |b: &u8| matches!(b, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    let mut other = '\u{100}'..;
    let vocab: HashMap<String, u8> = (0..=255u8)
        .map(|b| match printable(&b) {
            true => (char::from(b).to_string(), b),
            false => (other.next().unwrap().to_string(), b),
        })
        .collect();
    let added = |id: u32, content: &str| {
        json!({"id": id, "content": content, "single_word": false, "lstrip": false,
            "rstrip": false, "normalized": false, "special": true})
    };
    json!({
        "version": "1.0", "truncation": {"direction": "Right", "max_length": 16,
            "strategy": "LongestFirst", "stride": 0}, "padding": null,
        "added_tokens": [added(BOS, "<s>"), added(IM_START, "<|im_start|>"),
            added(IM_END, "<|im_end|>")],
        "normalizer": null,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true,
            "use_regex": true},
        "post_processor": {"type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}},
                {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [BOS], "tokens": ["<s>"]}}},
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true,
            "use_regex": true},
        "model": {"type": "BPE", "dropout": null, "unk_token": null,
            "continuing_subword_prefix": null, "end_of_word_suffix": null, "fuse_unk": false,
            "byte_fallback": false, "ignore_merges": false, "vocab": vocab, "merges": []},
    })
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
