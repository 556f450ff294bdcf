//! The start-up sweep that gives the step-time law its prior.

use stoker_law::{LawFit, Prior};

use crate::executor::{
    BlockId, Capacity, Executor, ExecutorError, InputToken, Row, Sampling, StepBatch,
};

/// Steps of the sweep: decoding sequences, cached tokens of each, tokens of a prompt chunk. What
/// tells most comes first, for devices on which the time runs out.
const SWEEP: [(u32, u32, u32); 14] = [
    (1, 16, 0),
    (0, 0, 32),
    (4, 64, 0),
    (0, 0, 128),
    (16, 128, 0),
    (0, 0, 256),
    (2, 1500, 0),
    (8, 256, 0),
    (0, 0, 64),
    (32, 64, 0),
    (16, 1024, 0),
    (8, 128, 64),
    (0, 0, 512),
    (64, 32, 0),
];
/// Seconds of device time after which no further step is begun.
const TIME_LIMIT: f64 = 0.5;
/// No step is tried that is predicted to take longer.
const LONGEST_STEP: f64 = 0.25;
/// A sweep that took less is worth repeating against noise.
const QUICK_SWEEP: f64 = 0.25;
const MOST_SWEEPS: usize = 4;
/// What is known at the start is never quite certain.
const MOST_CONFIDENCE: f64 = 0.9;

/// Times about a dozen steps of different batch and chunk sizes on scratch blocks and fits the
/// law to them: at most about half a second of device time, less on a fast device. For an executor
/// that has no step in flight and no cached token to lose: it writes over KV blocks.
pub fn calibrate(executor: &mut dyn Executor) -> Result<Prior, ExecutorError> {
    let capacity = executor.capacity();
    let mut fit = LawFit::new(Prior::default());
    // Once unmeasured: the first step touches memory and loads code for the first time.
    if let Some(batch) = scratch_batch(&capacity, 1, 16, 0) {
        let ticket = executor.submit(batch)?;
        executor.wait(ticket)?;
    }
    let mut spent = 0.0;
    for _ in 0..MOST_SWEEPS {
        for (decodes, context, chunk) in SWEEP {
            let Some(batch) = scratch_batch(&capacity, decodes, context, chunk) else {
                continue;
            };
            let shape = batch.shape();
            let predicted = fit.law().step_seconds(shape);
            if spent > TIME_LIMIT || (spent > 0.0 && predicted > LONGEST_STEP) {
                continue;
            }
            let ticket = executor.submit(batch)?;
            let seconds = executor.wait(ticket)?.device_time.as_secs_f64();
            spent += seconds;
            fit.observe(shape, seconds);
            fit.refit();
        }
        if spent > QUICK_SWEEP {
            break;
        }
    }
    Ok(Prior {
        law: fit.law(),
        confidence: fit.confidence().min(MOST_CONFIDENCE),
    })
}

/// A step of `decodes` sequences with `context` cached tokens each and a prompt chunk of `chunk`
/// tokens, each on its own blocks; `None` if the executor has no room for it.
fn scratch_batch(capacity: &Capacity, decodes: u32, context: u32, chunk: u32) -> Option<StepBatch> {
    let mut next_block: BlockId = 0;
    let mut rows = Vec::new();
    let chunks = u32::from(chunk > 0);
    if decodes + chunks > capacity.max_num_seqs
        || decodes + chunk > capacity.max_num_batched_tokens
        || (context + 1).max(chunk) > capacity.max_model_len
    {
        return None;
    }
    for slot in 0..decodes + chunks {
        let (start, tokens) = if slot < decodes {
            (context, 1)
        } else {
            (0, chunk)
        };
        let blocks = (start + tokens).div_ceil(capacity.block_size.max(1));
        let end = next_block.checked_add(blocks)?;
        if end > capacity.blocks {
            return None;
        }
        rows.push(Row {
            slot,
            tokens: vec![InputToken::Known(0); tokens as usize],
            start,
            blocks: (next_block..end).collect(),
            sample: Some(Sampling {
                temperature: 0.0,
                top_p: 1.0,
                top_k: 0,
                seed: 0,
            }),
        });
        next_block = end;
    }
    Some(StepBatch { rows })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Clock, Profile, SimulatedExecutor, VirtualClock};
    use stoker_law::StepShape;

    fn calibrated(profile: &Profile) -> (Prior, f64) {
        let clock = VirtualClock::new();
        let mut executor = SimulatedExecutor::new(profile.clone(), clock.clone());
        let prior = calibrate(&mut executor).unwrap();
        (prior, clock.now())
    }

    #[test]
    fn finds_the_law_of_both_cards_quickly() {
        for profile in [Profile::t4(), Profile::h100()] {
            for noise in [0.0, 0.02] {
                let noisy = Profile {
                    noise,
                    seed: 3,
                    ..profile.clone()
                };
                let (prior, seconds) = calibrated(&noisy);
                assert!(seconds < 1.0, "{} took {seconds} s", profile.name);
                assert!(prior.confidence > 0.5, "{}: {prior:?}", profile.name);
                for (sequences, tokens, kv_tokens) in [
                    (2, 2, 500),
                    (16, 16, 8_000),
                    (24, 24, 20_000),
                    (9, 296, 8_000),
                    (1, 1024, 1024),
                ] {
                    let shape = StepShape {
                        sequences,
                        tokens,
                        kv_tokens,
                    };
                    let error = prior.law.step_seconds(shape) / profile.step_seconds(shape) - 1.0;
                    assert!(
                        error.abs() < 0.08,
                        "{} with noise {noise}, {shape:?}: off by {error} with {prior:?}",
                        profile.name
                    );
                }
            }
        }
    }

    #[test]
    fn a_slow_device_is_asked_for_little() {
        // 20 ms a decoding token and 7 ms a prompt token: a CPU.
        let mut profile = Profile::t4();
        profile.law.base = 20e-3;
        profile.law.per_token = 7e-3;
        profile.law.hidden = 0.0;
        let (prior, seconds) = calibrated(&profile);
        assert!(seconds < 1.5, "took {seconds} s");
        assert!((prior.law.per_token / 7e-3 - 1.0).abs() < 0.15, "{prior:?}");
    }

    #[test]
    fn respects_a_small_executor() {
        let profile = Profile {
            max_num_seqs: 4,
            max_num_batched_tokens: 64,
            max_model_len: 100,
            memory_bytes: 8_000_000_000,
            ..Profile::t4()
        };
        assert!(calibrated(&profile).0.law.base > 0.0);
        for (decodes, context, chunk) in SWEEP {
            let executor = SimulatedExecutor::new(profile.clone(), VirtualClock::new());
            let capacity = executor.capacity();
            if let Some(batch) = scratch_batch(&capacity, decodes, context, chunk) {
                assert!(batch.rows.len() <= 4);
                assert!(batch.shape().tokens <= 64);
                assert!(
                    batch
                        .rows
                        .iter()
                        .flat_map(|row| &row.blocks)
                        .all(|b| *b < capacity.blocks)
                );
            }
        }
        let none = Profile {
            memory_bytes: 0,
            ..Profile::t4()
        };
        assert_eq!(calibrated(&none).0.confidence, 0.0);
    }
}
