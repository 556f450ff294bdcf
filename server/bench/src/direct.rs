//! The engine in this process: every sequence of a batch is generated at once, round after round.

use std::collections::HashMap;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};
use serde::{Deserialize, Serialize};
use stoker_engine::executor::{Executor, Sampling};
use stoker_engine::{
    Clock, Engine, EngineConfig, Event, Limits, Profile, RealClock, Request, RequestId,
    SimulatedExecutor,
};
use stoker_model::{Dtype, KvMemory, LoadOptions, LoadedModel};

use crate::prompts::{Mix, Prompts, token_ids};
use crate::stats::Summary;
use crate::table::{self, ms};

#[derive(Args)]
pub struct DirectArgs {
    /// What runs the model
    #[arg(long, value_enum)]
    device: Device,
    /// GGUF file or folder of a checkpoint, for --device cpu and cuda
    #[arg(long)]
    model: Option<PathBuf>,
    /// GPU to imitate, for --device simulated: t4 or h100
    #[arg(long, default_value = "t4")]
    simulated_profile: String,
    /// Sequences at once; several: one after the other
    #[arg(long, value_delimiter = ',', default_value = "1,2,4,8",
          value_parser = clap::value_parser!(u32).range(1..))]
    batch: Vec<u32>,
    /// Rounds of each batch, after one that is not counted
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Tokens of each prompt
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..))]
    prompt_tokens: u32,
    /// New tokens of each sequence; the model's end token is ignored
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..))]
    max_tokens: u32,
    /// Token budget of a step
    #[arg(long, default_value_t = 512, value_parser = clap::value_parser!(u32).range(1..))]
    max_num_batched_tokens: u32,
    /// What weights are kept as, for --device cuda
    #[arg(long, value_enum, default_value = "auto")]
    dtype: WeightType,
    /// Most tokens of a sequence, for --device cpu and cuda [default: what the model was made for]
    #[arg(long)]
    max_model_len: Option<u32>,
    /// Threads that compute, for --device cpu [default: as many as the process may use]
    #[arg(long)]
    threads: Option<usize>,
    /// Bytes of memory for the KV cache, for --device cpu and cuda
    #[arg(long, default_value_t = 1 << 30)]
    kv_cache_memory_bytes: u64,
    /// Token ids that prompts are made of
    #[arg(long, default_value = "1000..30000", value_parser = token_ids)]
    token_ids: std::ops::Range<u32>,
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Where to write the figures as JSON
    #[arg(long)]
    json: Option<PathBuf>,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Device {
    Cpu,
    Cuda,
    Simulated,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum WeightType {
    Auto,
    Float16,
    Int8,
    Int4,
}

#[derive(Debug, Serialize, Deserialize)]
pub struct DirectReport {
    pub model: String,
    pub runs: Vec<DirectRun>,
}

#[derive(Debug, Serialize, Deserialize)]
pub struct DirectRun {
    pub batch: u32,
    pub rounds: u32,
    pub seconds: f64,
    /// New tokens a second, prompt processing included in the time.
    pub tok_s: f64,
    /// Seconds.
    #[serde(skip_deserializing)]
    pub latency: Summary,
    #[serde(skip_deserializing)]
    pub ttft: Summary,
    #[serde(skip_deserializing)]
    pub itl: Summary,
}

pub fn run(args: DirectArgs) -> Result<bool> {
    let clock = RealClock::new();
    let (model, executor) = executor(&args, clock)?;
    let most = args.batch.iter().copied().max().unwrap_or(1);
    let limits = Limits {
        max_num_seqs: most,
        max_num_batched_tokens: args.max_num_batched_tokens,
    };
    let config = EngineConfig {
        max_waiting: most as usize,
        ..EngineConfig::default()
    };
    let mut engine = Engine::new(executor, limits, config);
    if engine.limits() != limits {
        bail!(
            "the device allows at most {:?}; lower --batch or --max-num-batched-tokens",
            engine.limits()
        );
    }
    let mut bench = Bench {
        prompts: Prompts {
            mix: Mix::single(args.prompt_tokens, args.max_tokens),
            token_ids: args.token_ids.clone(),
            seed: args.seed,
        },
        next: 0,
        clock,
    };
    let mut runs = Vec::new();
    for &batch in &args.batch {
        bench.round(&mut engine, batch, &mut Samples::default())?;
        let mut samples = Samples::default();
        let start = clock.now();
        for _ in 0..args.rounds {
            bench.round(&mut engine, batch, &mut samples)?;
        }
        let seconds = clock.now() - start;
        runs.push(DirectRun {
            batch,
            rounds: args.rounds,
            seconds,
            tok_s: samples.tokens as f64 / seconds,
            latency: Summary::of(&mut samples.latency),
            ttft: Summary::of(&mut samples.ttft),
            itl: Summary::of(&mut samples.itl),
        });
    }
    let report = DirectReport { model, runs };
    print(&report, &args);
    if let Some(path) = &args.json {
        crate::write_json(path, &report)?;
    }
    Ok(true)
}

fn executor(args: &DirectArgs, clock: RealClock) -> Result<(String, Box<dyn Executor>)> {
    match args.device {
        Device::Simulated => {
            let profile = Profile::by_name(&args.simulated_profile).with_context(|| {
                format!(
                    "there is no profile {:?}; take t4 or h100",
                    args.simulated_profile
                )
            })?;
            let name = format!("simulated-{}", profile.name);
            Ok((name, Box::new(SimulatedExecutor::new(profile, clock))))
        }
        Device::Cpu | Device::Cuda => {
            let path = args.model.as_deref().context(
                "--device cpu and cuda need --model, a GGUF file or the folder of a checkpoint",
            )?;
            let most = args.batch.iter().copied().max().unwrap_or(1);
            let defaults = LoadOptions::default();
            let options = LoadOptions {
                dtype: match args.dtype {
                    WeightType::Auto => Dtype::Auto,
                    WeightType::Float16 => Dtype::Float16,
                    WeightType::Int8 => Dtype::Int8,
                    WeightType::Int4 => Dtype::Int4,
                },
                max_model_len: args.max_model_len,
                threads: args.threads,
                kv_memory: KvMemory::Bytes(args.kv_cache_memory_bytes),
                max_num_seqs: defaults.max_num_seqs.max(most),
                max_num_batched_tokens: defaults
                    .max_num_batched_tokens
                    .max(args.max_num_batched_tokens),
            };
            let name = path.file_stem().unwrap_or_default().to_string_lossy();
            let executor: Box<dyn Executor> = match args.device {
                Device::Cuda => Box::new(LoadedModel::load_cuda(path, &options, &|_| {})?.executor),
                _ => Box::new(LoadedModel::load(path, &options, &|_| {})?.executor),
            };
            Ok((name.into_owned(), executor))
        }
    }
}

#[derive(Default)]
struct Samples {
    tokens: u64,
    latency: Vec<f64>,
    ttft: Vec<f64>,
    itl: Vec<f64>,
}

struct Bench {
    prompts: Prompts,
    next: u64,
    clock: RealClock,
}

impl Bench {
    /// Generates `batch` sequences at once.
    fn round(
        &mut self,
        engine: &mut Engine<Box<dyn Executor>>,
        batch: u32,
        samples: &mut Samples,
    ) -> Result<()> {
        let arrival = self.clock.now();
        for _ in 0..batch {
            engine.add(self.request(arrival))?;
        }
        let mut last_token: HashMap<RequestId, f64> = HashMap::new();
        while engine.has_work() {
            for event in engine.step(&self.clock)? {
                match event {
                    Event::Token { id, at, .. } => {
                        samples.tokens += 1;
                        match last_token.insert(id, at) {
                            None => samples.ttft.push(at - arrival),
                            Some(before) => samples.itl.push(at - before),
                        }
                    }
                    Event::Finished { at, .. } => samples.latency.push(at - arrival),
                }
            }
        }
        Ok(())
    }

    fn request(&mut self, arrival: f64) -> Request {
        self.next += 1;
        let prompt = self.prompts.get(self.next);
        Request {
            id: RequestId(self.next),
            prompt: prompt.ids,
            sampling: Sampling {
                temperature: 0.0,
                top_p: 1.0,
                top_k: 0,
                seed: 0,
            },
            max_tokens: prompt.max_tokens,
            stop_token_ids: Vec::new(),
            ignore_eos: true,
            eos_token_ids: Vec::new(),
            priority: 0,
            arrival,
            first_token_due: None,
        }
    }
}

fn print(report: &DirectReport, args: &DirectArgs) {
    let title = format!(
        "Direct: {}, {} prompt tokens, {} new tokens",
        report.model, args.prompt_tokens, args.max_tokens
    );
    let rows: Vec<Vec<String>> = report
        .runs
        .iter()
        .map(|run| {
            vec![
                run.batch.to_string(),
                format!("{:.1}", run.tok_s),
                format!("{:.1}", run.tok_s / f64::from(run.batch)),
                ms(run.latency.p50),
                ms(run.ttft.p50),
                ms(run.itl.p50),
                ms(run.itl.p95),
                ms(run.itl.max),
            ]
        })
        .collect();
    table::print(
        &title,
        &[
            "batch",
            "tok/s",
            "tok/s/seq",
            "latency ms",
            "TTFT ms",
            "ITL P50 ms",
            "P95",
            "max",
        ],
        &rows,
    );
}
