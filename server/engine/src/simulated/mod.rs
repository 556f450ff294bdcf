//! An executor that takes the time a GPU would take, without one: same scheduler, same memory,
//! steps paced to absolute deadlines, made-up tokens.

mod profile;

pub use profile::Profile;

use std::collections::VecDeque;
use std::time::Duration;

use crate::clock::Clock;
use crate::executor::{
    Capacity, Executor, ExecutorError, InputToken, Row, StepBatch, StepOutput, Ticket,
};

/// Paces steps by a [`Profile`]'s law. A step starts when it is submitted or when the one before
/// it ends, whichever is later, so that what the host loses between steps is not lost when it
/// submits ahead, and no error adds up.
pub struct SimulatedExecutor {
    profile: Profile,
    clock: Box<dyn Clock + Send>,
    in_flight: VecDeque<Step>,
    steps: u64,
    /// When the device will have done all that was submitted.
    deadline: f64,
    /// The newest sampled token of each slot.
    sampled: Vec<u32>,
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
            sampled: Vec::new(),
        }
    }

    pub fn profile(&self) -> &Profile {
        &self.profile
    }

    /// The next token of a sequence: a function of its last token, its length and its seed.
    fn sample(&mut self, row: &Row) -> Option<u32> {
        let sampling = row.sample?;
        let slot = row.slot as usize;
        if self.sampled.len() <= slot {
            self.sampled.resize(slot + 1, 0);
        }
        let place = self.sampled.get_mut(slot)?;
        let last = match row.tokens.last()? {
            InputToken::Known(token) => *token,
            InputToken::FromPreviousStep => *place,
        };
        let seed = if sampling.temperature > 0.0 {
            sampling.seed
        } else {
            0
        };
        let position = u64::from(row.start) + row.tokens.len() as u64;
        let hash = mix(mix(u64::from(last) ^ (position << 32)) ^ seed);
        let vocabulary = &self.profile.vocabulary;
        let size = vocabulary.end.saturating_sub(vocabulary.start).max(1);
        let token = vocabulary.start + (hash % u64::from(size)) as u32;
        *place = token;
        Some(token)
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
        if let Some(oldest) = self.in_flight.front()
            && self.in_flight.len() >= 2
        {
            self.clock.sleep_until(oldest.deadline);
        }
        self.steps += 1;
        let shape = batch.shape();
        let noise = (self.profile.noise * normal(self.profile.seed, self.steps)).exp();
        let seconds = self.profile.step_seconds(shape) * noise;
        self.deadline = self.deadline.max(self.clock.now()) + seconds;
        let tokens = batch.rows.iter().map(|row| self.sample(row)).collect();
        self.in_flight.push_back(Step {
            number: self.steps,
            deadline: self.deadline,
            seconds,
            tokens,
        });
        Ok(Ticket(self.steps))
    }

    fn wait(&mut self, ticket: Ticket) -> Result<StepOutput, ExecutorError> {
        match self.in_flight.pop_front() {
            Some(step) if step.number == ticket.0 => {
                self.clock.sleep_until(step.deadline);
                Ok(StepOutput {
                    tokens: step.tokens,
                    device_time: Duration::try_from_secs_f64(step.seconds)
                        .unwrap_or(Duration::ZERO),
                })
            }
            _ => Err(ExecutorError::Device {
                step: ticket.0,
                message: "this isn't the oldest step in flight; wait in order of submission".into(),
            }),
        }
    }
}

