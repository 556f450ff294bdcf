use std::sync::mpsc as std_mpsc;

use stoker_engine::executor::{Capacity, ExecutorError, StepBatch, StepOutput, Ticket};
use stoker_engine::{Profile, SimulatedExecutor};

use super::*;
use crate::metrics::Metrics;

fn request(prompt_tokens: usize, max_tokens: u32) -> NewRequest {
    NewRequest {
        prompt: vec![1; prompt_tokens],
        sampling: Sampling {
            temperature: 0.0,
            top_p: 1.0,
            top_k: 0,
            seed: 0,
        },
        max_tokens,
        stop_token_ids: Vec::new(),
        ignore_eos: true,
        priority: 0,
    }
}

fn start(
    executor: Box<dyn Executor>,
    clock: RealClock,
) -> (EngineHandle, std_mpsc::Receiver<String>) {
    let (failed, failure) = std_mpsc::channel();
    let handle = EngineHandle::start(EngineStart {
        executor,
        clock,
        limits: Limits {
            max_num_seqs: 2,
            max_num_batched_tokens: 512,
        },
        config: EngineConfig {
            max_waiting: 3,
            ..EngineConfig::default()
        },
        objectives: Objectives::default(),
        eos_token_ids: Vec::new(),
        metrics: Metrics::new("m").unwrap().engine_started(8192).unwrap(),
        on_failure: Box::new(move |message| failed.send(message).unwrap()),
    });
    (handle.unwrap(), failure)
}

fn simulated() -> EngineHandle {
    let clock = RealClock::new();
    let executor = SimulatedExecutor::new(Profile::h100(), clock);
    start(Box::new(executor), clock).0
}

async fn until(mut check: impl FnMut() -> bool) {
    while !check() {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

async fn submit(
    engine: &EngineHandle,
    requests: Vec<NewRequest>,
) -> Result<Generation, SubmitError> {
    engine.submit(requests, Duration::ZERO).await
}

async fn collect(generation: &mut Generation) -> Vec<(usize, Update)> {
    let mut updates = Vec::new();
    while generation.next(&mut updates).await {}
    updates
}

#[tokio::test]
async fn tokens_of_requests_added_together_come_with_their_index() {
    let engine = simulated();
    let mut generation = submit(&engine, vec![request(5, 3), request(700, 4)])
        .await
        .unwrap();
    let updates = collect(&mut generation).await;
    for (index, tokens) in [(0, 3), (1, 4)] {
        let own: Vec<_> = updates.iter().filter(|(i, _)| *i == index).collect();
        assert_eq!(own.len(), tokens + 1);
        assert!(matches!(
            own[tokens].1,
            Update::Finished {
                reason: FinishReason::Length
            }
        ));
    }
}

#[tokio::test]
async fn requests_are_added_all_or_none() {
    let engine = simulated();
    let refused = submit(&engine, vec![request(5, 3), request(9000, 3)])
        .await
        .err();
    assert!(matches!(
        refused,
        Some(SubmitError::Refused {
            index: 1,
            error: AddError::PromptTooLong { .. }
        })
    ));
    let refused = submit(&engine, vec![request(5, 3); 4]).await.err();
    assert!(matches!(refused, Some(SubmitError::QueueFull { .. })));
    until(|| {
        let stats = engine.snapshot().stats;
        stats.running == 0 && stats.waiting == 0
    })
    .await;
    assert_eq!(engine.snapshot().stats.waiting_prompt_tokens, 0);
}

#[tokio::test]
async fn a_dropped_answer_frees_its_blocks() {
    let engine = simulated();
    let generation = submit(&engine, vec![request(2000, 6000)]).await.unwrap();
    until(|| engine.snapshot().stats.kv_tokens > 0).await;
    drop(generation);
    until(|| engine.snapshot().stats.kv_blocks_used == 0).await;
    // A handler that is dropped before the engine has answered it leaves nothing either.
    let submit = submit(&engine, vec![request(2000, 6000)]);
    assert!(futures::poll!(std::pin::pin!(submit)).is_pending());
    until(|| {
        let stats = engine.snapshot().stats;
        stats.running == 0 && stats.waiting == 0 && stats.kv_blocks_used == 0
    })
    .await;
}

/// A device that works for some steps.
struct Failing {
    steps: u32,
    panics: bool,
}

impl Executor for Failing {
    fn capacity(&self) -> Capacity {
        Capacity {
            blocks: 100,
            block_size: 16,
            max_model_len: 1000,
            max_num_seqs: 8,
            max_num_batched_tokens: 512,
        }
    }

    fn submit(&mut self, _batch: StepBatch) -> Result<Ticket, ExecutorError> {
        self.steps += 1;
        Ok(Ticket(u64::from(self.steps)))
    }

    fn wait(&mut self, ticket: Ticket) -> Result<StepOutput, ExecutorError> {
        if ticket.0 < 3 {
            return Ok(StepOutput {
                tokens: vec![Some(7)],
                device_time: Duration::from_millis(1),
            });
        }
        assert!(!self.panics, "the device is on fire");
        Err(ExecutorError::Device {
            step: ticket.0,
            message: "unplugged".into(),
        })
    }
}

#[tokio::test]
async fn a_failed_device_ends_every_answer_and_is_told() {
    for panics in [false, true] {
        let device = Failing { steps: 0, panics };
        let (engine, failure) = start(Box::new(device), RealClock::new());
        let mut generation = submit(&engine, vec![request(5, 50)]).await.unwrap();
        let updates = collect(&mut generation).await;
        assert_eq!(updates.len(), 2, "two tokens, no end");
        let message = failure.recv().unwrap();
        assert!(
            message.contains(if panics { "panicked" } else { "unplugged" }),
            "{message}"
        );
        until(|| {
            engine
                .commands
                .send(Command::SetObjectives(Objectives::default()))
                .is_err()
        })
        .await;
        let refused = submit(&engine, vec![request(5, 5)]).await.err();
        assert!(matches!(refused, Some(SubmitError::Gone)));
    }
}
