//! The real model on a GPU against llama.cpp's continuations in f32, alone and together. Says so
//! and passes on a machine without a GPU.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::{
    path::PathBuf,
    sync::{Mutex, MutexGuard, PoisonError},
};

use common::{GREEDY, Request, generate};
use serde::Deserialize;
use stoker_engine::executor::Sampling;
use stoker_kernels::cuda::CudaError;
use stoker_model::{CudaExecutor, Dtype, KvMemory, LoadError, LoadOptions, LoadedModel};

/// Where the best two tokens are nearer than this (nats), arithmetic in another order may choose
/// the other one.
const NEAR_TIE: f64 = 0.2;

#[derive(Deserialize)]
struct Reference {
    prompts: Vec<Prompt>,
}

#[derive(Deserialize)]
struct Prompt {
    name: String,
    prompt_ids: Vec<u32>,
    reference: Continuation,
}

#[derive(Deserialize)]
struct Continuation {
    ids: Vec<u32>,
    margin_top1_top2: Vec<f64>,
}

/// An executor measures what memory is left while it is set up: one test at a time.
fn alone() -> MutexGuard<'static, ()> {
    static GPU: Mutex<()> = Mutex::new(());
    GPU.lock().unwrap_or_else(PoisonError::into_inner)
}

fn model(dtype: Dtype) -> Option<LoadedModel<CudaExecutor>> {
    let path = match std::env::var_os("STOKER_TEST_MODEL") {
        Some(path) => PathBuf::from(path),
        None => PathBuf::from(std::env::var_os("HOME").unwrap_or_default())
            .join(".cache/stoker/models/SmolLM2-135M-Instruct.Q4_1.gguf"),
    };
    let options = LoadOptions {
        dtype,
        kv_memory: KvMemory::Bytes(1 << 30),
        max_num_seqs: 64,
        ..LoadOptions::default()
    };
    match LoadedModel::load_cuda(&path, &options, &|_| {}) {
        Ok(model) => Some(model),
        Err(LoadError::Cuda(
            error @ (CudaError::NoDriver | CudaError::NoKernels | CudaError::NoDevice),
        )) => {
            eprintln!("SKIPPED: {error}");
            None
        }
        Err(error) => panic!("{}: {error}", path.display()),
    }
}

/// Weights as the file has them (Q4_1), and as f16.
#[test]
fn greedy_tokens_equal_the_reference_alone_and_together() {
    let _alone = alone();
    for dtype in [Dtype::Auto, Dtype::Float16] {
        let Some(model) = model(dtype) else { return };
        eprintln!("{dtype}: {} bytes of weights", model.info.weight_bytes);
        compare(model);
    }
}

fn compare(mut model: LoadedModel<CudaExecutor>) {
    let text = include_str!("data/smollm2_greedy_reference.json");
    let prompts = serde_json::from_str::<Reference>(text).unwrap().prompts;
    let request = |prompt: &Prompt| Request {
        prompt: prompt.prompt_ids.clone(),
        max_tokens: 64,
        eos: vec![2],
        sampling: GREEDY,
    };
    let requests: Vec<Request> = prompts.iter().map(request).collect();
    // Streamed (few sequences), in tiles (many: each prompt four times), and one at a time.
    let few = generate(&mut model.executor, &requests, |step, i| {
        1 + (step * 7 + i * 13) % 61
    });
    let four: Vec<Request> = (0..4 * requests.len())
        .map(|i| requests[i % requests.len()].clone())
        .collect();
    let many = generate(&mut model.executor, &four, |step, i| {
        1 + (step * 5 + i * 11) % 61
    });
    let alone: Vec<Vec<u32>> = requests
        .iter()
        .map(|r| generate(&mut model.executor, std::slice::from_ref(r), |_, _| 37).remove(0))
        .collect();
    let (mut same, mut ties, mut wrong) = (0, Vec::new(), Vec::new());
    for (how, all) in [("few", &few), ("many", &many), ("alone", &alone)] {
        for (i, tokens) in all.iter().enumerate() {
            let prompt = &prompts[i % prompts.len()];
            let reference = &prompt.reference;
            match (0..reference.ids.len()).find(|&i| tokens.get(i) != Some(&reference.ids[i])) {
                None => same += 1,
                Some(at) => {
                    let margin = reference.margin_top1_top2[at];
                    let line = format!(
                        "{how} {}: another token at {at}, margin {margin:.3}",
                        prompt.name
                    );
                    if margin < NEAR_TIE {
                        &mut ties
                    } else {
                        &mut wrong
                    }
                    .push(line);
                }
            }
        }
    }
    eprintln!(
        "{same} equal, {} leave at a near tie, {} differ",
        ties.len(),
        wrong.len()
    );
    for line in ties.iter().chain(&wrong) {
        eprintln!("  {line}");
    }
    assert!(wrong.is_empty());
    assert_eq!(
        model.tokenizer.decode(&alone[0]),
        "The capital of France is Paris."
    );
}

#[test]
fn a_seed_gives_the_same_tokens_in_any_batch() {
    let _alone = alone();
    let Some(mut model) = model(Dtype::Auto) else {
        return;
    };
    let text = include_str!("data/smollm2_greedy_reference.json");
    let prompts = serde_json::from_str::<Reference>(text).unwrap().prompts;
    let sampled = |seed| Request {
        prompt: prompts[1].prompt_ids.clone(),
        max_tokens: 20,
        eos: vec![2],
        sampling: Sampling {
            temperature: 0.8,
            top_p: 0.9,
            top_k: 40,
            seed,
        },
    };
    let requests = [sampled(1), sampled(2), sampled(1)];
    let together = generate(&mut model.executor, &requests, |_, _| 11);
    let again = generate(&mut model.executor, &requests, |_, _| 11);
    assert_eq!(together[0], together[2]);
    assert_eq!(together, again);
    assert_ne!(together[0], together[1]);
}
