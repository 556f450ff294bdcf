//! Decoding: so many sequences, a token each in every step.

use std::time::Instant;

use serde_json::{Value, json};
use stoker_engine::{
    Engine, EngineConfig, Event, Limits, RealClock, Request, RequestId, executor::Executor,
};
use stoker_kernels::cuda::Format;
use stoker_model::CudaExecutor;

use crate::{Bench, CONTEXT, Error, GREEDY};

pub const BATCHES: [usize; 9] = [1, 2, 4, 8, 16, 32, 64, 128, 256];
/// (batch, context)
pub const LONG: [(usize, usize); 2] = [(1, 4000), (4, 4000)];
/// Batches whose speed with quantised weights is told against f16.
const COMPARED: [usize; 9] = BATCHES;
const STEPS: usize = 80;

impl Bench {
    /// Seconds a step through scheduler, graph, sampler and back, around `context` tokens.
    pub fn decode(
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
                first_token_due: None,
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

pub fn run(bench: &Bench, batches: &[usize], more: &[(usize, usize)]) -> Result<Vec<Value>, Error> {
    println!(
        "decode {:5} batch  context    step ms  device ms     tok/s  of roofline",
        bench.dtype()
    );
    let mut runs = Vec::new();
    let begun = Instant::now();
    let mut executor = bench.executor(256, 2048, 4608, None)?;
    println!(
        "(executor of 256 sequences set up in {:.2} s)",
        begun.elapsed().as_secs_f64()
    );
    let all = batches.iter().map(|&batch| (batch, CONTEXT));
    for (batch, context) in all.chain(more.iter().copied()) {
        let (seconds, device, back) = bench.decode(executor, batch, context)?;
        executor = back;
        let share = bench.roofline(batch, context) / seconds;
        let rate = batch as f64 / seconds;
        println!(
            "{batch:18} {context:8} {:10.3} {:10.3} {rate:9.0} {:10.1} %",
            seconds * 1e3,
            device * 1e3,
            share * 100.0
        );
        runs.push(json!({"dtype": bench.dtype(), "batch": batch, "context": context, "tok_s": rate, "share": share}));
    }
    Ok(runs)
}

/// Decoding with quantised weights, and each run's speed against f16's. `more` is done with each type, too.
pub fn quantised(
    f16: &Bench,
    more: &dyn Fn(&Bench) -> Result<(), Error>,
) -> Result<(Vec<Value>, Vec<Value>), Error> {
    let rate = |run: &Value| run["tok_s"].as_f64().unwrap_or(0.0);
    let base = run(f16, &COMPARED, &[])?;
    let (mut runs, mut ratios) = (Vec::new(), Vec::new());
    for format in Format::ALL {
        let bench = f16.with(format)?;
        println!("weights: {:.3} GB", bench.weights.bytes() as f64 / 1e9);
        more(&bench)?;
        for (found, base) in run(&bench, &COMPARED, &[])?.into_iter().zip(&base) {
            let of_f16 = rate(&found) / rate(base);
            println!(
                "{:>7} batch {:3}: {of_f16:.2} x f16",
                bench.dtype(),
                found["batch"]
            );
            ratios.push(json!({"dtype": bench.dtype(), "batch": found["batch"], "of_f16": of_f16}));
            runs.push(found);
        }
    }
    Ok((runs, ratios))
}
