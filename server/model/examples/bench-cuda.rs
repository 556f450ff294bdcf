//! Times the whole engine on a GPU with random f16 weights in the shape of Llama 3.2 3B: decoding,
//! mixed steps and prompts, each against what the card can do. Prints tables, and JSON with
//! `--json FILE`.
//!
//! The roofline of decoding is the time to read all weights and the keys and values of the context
//! at the rate of a large copy on the same card.
#![allow(clippy::print_stdout)]

use std::{sync::Arc, time::Instant};

use half::f16;
use serde_json::{Value, json};
use stoker_engine::{
    Engine, EngineConfig, Event, Limits, RealClock, Request, RequestId,
    executor::{Executor, InputToken, Row, Sampling, StepBatch},
};
use stoker_kernels::{
    AttentionShape,
    cuda::{self, Buffer, FewTile, Gpu, GpuOptions, Kernels, Stream},
};
use stoker_model::{
    CudaExecutor, KvMemory, LoadOptions,
    architecture::{LLAMA, PairOrder},
    config::{ModelConfig, RopeScaling},
    cuda::{Tuning, Weights},
};

type Error = Box<dyn std::error::Error>;

const BATCHES: [usize; 9] = [1, 2, 4, 8, 16, 32, 64, 128, 256];
const CONTEXT: usize = 200;
const STEPS: usize = 80;

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
            threads: None,
            max_num_seqs: sequences as u32,
            max_num_batched_tokens: rows as u32,
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

    /// Seconds that the memory's rate allows for a step of `batch` sequences.
    fn roofline(&self, batch: usize, context: usize) -> f64 {
        let kv = 2 * 2 * self.config.attention.kv_heads * self.config.attention.head_size;
        let kv = (kv * self.config.layers * batch * context) as f64;
        (self.weights.bytes() as f64 + kv) / self.copy
    }

    /// Seconds a step through scheduler, graph, sampler and back, around `context` tokens.
    fn decode(
        &self,
        executor: CudaExecutor,
        batch: usize,
        context: usize,
    ) -> Result<(f64, f64, CudaExecutor), Error> {
        let clock = RealClock::new();
        let limits = Limits {
            max_num_seqs: batch as u32,
            max_num_batched_tokens: executor.capacity().max_num_batched_tokens,
        };
        let mut engine = Engine::new(executor, limits, EngineConfig::default());
        let before = context - STEPS / 2 - 12;
        for id in 0..batch as u64 {
            engine.add(Request {
                id: RequestId(id),
                prompt: (0..before as u32)
                    .map(|i| (i * 97 + id as u32 * 31) % 100_000)
                    .collect(),
                sampling: GREEDY,
                max_tokens: (STEPS + 40) as u32 + (batch * before / 2048) as u32,
                stop_token_ids: vec![],
                ignore_eos: true,
                eos_token_ids: vec![],
                priority: 0,
                arrival: 0.0,
            })?;
        }
        let mut first = 0;
        while first < batch {
            first += engine
                .step(&clock)?
                .iter()
                .filter(|e| matches!(e, Event::Token { first: true, .. }))
                .count();
        }
        for _ in 0..12 {
            engine.step(&clock)?;
        }
        let (steps, device) = (
            engine.stats().steps_total,
            engine.stats().step_seconds_total,
        );
        let begun = Instant::now();
        let mut tokens = 0;
        for _ in 0..STEPS {
            tokens += engine
                .step(&clock)?
                .iter()
                .filter(|e| matches!(e, Event::Token { .. }))
                .count();
        }
        let seconds = begun.elapsed().as_secs_f64() / STEPS as f64;
        let stats = engine.stats();
        let device = (stats.step_seconds_total - device) / (stats.steps_total - steps) as f64;
        assert_eq!(
            tokens,
            STEPS * batch,
            "every step gives every sequence a token"
        );
        while engine.has_work() {
            engine.step(&clock)?;
        }
        Ok((seconds, device, engine.into_executor()))
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

/// Bytes a second that a copy of 4 GiB moves, counting those read and those written.
fn copy_rate(gpu: &Arc<Gpu>, stream: &Stream) -> Result<f64, Error> {
    let len = 2usize << 30;
    let (from, to) = (
        Buffer::<u8>::zeroed(gpu, "a copy", len)?,
        Buffer::<u8>::zeroed(gpu, "a copy", len)?,
    );
    let (begun, ended) = (cuda::Event::new(gpu)?, cuda::Event::new(gpu)?);
    let mut best = f64::INFINITY;
    for _ in 0..8 {
        stream.record(&begun)?;
        stream.copy(from.all(), to.all())?;
        stream.record(&ended)?;
        ended.synchronize()?;
        best = best.min(ended.since(&begun)?.as_secs_f64());
    }
    Ok(2.0 * len as f64 / best)
}

fn main() -> Result<(), Error> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let wants = |what: &str| arguments.is_empty() || arguments.iter().any(|a| a == what);
    let begun = Instant::now();
    let gpu = Gpu::open(GpuOptions::default())?;
    let kernels = Arc::new(Kernels::load(&gpu)?);
    println!(
        "{}, driver {}: kernels loaded after {:.2} s",
        gpu.name(),
        gpu.driver_version(),
        begun.elapsed().as_secs_f64()
    );
    let stream = Stream::new(&gpu)?;
    let copy = copy_rate(&gpu, &stream)?;
    println!("copy: {:.3} TB/s", copy / 1e12);
    let config = llama_3b();
    let weights = Arc::new(Weights::random(&kernels, &config)?);
    let bench = Bench {
        kernels,
        weights,
        config,
        copy,
    };
    println!("weights: {:.3} GB", bench.weights.bytes() as f64 / 1e9);
    let mut report = json!({"card": gpu.name(), "copy_tb_s": copy / 1e12});
    if wants("products") {
        products(&bench, &stream)?;
    }
    if wants("decode") {
        report["decode"] = decode(&bench)?;
    }
    if wants("mixed") {
        report["mixed"] = mixed(&bench)?;
    }
    if wants("prefill") {
        report["prefill"] = prefill(&bench)?;
    }
    if wants("tune") {
        tune(&bench)?;
    }
    println!("JSON {report}");
    Ok(())
}

