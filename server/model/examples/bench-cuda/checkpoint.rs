//! A Hugging Face folder with random f16 weights, for benches of the server: config.json, sharded
//! safetensors, and a tokenizer of made-up words.

use std::{
    collections::HashMap,
    fs::{self, File},
    io::{BufWriter, Write},
    path::Path,
};

use half::f16;
use rayon::prelude::*;
use serde_json::{Value, json};
use stoker_model::config::ModelConfig;

use crate::Error;

/// Layers of a file.
const LAYERS_PER_FILE: usize = 14;

pub fn write(config: &ModelConfig, folder: &Path) -> Result<(), Error> {
    fs::create_dir_all(folder)?;
    let shape = config.attention;
    let settings = json!({
        "architectures": [config.architecture.class], "hidden_act": "silu",
        "hidden_size": config.hidden, "intermediate_size": config.inner,
        "num_hidden_layers": config.layers, "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads, "head_dim": shape.head_size,
        "vocab_size": config.vocab, "max_position_embeddings": config.context_length,
        "rms_norm_eps": config.norm_epsilon, "rope_theta": config.rope_base,
        "tie_word_embeddings": true, "eos_token_id": config.vocab - 1,
    });
    fs::write(folder.join("config.json"), settings.to_string())?;
    fs::write(
        folder.join("tokenizer.json"),
        tokenizer(config.vocab).to_string(),
    )?;
    let mut files = vec![vec![
        (
            "model.embed_tokens.weight".to_owned(),
            vec![config.vocab, config.hidden],
        ),
        ("model.norm.weight".to_owned(), vec![config.hidden]),
    ]];
    for first in (0..config.layers).step_by(LAYERS_PER_FILE) {
        let layers = first..(first + LAYERS_PER_FILE).min(config.layers);
        files.push(
            layers
                .flat_map(|layer| layer_tensors(config, layer))
                .collect(),
        );
    }
    let mut places = HashMap::new();
    for (i, tensors) in files.iter().enumerate() {
        let name = format!("model-{:05}-of-{:05}.safetensors", i + 1, files.len());
        write_tensors(&folder.join(&name), tensors)?;
        places.extend(tensors.iter().map(|(tensor, _)| (tensor, name.clone())));
    }
    let index = json!({"metadata": {}, "weight_map": places});
    fs::write(
        folder.join("model.safetensors.index.json"),
        index.to_string(),
    )?;
    Ok(())
}

fn layer_tensors(config: &ModelConfig, layer: usize) -> Vec<(String, Vec<usize>)> {
    let (hidden, inner, shape) = (config.hidden, config.inner, config.attention);
    let (heads, keys) = (shape.out_width(), shape.kv_heads * shape.head_size);
    [
        ("input_layernorm", vec![hidden]),
        ("self_attn.q_proj", vec![heads, hidden]),
        ("self_attn.k_proj", vec![keys, hidden]),
        ("self_attn.v_proj", vec![keys, hidden]),
        ("self_attn.o_proj", vec![hidden, heads]),
        ("post_attention_layernorm", vec![hidden]),
        ("mlp.gate_proj", vec![inner, hidden]),
        ("mlp.up_proj", vec![inner, hidden]),
        ("mlp.down_proj", vec![hidden, inner]),
    ]
    .map(|(name, shape)| (format!("model.layers.{layer}.{name}.weight"), shape))
    .into()
}

fn write_tensors(path: &Path, tensors: &[(String, Vec<usize>)]) -> Result<(), Error> {
    let mut header = serde_json::Map::new();
    let mut end = 0usize;
    for (name, shape) in tensors {
        let start = end;
        end += 2 * shape.iter().product::<usize>();
        let info = json!({"dtype": "F16", "shape": shape, "data_offsets": [start, end]});
        header.insert(name.clone(), info);
    }
    let header = Value::Object(header).to_string();
    let mut file = BufWriter::with_capacity(1 << 20, File::create(path)?);
    file.write_all(&(header.len() as u64).to_le_bytes())?;
    file.write_all(header.as_bytes())?;
    for (number, (_, shape)) in tensors.iter().enumerate() {
        let len = shape.iter().product::<usize>();
        let bytes = match shape[..] {
            // Norms.
            [_] => f16::ONE.to_le_bytes().repeat(len),
            _ => random(len, 1.0 / (shape[1] as f32).sqrt(), number as u64),
        };
        file.write_all(&bytes)?;
    }
    file.flush()?;
    Ok(())
}

/// Values in -size..size.
fn random(len: usize, size: f32, seed: u64) -> Vec<u8> {
    const PIECE: usize = 1 << 16;
    let mut bytes = vec![0; 2 * len];
    bytes
        .par_chunks_mut(2 * PIECE)
        .enumerate()
        .for_each(|(piece, bytes)| {
            let mut state = (seed << 32 | piece as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
            for value in bytes.as_chunks_mut::<2>().0 {
                state ^= state >> 12;
                state ^= state << 25;
                state ^= state >> 27;
                let unit = (state.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 40) as f32;
                let unit = unit / (1u32 << 23) as f32 - 1.0;
                *value = f16::from_f32(unit * size).to_le_bytes();
            }
        });
    bytes
}

/// The bytes, and then words by their number.
fn tokenizer(vocab: usize) -> Value {
    let printable = |b: &u8| matches!(b, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    let mut other = '\u{100}'..;
    let bytes = (0..=255u8).map(|b| match printable(&b) {
        true => char::from(b).to_string(),
        false => other.next().map(String::from).unwrap_or_default(),
    });
    let words: HashMap<String, usize> = bytes
        .chain((256..vocab).map(|id| format!("\u{120}{id}")))
        .zip(0..)
        .collect();
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [],
        "normalizer": null,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true,
            "use_regex": true},
        "post_processor": null,
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true,
            "use_regex": true},
        "model": {"type": "BPE", "dropout": null, "unk_token": null,
            "continuing_subword_prefix": null, "end_of_word_suffix": null, "fuse_unk": false,
            "byte_fallback": false, "ignore_merges": false, "vocab": words, "merges": []},
    })
}
