//! The executor: a thread that owns the model and runs the steps it is sent.

use std::{
    collections::HashMap,
    sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel},
    time::{Duration, Instant},
};

use rayon::{ThreadPool, ThreadPoolBuilder};
use stoker_engine::executor::{
    Capacity, Executor, ExecutorError, InputToken, Row, Slot, StepBatch, StepOutput, Ticket,
};
use stoker_kernels::{BLOCK_SIZE, Pick, SamplingParams};

use super::{Forward, Input, Weights, memory};
use crate::{
    checkpoint::Checkpoint,
    error::LoadError,
    load::{Dtype, LoadOptions, LoadPhase, ModelInfo},
    tokenizer::Tokenizer,
};

/// A model on the CPU, its steps run in order by threads of its own.
pub struct CpuExecutor {
    capacity: Capacity,
    submitted: u64,
    steps: SyncSender<StepBatch>,
    results: Receiver<Result<StepOutput, String>>,
    waited: u64,
    /// Stops its threads when dropped, once the worker has seen that `steps` is closed.
    _pool: ThreadPool,
}

impl CpuExecutor {
    /// Loads weights and sets up the KV cache; `progress` is given the phase and the share of the
    /// whole.
    pub(crate) fn load(
        checkpoint: &Checkpoint,
        tokenizer: &Tokenizer,
        options: &LoadOptions,
        progress: &dyn Fn(LoadPhase, f32),
    ) -> Result<(Self, ModelInfo), LoadError> {
        let config = checkpoint.config(tokenizer)?;
        let max_model_len = options.checked_len(config.context_length)?;
        if !matches!(options.dtype, Dtype::Auto | Dtype::Float16) {
            return Err(LoadError::Option {
                name: "dtype",
                value: options.dtype.to_string(),
                expected: "auto or float16 with --device cpu",
            });
        }
        let pool = thread_pool(options.threads)?;
        let weights = Weights::load(checkpoint, &config, &pool, &|share| {
            progress(LoadPhase::Weights, share * 0.98);
        })?;
        progress(LoadPhase::KvCache, 0.98);
        let blocks = memory::blocks(&config, max_model_len, options)?;
        let info = ModelInfo {
            name: checkpoint.name()?,
            architecture: config.architecture.name.to_owned(),
            parameters: checkpoint.parameters(),
            context_length: config.context_length,
            vocab_size: tokenizer.vocab_size(),
            weight_bytes: weights.bytes() as u64,
            kv_bytes_per_token: memory::block_bytes(&config) / BLOCK_SIZE as u64,
            threads: pool.current_num_threads(),
        };
        let capacity = Capacity {
            blocks,
            block_size: BLOCK_SIZE as u32,
            max_model_len,
            max_num_seqs: options.max_num_seqs,
            max_num_batched_tokens: options.max_num_batched_tokens,
        };
        let forward = Forward::new(config, weights, max_model_len as usize, blocks as usize)?;
        tracing::info!(
            architecture = info.architecture,
            parameters = info.parameters,
            weight_bytes = info.weight_bytes,
            kv_blocks = blocks,
            max_model_len,
            threads = info.threads,
            instruction_set = stoker_kernels::instruction_set(),
            "model loaded"
        );
        Ok((Self::start(forward, capacity, pool), info))
    }

    fn start(forward: Forward, capacity: Capacity, pool: ThreadPool) -> Self {
        // One step waits here while another runs: two in flight.
        let (steps, incoming) = sync_channel(1);
        let (outgoing, results) = channel();
        let worker = Worker {
            forward,
            previous: HashMap::new(),
        };
        pool.spawn(move || worker.run(&incoming, &outgoing));
        Self {
            capacity,
            submitted: 0,
            steps,
            results,
            waited: 0,
            _pool: pool,
        }
    }

    fn stopped(step: u64) -> ExecutorError {
        ExecutorError::Device {
            step,
            message: "the executor's thread has ended; restart the server".into(),
        }
    }
}