fn decode(bench: &Bench) -> Result<Value, Error> {
    println!("decode   batch  context    step ms  device ms     tok/s  of roofline");
    let mut runs = Vec::new();
    let begun = Instant::now();
    let mut executor = bench.executor(256, 2048, 4608, None)?;
    println!(
        "(executor of 256 sequences set up in {:.2} s)",
        begun.elapsed().as_secs_f64()
    );
    for (batch, context) in BATCHES
        .map(|b| (b, CONTEXT))
        .into_iter()
        .chain([(1, 4000), (4, 4000)])
    {
        let (seconds, device, back) = bench.decode(executor, batch, context)?;
        executor = back;
        let share = bench.roofline(batch, context) / seconds;
        let rate = batch as f64 / seconds;
        println!(
            "{batch:14} {context:8} {:10.3} {:10.3} {rate:9.0} {:10.1} %",
            seconds * 1e3,
            device * 1e3,
            share * 100.0
        );
        runs.push(json!({"dtype": "f16", "batch": batch, "context": context, "tok_s": rate, "share": share}));
    }
    Ok(runs.into())
}

fn mixed(bench: &Bench) -> Result<Value, Error> {
    let mut executor = bench.executor(64, 2048, 4096, None)?;
    let mut runs = Vec::new();
    println!("mixed  decodes  prompt   alone ms (decodes, prompt)   both ms  of larger");
    for (decodes, prompt) in [(32, 256), (16, 128), (32, 512), (8, 256)] {
        let mut next = 0;
        let mut rows: Vec<Row> = (0..decodes)
            .map(|i| row(i, CONTEXT, 1, &mut next, true))
            .collect();
        let chunk = row(decodes, 0, prompt, &mut next, true);
        let first = step_seconds(&mut executor, &rows, 15)?;
        let second = step_seconds(&mut executor, std::slice::from_ref(&chunk), 15)?;
        rows.push(chunk);
        let both = step_seconds(&mut executor, &rows, 15)?;
        let ratio = both / first.max(second);
        println!(
            "{decodes:14} {prompt:7} {:11.3} {:8.3} {:17.3} {ratio:10.2}",
            first * 1e3,
            second * 1e3,
            both * 1e3
        );
        runs.push(json!({"decodes": decodes, "prompt_tokens": prompt, "of_larger_part": ratio}));
    }
    Ok(runs.into())
}

fn prefill(bench: &Bench) -> Result<Value, Error> {
    let mut runs = Vec::new();
    println!("prefill  tokens  chunk       ms   TFLOP/s (products and attention)");
    let config = &bench.config;
    let matrices = (bench.weights.bytes() / 2) as f64 - (config.vocab * config.hidden) as f64;
    for chunk in [2048, 8192] {
        let mut executor = bench.executor(4, chunk, 8448, None)?;
        for tokens in [512, 2048, 8192] {
            let mut seconds = 0.0;
            for start in (0..tokens).step_by(chunk) {
                let mut next = 0;
                let mut part = row(0, start, chunk.min(tokens - start), &mut next, true);
                part.blocks = (0..next).collect();
                seconds += step_seconds(&mut executor, &[part], 7)?;
            }
            let products = 2.0 * matrices * tokens as f64;
            let pairs = (tokens * (tokens + 1) / 2) as f64;
            let attention =
                4.0 * pairs * config.attention.out_width() as f64 * config.layers as f64;
            let rate = (products + attention) / seconds;
            println!(
                "{tokens:15} {chunk:6} {:8.2} {:9.1}",
                seconds * 1e3,
                rate / 1e12
            );
            runs.push(json!({"tokens": tokens, "chunk": chunk, "tflops": rate / 1e12}));
        }
    }
    Ok(runs.into())
}

