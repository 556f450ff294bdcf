//! Every plan on a GPU against the CPU, which other tests compare with candle-transformers: logit by
//! logit, then 1,000 requests through the engine. Says so and passes on a machine without a GPU.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common {
    pub mod gguf;
    pub mod hugging_face;
}

use std::{
    collections::HashMap,
    path::Path,
    sync::{Mutex, MutexGuard, PoisonError},
};

use candle_core::quantized::GgmlDType;
use common::{
    gguf::{MatrixType, write_gguf},
    hugging_face::{HuggingFace, VOCAB, random},
};
use serde_json::json;
use stoker_engine::{
    Engine, EngineConfig, Event, Limits, RealClock, Request, RequestId,
    executor::{Executor, InputToken, Row, Sampling, StepBatch},
};
use stoker_kernels::{
    SamplingParams,
    cuda::{Buffer, CudaError, Gpu, GpuOptions},
    sample,
};
use stoker_model::{
    CudaExecutor, Dtype, KvMemory, LoadError, LoadOptions, LoadedModel,
    checkpoint::Checkpoint,
    cpu::{Forward, Input, Weights},
};

/// Error of a logit against the largest one: activations are f16 between the GPU's kernels.
const TOLERANCE: f32 = 0.02;

const TOKENS: usize = 60;
/// Chunks of a prompt and single tokens, as many as `TOKENS`.
const CHUNKS: [usize; 8] = [17, 1, 1, 24, 1, 2, 13, 1];

const GREEDY: Sampling = Sampling {
    temperature: 0.0,
    top_p: 1.0,
    top_k: 0,
    seed: 0,
};

/// An executor measures what memory is left while it is set up: one test at a time.
fn alone() -> MutexGuard<'static, ()> {
    static GPU: Mutex<()> = Mutex::new(());
    GPU.lock().unwrap_or_else(PoisonError::into_inner)
}

fn plans() -> Vec<(&'static str, HuggingFace)> {
    let mut mistral = HuggingFace::mistral();
    // Within the window every token sees all before it, which is what a GPU does.
    mistral.set(json!({"sliding_window": TOKENS}));
    vec![
        ("llama 3", HuggingFace::llama3().for_gpu()),
        ("smollm 2", HuggingFace::smollm2().for_gpu()),
        ("mistral", mistral.for_gpu()),
        ("qwen 2", HuggingFace::qwen2().for_gpu()),
        ("qwen 3", HuggingFace::qwen3().for_gpu()),
    ]
}

fn options(dtype: Dtype) -> LoadOptions {
    LoadOptions {
        dtype,
        max_model_len: Some(TOKENS as u32),
        kv_memory: KvMemory::Bytes(4 << 20),
        max_num_seqs: 4,
        max_num_batched_tokens: 64,
        ..LoadOptions::default()
    }
}

