//! What a step contains, by example.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a failed assumption is a failed test"
)]

mod common;

use common::{Log, PagedModel, reference, request};
use stoker_engine::executor::{Capacity, InputToken};
use stoker_engine::*;

const CAPACITY: Capacity = Capacity {
    blocks: 100,
    block_size: 4,
    max_model_len: 200,
    max_num_seqs: 8,
    max_num_batched_tokens: 64,
};

fn engine(limits: (u32, u32)) -> (Engine<PagedModel>, Log) {
    let model = PagedModel::new(CAPACITY);
    let log = model.log.clone();
    let limits = Limits {
        max_num_seqs: limits.0,
        max_num_batched_tokens: limits.1,
    };
    (Engine::new(model, limits, EngineConfig::default()), log)
}

/// Rows of the newest step as (start, tokens, samples).
fn rows(log: &Log) -> Vec<(u32, usize, bool)> {
    let row = |row: &executor::Row| (row.start, row.tokens.len(), row.sample.is_some());
    log.last().rows.iter().map(row).collect()
}

fn run(engine: &mut Engine<PagedModel>, clock: &VirtualClock) -> Vec<Event> {
    let mut events = vec![];
    while engine.has_work() {
        events.extend(engine.step(clock).unwrap());
    }
    events
}

fn finished(events: &[Event]) -> Vec<u64> {
    let ids = events.iter().filter_map(|event| match event {
        Event::Finished { id, .. } => Some(id.0),
        Event::Token { .. } => None,
    });
    ids.collect()
}

#[test]
fn prompts_are_chunked_and_decodes_go_first() {
    let (mut engine, log) = engine((8, 10));
    let clock = VirtualClock::new();
    engine.add(request(0, vec![1; 6], 20)).unwrap();
    engine.add(request(1, vec![2; 17], 20)).unwrap();
    engine.step(&clock).unwrap();
    assert_eq!(rows(&log), [(0, 6, true), (0, 4, false)]);
    engine.step(&clock).unwrap();
    assert_eq!(rows(&log), [(6, 1, true), (4, 9, false)]);
    assert_eq!(log.last().rows[0].tokens, [InputToken::FromPreviousStep]);
    engine.add(request(2, vec![3; 3], 20)).unwrap();
    assert_eq!(engine.stats().waiting_prompt_tokens, 4 + 3);
    engine.step(&clock).unwrap();
    assert_eq!(rows(&log), [(7, 1, true), (13, 4, true), (0, 3, true)]);
    assert_eq!(engine.stats().running, 3);
}

#[test]
fn runs_one_step_ahead_and_throws_away_what_follows_a_stop() {
    let (mut engine, log) = engine((8, 64));
    let clock = VirtualClock::new();
    let mut stopping = request(0, vec![5, 6, 7], 50);
    let text = reference(&stopping);
    let stop = text[3];
    let expected = text.iter().position(|token| *token == stop).unwrap() + 1;
    stopping.stop_token_ids = vec![stop];
    engine.add(stopping).unwrap();
    let events = run(&mut engine, &clock);
    let tokens = events
        .iter()
        .filter(|event| matches!(event, Event::Token { .. }))
        .count();
    assert_eq!(
        tokens, expected,
        "the stop token is reported, nothing after it"
    );
    assert!(matches!(
        events.last(),
        Some(Event::Finished {
            reason: FinishReason::Stop,
            ..
        })
    ));
    assert_eq!(log.steps(), expected + 1, "one step was ahead");
    assert_eq!(engine.stats().kv_blocks_used, 0);
}

#[test]
fn a_length_known_beforehand_wastes_no_step_and_no_seat() {
    let (mut engine, log) = engine((1, 64));
    let clock = VirtualClock::new();
    engine.add(request(0, vec![5; 3], 4)).unwrap();
    engine.add(request(1, vec![6; 3], 4)).unwrap();
    run(&mut engine, &clock);
    assert_eq!(
        log.steps(),
        8,
        "the second takes the seat in the very next step"
    );
}

#[test]
fn priority_first_then_arrival() {
    let (mut engine, _) = engine((1, 64));
    let clock = VirtualClock::new();
    for (id, priority) in [(0, 5), (1, 0), (2, 5), (3, -1)] {
        let request = Request {
            priority,
            ..request(id, vec![1; 4], 2)
        };
        engine.add(request).unwrap();
    }
    assert_eq!(finished(&run(&mut engine, &clock)), [3, 1, 0, 2]);
}