/// Each product of a layer by itself, over all layers: bytes or operations against the limit.
fn products(bench: &Bench, stream: &Stream) -> Result<(), Error> {
    let gpu = bench.kernels.gpu();
    let config = &bench.config;
    let most = 8192;
    let x = Buffer::<f16>::zeroed(gpu, "a bench", most * config.inner)?;
    bench.kernels.fill(stream, x.all(), 77, 1.0)?;
    let out = Buffer::<f16>::zeroed(gpu, "a bench", most * config.inner)?;
    let sums = Buffer::<f32>::zeroed(gpu, "a bench", most * config.inner)?;
    let (begun, ended) = (cuda::Event::new(gpu)?, cuda::Event::new(gpu)?);
    println!(
        "products   rows        qkv         output        gate_up          down   TB/s (to 256 rows) or TFLOP/s"
    );
    for rows in [1, 8, 16, 32, 64, 128, 256, 512, 2048, 8192] {
        print!("{rows:15}");
        for which in 0..4 {
            let run = |layer: &stoker_model::cuda::Layer| -> Result<(), Error> {
                let w = [&layer.qkv, &layer.output, &layer.gate_up, &layer.down][which];
                let k = &bench.kernels;
                let gate_up = which == 2;
                if rows <= 16 {
                    let input = cuda::FewIn {
                        x: x.all(),
                        squares: None,
                        epsilon: 1e-5,
                    };
                    let to = if gate_up {
                        cuda::FewOut::GateUp(out.all())
                    } else {
                        cuda::FewOut::F16(out.all())
                    };
                    k.few(stream, rows, input, w, to, None)?;
                } else {
                    let halves = which == 0 && rows > 384;
                    let shape = k.many_shape(w.rows(), w.cols(), rows, !gate_up && !halves, halves);
                    let to = match (gate_up, halves) {
                        (true, _) => cuda::ManyOut::GateUp(out.all()),
                        (_, true) => cuda::ManyOut::F16(out.all()),
                        _ => cuda::ManyOut::Sums(sums.all()),
                    };
                    k.many(stream, rows, x.all(), w, to, shape)?;
                }
                Ok(())
            };
            let mut best = f64::INFINITY;
            for _ in 0..4 {
                stream.record(&begun)?;
                for layer in &bench.weights.layers {
                    run(layer)?;
                }
                stream.record(&ended)?;
                ended.synchronize()?;
                best = best.min(ended.since(&begun)?.as_secs_f64() / config.layers as f64);
            }
            let layer = &bench.weights.layers[0];
            let w = [&layer.qkv, &layer.output, &layer.gate_up, &layer.down][which];
            let amount = match rows <= 256 {
                true => w.bytes() as f64,
                false => w.bytes() as f64 * rows as f64,
            };
            print!(" {:7.1} us {:5.2}", best * 1e6, amount / best / 1e12);
        }
        println!();
    }
    Ok(())
}

/// Cuts of the products, each tried inside the whole step.
fn tune(bench: &Bench) -> Result<(), Error> {
    for batch in [1, 8, 16] {
        let base = Tuning::best(bench.kernels.gpu());
        let measure = |tuning| -> Result<f64, Error> {
            let executor = bench.executor(batch, 512, 1024, Some(tuning))?;
            Ok(bench.decode(executor, batch, CONTEXT)?.1)
        };
        println!(
            "tune batch {batch}: as it is {:.3} ms",
            measure(base)? * 1e3
        );
        for part_tokens in [32, 64, 128] {
            let seconds = measure(Tuning {
                part_tokens,
                ..base
            })?;
            println!("  parts of {part_tokens}: {:.3}", seconds * 1e3);
        }
        for (which, name) in ["qkv", "output", "gate_up", "down", "head"]
            .into_iter()
            .enumerate()
        {
            print!("  {name}:");
            for tile in FewTile::all(batch) {
                let mut tuning = base;
                tuning.tiles[which] = Some(tile);
                print!(
                    " {}x{} {:.3}",
                    tile.warps,
                    tile.tiles,
                    measure(tuning)? * 1e3
                );
            }
            println!();
        }
    }
    for batch in [16, 32] {
        for few_rows in [0, 32] {
            let tuning = Tuning {
                few_rows,
                ..Tuning::best(bench.kernels.gpu())
            };
            let executor = bench.executor(batch, 512, 1024, Some(tuning))?;
            println!(
                "batch {batch}, streamed up to {few_rows}: {:.3} ms",
                bench.decode(executor, batch, CONTEXT)?.1 * 1e3
            );
        }
    }
    Ok(())
}
