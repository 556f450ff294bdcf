//! A deterministic model with paged memory, which checks what the engine asks of it.
#![allow(dead_code, reason = "each test file uses a part")]

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use stoker_engine::executor::*;
use stoker_engine::{Request, RequestId};

pub const VOCABULARY: u64 = 40;

/// The model: the next token is a hash of all tokens so far and the seed.
pub fn next_token(tokens: &[u32], seed: u64) -> u32 {
    let mut hash = seed ^ 0xcbf2_9ce4_8422_2325;
    for &token in tokens {
        hash = (hash ^ u64::from(token)).wrapping_mul(0x0100_0000_01b3);
        hash ^= hash >> 29;
    }
    (hash % VOCABULARY) as u32
}

/// What a request alone generates.
pub fn reference(request: &Request) -> Vec<u32> {
    let mut tokens = request.prompt.clone();
    for _ in 0..request.max_tokens {
        let token = next_token(&tokens, request.sampling.seed);
        tokens.push(token);
        let eos = !request.ignore_eos && request.eos_token_ids.contains(&token);
        if eos || request.stop_token_ids.contains(&token) {
            break;
        }
    }
    tokens.split_off(request.prompt.len())
}

pub fn request(id: u64, prompt: Vec<u32>, max_tokens: u32) -> Request {
    Request {
        id: RequestId(id),
        prompt,
        sampling: Sampling {
            temperature: 1.0,
            top_p: 1.0,
            top_k: 0,
            seed: id % 3,
        },
        max_tokens,
        stop_token_ids: vec![],
        ignore_eos: false,
        eos_token_ids: vec![],
        priority: 0,
        arrival: 0.0,
        first_token_due: None,
    }
}

/// Rows and tokens of every submitted step, for tests to look at.
#[derive(Clone, Default)]
pub struct Log(pub Arc<Mutex<Vec<StepBatch>>>);

impl Log {
    pub fn steps(&self) -> usize {
        self.0.lock().unwrap().len()
    }

    pub fn last(&self) -> StepBatch {
        self.0.lock().unwrap().last().cloned().unwrap()
    }
}

pub struct PagedModel {
    pub capacity: Capacity,
    pub log: Log,
    /// Fails in this step.
    pub fails_at: Option<u64>,
    kv: Vec<Option<u32>>,
    in_flight: VecDeque<(u64, StepBatch)>,
    /// Tokens that the newest executed step sampled, by slot.
    sampled: HashMap<Slot, u32>,
    submitted: u64,
}

impl PagedModel {
    pub fn new(capacity: Capacity) -> Self {
        Self {
            capacity,
            log: Log::default(),
            fails_at: None,
            kv: vec![None; (capacity.blocks * capacity.block_size) as usize],
            in_flight: VecDeque::new(),
            sampled: HashMap::new(),
            submitted: 0,
        }
    }

    fn place(&self, row: &Row, position: u32) -> usize {
        let size = self.capacity.block_size;
        (row.blocks[(position / size) as usize] * size + position % size) as usize
    }

    fn check(&self, batch: &StepBatch) {
        assert!(!batch.rows.is_empty(), "an empty step");
        let tokens: usize = batch.rows.iter().map(|row| row.tokens.len()).sum();
        assert!(tokens <= self.capacity.max_num_batched_tokens as usize);
        let mut blocks = HashSet::new();
        let mut slots = HashSet::new();
        for row in &batch.rows {
            assert!(row.slot < self.capacity.max_num_seqs, "slot out of range");
            assert!(slots.insert(row.slot), "a slot twice in a step");
            assert!(!row.tokens.is_empty());
            let end = row.start + row.tokens.len() as u32;
            assert!(end <= self.capacity.max_model_len);
            assert_eq!(
                row.blocks.len() as u32,
                end.div_ceil(self.capacity.block_size)
            );
            for &block in &row.blocks {
                assert!(block < self.capacity.blocks);
                assert!(blocks.insert(block), "a block twice in a step");
            }
            if let Some(at) = row
                .tokens
                .iter()
                .position(|t| *t == InputToken::FromPreviousStep)
            {
                assert_eq!(
                    at + 1,
                    row.tokens.len(),
                    "only the last token can be unknown"
                );
            }
            // A block that a step in flight uses belongs to the same sequence, or nobody.
            for (_, other) in &self.in_flight {
                for before in &other.rows {
                    let shared = before.blocks.iter().any(|block| row.blocks.contains(block));
                    let continues = before.slot == row.slot
                        && row.start == before.start + before.tokens.len() as u32;
                    assert!(!shared || continues, "a block in use was given away");
                }
            }
        }
    }

    /// Runs a step: every token goes through the block table into memory and out again.
    fn execute(&mut self, batch: &StepBatch) -> Vec<Option<u32>> {
        let before = std::mem::take(&mut self.sampled);
        let mut output = Vec::new();
        for row in &batch.rows {
            for (offset, token) in row.tokens.iter().enumerate() {
                let place = self.place(row, row.start + offset as u32);
                self.kv[place] = Some(match token {
                    InputToken::Known(token) => *token,
                    InputToken::FromPreviousStep => before[&row.slot],
                });
            }
            output.push(row.sample.map(|sampling| {
                let end = row.start + row.tokens.len() as u32;
                let read = |position| self.kv[self.place(row, position)];
                let tokens: Option<Vec<u32>> = (0..end).map(read).collect();
                let tokens = tokens.expect("memory that was never written");
                let token = next_token(&tokens, sampling.seed);
                self.sampled.insert(row.slot, token);
                token
            }));
        }
        output
    }
}

impl Executor for PagedModel {
    fn capacity(&self) -> Capacity {
        self.capacity
    }

    fn submit(&mut self, batch: StepBatch) -> Result<Ticket, ExecutorError> {
        assert!(self.in_flight.len() < 2, "three steps in flight");
        self.check(&batch);
        self.submitted += 1;
        self.log.0.lock().unwrap().push(batch.clone());
        self.in_flight.push_back((self.submitted, batch));
        Ok(Ticket(self.submitted))
    }

    fn wait(&mut self, ticket: Ticket) -> Result<StepOutput, ExecutorError> {
        let (number, batch) = self.in_flight.pop_front().unwrap();
        assert_eq!(number, ticket.0, "waited out of order");
        if self.fails_at == Some(number) {
            return Err(ExecutorError::Device {
                step: number,
                message: "it burns".into(),
            });
        }
        let tokens = self.execute(&batch);
        let computed: usize = batch.rows.iter().map(|row| row.tokens.len()).sum();
        Ok(StepOutput {
            tokens,
            device_time: Duration::from_micros(1000 + 10 * computed as u64),
        })
    }
}