#[test]
fn who_cannot_be_in_time_lets_others_go_first() {
    let (mut engine, _) = engine((1, 64));
    let clock = VirtualClock::new();
    engine.add(request(0, vec![1; 4], 3)).unwrap();
    engine.step(&clock).unwrap();
    for (id, first_token_due) in [(1, Some(5.0)), (2, Some(11.0)), (3, Some(2.0)), (4, None)] {
        let request = Request {
            first_token_due,
            ..request(id, vec![1; 4], 2)
        };
        engine.add(request).unwrap();
    }
    clock.sleep_until(10.0);
    // Among the late it is first come, first served again.
    assert_eq!(finished(&run(&mut engine, &clock)), [0, 2, 4, 1, 3]);
    assert_eq!(engine.stats().set_back_total, 2);
}

#[test]
fn time_for_the_prompt_counts_for_who_is_late() {
    let (mut engine, _) = engine((1, 10));
    let clock = VirtualClock::new();
    // Steps take 1.1 ms with ten tokens: the long prompt needs eight of them, the short one one.
    engine.add(request(0, vec![1; 10], 3)).unwrap();
    engine.step(&clock).unwrap();
    for (id, prompt) in [(1, 80), (2, 8)] {
        let request = Request {
            first_token_due: Some(0.005),
            ..request(id, vec![1; prompt], 2)
        };
        engine.add(request).unwrap();
    }
    assert_eq!(finished(&run(&mut engine, &clock)), [0, 2, 1]);
}

#[test]
fn who_streams_already_is_not_set_back() {
    let small = Capacity {
        blocks: 6,
        ..CAPACITY
    };
    let limits = Limits {
        max_num_seqs: 2,
        max_num_batched_tokens: 64,
    };
    let mut engine = Engine::new(PagedModel::new(small), limits, EngineConfig::default());
    let clock = VirtualClock::new();
    for id in 0..3 {
        let request = Request {
            first_token_due: (id < 2).then_some(0.5),
            ..request(id, vec![1; 8], 9)
        };
        engine
            .add(Request {
                ignore_eos: true,
                ..request
            })
            .unwrap();
    }
    // Both stream when memory runs out; the second one loses its seat.
    let mut events = engine.step(&clock).unwrap();
    clock.sleep_until(10.0);
    events.extend(run(&mut engine, &clock));
    let stats = engine.stats();
    assert!(stats.preemptions_total > 0);
    assert_eq!(stats.set_back_total, 0);
    assert_eq!(finished(&events), [0, 1, 2]);
}

#[test]
fn late_ones_get_one_seat_in_eight() {
    let (mut engine, _) = engine((1, 64));
    let clock = VirtualClock::new();
    clock.sleep_until(1.0);
    for id in 0..20 {
        let request = Request {
            first_token_due: (id < 2).then_some(0.5),
            ..request(id, vec![1; 4], 2)
        };
        engine.add(request).unwrap();
    }
    let order = finished(&run(&mut engine, &clock));
    let place = |id| order.iter().position(|other| *other == id).unwrap();
    assert_eq!((place(0), place(1)), (7, 15));
}

#[test]
fn a_budget_below_the_running_sequences_serves_them_in_turn() {
    let (mut engine, log) = engine((6, 60));
    let clock = VirtualClock::new();
    for id in 0..6 {
        engine.add(request(id, vec![id as u32; 2], 30)).unwrap();
    }
    engine.step(&clock).unwrap();
    engine
        .set_limits(Limits {
            max_num_seqs: 6,
            max_num_batched_tokens: 4,
        })
        .unwrap();
    let mut served = [0; 6];
    for _ in 0..12 {
        engine.step(&clock).unwrap();
        for row in log.last().rows {
            served[row.slot as usize] += 1;
        }
    }
    assert_eq!(served, [8; 6]);
}

#[test]
fn a_lower_cap_preempts_nobody() {
    let (mut engine, log) = engine((4, 64));
    let clock = VirtualClock::new();
    for id in 0..8 {
        engine.add(request(id, vec![id as u32; 2], 10)).unwrap();
    }
    engine.step(&clock).unwrap();
    let lowered = Limits {
        max_num_seqs: 2,
        max_num_batched_tokens: 64,
    };
    assert_eq!(engine.set_limits(lowered), Ok(lowered));
    engine.step(&clock).unwrap();
    assert_eq!(log.last().rows.len(), 4);
    for _ in 0..9 {
        engine.step(&clock).unwrap();
    }
    assert_eq!(log.last().rows.len(), 2);
    run(&mut engine, &clock);
    assert_eq!(engine.stats().preemptions_total, 0);
}

