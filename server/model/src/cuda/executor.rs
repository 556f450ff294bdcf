//! The executor: steps as graphs where they only decode, else kernel by kernel.

use std::{collections::VecDeque, sync::Arc, time::Duration};

use stoker_engine::executor::{Capacity, Executor, ExecutorError, StepBatch, StepOutput, Ticket};
use stoker_kernels::{
    BLOCK_SIZE,
    cuda::{Buffer, CudaError, Event, Gpu, GpuOptions, Graph, Kernels, Marks, Pinned, Stream},
};

use super::{
    Forward, GpuProfiler, Layout, Packed, Sizes, Tuning, Weights, memory,
    profile::{Probe, Work, copy_rate},
    sizes::{bucket_of, buckets},
    step::Bounds,
};
use crate::{
    checkpoint::Checkpoint,
    config::ModelConfig,
    error::LoadError,
    load::{LoadOptions, LoadPhase, ModelInfo},
    tokenizer::Tokenizer,
};

/// Steps whose descriptions and results the host holds: two in flight and the one being built.
const RING: usize = 3;

/// Bytes that are copied to learn the memory's rate, far more than caches hold.
const COPIED: usize = 1 << 30;

/// A model on an NVIDIA GPU. Steps run in the order of one stream; any thread may drive it.
pub struct CudaExecutor {
    gpu: Arc<Gpu>,
    stream: Stream,
    forward: Forward,
    /// Graphs of the batches in `buckets`.
    graphs: Vec<Graph>,
    buckets: Vec<usize>,
    bounds: Bounds,
    capacity: Capacity,
    packed: Packed,
    /// The step's description, as the kernels find it.
    step: Buffer<u8>,
    places: Vec<Place>,
    /// Tokens, `RING` times those of a step, written by the GPU.
    results: Pinned<u32>,
    in_flight: VecDeque<Vec<bool>>,
    submitted: u64,
    waited: u64,
    probe: Arc<Probe>,
    copy_rate: f64,
    memory: DeviceMemory,
}

/// Bytes of the GPU's memory. Weights and KV cache are what the model and its capacity say.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DeviceMemory {
    pub total: u64,
    /// What the largest step and all graphs take.
    pub steps: u64,
}

/// What a step in flight holds.
struct Place {
    description: Pinned<u8>,
    begun: Event,
    ended: Event,
    /// Set if its kernels are timed.
    probed: Option<Probed>,
}

/// A step whose kernels are timed.
struct Probed {
    /// The step itself: launched one by one, its kernels would wait for the host.
    _graph: Graph,
    marks: Marks,
    work: Vec<Work>,
}

/// The first GPU that the process may use.
///
/// # Errors
/// Where there is none that this build can use: says what was found and what is needed.
pub fn open() -> Result<Arc<Gpu>, LoadError> {
    Ok(Gpu::open(GpuOptions::from_environment())?)
}

impl CudaExecutor {
    /// Opens the GPU, loads weights and sets up the KV cache; `progress` is given the phase and the
    /// share of the whole.
    pub(crate) fn load(
        checkpoint: &Checkpoint,
        tokenizer: &Tokenizer,
        options: &LoadOptions,
        progress: &dyn Fn(LoadPhase, f32),
    ) -> Result<(Self, ModelInfo), LoadError> {
        let config = checkpoint.config(tokenizer)?;
        let sizes = sizes(&config, options)?;
        let gpu = open()?;
        let kernels = Arc::new(Kernels::load(&gpu)?);
        let weights = Weights::load(&kernels, checkpoint, &config, options.dtype, &|share| {
            progress(LoadPhase::Weights, share * 0.95);
        })?;
        progress(LoadPhase::KvCache, 0.95);
        let weight_bytes = weights.bytes();
        let info = ModelInfo {
            name: checkpoint.name()?,
            architecture: config.architecture.name.to_owned(),
            parameters: checkpoint.parameters(),
            context_length: config.context_length,
            vocab_size: tokenizer.vocab_size(),
            weight_bytes,
            kv_bytes_per_token: Forward::block_bytes(&config) / BLOCK_SIZE as u64,
            threads: 1,
        };
        let executor = Self::new(kernels, config, Arc::new(weights), sizes, options, None)?;
        Ok((executor, info))
    }

    /// Random weights in the shape of a model, for benches.
    pub fn random(
        kernels: Arc<Kernels>,
        config: ModelConfig,
        weights: Arc<Weights>,
        options: &LoadOptions,
        tuning: Option<Tuning>,
    ) -> Result<Self, LoadError> {
        let sizes = sizes(&config, options)?;
        Self::new(kernels, config, weights, sizes, options, tuning)
    }