/// The finalizer of splitmix64.
fn mix(value: u64) -> u64 {
    let mut z = value.wrapping_add(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// The draw of a standard normal distribution (Box-Muller) that belongs to a seed and a step.
fn normal(seed: u64, step: u64) -> f64 {
    let unit = |salt: u64| {
        let bits = mix(mix(seed ^ salt) ^ step) >> 11;
        (bits as f64 + 0.5) / (1u64 << 53) as f64
    };
    (-2.0 * unit(1).ln()).sqrt() * (std::f64::consts::TAU * unit(2)).cos()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::executor::Sampling;
    use crate::{Engine, EngineConfig, Event, Limits, Request, RequestId, VirtualClock};
    use stoker_law::StepShape;

    const GREEDY: Sampling = Sampling {
        temperature: 0.0,
        top_p: 1.0,
        top_k: 0,
        seed: 0,
    };

    fn request(id: u64, prompt: u32, max_tokens: u32, now: f64) -> Request {
        Request {
            id: RequestId(id),
            prompt: (0..prompt).map(|token| token + id as u32).collect(),
            sampling: GREEDY,
            max_tokens,
            stop_token_ids: vec![],
            ignore_eos: true,
            eos_token_ids: vec![],
            priority: 0,
            arrival: now,
            first_token_due: None,
        }
    }

    /// Runs `batch` requests at once in virtual time; tokens per second and the tokens of each.
    fn direct(profile: Profile, batch: u32, prompt: u32) -> (f64, Vec<Vec<u32>>) {
        let clock = VirtualClock::new();
        let limits = Limits {
            max_num_seqs: 256,
            max_num_batched_tokens: 2048,
        };
        let executor = SimulatedExecutor::new(profile, clock.clone());
        let mut engine = Engine::new(executor, limits, EngineConfig::default());
        for id in 0..u64::from(batch) {
            engine.add(request(id, prompt, 100, 0.0)).unwrap();
        }
        let mut tokens = vec![vec![]; batch as usize];
        while engine.has_work() {
            for event in engine.step(&clock).unwrap() {
                if let Event::Token { id, token, .. } = event {
                    tokens[id.0 as usize].push(token);
                }
            }
        }
        (f64::from(batch) * 100.0 / clock.now(), tokens)
    }

    #[test]
    fn t4_reaches_the_published_figures() {
        for (batch, published) in [(1, 37.0), (2, 69.0), (4, 135.6), (8, 265.1)] {
            for prompt in [8, 16, 32] {
                let (rate, _) = direct(Profile::t4(), batch, prompt);
                let error = rate / published - 1.0;
                assert!(
                    error.abs() < 0.015,
                    "{batch} x {prompt} tokens: {rate} tok/s"
                );
            }
        }
    }

    #[test]
    fn h100_steps_take_what_the_prototype_took() {
        // Context 200; 0.04 ms of upload, launch and read-back added to the graph's time.
        let measured = [
            (1, 2.348),
            (2, 2.390),
            (4, 2.442),
            (8, 2.490),
            (16, 2.660),
            (32, 2.989),
            (64, 3.711),
        ];
        for (sequences, milliseconds) in measured {
            let shape = StepShape {
                sequences,
                tokens: sequences,
                kv_tokens: u64::from(sequences) * 200,
            };
            let error = Profile::h100().step_seconds(shape) / ((milliseconds + 0.04) * 1e-3) - 1.0;
            assert!(error.abs() < 0.02, "batch {sequences}: off by {error}");
        }
        // GEMMs of a step of m tokens, from 2.58 ms at m = 1; attention comes on top.
        for (tokens, milliseconds) in [(128, 2.76), (512, 5.43), (1024, 9.32), (2048, 18.45)] {
            let shape = StepShape {
                sequences: 1,
                tokens,
                kv_tokens: u64::from(tokens),
            };
            let error = Profile::h100().step_seconds(shape) / (milliseconds * 1e-3) - 1.0;
            assert!(error.abs() < 0.1, "{tokens} tokens: off by {error}");
        }
    }

    #[test]
    fn memory_is_what_the_weights_leave() {
        let t4 = Profile::t4();
        assert_eq!(t4.kv_capacity_tokens(), 69_754);
        let executor = SimulatedExecutor::new(t4, VirtualClock::new());
        assert_eq!(executor.capacity().blocks, 69_754 / 16);
        let full = Profile {
            memory_utilization: 0.3,
            ..Profile::t4()
        };
        assert_eq!(full.kv_capacity_tokens(), 0);
    }

    #[test]
    fn noise_is_off_by_default_repeatable_and_of_its_size() {
        let noisy = |seed| Profile {
            noise: 0.03,
            seed,
            ..Profile::t4()
        };
        let exact = direct(Profile::t4(), 4, 16);
        assert_eq!(exact, direct(Profile::t4(), 4, 16));
        assert_eq!(direct(noisy(1), 4, 16), direct(noisy(1), 4, 16));
        assert_ne!(direct(noisy(1), 4, 16).0, direct(noisy(2), 4, 16).0);
        assert_eq!(direct(noisy(1), 4, 16).1, exact.1, "tokens don't change");
        let draws: Vec<f64> = (0..10_000).map(|step| normal(7, step)).collect();
        let mean = draws.iter().sum::<f64>() / 1e4;
        let variance = draws.iter().map(|draw| draw * draw).sum::<f64>() / 1e4;
        assert!(
            mean.abs() < 0.04 && (variance - 1.0).abs() < 0.06,
            "{mean} {variance}"
        );
    }

    #[test]
    fn tokens_are_the_same_alone_and_in_a_batch() {
        let (_, batch) = direct(Profile::t4(), 8, 16);
        let (_, alone) = direct(Profile::t4(), 1, 16);
        assert_eq!(batch[0], alone[0]);
        assert_ne!(batch[1], alone[0]);
        let vocabulary = Profile::t4().vocabulary;
        assert!(
            batch
                .iter()
                .flatten()
                .all(|token| vocabulary.contains(token))
        );
    }

    #[test]
    fn lateness_of_the_host_does_not_add_up() {
        // The host reacts 5 ms late to every step; the device, fed one step ahead, never idles.
        struct Late(VirtualClock);
        impl Clock for Late {
            fn now(&self) -> f64 {
                self.0.now()
            }
            fn sleep_until(&self, t: f64) {
                self.0.sleep_until(t + 5e-3);
            }
        }
        let clock = VirtualClock::new();
        let executor = SimulatedExecutor::new(Profile::t4(), Late(clock.clone()));
        let limits = Limits {
            max_num_seqs: 8,
            max_num_batched_tokens: 2048,
        };
        let mut engine = Engine::new(executor, limits, EngineConfig::default());
        engine.add(request(0, 16, 100, 0.0)).unwrap();
        while engine.has_work() {
            engine.step(&clock).unwrap();
        }
        let busy = engine.stats().step_seconds_total;
        assert!(clock.now() < busy + 6e-3, "{} for {busy}", clock.now());
    }

    #[test]
    fn waiting_out_of_order_is_an_error() {
        let mut executor = SimulatedExecutor::new(Profile::t4(), VirtualClock::new());
        assert!(executor.wait(Ticket(1)).is_err());
        let first = executor.submit(StepBatch::default()).unwrap();
        let second = executor.submit(StepBatch::default()).unwrap();
        assert!(executor.wait(second).is_err());
        assert!(executor.wait(first).is_err(), "the error has used it up");
    }
}
