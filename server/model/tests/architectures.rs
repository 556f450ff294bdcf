//! Every architecture on random weights, logit by logit, against candle-transformers; and the same
//! weights as GGUF, bit by bit, against themselves as safetensors.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common {
    pub mod gguf;
    pub mod hugging_face;
}

use std::{collections::HashMap, path::Path};

use candle_core::{DType, Device, Tensor, quantized::GgmlDType};
use candle_nn::VarBuilder;
use candle_transformers::models::{llama, mistral, qwen2, qwen3};
use common::{
    gguf::write_gguf,
    hugging_face::{CONTEXT, Dtype, HuggingFace, VOCAB, random},
};
use serde_json::json;
use stoker_model::{
    checkpoint::Checkpoint,
    cpu::{Forward, Input, Weights},
};

const TOKENS: usize = 45;

/// Of the largest logit. Keys and values are f16 here and f32 in candle: 1/2048 each, some layers.
const TOLERANCE: f32 = 3e-3;

fn tokens() -> Vec<u32> {
    random(11, TOKENS)
        .map(|v| ((v + 1.0) / 2.0 * (VOCAB - 1) as f32) as u32)
        .collect()
}

/// Logits at every position by our own forward pass, the prompt in uneven chunks.
fn ours(path: &Path) -> Vec<Vec<f32>> {
    let checkpoint = Checkpoint::open(path).unwrap();
    let tokenizer = checkpoint.tokenizer().unwrap();
    let config = checkpoint.config(&tokenizer).unwrap();
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(2)
        .build()
        .unwrap();
    let weights = Weights::load(&checkpoint, &config, &pool, &|_| {}).unwrap();
    let mut forward = Forward::new(config, weights, CONTEXT, 16).unwrap();
    let blocks: Vec<u32> = (0..16).rev().collect();
    let tokens = tokens();
    let mut logits = Vec::new();
    for chunk in [7, 1, 1, 20, 3, 13] {
        let start = logits.len();
        let tokens = &tokens[start..start + chunk];
        let input = Input {
            tokens,
            start,
            blocks: &blocks,
        };
        forward.run(&[input]).unwrap();
        let rows: Vec<usize> = (0..chunk).collect();
        logits.extend(forward.logits(&rows).unwrap());
    }
    assert_eq!(logits.len(), TOKENS);
    logits
}

/// Candle's own reading of the same files.
fn weights(folder: &Path) -> VarBuilder<'static> {
    let mut tensors = HashMap::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|e| e == "safetensors") {
            tensors.extend(candle_core::safetensors::load(&path, &Device::Cpu).unwrap());
        }
    }
    VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu)
}

/// Logits at every position, each by a fresh run over all tokens up to it.
fn theirs(mut last_logits: impl FnMut(&Tensor) -> Tensor) -> Vec<Vec<f32>> {
    let tokens = tokens();
    (1..=TOKENS)
        .map(|n| {
            let input = Tensor::new(&tokens[..n], &Device::Cpu).unwrap();
            let logits = last_logits(&input.unsqueeze(0).unwrap());
            logits.flatten_all().unwrap().to_vec1().unwrap()
        })
        .collect()
}

fn candle(model: &HuggingFace, folder: &Path) -> Vec<Vec<f32>> {
    let weights = weights(folder);
    let config = |fields: serde_json::Value| {
        let mut config = model.clone();
        config.set(fields);
        config.config
    };
    let class = model.config["architectures"][0].as_str().unwrap();
    match class {
        "LlamaForCausalLM" => {
            let config: llama::LlamaConfig = serde_json::from_value(config(json!({}))).unwrap();
            let config = config.into_config(false);
            let model = llama::Llama::load(weights, &config).unwrap();
            theirs(|input| {
                let mut cache =
                    llama::Cache::new(false, DType::F32, &config, &Device::Cpu).unwrap();
                model.forward(input, 0, &mut cache).unwrap()
            })
        }
        "MistralForCausalLM" => {
            // Candle lets a token see `sliding_window` tokens before itself, transformers and we
            // one fewer: the window counts the token itself.
            let window = model.size("sliding_window") - 1;
            let config = config(json!({"sliding_window": window, "use_flash_attn": false}));
            let config: mistral::Config = serde_json::from_value(config).unwrap();
            let mut model = mistral::Model::new(&config, weights).unwrap();
            theirs(|input| {
                model.clear_kv_cache();
                model.forward(input, 0).unwrap()
            })
        }
        "Qwen2ForCausalLM" => {
            let config: qwen2::Config = serde_json::from_value(config(json!({}))).unwrap();
            let mut model = qwen2::ModelForCausalLM::new(&config, weights).unwrap();
            theirs(|input| {
                model.clear_kv_cache();
                model.forward(input, 0).unwrap()
            })
        }
        "Qwen3ForCausalLM" => {
            let config: qwen3::Config = serde_json::from_value(config(json!({}))).unwrap();
            let mut model = qwen3::ModelForCausalLM::new(&config, weights).unwrap();
            theirs(|input| {
                model.clear_kv_cache();
                model.forward(input, 0).unwrap()
            })
        }
        other => unreachable!("{other}"),
    }
}

