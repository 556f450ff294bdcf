//! Times the whole engine on a GPU with random weights in the shape of Llama 3.2 3B: decoding with
//! f16, int8, int4 and as GGUF files have them, mixed steps and prompts, each against what the card can
//! do. Prints tables, and JSON with `--json FILE`.
//!
//! `bench-cuda [decode] [quantised] [mixed] [prefill] [products] [tune]`; without a name all but the
//! last two, which are done with each type of weights that is measured. `bench-cuda checkpoint DIR` writes such a model as a Hugging Face folder, for benches of
//! the server.
//!
//! With STOKER_CUDA_OLDEST_CODE=1 it runs the PTX for the oldest architecture.
//!
//! The roofline of decoding is the time to read all weights and the keys and values of the context
//! at the rate of a large copy on the same card.
#![allow(clippy::print_stdout)]

mod checkpoint;
mod cublas;
mod decode;
mod prompts;
mod tune;
mod weights;

use std::{path::Path, sync::Arc, time::Instant};

use serde_json::json;
use stoker_engine::executor::{Executor, InputToken, Row, Sampling, StepBatch};
use stoker_kernels::{
    AttentionShape,
    cuda::{Format, Gpu, GpuOptions, Kernels, Stream},
};
use stoker_model::{
    CudaExecutor, KvMemory, LoadOptions,
    architecture::{LLAMA, PairOrder},
    config::{ModelConfig, RopeScaling},
    cuda::{Tuning, Weights, copy_rate},
};

type Error = Box<dyn std::error::Error>;

const CONTEXT: usize = 200;

const GREEDY: Sampling = Sampling {
    temperature: 0.0,
    top_p: 1.0,
    top_k: 0,
    seed: 0,
};

fn llama_3b() -> ModelConfig {
    ModelConfig {
        architecture: &LLAMA,
        layers: 28,
        hidden: 3072,
        inner: 8192,
        attention: AttentionShape {
            heads: 24,
            kv_heads: 8,
            head_size: 128,
            window: None,
        },
        vocab: 128_256,
        context_length: 131_072,
        rotated: 128,
        rope_base: 500_000.0,
        rope_scaling: RopeScaling::None,
        norm_epsilon: 1e-5,
        pairs: PairOrder::Adjacent,
    }
}

/// The card, the weights, and what they are measured against.
struct Bench {
    kernels: Arc<Kernels>,
    weights: Arc<Weights>,
    /// Of quantised weights.
    format: Option<Format>,
    config: ModelConfig,
    /// Bytes a second.
    copy: f64,
}

impl Bench {
    fn executor(
        &self,
        sequences: usize,
        rows: usize,
        len: usize,
        tuning: Option<Tuning>,
    ) -> Result<CudaExecutor, Error> {
        let options = LoadOptions {
            max_model_len: Some(len as u32),
            kv_memory: KvMemory::Utilization(0.9),
            max_num_seqs: sequences as u32,
            max_num_batched_tokens: rows as u32,
            ..LoadOptions::default()
        };
        let (kernels, weights) = (self.kernels.clone(), self.weights.clone());
        Ok(CudaExecutor::random(
            kernels,
            self.config,
            weights,
            &options,
            tuning,
        )?)
    }

    /// The same card and shape with weights of another type.
    fn with(&self, format: Format) -> Result<Self, Error> {
        Ok(Self {
            kernels: self.kernels.clone(),
            weights: Arc::new(weights::random(&self.kernels, &self.config, Some(format))?),
            format: Some(format),
            config: self.config,
            copy: self.copy,
        })
    }

    /// As results name the weights' type.
    fn dtype(&self) -> &'static str {
        match self.format {
            None => "f16",
            Some(Format::INT8) => "int8",
            Some(Format::INT4) => "int4",
            Some(Format::INT8_BY_32) => "Q8_0",
            Some(Format::INT8_BY_16) => "Q6_K",
            Some(_) => "Q4_K",
        }
    }

    /// Seconds that the memory's rate allows for a step of `batch` sequences.
    fn roofline(&self, batch: usize, context: usize) -> f64 {
        let kv = 2 * 2 * self.config.attention.kv_heads * self.config.attention.head_size;
        let kv = (kv * self.config.layers * batch * context) as f64;
        (self.weights.bytes() as f64 + kv) / self.copy
    }
}