fn on_gpu(folder: &Path, options: &LoadOptions) -> Option<CudaExecutor> {
    match LoadedModel::load_cuda(folder, options, &|_| {}) {
        Ok(model) => Some(model.executor),
        Err(LoadError::Cuda(
            error @ (CudaError::NoDriver | CudaError::NoKernels | CudaError::NoDevice),
        )) => {
            eprintln!("SKIPPED: {error}");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

/// The model's forward pass on the CPU.
fn on_cpu(folder: &Path, tokens: usize) -> Forward {
    let checkpoint = Checkpoint::open(folder).unwrap();
    let tokenizer = checkpoint.tokenizer().unwrap();
    let config = checkpoint.config(&tokenizer).unwrap();
    let pool = rayon::ThreadPoolBuilder::new().build().unwrap();
    let weights = Weights::load(&checkpoint, &config, &pool, &|_| {}).unwrap();
    Forward::new(config, weights, tokens, tokens.div_ceil(16)).unwrap()
}

fn tokens(seed: u64, count: usize) -> Vec<u32> {
    random(seed, count)
        .map(|v| ((v + 1.0) / 2.0 * (VOCAB - 1) as f32) as u32)
        .collect()
}

/// Logits after each chunk, by the GPU.
fn gpu_logits(executor: &mut CudaExecutor, tokens: &[u32]) -> Vec<Vec<f32>> {
    let mut start = 0;
    let mut all = Vec::new();
    for chunk in CHUNKS {
        let rows = vec![Row {
            slot: 0,
            tokens: tokens[start..start + chunk]
                .iter()
                .map(|&id| InputToken::Known(id))
                .collect(),
            start: start as u32,
            blocks: (0..4).rev().collect(),
            sample: Some(GREEDY),
        }];
        let ticket = executor.submit(StepBatch { rows }).unwrap();
        let output = executor.wait(ticket).unwrap();
        let logits = executor.forward().logits().read().unwrap()[..VOCAB].to_vec();
        let best = (0..VOCAB).max_by(|&a, &b| logits[a].total_cmp(&logits[b]));
        assert_eq!(output.tokens[0].map(|id| id as usize), best);
        all.push(logits);
        start += chunk;
    }
    all
}

/// The root mean square of the difference, of the root mean square.
fn relative(found: &[Vec<f32>], expected: &[Vec<f32>]) -> f32 {
    let square = |v: f32| v * v;
    let pairs = found.iter().flatten().zip(expected.iter().flatten());
    let error: f32 = pairs.clone().map(|(a, b)| square(a - b)).sum();
    let size: f32 = pairs.map(|(_, b)| square(*b)).sum();
    (error / size).sqrt()
}

#[test]
fn every_plan_has_the_cpus_logits() {
    let _alone = alone();
    let tokens = tokens(11, TOKENS);
    for (name, model) in plans() {
        let folder = tempfile::tempdir().unwrap();
        model.write(folder.path());
        let Some(mut gpu) = on_gpu(folder.path(), &options(Dtype::Auto)) else {
            return;
        };
        let mut cpu = on_cpu(folder.path(), TOKENS);
        let blocks: Vec<u32> = (0..4).collect();
        let mut start = 0;
        let mut expected = Vec::new();
        for chunk in CHUNKS {
            let input = Input {
                tokens: &tokens[start..start + chunk],
                start,
                blocks: &blocks,
            };
            cpu.run(&[input]).unwrap();
            expected.extend(cpu.logits(&[chunk - 1]).unwrap());
            start += chunk;
        }
        let found = gpu_logits(&mut gpu, &tokens);
        drop(gpu);
        let mut worst = 0.0f32;
        for (found, expected) in found.iter().zip(&expected) {
            let largest = expected.iter().fold(0.0f32, |m, v| m.max(v.abs()));
            for (a, b) in found.iter().zip(expected) {
                worst = worst.max((a - b).abs() / largest);
            }
        }
        eprintln!("{name}: largest error {worst:.1e} of the largest logit");
        assert!(worst < TOLERANCE, "{name}");
        for (dtype, most) in [(Dtype::Int8, 0.05), (Dtype::Int4, 0.5)] {
            let mut gpu = on_gpu(folder.path(), &options(dtype)).unwrap();
            let error = relative(&gpu_logits(&mut gpu, &tokens), &expected);
            eprintln!("{name} as {dtype}: error {error:.3} of the logits' size");
            assert!(error < most, "{name} as {dtype}");
        }
    }
}

/// A GGUF file's quantised weights as they are, against the same file as f16: numbers are the same, and
/// scales of scales are rounded to f16 before they meet them instead of after.
#[test]
fn quantised_files_are_kept_as_they_are() {
    let _alone = alone();
    let tokens = tokens(12, TOKENS);
    // As llama.cpp does for columns that aren't whole blocks of 256.
    let whole = |dtype: GgmlDType, cols: usize| match cols.is_multiple_of(dtype.block_size()) {
        true => dtype,
        false => GgmlDType::Q8_0,
    };
    // Q4_K with some matrices of Q6_K, of which one stands beside Q4_K in a common matrix: f16.
    let mixed = |name: &str, cols| match name.contains("attn_v") || name.contains("token_embd") {
        true => whole(GgmlDType::Q6K, cols),
        false => whole(GgmlDType::Q4K, cols),
    };
    let types: [(&str, MatrixType); 6] = [
        ("Q8_0", &|_, _| GgmlDType::Q8_0),
        ("Q4_0", &|_, _| GgmlDType::Q4_0),
        ("Q4_1", &|_, _| GgmlDType::Q4_1),
        ("Q4_K", &|_, cols| whole(GgmlDType::Q4K, cols)),
        ("Q6_K", &|_, cols| whole(GgmlDType::Q6K, cols)),
        ("Q4_K with Q6_K", &mixed),
    ];
    for (model, architecture) in [
        (HuggingFace::llama3().for_gpu(), "llama"),
        (HuggingFace::qwen2().for_gpu(), "qwen2"),
    ] {
        for (name, matrix_type) in &types {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("model.gguf");
            write_gguf(&model, architecture, matrix_type, &path);
            let load = |dtype| {
                let mut gpu = on_gpu(&path, &options(dtype))?;
                let bytes = gpu.forward().weights().bytes();
                Some((gpu_logits(&mut gpu, &tokens), bytes))
            };
            let Some((kept, bytes)) = load(Dtype::Auto) else {
                return;
            };
            let (halves, halves_bytes) = load(Dtype::Float16).unwrap();
            let share = bytes as f64 / halves_bytes as f64;
            let error = relative(&kept, &halves);
            eprintln!(
                "{architecture}, {name}: {error:.1e} of the logits' size, {share:.2} of the memory"
            );
            assert!(error < 0.01, "{architecture}, {name}");
            assert!(share < 0.7, "{architecture}, {name}");
        }
    }
}

#[test]
fn a_window_that_contexts_outgrow_is_refused() {
    let _alone = alone();
    let folder = tempfile::tempdir().unwrap();
    HuggingFace::mistral().for_gpu().write(folder.path());
    match LoadedModel::load_cuda(folder.path(), &LoadOptions::default(), &|_| {}) {
        Ok(_) => panic!("a model that would answer wrongly was loaded"),
        Err(error) => assert!(error.to_string().contains("--max-model-len"), "{error}"),
    }
}

#[test]
fn a_gpu_too_small_says_what_is_there_and_what_is_needed() {
    let _alone = alone();
    let folder = tempfile::tempdir().unwrap();
    HuggingFace::llama3().for_gpu().write(folder.path());
    let load = |kv_memory| {
        let options = LoadOptions {
            kv_memory,
            ..LoadOptions::default()
        };
        LoadedModel::load_cuda(folder.path(), &options, &|_| {})
    };
    let Ok(gpu) = Gpu::open(GpuOptions::default()) else {
        eprintln!("SKIPPED: no GPU");
        return;
    };
    // Another program's memory: all but what kernels and the tiny model need.
    let held = gpu.memory().unwrap().0 - (1 << 30);
    let _held = Buffer::<u8>::zeroed(&gpu, "a test", held as usize).unwrap();
    let bytes = 4 << 30;
    let error = load(KvMemory::Bytes(bytes)).err().unwrap().to_string();
    eprintln!("{error}");
    assert!(error.contains(&bytes.to_string()), "{error}");
    assert!(error.contains("the KV cache") && error.contains("are free"));
    let error = load(KvMemory::Utilization(0.9)).err().unwrap().to_string();
    eprintln!("{error}");
    assert!(
        error.contains("nothing is left beside the weights"),
        "{error}"
    );
    // Less than the weights take.
    let all = gpu.memory().unwrap().0 - (16 << 20);
    let _all = Buffer::<u8>::zeroed(&gpu, "a test", all as usize).unwrap();
    let error = load(KvMemory::Utilization(0.9)).err().unwrap().to_string();
    eprintln!("{error}");
    assert!(error.to_lowercase().contains("memory"), "{error}");
}

const REQUESTS: u64 = 1000;
const LONGEST: usize = 160;
/// Error of a logit against the largest one that may explain another token: twice what has been seen.
const MARGIN: f32 = 0.003;
/// Errors that are tried, up to the margin.
const STEPS: u32 = 30;

/// What becomes of requests on an engine that is disturbed: dials that move, requests that are
/// cancelled, and a KV cache so small that sequences are put off.
fn serve<E: Executor>(executor: E) -> (HashMap<u64, Vec<u32>>, u64) {
    let clock = RealClock::new();
    let limits = Limits {
        max_num_seqs: 24,
        max_num_batched_tokens: 256,
    };
    let config = EngineConfig {
        max_waiting: REQUESTS as usize,
        ..EngineConfig::default()
    };
    let mut engine = Engine::new(executor, limits, config);
    for id in 0..REQUESTS {
        engine.add(request(id)).unwrap();
    }
    let mut answers: HashMap<u64, Vec<u32>> = HashMap::new();
    let mut next_cancelled = 0;
    for step in 0u64.. {
        if !engine.has_work() {
            break;
        }
        if step % 37 == 36 {
            engine
                .set_limits(Limits {
                    max_num_seqs: 1 + (step * 13 % 31) as u32,
                    max_num_batched_tokens: 32 + (step * 29 % 224) as u32,
                })
                .unwrap();
        }
        for event in engine.step(&clock).unwrap() {
            if let Event::Token { id, token, .. } = event {
                let tokens = answers.entry(id.0).or_default();
                tokens.push(token);
                if id.0 % 11 == 3 && tokens.len() == 2 {
                    engine.abort(id);
                    next_cancelled += 1;
                }
            }
        }
    }
    assert!(next_cancelled > 50);
    (answers, engine.stats().preemptions_total)
}

fn request(id: u64) -> Request {
    let numbers: Vec<f32> = random(1000 + id, 3).map(|v| (v + 1.0) / 2.0).collect();
    let prompt = 1 + (numbers[0] * 99.0) as usize;
    Request {
        id: RequestId(id),
        prompt: tokens(id + 1, prompt),
        sampling: match id % 4 {
            0 => Sampling {
                temperature: 0.3 + numbers[1],
                top_p: 0.9,
                top_k: 20,
                seed: id,
            },
            _ => GREEDY,
        },
        max_tokens: 3 + (numbers[2] * 50.0) as u32,
        stop_token_ids: vec![],
        ignore_eos: true,
        eos_token_ids: vec![],
        priority: (id % 3) as i32,
        arrival: 0.0,
        first_token_due: None,
    }
}

#[test]
fn a_thousand_requests_equal_the_cpus() {
    let _alone = alone();
    let folder = tempfile::tempdir().unwrap();
    let model = HuggingFace {
        shards: 2,
        ..HuggingFace::llama3().for_gpu()
    };
    model.write(folder.path());
    let options = LoadOptions {
        max_model_len: Some(LONGEST as u32),
        // 40 blocks: an eighth of what 32 sequences can want.
        kv_memory: KvMemory::Bytes(40 * 16 * 3 * 2 * 64 * 2 * 2),
        max_num_seqs: 32,
        max_num_batched_tokens: 256,
        ..LoadOptions::default()
    };
    let Some(gpu) = on_gpu(folder.path(), &options) else {
        return;
    };
    let (found, preempted) = serve(gpu);
    assert!(preempted > 100, "only {preempted} were put off");
    let cpu = LoadedModel::load(folder.path(), &options, &|_| {}).unwrap();
    let (expected, _) = serve(cpu.executor);
    let mut forward = on_cpu(folder.path(), LONGEST);
    let (mut equal, mut ties, mut draws) = (0, 0, 0);
    let mut furthest = [0.0f32; 2];
    for id in 0..REQUESTS {
        let (found, expected) = (&found[&id], &expected[&id]);
        let count = found.len().min(expected.len());
        let cancelled = id % 11 == 3;
        assert!(cancelled || found.len() == expected.len(), "request {id}");
        let Some(at) = (0..count).find(|&i| found[i] != expected[i]) else {
            equal += 1;
            continue;
        };
        let request = request(id);
        let context = [request.prompt, expected[..at].to_vec()].concat();
        let input = Input {
            tokens: &context,
            start: 0,
            blocks: &(0..LONGEST.div_ceil(16) as u32).collect::<Vec<_>>(),
        };
        forward.run(&[input]).unwrap();
        let logits = forward.logits(&[context.len() - 1]).unwrap().remove(0);
        let drawn = request.sampling != GREEDY;
        let error = least_error(&logits, &request.sampling, context.len(), found[at]);
        let error = error.unwrap_or_else(|| {
            panic!("request {id}, drawn: {drawn}, leaves at {at} where no error explains it")
        });
        furthest[usize::from(drawn)] = furthest[usize::from(drawn)].max(error);
        *(if drawn { &mut draws } else { &mut ties }) += 1;
    }
    eprintln!(
        "{equal} of {REQUESTS} equal, {ties} leave at a near tie (logits {:.1e} of the largest apart), \
         {draws} at a near draw ({:.1e}); {preempted} put off",
        furthest[0], furthest[1]
    );
    // These random weights give logits that lie close together.
    assert!(ties < REQUESTS as usize / 10 && draws < REQUESTS as usize / 8);
}

/// The least error of logits, as a share of the largest, with which `token` would have been chosen
/// too: the margin rule, for draws as well. `None` where none up to the margin does.
fn least_error(logits: &[f32], sampling: &Sampling, position: usize, token: u32) -> Option<f32> {
    let params = SamplingParams {
        temperature: sampling.temperature,
        top_p: sampling.top_p,
        top_k: sampling.top_k,
        seed: sampling.seed,
        position: position as u64,
    };
    let largest = logits.iter().fold(0.0f32, |m, v| m.max(v.abs()));
    let own = logits[token as usize];
    // Draws go through the tokens from the heaviest on: errors that move the token's place in that
    // order of mass raise those before it and lower those after it, or the reverse.
    let turns = (-10..=10).map(|turn| turn as f32 / 10.0);
    let with = |error: f32, turn: f32, itself: f32| {
        let moved = logits.iter().enumerate().map(|(i, &logit)| {
            error
                * match i == token as usize {
                    true => itself,
                    false if logit > own => turn,
                    false => -turn,
                }
                + logit
        });
        sample(&moved.collect::<Vec<_>>(), &params) == Ok(token)
    };
    (1..=STEPS)
        .map(|step| MARGIN * step as f32 / STEPS as f32)
        .find(|share| {
            let turns = turns.clone();
            let mut all = turns.flat_map(|turn| [-1.0, 0.0, 1.0].map(|itself| (turn, itself)));
            all.any(|(turn, itself)| with(share * largest, turn, itself))
        })
}