/// The largest difference at any position, as a share of that position's largest logit.
fn difference(ours: &[Vec<f32>], theirs: &[Vec<f32>]) -> f32 {
    assert_eq!(ours.len(), theirs.len());
    let rows = ours.iter().zip(theirs).map(|(ours, theirs)| {
        assert_eq!(ours.len(), theirs.len());
        let size = theirs.iter().fold(0.0f32, |m, x| m.max(x.abs()));
        let worst = ours.iter().zip(theirs).map(|(a, b)| (a - b).abs());
        worst.fold(0.0, f32::max) / size
    });
    rows.fold(0.0, f32::max)
}

fn compare(model: &HuggingFace) {
    let folder = tempfile::tempdir().unwrap();
    model.write(folder.path());
    let difference = difference(&ours(folder.path()), &candle(model, folder.path()));
    eprintln!("{}: {difference:.1e}", model.config["architectures"][0]);
    assert!(difference < TOLERANCE, "{difference}");
}

#[test]
fn llama_3_with_scaled_rope() {
    compare(&HuggingFace::llama3());
}

#[test]
fn smollm2_tied_in_three_shards_of_f16() {
    compare(&HuggingFace {
        dtype: Dtype::F16,
        shards: 3,
        ..HuggingFace::smollm2()
    });
}

#[test]
fn mistral_with_a_sliding_window_in_f32() {
    compare(&HuggingFace {
        dtype: Dtype::F32,
        ..HuggingFace::mistral()
    });
}

#[test]
fn qwen2_with_biases_in_two_shards() {
    compare(&HuggingFace {
        shards: 2,
        ..HuggingFace::qwen2()
    });
}

#[test]
fn qwen3_with_head_norms() {
    compare(&HuggingFace::qwen3());
}

/// What the comparison is worth: each option, left out of the config or the weights, is noticed.
#[test]
fn an_option_that_is_ignored_would_be_noticed() {
    let folder = tempfile::tempdir().unwrap();
    let mut differences = Vec::new();
    let mut check = |name, model: HuggingFace, change: &dyn Fn(&mut HuggingFace)| {
        model.write(folder.path());
        let right = ours(folder.path());
        let mut changed = model;
        change(&mut changed);
        changed.write(folder.path());
        differences.push((name, difference(&ours(folder.path()), &right)));
    };
    let zero = |part: &'static str, to: f32| {
        move |model: &mut HuggingFace| {
            for (name, tensor) in &mut model.tensors {
                if name.ends_with(part) {
                    tensor.values.fill(to);
                }
            }
        }
    };
    check("rope scaling", HuggingFace::llama3(), &|model| {
        model.config["rope_scaling"] = json!(null);
    });
    check("window", HuggingFace::mistral(), &|model| {
        model.config["sliding_window"] = json!(null);
    });
    check("window by one", HuggingFace::mistral(), &|model| {
        model.config["sliding_window"] = json!(13);
    });
    check(
        "query bias",
        HuggingFace::qwen2(),
        &zero("q_proj.bias", 0.0),
    );
    check(
        "value bias",
        HuggingFace::qwen2(),
        &zero("v_proj.bias", 0.0),
    );
    check(
        "key norm",
        HuggingFace::qwen3(),
        &zero("k_norm.weight", 1.0),
    );
    for (name, difference) in differences {
        assert!(difference > 10.0 * TOLERANCE, "{name}: {difference}");
    }
}

#[test]
fn gguf_gives_the_same_bits_as_safetensors() {
    let mut mistral = HuggingFace::mistral();
    mistral.config["sliding_window"] = json!(null);
    for (model, architecture) in [
        (HuggingFace::llama3(), "llama"),
        (HuggingFace::smollm2(), "llama"),
        (mistral, "llama"),
        (HuggingFace::qwen2(), "qwen2"),
        (HuggingFace::qwen3(), "qwen3"),
    ] {
        let folder = tempfile::tempdir().unwrap();
        model.write(folder.path());
        let path = folder.path().join("model.gguf");
        write_gguf(&model, architecture, &|_, _| GgmlDType::F16, &path);
        assert_eq!(ours(folder.path()), ours(&path), "{architecture}");
    }
}
