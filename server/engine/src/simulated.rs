//! An executor that takes the time a GPU would take, without one.

use std::collections::VecDeque;
use std::ops::Range;
use std::time::Duration;

use stoker_law::{Law, StepShape};

use crate::clock::Clock;
use crate::executor::{
    Capacity, Executor, ExecutorError, InputToken, StepBatch, StepOutput, Ticket,
};

/// A device and model to imitate: Llama 3.2 3B in float16 on some card.
#[derive(Clone, Debug, PartialEq)]
pub struct Profile {
    pub name: &'static str,
    pub law: Law,
    /// Seconds that a step of a single token is shorter than the law says (matrix-vector kernels
    /// read the weights faster than those for a batch).
    pub single_token_saving: f64,
    /// Bytes of device memory.
    pub memory_bytes: u64,
    pub weight_bytes: u64,
    pub kv_bytes_per_token: u64,
    /// Share of the memory that weights and KV cache may fill.
    pub memory_utilization: f64,
    pub block_size: u32,
    pub max_model_len: u32,
    /// Ceilings of the dials.
    pub max_num_seqs: u32,
    pub max_num_batched_tokens: u32,
    /// Token ids that are generated.
    pub vocabulary: Range<u32>,
    /// Standard deviation of the logarithm of a step's time; 0 for none.
    pub noise: f64,
    pub seed: u64,
}

impl Profile {
    /// NVIDIA T4, 16 GB.
    pub fn t4() -> Self {
        Self {
            name: "t4",
            law: Law {
                base: 28.6e-3,
                per_kv_token: 0.36e-6,
                per_token: 0.27e-3,
                per_sequence: 0.18e-3,
                hidden: 1.0,
            },
            single_token_saving: 1.8e-3,
            memory_bytes: 16_000_000_000,
            weight_bytes: 6_400_000_000,
            kv_bytes_per_token: 114_688,
            memory_utilization: 0.9,
            block_size: 16,
            max_model_len: 8192,
            max_num_seqs: 256,
            max_num_batched_tokens: 8192,
            vocabulary: 0..128_000,
            noise: 0.0,
            seed: 0,
        }
    }

    /// NVIDIA H100, 80 GB.
    pub fn h100() -> Self {
        Self {
            name: "h100",
            law: Law {
                base: 2.37e-3,
                per_kv_token: 50e-9,
                per_token: 9.0e-6,
                per_sequence: 10e-6,
                hidden: 0.85,
            },
            single_token_saving: 0.0,
            memory_bytes: 80_000_000_000,
            max_num_seqs: 1024,
            ..Self::t4()
        }
    }

    /// The profile of that name: `t4` or `h100`.
    pub fn by_name(name: &str) -> Option<Self> {
        match name {
            "t4" => Some(Self::t4()),
            "h100" => Some(Self::h100()),
            _ => None,
        }
    }

    /// Tokens that fit the KV cache beside the weights.
    pub fn kv_capacity_tokens(&self) -> u64 {
        let usable = (self.memory_bytes as f64 * self.memory_utilization) as u64;
        usable.saturating_sub(self.weight_bytes) / self.kv_bytes_per_token.max(1)
    }
}

/// Paces steps to absolute deadlines by the profile's law and makes up deterministic tokens.
pub struct SimulatedExecutor {
    profile: Profile,
    clock: Box<dyn Clock + Send>,
    in_flight: VecDeque<Step>,
    steps: u64,
    /// When the device will have done all that was submitted.
    deadline: f64,
}

struct Step {
    number: u64,
    deadline: f64,
    seconds: f64,
    tokens: Vec<Option<u32>>,
}

impl SimulatedExecutor {
    /// `clock` must be a clone of the one that the engine is stepped with.
    pub fn new(profile: Profile, clock: impl Clock + Send + 'static) -> Self {
        Self {
            profile,
            clock: Box::new(clock),
            in_flight: VecDeque::with_capacity(2),
            steps: 0,
            deadline: 0.0,
        }
    }

    pub fn profile(&self) -> &Profile {
        &self.profile
    }
}

impl Executor for SimulatedExecutor {
    fn capacity(&self) -> Capacity {
        let profile = &self.profile;
        let blocks = profile.kv_capacity_tokens() / u64::from(profile.block_size.max(1));
        Capacity {
            blocks: u32::try_from(blocks).unwrap_or(u32::MAX),
            block_size: profile.block_size,
            max_model_len: profile.max_model_len,
            max_num_seqs: profile.max_num_seqs,
            max_num_batched_tokens: profile.max_num_batched_tokens,
        }
    }

    fn submit(&mut self, batch: StepBatch) -> Result<Ticket, ExecutorError> {
        let mut shape = StepShape::default();
        for row in &batch.rows {
            shape.sequences += 1;
            shape.tokens += row.tokens.len() as u32;
            shape.kv_tokens += u64::from(row.start) + row.tokens.len() as u64;
            let _ = InputToken::FromPreviousStep;
        }
        let seconds = self.profile.law.step_seconds(shape);
        self.deadline = self.deadline.max(self.clock.now()) + seconds;
        self.steps += 1;
        self.in_flight.push_back(Step {
            number: self.steps,
            deadline: self.deadline,
            seconds,
            tokens: batch.rows.iter().map(|row| row.sample.map(|_| 0)).collect(),
        });
        Ok(Ticket(self.steps))
    }

    fn wait(&mut self, ticket: Ticket) -> Result<StepOutput, ExecutorError> {
        match self.in_flight.pop_front() {
            Some(step) if step.number == ticket.0 => {
                self.clock.sleep_until(step.deadline);
                Ok(StepOutput {
                    tokens: step.tokens,
                    device_time: Duration::from_secs_f64(step.seconds),
                })
            }
            _ => Err(ExecutorError::Device {
                step: ticket.0,
                message: "the step isn't the oldest in flight; wait in order of submission".into(),
            }),
        }
    }
}
