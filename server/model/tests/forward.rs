//! The executor's forward pass, paged, chunked and batched, against a naive one in f32.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common {
    pub mod tiny;
}

use std::{cell::RefCell, collections::HashMap, path::Path};

use candle_core::quantized::GgmlDType;
use common::tiny::{self, TinyFile};
use half::f16;
use stoker_kernels::reference;
use stoker_model::{
    checkpoint::Checkpoint,
    config::ModelConfig,
    cpu::{Forward, Input, Weights},
};

/// Plain loops over one sequence; weights, keys and values rounded to f16, all else f32.
struct Naive {
    file: Checkpoint,
    config: ModelConfig,
    weights: RefCell<HashMap<String, Vec<f32>>>,
}

impl Naive {
    fn matrix(&self, name: &str, rows: usize, cols: usize) -> Vec<f32> {
        let read = || {
            let handle = self.file.tensor(name, &[rows, cols]).unwrap();
            let values = self.file.rows(&handle, 0..rows).unwrap();
            values.into_iter().map(round).collect()
        };
        let mut weights = self.weights.borrow_mut();
        weights.entry(name.into()).or_insert_with(read).clone()
    }

    fn vector(&self, name: &str, len: usize) -> Vec<f32> {
        let handle = self.file.tensor(name, &[len]).unwrap();
        self.file.rows(&handle, 0..1).unwrap()
    }

    /// Logits at every position.
    fn logits(&self, tokens: &[u32]) -> Vec<Vec<f32>> {
        let ModelConfig {
            hidden,
            inner,
            vocab,
            ..
        } = self.config;
        let shape = self.config.attention;
        let (queries, keys) = (
            shape.heads * shape.head_size,
            shape.kv_heads * shape.head_size,
        );
        let factors = (self.file.has_tensor("rope_freqs.weight"))
            .then(|| self.vector("rope_freqs.weight", shape.head_size / 2));
        let embedding = self.matrix("token_embd.weight", vocab, hidden);
        let head = match self.file.has_tensor("output.weight") {
            true => self.matrix("output.weight", vocab, hidden),
            false => embedding.clone(),
        };
        let mut rows: Vec<Vec<f32>> = tokens
            .iter()
            .map(|&t| embedding[t as usize * hidden..(t as usize + 1) * hidden].to_vec())
            .collect();
        for layer in 0..self.config.layers {
            let of = |name: &str| format!("blk.{layer}.{name}.weight");
            let project = |name, x: &[f32], rows, cols| {
                reference::matmul(x, &self.matrix(&of(name), rows, cols), rows, cols)
            };
            let norm = |name, x: &[f32]| {
                reference::norm(x, &self.vector(&of(name), hidden), self.config.norm_epsilon)
            };
            let (mut cached_keys, mut cached_values) = (Vec::new(), Vec::new());
            for (position, x) in rows.iter_mut().enumerate() {
                let normed = norm("attn_norm", x);
                let mut query = project("attn_q", &normed, queries, hidden);
                let mut key = project("attn_k", &normed, keys, hidden);
                let value = project("attn_v", &normed, keys, hidden);
                for head in query
                    .chunks_mut(shape.head_size)
                    .chain(key.chunks_mut(shape.head_size))
                {
                    reference::rope(head, position, self.config.rope_base, factors.as_deref());
                }
                cached_keys.push(key.into_iter().map(round).collect::<Vec<_>>());
                cached_values.push(value.into_iter().map(round).collect::<Vec<_>>());
                let attended = reference::attention(
                    &query,
                    &cached_keys,
                    &cached_values,
                    shape.heads,
                    shape.kv_heads,
                );
                add(x, &project("attn_output", &attended, hidden, queries));
                let normed = norm("ffn_norm", x);
                let gated = reference::gated(
                    &project("ffn_gate", &normed, inner, hidden),
                    &project("ffn_up", &normed, inner, hidden),
                );
                add(x, &project("ffn_down", &gated, hidden, inner));
            }
        }
        let weight = self.vector("output_norm.weight", hidden);
        rows.iter()
            .map(|x| {
                let normed = reference::norm(x, &weight, self.config.norm_epsilon);
                reference::matmul(&normed, &head, vocab, hidden)
            })
            .collect()
    }
}

