//! Prints what the scheduler costs a step, and what the simulated T4 reaches on a real clock:
//! `cargo run --release -p stoker-engine --example measure`

use std::time::{Duration, Instant};

use stoker_engine::executor::{
    Capacity, Executor, ExecutorError, Sampling, StepBatch, StepOutput, Ticket,
};
use stoker_engine::*;

/// Takes no time.
struct Instantaneous(u64, std::collections::VecDeque<usize>);

impl Executor for Instantaneous {
    fn capacity(&self) -> Capacity {
        Capacity {
            blocks: 100_000,
            block_size: 16,
            max_model_len: 100_000,
            max_num_seqs: 256,
            max_num_batched_tokens: 1 << 20,
        }
    }

    fn submit(&mut self, batch: StepBatch) -> Result<Ticket, ExecutorError> {
        self.0 += 1;
        self.1.push_back(batch.rows.len());
        Ok(Ticket(self.0))
    }

    fn wait(&mut self, _: Ticket) -> Result<StepOutput, ExecutorError> {
        let rows = self.1.pop_front().unwrap_or(0);
        // Device times that vary, so that the fit has to work.
        let wobble = self.0.wrapping_mul(0x9E37_79B9) >> 7 & 0xff;
        Ok(StepOutput {
            tokens: vec![Some(1); rows],
            device_time: Duration::from_nanos(2_000_000 + 10_000 * rows as u64 + 500 * wobble),
        })
    }
}

fn request(id: u64, prompt: usize, max_tokens: u32) -> Request {
    Request {
        id: RequestId(id),
        prompt: vec![1 + id as u32; prompt],
        sampling: Sampling {
            temperature: 0.0,
            top_p: 1.0,
            top_k: 0,
            seed: 0,
        },
        max_tokens,
        stop_token_ids: vec![],
        ignore_eos: true,
        eos_token_ids: vec![],
        priority: 0,
        arrival: 0.0,
        first_token_due: None,
    }
}

fn scheduler_cost(sequences: u64) -> Result<(f64, f64), Box<dyn std::error::Error>> {
    let limits = Limits {
        max_num_seqs: 256,
        max_num_batched_tokens: 1 << 20,
    };
    let executor = Instantaneous(0, Default::default());
    let mut engine = Engine::new(executor, limits, EngineConfig::default());
    let clock = RealClock::new();
    for id in 0..sequences {
        engine.add(request(id, 1000, 4000))?;
    }
    let mut micros = Vec::new();
    for _ in 0..2_000 {
        let start = Instant::now();
        engine.step(&clock)?;
        micros.push(start.elapsed().as_secs_f64() * 1e6);
    }
    micros.drain(..10);
    let mean = micros.iter().sum::<f64>() / micros.len() as f64;
    micros.sort_by(f64::total_cmp);
    let median = micros.get(micros.len() / 2).copied().unwrap_or(0.0);
    Ok((mean, median))
}

fn direct(profile: Profile, batch: u64, prompt: usize) -> Result<f64, Box<dyn std::error::Error>> {
    let clock = RealClock::new();
    let limits = Limits {
        max_num_seqs: 256,
        max_num_batched_tokens: 2048,
    };
    let executor = SimulatedExecutor::new(profile, clock);
    let mut engine = Engine::new(executor, limits, EngineConfig::default());
    let start = Instant::now();
    for id in 0..batch {
        engine.add(request(id, prompt, 100))?;
    }
    while engine.has_work() {
        engine.step(&clock)?;
    }
    Ok(batch as f64 * 100.0 / start.elapsed().as_secs_f64())
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("scheduling, committing and learning, 1,000 to 3,000 tokens of context:");
    for sequences in [1, 32, 256] {
        let (mean, median) = scheduler_cost(sequences)?;
        println!("  {sequences:>3} sequences: mean {mean:6.1} us a step, median {median:6.1} us");
    }
    for profile in [Profile::t4(), Profile::h100()] {
        let name = profile.name;
        let mut executor = SimulatedExecutor::new(profile, RealClock::new());
        let start = Instant::now();
        let prior = calibrate(&mut executor)?;
        println!(
            "calibration of the simulated {name}: {:.2?}, {prior:?}",
            start.elapsed()
        );
    }
    println!("100 new tokens each, on a real clock:");
    let t4 = [(1, 37.0), (2, 69.0), (4, 135.6), (8, 265.1)];
    let h100 = [(1, 426.0), (8, 3212.0)];
    for (profile, figures) in [(Profile::t4(), t4.as_slice()), (Profile::h100(), &h100)] {
        for &(batch, measured) in figures {
            for prompt in [16, 32] {
                let rate = direct(profile.clone(), batch, prompt)?;
                let error = 100.0 * (rate / measured - 1.0);
                println!(
                    "  {}, batch {batch}, prompt {prompt}: {rate:.1} tok/s, {error:+.1} % of \
                     {measured}",
                    profile.name
                );
            }
        }
    }
    Ok(())
}
