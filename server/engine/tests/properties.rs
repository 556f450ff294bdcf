//! Under any mix of arrivals, aborts, dial changes and memory pressure: blocks are never leaked or
//! shared, dials are kept, every request finishes, and its tokens are what it would get alone.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a failed assumption is a failed test"
)]

mod common;

use std::collections::HashMap;

use common::{PagedModel, VOCABULARY, reference, request};
use proptest::prelude::*;
use stoker_engine::executor::Capacity;
use stoker_engine::*;

#[derive(Clone, Debug)]
enum Action {
    Add {
        prompt: Vec<u32>,
        max_tokens: u32,
        stops: Vec<u32>,
        ignore_eos: bool,
        priority: i32,
        first_token_due: Option<f64>,
    },
    /// Aborts the n-th request of those added.
    Abort(prop::sample::Index),
    Dial(Limits),
    Step(u8),
}

fn limits() -> impl Strategy<Value = Limits> {
    (1u32..8, prop_oneof![1u32..12, 12u32..60]).prop_map(|(seqs, tokens)| Limits {
        max_num_seqs: seqs,
        max_num_batched_tokens: tokens,
    })
}

fn action() -> impl Strategy<Value = Action> {
    let token = 0..VOCABULARY as u32;
    let add = (
        prop::collection::vec(token.clone(), 1..40),
        1u32..25,
        prop::collection::vec(token, 0..3),
        any::<bool>(),
        -1i32..2,
        prop::option::of(0.0..60.0f64),
    )
        .prop_map(
            |(prompt, max_tokens, stops, ignore_eos, priority, first_token_due)| Action::Add {
                prompt,
                max_tokens,
                stops,
                ignore_eos,
                priority,
                first_token_due,
            },
        );
    prop_oneof![
        5 => add,
        1 => any::<prop::sample::Index>().prop_map(Action::Abort),
        1 => limits().prop_map(Action::Dial),
        6 => (1u8..6).prop_map(Action::Step),
    ]
}

/// What is known about a request from the outside.
struct Seen {
    expected: Vec<u32>,
    prompt: usize,
    tokens: Vec<u32>,
    aborted: bool,
    finished: Option<FinishReason>,
}

struct Run {
    engine: Engine<PagedModel>,
    log: common::Log,
    clock: VirtualClock,
    seen: HashMap<RequestId, Seen>,
    refused: usize,
}

impl Run {
    fn new(capacity: Capacity, limits: Limits) -> Self {
        let model = PagedModel::new(capacity);
        let log = model.log.clone();
        Self {
            engine: Engine::new(model, limits, EngineConfig::default()),
            log,
            clock: VirtualClock::new(),
            seen: HashMap::new(),
            refused: 0,
        }
    }

    fn add(&mut self, request: Request) {
        let seen = Seen {
            expected: reference(&request),
            prompt: request.prompt.len(),
            tokens: vec![],
            aborted: false,
            finished: None,
        };
        let id = request.id;
        match self.engine.add(request) {
            Ok(()) => {
                self.seen.insert(id, seen);
            }
            Err(AddError::PromptTooLong { .. } | AddError::NeverFits { .. }) => self.refused += 1,
            Err(other) => panic!("refused for {other}"),
        }
    }

    fn step(&mut self) {
        let before = self.engine.stats();
        let steps = self.log.steps();
        self.clock.sleep_until(self.clock.now() + 1.0);
        let events = self.engine.step(&self.clock).unwrap();
        let after = self.engine.stats();
        if self.log.steps() > steps {
            let batch = self.log.last();
            let tokens: usize = batch.rows.iter().map(|row| row.tokens.len()).sum();
            assert!(
                tokens <= after.limits.max_num_batched_tokens as usize,
                "budget"
            );
            // A lowered cap lets those who run go on, and admits nobody.
            let cap = after.limits.max_num_seqs.max(before.running);
            assert!(batch.rows.len() <= cap as usize, "cap");
            assert!(after.running <= cap, "cap");
        }
        assert!(after.kv_blocks_used <= after.kv_blocks_total);
        assert!(after.kv_tokens <= u64::from(after.kv_blocks_used * after.kv_block_size));
        for event in events {
            self.take(event);
        }
    }

    fn take(&mut self, event: Event) {
        match event {
            Event::Token {
                id, token, first, ..
            } => {
                let seen = self.seen.get_mut(&id).unwrap();
                assert!(seen.finished.is_none(), "a token after the end");
                assert!(!seen.aborted, "a token after an abort");
                assert_eq!(first, seen.tokens.is_empty());
                seen.tokens.push(token);
            }
            Event::Finished {
                id,
                reason,
                prompt_tokens,
                generated_tokens,
                timing,
                ..
            } => {
                let seen = self.seen.get_mut(&id).unwrap();
                assert!(seen.finished.replace(reason).is_none(), "finished twice");
                assert_eq!(seen.aborted, reason == FinishReason::Abort);
                assert_eq!(prompt_tokens as usize, seen.prompt);
                assert_eq!(generated_tokens as usize, seen.tokens.len());
                assert_eq!(timing.first_token.is_some(), generated_tokens > 0);
                assert!(timing.first_token <= timing.last_token);
            }
        }
    }