    fn new(
        kernels: Arc<Kernels>,
        config: ModelConfig,
        weights: Arc<Weights>,
        sizes: Sizes,
        options: &LoadOptions,
        tuning: Option<Tuning>,
    ) -> Result<Self, LoadError> {
        let gpu = kernels.gpu().clone();
        let (_, total) = gpu.memory()?;
        let before = gpu.memory()?.0;
        // With a cache just large enough for the largest step everything takes its memory: that
        // step and the graphs have then been seen to fit when the cache is sized by what is left.
        let least = sizes.max_rows.div_ceil(BLOCK_SIZE) + sizes.max_sequences;
        let build = |blocks| Self::with_blocks(&kernels, config, &weights, sizes, blocks, tuning);
        let trial = build(least)?;
        let copied = COPIED.min(gpu.memory()?.0 as usize / 4);
        let copy_rate = copy_rate(&gpu, &trial.stream, copied)?;
        let without_cache = gpu.memory()?.0 + Forward::block_bytes(&config) * least as u64;
        drop(trial);
        let reserve = before.saturating_sub(without_cache);
        let held = Buffer::<u8>::zeroed(&gpu, "a step's activations", reserve as usize)?;
        let blocks = memory::blocks(&gpu, &config, &sizes, options);
        drop(held);
        let mut executor = build(blocks?)?;
        executor.copy_rate = copy_rate;
        executor.memory = DeviceMemory {
            total,
            steps: reserve,
        };
        let kv_bytes = Forward::block_bytes(&config) * u64::from(executor.capacity.blocks);
        tracing::info!(
            gpu = gpu.name(),
            driver = gpu.driver_version(),
            total_bytes = total,
            weight_bytes = weights.bytes(),
            step_bytes = reserve,
            kv_bytes,
            free_bytes = gpu.memory()?.0,
            kv_blocks = executor.capacity.blocks,
            graphs = executor.graphs.len(),
            "memory of the GPU"
        );
        Ok(executor)
    }

    fn with_blocks(
        kernels: &Arc<Kernels>,
        config: ModelConfig,
        weights: &Arc<Weights>,
        sizes: Sizes,
        blocks: usize,
        tuning: Option<Tuning>,
    ) -> Result<Self, LoadError> {
        let gpu = kernels.gpu().clone();
        let stream = Stream::new(&gpu)?;
        let mut forward = Forward::new(kernels.clone(), config, weights.clone(), sizes, blocks)?;
        if let Some(tuning) = tuning {
            forward.tuning = tuning;
        }
        let bytes = Layout::most_bytes(&sizes);
        let step = Buffer::zeroed(&gpu, "a step's description", bytes)?;
        let results = Pinned::zeroed(&gpu, RING * sizes.max_sequences)?;
        let places = (0..RING)
            .map(|_| {
                Ok(Place {
                    description: Pinned::zeroed(&gpu, bytes)?,
                    begun: Event::new(&gpu)?,
                    ended: Event::new(&gpu)?,
                    probed: None,
                })
            })
            .collect::<Result<_, CudaError>>()?;
        let buckets = buckets(sizes.max_sequences.min(sizes.max_rows));
        let graphs = buckets
            .iter()
            .map(|&bucket| {
                stream.capture(|| {
                    let layout = Layout::of_decodes(bucket, &sizes);
                    forward.run(&stream, &layout, step.all(), results.on_gpu())
                })
            })
            .collect::<Result<_, CudaError>>()?;
        let executor = Self {
            bounds: Bounds {
                sizes,
                blocks,
                vocab: config.vocab,
                tile_tokens: forward.cache_shape().tile_tokens(),
            },
            capacity: Capacity {
                blocks: blocks as u32,
                block_size: BLOCK_SIZE as u32,
                max_model_len: sizes.max_model_len as u32,
                max_num_seqs: sizes.max_sequences as u32,
                max_num_batched_tokens: sizes.max_rows as u32,
            },
            gpu,
            stream,
            forward,
            graphs,
            buckets,
            packed: Packed::default(),
            step,
            places,
            results,
            in_flight: VecDeque::with_capacity(RING),
            submitted: 0,
            waited: 0,
            probe: Arc::default(),
            copy_rate: 0.0,
            memory: DeviceMemory::default(),
        };
        executor.gpu.synchronize()?;
        Ok(executor)
    }

    pub fn memory(&self) -> DeviceMemory {
        self.memory
    }

    /// What times this executor's kernels, from any thread.
    pub fn profiler(&self) -> GpuProfiler {
        GpuProfiler {
            gpu: self.gpu.clone(),
            probe: self.probe.clone(),
            copy_rate: self.copy_rate,
        }
    }