/// One thread of the pool becomes the worker, which takes part in the parallel work itself.
fn thread_pool(threads: Option<usize>) -> Result<ThreadPool, LoadError> {
    let threads = match threads {
        Some(0) => {
            return Err(LoadError::Option {
                name: "threads",
                value: "0".into(),
                expected: "at least 1",
            });
        }
        Some(threads) => threads,
        None => std::thread::available_parallelism().map_or(1, usize::from),
    };
    ThreadPoolBuilder::new()
        .num_threads(threads)
        .thread_name(|i| format!("executor-{i}"))
        .panic_handler(|_| tracing::error!("an executor thread panicked"))
        .build()
        .map_err(|e| LoadError::Threads {
            threads,
            message: e.to_string(),
        })
}

impl Executor for CpuExecutor {
    fn capacity(&self) -> Capacity {
        self.capacity
    }

    fn submit(&mut self, batch: StepBatch) -> Result<Ticket, ExecutorError> {
        let step = self.submitted;
        self.steps.send(batch).map_err(|_| Self::stopped(step))?;
        self.submitted += 1;
        Ok(Ticket(step))
    }

    fn wait(&mut self, ticket: Ticket) -> Result<StepOutput, ExecutorError> {
        let step = ticket.0;
        if step != self.waited || step >= self.submitted {
            return Err(ExecutorError::Device {
                step,
                message: format!(
                    "step {step} was waited for out of order: the next is {} of {} submitted",
                    self.waited, self.submitted
                ),
            });
        }
        self.waited += 1;
        self.results
            .recv()
            .map_err(|_| Self::stopped(step))?
            .map_err(|message| ExecutorError::Device { step, message })
    }
}

struct Worker {
    forward: Forward,
    /// What the step before sampled for each slot.
    previous: HashMap<Slot, u32>,
}

impl Worker {
    fn run(mut self, steps: &Receiver<StepBatch>, results: &Sender<Result<StepOutput, String>>) {
        while let Ok(batch) = steps.recv() {
            let started = Instant::now();
            let result = self
                .step(&batch)
                .map(|tokens| self.finish(&batch, tokens, started.elapsed()));
            if result.is_err() {
                self.previous.clear();
            }
            if results.send(result).is_err() {
                break;
            }
        }
    }

    /// Computes a step and gives the sampled tokens, one for each row that asked.
    fn step(&mut self, batch: &StepBatch) -> Result<Vec<u32>, String> {
        let tokens = batch
            .rows
            .iter()
            .map(|row| self.tokens(row))
            .collect::<Result<Vec<_>, _>>()?;
        let mut picks = Vec::new();
        let mut end = 0;
        for row in &batch.rows {
            end += row.tokens.len();
            if let Some(sampling) = row.sample {
                picks.push(Pick {
                    row: end - 1,
                    sampling: SamplingParams {
                        temperature: sampling.temperature,
                        top_p: sampling.top_p,
                        top_k: sampling.top_k,
                        seed: sampling.seed,
                        position: u64::from(row.start) + row.tokens.len() as u64,
                    },
                });
            }
        }
        let inputs: Vec<Input> = batch
            .rows
            .iter()
            .zip(&tokens)
            .map(|(row, tokens)| Input {
                tokens,
                start: row.start as usize,
                blocks: &row.blocks,
            })
            .collect();
        self.forward.run(&inputs).map_err(|e| e.to_string())?;
        self.forward.sample(&picks).map_err(|e| e.to_string())
    }

    fn tokens(&self, row: &Row) -> Result<Vec<u32>, String> {
        if row.tokens.is_empty() {
            return Err(format!("slot {} has a row without tokens", row.slot));
        }
        row.tokens
            .iter()
            .map(|token| match token {
                InputToken::Known(id) => Ok(*id),
                InputToken::FromPreviousStep => {
                    self.previous.get(&row.slot).copied().ok_or_else(|| {
                        format!("the step before sampled no token for slot {}", row.slot)
                    })
                }
            })
            .collect()
    }

    fn finish(&mut self, batch: &StepBatch, sampled: Vec<u32>, time: Duration) -> StepOutput {
        self.previous.clear();
        let mut sampled = sampled.into_iter();
        let tokens = batch
            .rows
            .iter()
            .map(|row| {
                let token = row.sample.and_then(|_| sampled.next());
                if let Some(token) = token {
                    self.previous.insert(row.slot, token);
                }
                token
            })
            .collect();
        StepOutput {
            tokens,
            device_time: time,
        }
    }
}