    fn act(&mut self, number: u64, action: Action) {
        match action {
            Action::Add {
                prompt,
                max_tokens,
                stops,
                ignore_eos,
                priority,
                first_token_due,
            } => self.add(Request {
                stop_token_ids: stops.iter().take(1).copied().collect(),
                eos_token_ids: stops.iter().skip(1).copied().collect(),
                ignore_eos,
                priority,
                first_token_due,
                ..request(number, prompt, max_tokens)
            }),
            Action::Abort(index) => {
                let mut ids: Vec<RequestId> = self.seen.keys().copied().collect();
                ids.sort();
                if !ids.is_empty() {
                    let id = *index.get(&ids);
                    let seen = self.seen.get_mut(&id).unwrap();
                    seen.aborted |= seen.finished.is_none();
                    self.engine.abort(id);
                }
            }
            Action::Dial(limits) => {
                self.engine.set_limits(limits).unwrap();
            }
            Action::Step(times) => (0..times).for_each(|_| self.step()),
        }
    }

    /// Runs until nothing is left to do, and checks what came of every request.
    fn finish(&mut self) {
        let mut steps = 0;
        while self.engine.has_work() {
            self.step();
            steps += 1;
            assert!(steps < 200_000, "it never ends");
        }
        let stats = self.engine.stats();
        assert_eq!((stats.running, stats.waiting), (0, 0));
        assert_eq!(stats.kv_blocks_used, 0, "blocks leaked");
        assert_eq!((stats.kv_tokens, stats.waiting_prompt_tokens), (0, 0));
        let generated: usize = self.seen.values().map(|seen| seen.tokens.len()).sum();
        assert_eq!(stats.generation_tokens_total, generated as u64);
        for (id, seen) in &self.seen {
            let reason = seen
                .finished
                .unwrap_or_else(|| panic!("{id:?} never finished"));
            if reason == FinishReason::Abort {
                assert!(seen.expected.starts_with(&seen.tokens), "{id:?}");
            } else {
                assert_eq!(seen.tokens, seen.expected, "{id:?}");
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]
    #[test]
    fn any_mix_keeps_all_promises(
        blocks in 6u32..40,
        block_size in prop_oneof![Just(1u32), Just(3), Just(4), Just(16)],
        start in limits(),
        actions in prop::collection::vec(action(), 1..60),
        last_act in prop_oneof![Just(None), (1u64..4).prop_map(Some)],
    ) {
        let capacity = Capacity {
            blocks,
            block_size,
            max_model_len: 60,
            max_num_seqs: 7,
            max_num_batched_tokens: 60,
        };
        let mut run = Run::new(capacity, start);
        for (number, action) in actions.into_iter().enumerate() {
            run.act(number as u64, action);
        }
        if let Some(steps) = last_act {
            // Everybody leaves at once: one step later all memory is free.
            (0..steps).for_each(|_| run.step());
            for (id, seen) in &mut run.seen {
                seen.aborted |= seen.finished.is_none();
                run.engine.abort(*id);
            }
            run.step();
            prop_assert_eq!(run.engine.stats().kv_blocks_used, 0);
        }
        run.finish();
    }

    /// Long sequences in little memory: many preemptions, same tokens.
    #[test]
    fn preemption_changes_no_token(
        prompts in prop::collection::vec(prop::collection::vec(0u32..40, 1..20), 2..8),
        blocks in 10u32..16,
        start in limits(),
    ) {
        let capacity = Capacity {
            blocks,
            block_size: 4,
            max_model_len: 64,
            max_num_seqs: 8,
            max_num_batched_tokens: 64,
        };
        let mut run = Run::new(capacity, Limits { max_num_seqs: 8, ..start });
        for (id, prompt) in prompts.into_iter().enumerate() {
            run.add(request(id as u64, prompt, 20));
        }
        run.finish();
    }
}

#[test]
fn little_memory_does_preempt() {
    let capacity = Capacity {
        blocks: 12,
        block_size: 4,
        max_model_len: 64,
        max_num_seqs: 8,
        max_num_batched_tokens: 64,
    };
    let limits = Limits {
        max_num_seqs: 8,
        max_num_batched_tokens: 64,
    };
    let mut run = Run::new(capacity, limits);
    for id in 0..4 {
        run.add(request(id, vec![id as u32 + 1; 8], 30));
    }
    run.finish();
    assert!(run.engine.stats().preemptions_total > 0);
}