    pub fn forward(&self) -> &Forward {
        &self.forward
    }

    fn start(&mut self, batch: &StepBatch) -> Result<(), String> {
        let failed = |error: CudaError| error.to_string();
        let most = self.bounds.sizes.max_sequences;
        let turn = self.submitted as usize % RING;
        let first = turn * most;
        self.packed.fill(batch, &self.bounds, first..first + most)?;
        self.gpu.make_current().map_err(failed)?;
        let probed = self.probe.takes_step();
        let graph = match self.packed.only_decodes() && !probed {
            true => bucket_of(&self.buckets, self.packed.sequences()),
            false => None,
        };
        if let Some(at) = graph {
            self.packed.pad(self.buckets[at]);
        }
        let place = &mut self.places[turn];
        let bytes = self.packed.write(&mut place.description).map_err(failed)?;
        let stream = &self.stream;
        let run = || {
            let layout = self.packed.layout();
            let out = self.results.on_gpu();
            self.forward.run(stream, &layout, self.step.all(), out)
        };
        let recorded = match probed {
            true => {
                stream.note_marks();
                let graph = stream.capture(run);
                let marks = stream.take_marks();
                Some((graph.map_err(failed)?, marks))
            }
            false => None,
        };
        stream
            .upload(&place.description, bytes, self.step.all())
            .and_then(|()| stream.record(&place.begun))
            .and_then(|()| match (&recorded, graph) {
                (Some((graph, _)), _) => stream.launch(graph),
                (None, Some(at)) => stream.launch(&self.graphs[at]),
                (None, None) => run(),
            })
            .and_then(|()| stream.record(&place.ended))
            .map_err(failed)?;
        place.probed = recorded.map(|(graph, marks)| Probed {
            _graph: graph,
            marks,
            work: Work::of(&self.forward, batch),
        });
        let sampled = batch.rows.iter().map(|row| row.sample.is_some()).collect();
        self.in_flight.push_back(sampled);
        Ok(())
    }

    fn finish(&mut self, step: u64) -> Result<StepOutput, String> {
        let failed = |error: CudaError| error.to_string();
        let sampled = self.in_flight.pop_front().ok_or("no step is in flight")?;
        self.gpu.make_current().map_err(failed)?;
        let turn = step as usize % RING;
        let place = &mut self.places[turn];
        place.ended.synchronize().map_err(failed)?;
        let device_time: Duration = place.ended.since(&place.begun).map_err(failed)?;
        if let Some(probed) = place.probed.take() {
            let seconds = device_time.as_secs_f64();
            self.probe
                .add(&place.begun, &probed.marks, &probed.work, seconds)
                .map_err(failed)?;
        }
        let first = turn * self.bounds.sizes.max_sequences;
        let vocab = self.bounds.vocab;
        let tokens = sampled
            .into_iter()
            .enumerate()
            .map(|(i, sampled)| {
                if !sampled {
                    return Ok(None);
                }
                match self.results.get(first + i) {
                    Some(token) if (token as usize) < vocab => Ok(Some(token)),
                    _ => Err(format!(
                        "no logit of the {vocab} is a number: the weights are damaged"
                    )),
                }
            })
            .collect::<Result<_, String>>()?;
        Ok(StepOutput {
            tokens,
            device_time,
        })
    }
}

fn sizes(config: &ModelConfig, options: &LoadOptions) -> Result<Sizes, LoadError> {
    let max_model_len = options.checked_len(config.context_length)?;
    // Attention sees whole contexts; within a window that is the same.
    if let Some(window) = config.attention.window
        && max_model_len as usize > window
    {
        return Err(LoadError::Window {
            window,
            max_model_len,
        });
    }
    Ok(Sizes {
        max_model_len: max_model_len as usize,
        max_sequences: options.max_num_seqs as usize,
        max_rows: options.max_num_batched_tokens as usize,
    })
}

impl Executor for CudaExecutor {
    fn capacity(&self) -> Capacity {
        self.capacity
    }

    fn submit(&mut self, batch: StepBatch) -> Result<Ticket, ExecutorError> {
        let step = self.submitted;
        self.start(&batch)
            .map_err(|message| ExecutorError::Device { step, message })?;
        self.submitted += 1;
        Ok(Ticket(step))
    }

    fn wait(&mut self, ticket: Ticket) -> Result<StepOutput, ExecutorError> {
        let step = ticket.0;
        let failed = |message| ExecutorError::Device { step, message };
        if step != self.waited || step >= self.submitted {
            return Err(failed(format!(
                "step {step} was waited for out of order: the next is {} of {} submitted",
                self.waited, self.submitted
            )));
        }
        self.waited += 1;
        self.finish(step).map_err(failed)
    }
}