/// Seconds of a step on the device, the median of several.
fn step_seconds(executor: &mut CudaExecutor, rows: &[Row], times: usize) -> Result<f64, Error> {
    let mut seconds = Vec::new();
    for _ in 0..times {
        let ticket = executor.submit(StepBatch {
            rows: rows.to_vec(),
        })?;
        seconds.push(executor.wait(ticket)?.device_time.as_secs_f64());
    }
    seconds.sort_by(f64::total_cmp);
    Ok(seconds[times / 2])
}

/// A row of `tokens` after `start`, on blocks of its own.
fn row(slot: usize, start: usize, tokens: usize, next_block: &mut u32, sample: bool) -> Row {
    let blocks = (start + tokens).div_ceil(16) as u32;
    *next_block += blocks;
    Row {
        slot: slot as u32,
        tokens: (0..tokens as u32)
            .map(|i| InputToken::Known(i * 131 % 100_000))
            .collect(),
        start: start as u32,
        blocks: (*next_block - blocks..*next_block).collect(),
        sample: sample.then_some(GREEDY),
    }
}

/// Bytes that are copied to learn the memory's rate.
const COPIED: usize = 2 << 30;

fn main() -> Result<(), Error> {
    let mut arguments: Vec<String> = std::env::args().skip(1).collect();
    if let [what, folder] = arguments.as_slice()
        && what == "checkpoint"
    {
        return checkpoint::write(&llama_3b(), Path::new(folder));
    }
    let json = match arguments.iter().position(|a| a == "--json") {
        Some(at) if at + 1 < arguments.len() => Some(arguments.drain(at..at + 2).next_back()),
        _ => None,
    };
    let wants = |what: &str| match arguments.is_empty() {
        true => !matches!(what, "products" | "tune"),
        false => arguments.iter().any(|a| a == what),
    };
    let begun = Instant::now();
    let gpu = Gpu::open(GpuOptions::from_environment())?;
    let kernels = Arc::new(Kernels::load(&gpu)?);
    println!(
        "{}, driver {}: kernels loaded after {:.2} s",
        gpu.name(),
        gpu.driver_version(),
        begun.elapsed().as_secs_f64()
    );
    let stream = Stream::new(&gpu)?;
    let copy = copy_rate(&gpu, &stream, COPIED)?;
    println!("copy: {:.3} TB/s", copy / 1e12);
    let config = llama_3b();
    let bench = Bench {
        weights: Arc::new(weights::random(&kernels, &config, None)?),
        kernels,
        format: None,
        config,
        copy,
    };
    println!("weights: {:.3} GB", bench.weights.bytes() as f64 / 1e9);
    let mut report = json!({"card": gpu.name(), "copy_tb_s": copy / 1e12});
    if wants("decode") {
        report["decode"] = decode::run(&bench, &decode::BATCHES, &decode::LONG)?.into();
    }
    if wants("mixed") {
        report["mixed"] = prompts::mixed(&bench)?;
    }
    if wants("prefill") {
        let cublas = cublas::rate(&gpu)?;
        report["prefill"] = prompts::prefill(&bench, cublas)?;
    }
    let more = |bench: &Bench| -> Result<(), Error> {
        if wants("products") {
            tune::products(bench, &stream)?;
        }
        if wants("tune") {
            tune::tune(bench)?;
        }
        Ok(())
    };
    more(&bench)?;
    if wants("quantised") {
        let (runs, ratios) = decode::quantised(&bench, &more)?;
        match report["decode"].as_array_mut() {
            Some(decode) => decode.extend(runs),
            None => report["decode"] = runs.into(),
        }
        report["quantised"] = ratios.into();
    }
    println!("JSON {report}");
    if let Some(path) = json.flatten() {
        std::fs::write(path, serde_json::to_string_pretty(&report)? + "\n")?;
    }
    Ok(())
}