#[test]
fn the_least_urgent_is_preempted() {
    let small = Capacity {
        blocks: 12,
        ..CAPACITY
    };
    // The last to come among equals; but before that whoever has the higher number.
    for (priorities, preempted) in [([0, 0, 0], 2), ([1, 0, 0], 0), ([0, 3, 2], 1)] {
        let limits = Limits {
            max_num_seqs: 8,
            max_num_batched_tokens: 64,
        };
        let mut engine = Engine::new(PagedModel::new(small), limits, EngineConfig::default());
        let clock = VirtualClock::new();
        for (id, priority) in priorities.into_iter().enumerate() {
            let request = Request {
                priority,
                ..request(id as u64, vec![id as u32; 12], 8)
            };
            engine.add(request).unwrap();
        }
        let mut counts = [0; 3];
        for event in run(&mut engine, &clock) {
            if let Event::Finished {
                id, preemptions, ..
            } = event
            {
                counts[id.0 as usize] = preemptions;
            }
        }
        let mut expected = [0; 3];
        expected[preempted] = 1;
        assert_eq!(counts, expected, "priorities {priorities:?}");
        assert_eq!(engine.stats().preemptions_total, 1);
    }
}

#[test]
fn dials_are_clamped_to_the_device_and_zero_is_refused() {
    let (mut engine, _) = engine((100, 1000));
    let ceilings = Limits {
        max_num_seqs: 8,
        max_num_batched_tokens: 64,
    };
    assert_eq!(engine.limits(), ceilings);
    assert_eq!(engine.stats().ceilings, ceilings);
    let zero = Limits {
        max_num_seqs: 4,
        max_num_batched_tokens: 0,
    };
    let error = engine.set_limits(zero).unwrap_err();
    assert_eq!(
        error.to_string(),
        "max_num_batched_tokens is 0; it must be at least 1"
    );
    assert_eq!(engine.limits(), ceilings, "nothing changed");
}

#[test]
fn what_can_never_run_is_refused_at_once() {
    let (mut engine, _) = engine((8, 64));
    let refusal = |engine: &mut Engine<PagedModel>, prompt: usize, max_tokens| {
        engine
            .add(request(9, vec![1; prompt], max_tokens))
            .unwrap_err()
    };
    assert_eq!(refusal(&mut engine, 0, 5), AddError::EmptyPrompt);
    assert_eq!(refusal(&mut engine, 5, 0), AddError::NothingToGenerate);
    let too_long = refusal(&mut engine, 150, 51);
    assert_eq!(
        too_long,
        AddError::PromptTooLong {
            prompt: 150,
            max_tokens: 51,
            max_model_len: 200
        }
    );
    engine.add(request(9, vec![1; 150], 50)).unwrap();
    assert_eq!(
        refusal(&mut engine, 3, 3),
        AddError::DuplicateId(RequestId(9))
    );

    let small = Capacity {
        blocks: 5,
        ..CAPACITY
    };
    let limits = engine.limits();
    let config = EngineConfig {
        max_waiting: 2,
        ..EngineConfig::default()
    };
    let mut engine = Engine::new(PagedModel::new(small), limits, config);
    let never = refusal(&mut engine, 12, 10);
    assert_eq!(
        never,
        AddError::NeverFits {
            prompt: 12,
            max_tokens: 10,
            kv_capacity_tokens: 20
        }
    );
    engine.add(request(1, vec![1; 12], 9)).unwrap();
    engine.add(request(2, vec![2; 12], 9)).unwrap();
    assert_eq!(
        refusal(&mut engine, 3, 3),
        AddError::QueueFull { waiting: 2 }
    );
    let clock = VirtualClock::new();
    let events = run(&mut engine, &clock);
    let finished = |event: &&Event| {
        matches!(
            event,
            Event::Finished {
                reason: FinishReason::Length,
                generated_tokens: 9,
                ..
            }
        )
    };
    assert_eq!(
        events.iter().filter(finished).count(),
        2,
        "they fit exactly"
    );
}

