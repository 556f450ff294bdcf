//! From the command line to a running engine: load, time the device, start.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use stoker_engine::executor::{Capacity, Executor, ExecutorError};
use stoker_engine::{EngineConfig, Limits, RealClock, SimulatedExecutor, calibrate};
use stoker_hub::HubError;
use stoker_model::{
    ChatTemplate, KvMemory, LoadError, LoadOptions, LoadedModel, Progress, Tokenizer,
    cuda::{DeviceMemory, GpuProfiler},
};
use thiserror::Error;

use crate::app::{App, Serving};
use crate::args::{Args, Device};
use crate::download;
use crate::engine::{EngineHandle, EngineStart};
use crate::objectives::ObjectivesError;

/// Share of the progress that loading takes; timing the device takes the rest.
pub const LOAD_SHARE: f64 = 0.95;

/// Ceiling of the dial `max_num_batched_tokens` on a CPU: more in one step would stall every running
/// sequence for many seconds.
const CPU_TOKENS: u32 = 1024;

/// The same on a GPU, where a step's memory grows with it.
const CUDA_TOKENS: u32 = 2048;

/// New tokens of a chat answer of the simulated device, which never ends one by itself.
const SIMULATED_CHAT_TOKENS: u32 = 256;

#[derive(Debug, Error)]
pub enum StartError {
    #[error("getting the model failed: {0}")]
    Fetch(#[from] HubError),
    #[error("getting the model failed: its async runtime can't be started: {0}")]
    Runtime(std::io::Error),
    #[error("loading the model failed: {0}")]
    Load(#[from] LoadError),
    #[error("timing the device failed: {0}")]
    Calibrate(#[from] ExecutorError),
    #[error("--{0}")]
    Objectives(#[from] ObjectivesError),
    #[error("registering the metrics failed: {0}")]
    Metrics(#[from] prometheus::Error),
    #[error("the engine's thread can't be started: {0}")]
    Thread(std::io::Error),
    #[error("--model is missing")]
    NoModel,
    #[error("the model was loaded twice")]
    Twice,
}

impl StartError {
    /// Whether the node's GPU or its driver can't be used.
    pub fn is_device(&self) -> bool {
        matches!(self, Self::Load(LoadError::Cuda(error)) if error.is_of_device())
    }

    /// Whether other flags would have helped.
    pub fn is_usage(&self) -> bool {
        if let Self::Fetch(error) = self {
            return error.is_usage();
        }
        matches!(
            self,
            Self::Load(
                LoadError::MaxModelLen { .. }
                    | LoadError::KvMemory { .. }
                    | LoadError::Option { .. }
            ) | Self::Objectives(_)
                | Self::NoModel
        )
    }
}

/// What a device gives.
struct Loaded {
    executor: Box<dyn Executor>,
    tokenizer: Arc<Tokenizer>,
    chat_template: Arc<ChatTemplate>,
    default_chat_tokens: Option<u32>,
    /// What takes the device's memory, in bytes.
    memory: Vec<(&'static str, u64)>,
    profiler: Option<GpuProfiler>,
}

/// Loads the model, times the device and starts the engine; then the app is ready. Takes seconds
/// to minutes: call it on a thread of its own.
pub fn start(args: &Args, app: &Arc<App>) -> Result<(), StartError> {
    let clock = RealClock::new();
    let mut loaded = match args.device {
        Device::Simulated => load_simulated(args, app, clock)?,
        Device::Cpu => load(args, app, LoadedModel::load, CPU_TOKENS, |_| None)?,
        Device::Cuda => {
            // Before gigabytes are fetched for a GPU that can't be used.
            let _gpu = stoker_model::cuda::open()?;
            load(args, app, LoadedModel::load_cuda, CUDA_TOKENS, |executor| {
                Some((executor.profiler(), executor.memory()))
            })?
        }
    };
    app.lifecycle.set_progress(LOAD_SHARE);
    let prior = calibrate(&mut *loaded.executor)?;
    let capacity = loaded.executor.capacity();
    app.metrics.device_memory(&loaded.memory)?;
    let metrics = app.metrics.engine_started(capacity.max_model_len)?;
    let on_failure = {
        let lifecycle = app.lifecycle.clone();
        Box::new(move |message| lifecycle.fail(message))
    };
    let engine = EngineHandle::start(EngineStart {
        executor: loaded.executor,
        clock,
        limits: limits(args, capacity),
        config: EngineConfig {
            max_waiting: args.max_waiting as usize,
            law_prior: prior,
        },
        objectives: args.objectives()?,
        eos_token_ids: loaded.tokenizer.eos_token_ids().to_vec(),
        metrics,
        on_failure,
    })
    .map_err(StartError::Thread)?;
    tracing::info!(
        model = &*app.model_name,
        max_model_len = capacity.max_model_len,
        kv_capacity_tokens = u64::from(capacity.blocks) * u64::from(capacity.block_size),
        law_base_seconds = prior.law.base,
        law_per_token_seconds = prior.law.per_token,
        "loaded"
    );
    app.serving
        .set(Serving {
            engine,
            tokenizer: loaded.tokenizer,
            chat_template: loaded.chat_template,
            max_model_len: capacity.max_model_len,
            max_waiting: args.max_waiting as usize,
            default_chat_tokens: loaded.default_chat_tokens,
            profiler: loaded.profiler.map(tokio::sync::Mutex::new),
        })
        .map_err(|_| StartError::Twice)?;
    app.lifecycle.set_ready();
    Ok(())
}

/// The dials to start with.
fn limits(args: &Args, capacity: Capacity) -> Limits {
    for (flag, asked, ceiling) in [
        ("--max-num-seqs", args.max_num_seqs, capacity.max_num_seqs),
        (
            "--max-num-batched-tokens",
            args.max_num_batched_tokens,
            capacity.max_num_batched_tokens,
        ),
    ] {
        if asked > ceiling {
            tracing::warn!(flag, asked, ceiling, "lowered to what the device allows");
        }
    }
    Limits {
        max_num_seqs: args.max_num_seqs.min(capacity.max_num_seqs),
        max_num_batched_tokens: args
            .max_num_batched_tokens
            .min(capacity.max_num_batched_tokens),
    }
}

fn load_simulated(args: &Args, app: &App, clock: RealClock) -> Result<Loaded, StartError> {
    let steps = 100;
    for step in 0..steps {
        app.lifecycle
            .set_progress(LOAD_SHARE * f64::from(step) / f64::from(steps));
        std::thread::sleep(Duration::from_secs_f64(
            args.simulated_load_seconds / f64::from(steps),
        ));
    }
    let profile = args.profile();
    Ok(Loaded {
        tokenizer: Arc::new(Tokenizer::simulated(profile.vocabulary.end)),
        chat_template: Arc::new(ChatTemplate::chatml()?),
        executor: Box::new(SimulatedExecutor::new(profile, clock)),
        default_chat_tokens: Some(SIMULATED_CHAT_TOKENS),
        memory: Vec::new(),
        profiler: None,
    })
}

/// How a device loads a model.
type LoadModel<E> = fn(&Path, &LoadOptions, &dyn Fn(Progress)) -> Result<LoadedModel<E>, LoadError>;

fn load<E: Executor + 'static>(
    args: &Args,
    app: &App,
    load_model: LoadModel<E>,
    most_batched_tokens: u32,
    of_gpu: fn(&E) -> Option<(GpuProfiler, DeviceMemory)>,
) -> Result<Loaded, StartError> {
    let local = download::obtain(args, app)?;
    let defaults = LoadOptions::default();
    let options = LoadOptions {
        dtype: args.dtype.into(),
        max_model_len: args.max_model_len,
        kv_memory: match args.kv_cache_memory_bytes {
            Some(bytes) => KvMemory::Bytes(bytes),
            None => KvMemory::Utilization(args.gpu_memory_utilization),
        },
        threads: args.threads.map(|n| n as usize),
        // A dial that is asked for is within its own ceiling.
        max_num_seqs: defaults.max_num_seqs.max(args.max_num_seqs),
        max_num_batched_tokens: most_batched_tokens.max(args.max_num_batched_tokens),
    };
    let model = load_model(&local.path, &options, &|progress| {
        let loaded = f64::from(progress.percent) / 100.0;
        app.lifecycle
            .set_progress(local.progress + (LOAD_SHARE - local.progress) * loaded);
    })?;
    tracing::info!(
        name = model.info.name.as_deref().unwrap_or(""),
        architecture = model.info.architecture,
        parameters = model.info.parameters,
        weight_bytes = model.info.weight_bytes,
        threads = model.info.threads,
        "model"
    );
    let Capacity {
        blocks, block_size, ..
    } = model.executor.capacity();
    let kv_tokens = u64::from(blocks) * u64::from(block_size);
    let mut memory = vec![
        ("weights", model.info.weight_bytes),
        ("kv_cache", kv_tokens * model.info.kv_bytes_per_token),
    ];
    let profiler = of_gpu(&model.executor).map(|(profiler, of_device)| {
        memory.extend([("steps", of_device.steps), ("total", of_device.total)]);
        profiler
    });
    Ok(Loaded {
        memory,
        profiler,
        executor: Box::new(model.executor),
        tokenizer: model.tokenizer,
        chat_template: model.chat_template,
        default_chat_tokens: None,
    })
}