fn round(value: f32) -> f32 {
    f16::from_f32(value).to_f32()
}

fn add(x: &mut [f32], y: &[f32]) {
    x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
}

fn load(path: &Path, blocks: usize) -> (Naive, Forward) {
    let file = Checkpoint::open(path).unwrap();
    let config = file.config(&file.tokenizer().unwrap()).unwrap();
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(2)
        .build()
        .unwrap();
    let weights = Weights::load(&file, &config, &pool, &|_| {}).unwrap();
    let forward = Forward::new(config, weights, tiny::CONTEXT as usize, blocks).unwrap();
    let naive = Naive {
        file,
        config,
        weights: RefCell::default(),
    };
    (naive, forward)
}

/// Feeds sequences in uneven chunks, all of them in every step, and compares each token's logits.
fn compare(file: &TinyFile) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tiny.gguf");
    file.write(&path);
    let lengths = [1, 37, 90, 16];
    let (naive, mut forward) = load(&path, 64);
    let sequences: Vec<Vec<u32>> = lengths
        .iter()
        .zip(100u64..)
        .map(|(&len, seed)| {
            let unit = tiny::random(seed, len).map(|v| (v + 1.0) / 2.0);
            unit.map(|v| (v * (tiny::VOCAB as f32 - 1.0)) as u32)
                .collect()
        })
        .collect();
    let tables: Vec<Vec<u32>> = (0..4u32)
        .map(|i| (0..16).map(|b| (b * 4 + (i + b) % 4) % 64).collect())
        .collect();
    let expected: Vec<Vec<Vec<f32>>> = sequences.iter().map(|s| naive.logits(s)).collect();
    let mut done = [0; 4];
    let mut worst = Vec::new();
    for step in 0.. {
        let mut inputs = Vec::new();
        let mut places = Vec::new();
        for (i, tokens) in sequences.iter().enumerate() {
            let count = (1 + (step * 5 + i * 3) % 13).min(tokens.len() - done[i]);
            if count > 0 {
                inputs.push(Input {
                    tokens: &tokens[done[i]..done[i] + count],
                    start: done[i],
                    blocks: &tables[i],
                });
                places.extend((done[i]..done[i] + count).map(|position| (i, position)));
                done[i] += count;
            }
        }
        if inputs.is_empty() {
            break;
        }
        forward.run(&inputs).unwrap();
        let rows: Vec<usize> = (0..places.len()).collect();
        for (found, (i, position)) in forward.logits(&rows).unwrap().iter().zip(places) {
            let expected = &expected[i][position];
            let size = expected.iter().fold(0.0f32, |m, e| m.max(e.abs()));
            let errors = found.iter().zip(expected).map(|(f, e)| (f - e).abs());
            let error = errors.fold(0.0, f32::max) / size;
            assert!(error < 1e-3, "sequence {i}, position {position}: {error}");
            worst.push(error);
        }
    }
    // A key next to the middle between two f16 values may be rounded to the other one than in the
    // naive forward, and all later positions see it.
    worst.sort_by(f32::total_cmp);
    assert!(worst[worst.len() / 10] < 5e-6, "{worst:?}");
    assert!(worst[worst.len() * 8 / 10] < 1e-4, "{worst:?}");
    assert_eq!(done, lengths);
}

#[test]
fn tied_llama_equals_the_naive_forward() {
    compare(&TinyFile::new());
}

#[test]
fn llama_with_its_own_head_and_rope_factors_equals_the_naive_forward() {
    let mut file = TinyFile::new();
    file.tensor(
        "output.weight",
        &[tiny::VOCAB, tiny::HIDDEN],
        GgmlDType::F16,
    );
    file.tensor("rope_freqs.weight", &[tiny::HEAD_SIZE / 2], GgmlDType::F32);
    compare(&file);
}
