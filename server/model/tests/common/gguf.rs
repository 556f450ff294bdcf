//! GGUF files of random weights.

use std::path::Path;

use candle_core::{
    Device, Tensor,
    quantized::{
        GgmlDType, QTensor,
        gguf_file::{self, Value as Gguf},
    },
};

use super::hugging_face::{CONTEXT, HuggingFace, LAYERS, VOCAB};

/// The type of a matrix, by its GGUF name and columns.
pub type MatrixType<'a> = &'a dyn Fn(&str, usize) -> GgmlDType;

/// Writes a checkpoint as llama.cpp's convert_hf_to_gguf.py does, with matrices of the types that
/// `matrix_type` gives.
pub fn write_gguf(model: &HuggingFace, architecture: &str, matrix_type: MatrixType, path: &Path) {
    let permuted = architecture == "llama";
    let heads = model.size("num_attention_heads");
    let kv_heads = model.size("num_key_value_heads");
    let name = |theirs: &str| {
        let mut name = theirs.to_owned();
        for (theirs, ours) in [
            ("model.embed_tokens.", "token_embd."),
            ("model.norm.", "output_norm."),
            ("lm_head.", "output."),
            ("model.layers.", "blk."),
            ("input_layernorm", "attn_norm"),
            ("post_attention_layernorm", "ffn_norm"),
            ("self_attn.q_proj", "attn_q"),
            ("self_attn.k_proj", "attn_k"),
            ("self_attn.v_proj", "attn_v"),
            ("self_attn.o_proj", "attn_output"),
            ("self_attn.q_norm", "attn_q_norm"),
            ("self_attn.k_norm", "attn_k_norm"),
            ("mlp.gate_proj", "ffn_gate"),
            ("mlp.up_proj", "ffn_up"),
            ("mlp.down_proj", "ffn_down"),
        ] {
            name = name.replace(theirs, ours);
        }
        name
    };
    let mut tensors: Vec<(String, QTensor)> = model
        .tensors
        .iter()
        .map(|(theirs, tensor)| {
            let mut values =
                Tensor::from_slice(&tensor.values, tensor.shape.as_slice(), &Device::Cpu).unwrap();
            let heads = match theirs {
                name if name.contains("q_proj") => heads,
                name if name.contains("k_proj") => kv_heads,
                _ => 0,
            };
            if permuted && heads > 0 {
                let (rows, cols) = values.dims2().unwrap();
                values = values
                    .reshape((heads, 2, rows / heads / 2, cols))
                    .and_then(|t| t.transpose(1, 2)?.reshape((rows, cols)))
                    .unwrap();
            }
            let name = name(theirs);
            let dtype = match tensor.shape[..] {
                [_, cols] => matrix_type(&name, cols),
                _ => GgmlDType::F32,
            };
            let values = QTensor::quantize(&values, dtype).unwrap();
            (name, values)
        })
        .collect();
    let head_size = model.config["head_dim"]
        .as_u64()
        .unwrap_or((model.size("hidden_size") / heads) as u64) as u32;
    if !model.config["rope_scaling"].is_null() {
        // What the converter computes from the config, and ours is tested to compute in rope.rs.
        let scaling = stoker_model::config::RopeScaling::Llama3 {
            factor: 8.0,
            low_frequency_factor: 1.0,
            high_frequency_factor: 4.0,
            original_context: 64,
        };
        let factors = scaling.factors(10_000.0, head_size as usize).unwrap();
        let factors = Tensor::new(factors, &Device::Cpu).unwrap();
        let dtype = GgmlDType::F32;
        let factors = QTensor::quantize(&factors, dtype).unwrap();
        tensors.push(("rope_freqs.weight".into(), factors));
    }
    let key = |name: &str| format!("{architecture}.{name}");
    let size = |name: &str| Gguf::U32(model.size(name) as u32);
    let strings = |texts: Vec<String>| Gguf::Array(texts.into_iter().map(Gguf::String).collect());
    let metadata = [
        (
            "general.architecture".into(),
            Gguf::String(architecture.into()),
        ),
        (key("block_count"), Gguf::U32(LAYERS as u32)),
        (key("context_length"), Gguf::U32(CONTEXT as u32)),
        (key("embedding_length"), size("hidden_size")),
        (key("feed_forward_length"), size("intermediate_size")),
        (key("attention.head_count"), size("num_attention_heads")),
        (key("attention.head_count_kv"), size("num_key_value_heads")),
        (key("attention.key_length"), Gguf::U32(head_size)),
        (key("attention.value_length"), Gguf::U32(head_size)),
        (key("attention.layer_norm_rms_epsilon"), Gguf::F32(1e-5)),
        (
            key("rope.freq_base"),
            Gguf::F32(model.config["rope_theta"].as_f64().unwrap() as f32),
        ),
        ("tokenizer.ggml.model".into(), Gguf::String("gpt2".into())),
        ("tokenizer.ggml.pre".into(), Gguf::String("qwen2".into())),
        (
            "tokenizer.ggml.tokens".into(),
            strings((0..VOCAB).map(|i| format!("<{i}>")).collect()),
        ),
        (
            "tokenizer.ggml.token_type".into(),
            Gguf::Array(vec![Gguf::I32(3); VOCAB]),
        ),
        ("tokenizer.ggml.merges".into(), Gguf::Array(vec![])),
    ];
    let metadata: Vec<(&str, &Gguf)> = metadata.iter().map(|(k, v)| (k.as_str(), v)).collect();
    let tensors: Vec<_> = tensors.iter().map(|(n, t)| (n.as_str(), t)).collect();
    let mut file = std::fs::File::create(path).unwrap();
    gguf_file::write(&mut file, &metadata, &tensors).unwrap();
}