#[test]
fn aborts_are_told_and_free_memory() {
    let (mut engine, _) = engine((2, 64));
    let clock = VirtualClock::new();
    for id in 0..3 {
        engine.add(request(id, vec![1; 9], 50)).unwrap();
    }
    engine.step(&clock).unwrap();
    engine.step(&clock).unwrap();
    for id in 0..3 {
        engine.abort(RequestId(id));
        engine.abort(RequestId(77));
    }
    assert!(
        engine.stats().kv_blocks_used > 0,
        "a step in flight uses them"
    );
    clock.sleep_until(3.0);
    let events = engine.step(&clock).unwrap();
    assert_eq!(events.len(), 3);
    for event in events {
        let Event::Finished {
            id,
            reason,
            at,
            timing,
            ..
        } = event
        else {
            panic!("{event:?}");
        };
        assert_eq!((reason, at), (FinishReason::Abort, 3.0));
        assert_eq!(timing.first_scheduled.is_some(), id.0 < 2);
    }
    assert_eq!(engine.stats().kv_blocks_used, 0);
    assert!(!engine.has_work());
    // Also for one that never ran, without a step in flight.
    engine.add(request(0, vec![1; 9], 50)).unwrap();
    engine.abort(RequestId(0));
    assert!(engine.has_work());
    assert_eq!(engine.step(&clock).unwrap().len(), 1);
    assert!(!engine.has_work());
}

#[test]
fn times_and_counts_are_told() {
    struct Ticking(VirtualClock);
    impl Clock for Ticking {
        fn now(&self) -> f64 {
            self.0.sleep_until(self.0.now() + 1.0);
            self.0.now()
        }
        fn sleep_until(&self, t: f64) {
            self.0.sleep_until(t);
        }
    }
    let (mut engine, _) = engine((8, 64));
    let clock = Ticking(VirtualClock::new());
    let arrival = Request {
        arrival: 0.5,
        ..request(4, vec![1; 9], 3)
    };
    engine.add(arrival).unwrap();
    let mut events = vec![];
    while engine.has_work() {
        events.extend(engine.step(&clock).unwrap());
    }
    let Some(Event::Finished {
        at,
        timing,
        preemptions,
        ..
    }) = events.last()
    else {
        panic!("{events:?}");
    };
    assert_eq!(timing.arrival, 0.5);
    assert_eq!(timing.first_scheduled, Some(1.0));
    assert!(timing.first_scheduled < timing.first_token);
    assert!(timing.first_token < timing.last_token);
    assert_eq!(timing.last_token, Some(*at));
    assert_eq!(*preemptions, 0);
    let stats = engine.stats();
    assert_eq!(
        (stats.prompt_tokens_total, stats.generation_tokens_total),
        (9, 3)
    );
    assert_eq!(stats.steps_total, 3);
    // 1 ms a step and 10 us a token; the last step decoded one token at position 10.
    assert!((stats.step_seconds_total - 0.00311).abs() < 1e-9);
    let last = stats.last_step.unwrap();
    assert_eq!(
        (
            last.shape.sequences,
            last.shape.tokens,
            last.shape.kv_tokens
        ),
        (1, 1, 11)
    );
}

#[test]
fn the_law_is_learnt_while_serving() {
    let (mut engine, _) = engine((8, 64));
    let clock = VirtualClock::new();
    assert_eq!(engine.stats().law_confidence, 0.0);
    for id in 0..40 {
        engine
            .add(request(id, vec![1; 5 + id as usize], 20))
            .unwrap();
    }
    run(&mut engine, &clock);
    let stats = engine.stats();
    let shape = stoker_law::StepShape {
        sequences: 8,
        tokens: 30,
        kv_tokens: 200,
    };
    let error = stats.law.step_seconds(shape) / 1.3e-3 - 1.0;
    assert!(error.abs() < 0.03, "{:?}", stats.law);
    assert!(stats.law_confidence > 0.3);
}

#[test]
fn a_failed_device_stays_failed() {
    let mut model = PagedModel::new(CAPACITY);
    model.fails_at = Some(3);
    let limits = Limits {
        max_num_seqs: 8,
        max_num_batched_tokens: 64,
    };
    // Also through a trait object, as the server has it.
    let executor: Box<dyn executor::Executor> = Box::new(model);
    let mut engine = Engine::new(executor, limits, EngineConfig::default());
    let clock = VirtualClock::new();
    engine.add(request(0, vec![1; 5], 20)).unwrap();
    for _ in 0..3 {
        engine.step(&clock).unwrap();
    }
    let failure = engine.step(&clock).unwrap_err();
    assert_eq!(failure.to_string(), "the device failed in step 3: it burns");
    assert_eq!(engine.step(&clock), Err(failure));
}
