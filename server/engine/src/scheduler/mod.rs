//! What goes into the next step, and what becomes of its tokens.
//!
//! One rule for all: a sequence has `total` tokens, `computed` of which are (or will be, once the
//! steps in flight are done) in the KV cache; a step lets it catch up by as many tokens as the
//! budget allows, and the step that computes its last token samples the next one. Decoding is
//! catching up by one.

mod plan;

use std::collections::{BTreeMap, HashMap, VecDeque};

use stoker_law::StepShape;

use crate::blocks::{BlockPool, BlockTable};
use crate::executor::{Capacity, Slot};
use crate::request::{AddError, Event, Limits, Request, RequestId};
use crate::sequence::{Rank, Seat, Sequence};
use crate::waiting::WaitingQueue;

pub(crate) struct Scheduler {
    capacity: Capacity,
    pub limits: Limits,
    max_waiting: usize,
    pool: BlockPool,
    /// Slots that no sequence has; ceiling of `max_num_seqs` in all.
    free_slots: Vec<Slot>,
    waiting: WaitingQueue,
    /// Sequences with a seat, in the order of their rank.
    running: Vec<Sequence>,
    /// Sequences whose last token is in flight: they need no seat any more.
    ending: BTreeMap<Rank, Sequence>,
    in_flight: VecDeque<InFlight>,
    ranks: HashMap<RequestId, Rank>,
    next_order: u64,
    steps: u64,
    /// Where the next step starts among the decoding sequences if the budget can't serve all.
    turn: usize,
    seats_given: u64,
    /// Times that a request was set back, since it couldn't be in time any more.
    pub set_back: u64,
    pub preemptions: u64,
    pub prompt_tokens: u64,
    pub generation_tokens: u64,
}

/// A submitted step.
struct InFlight {
    number: u64,
    /// One entry a row: whose it is, and whether it samples.
    rows: Vec<(Rank, bool)>,
    shape: StepShape,
    /// Blocks of sequences that ended while this step, which uses them, was in flight. They are
    /// given back when it is done.
    retired: Vec<BlockTable>,
}

impl Scheduler {
    pub fn new(capacity: Capacity, limits: Limits, max_waiting: usize) -> Self {
        Self {
            capacity,
            limits,
            max_waiting,
            pool: BlockPool::new(capacity.blocks, capacity.block_size),
            free_slots: (0..capacity.max_num_seqs.max(1)).rev().collect(),
            waiting: WaitingQueue::default(),
            running: Vec::new(),
            ending: BTreeMap::new(),
            in_flight: VecDeque::with_capacity(2),
            ranks: HashMap::new(),
            next_order: 0,
            steps: 0,
            turn: 0,
            seats_given: 0,
            set_back: 0,
            preemptions: 0,
            prompt_tokens: 0,
            generation_tokens: 0,
        }
    }

    pub fn add(&mut self, request: Request) -> Result<(), AddError> {
        let prompt = request.prompt.len();
        let max_tokens = request.max_tokens;
        if prompt == 0 {
            return Err(AddError::EmptyPrompt);
        }
        if max_tokens == 0 {
            return Err(AddError::NothingToGenerate);
        }
        let longest = prompt as u64 + u64::from(max_tokens);
        if longest > u64::from(self.capacity.max_model_len) {
            return Err(AddError::PromptTooLong {
                prompt,
                max_tokens,
                max_model_len: self.capacity.max_model_len,
            });
        }
        // The last token is never fed back, so it needs no place in the cache.
        let kv_capacity_tokens =
            u64::from(self.capacity.blocks) * u64::from(self.capacity.block_size);
        if longest - 1 > kv_capacity_tokens {
            return Err(AddError::NeverFits {
                prompt,
                max_tokens,
                kv_capacity_tokens,
            });
        }
        if self.ranks.contains_key(&request.id) {
            return Err(AddError::DuplicateId(request.id));
        }
        if self.waiting.len() >= self.max_waiting {
            return Err(AddError::QueueFull {
                waiting: self.waiting.len(),
            });
        }
        let sequence = Sequence::new(request, self.next_order);
        self.next_order += 1;
        self.ranks.insert(sequence.id(), sequence.rank);
        self.waiting.push(sequence);
        Ok(())
    }

    /// Takes a sequence out, wherever it is.
    pub fn abort(&mut self, id: RequestId) -> Option<Sequence> {
        let rank = *self.ranks.get(&id)?;
        self.remove(rank)
    }

    /// Takes in the tokens of the oldest step in flight, one entry a row, and gives back the
    /// blocks that waited for its end. Returns what the step contained, or what is wrong with the
    /// tokens.
    pub fn commit(
        &mut self,
        tokens: &[Option<u32>],
        now: f64,
        events: &mut Vec<Event>,
    ) -> Result<StepShape, String> {
        let Some(step) = self.in_flight.pop_front() else {
            return Err("a step ended, but none is in flight".into());
        };
        if tokens.len() != step.rows.len() {
            return Err(format!(
                "the executor returned {} tokens for a step of {} rows",
                tokens.len(),
                step.rows.len()
            ));
        }
        for (&(rank, sampled), &token) in step.rows.iter().zip(tokens) {
            if !sampled {
                continue;
            }
            let Some(token) = token else {
                return Err("the executor returned no token for a row to be sampled".into());
            };
            // A sequence that is gone was stopped or aborted while the step was in flight.
            let Some(sequence) = self.sequence_mut(rank) else {
                continue;
            };
            let prompt_len = sequence.prompt_len() as u64;
            let (event, reason) = sequence.append(token, now);
            if let Event::Token { first: true, .. } = event {
                self.prompt_tokens += prompt_len;
            }
            self.generation_tokens += 1;
            events.push(event);
            if let Some(reason) = reason
                && let Some(sequence) = self.remove(rank)
            {
                events.push(sequence.finished(reason, now));
            }
        }
        Ok(step.shape)
    }

    fn place(&self, rank: Rank) -> Option<usize> {
        self.running.binary_search_by_key(&rank, |s| s.rank).ok()
    }

    fn sequence_mut(&mut self, rank: Rank) -> Option<&mut Sequence> {
        match self.place(rank) {
            Some(place) => self.running.get_mut(place),
            None => match self.ending.get_mut(&rank) {
                Some(sequence) => Some(sequence),
                None => self.waiting.get_mut(rank),
            },
        }
    }

    fn remove(&mut self, rank: Rank) -> Option<Sequence> {
        let mut sequence = match self.place(rank) {
            Some(place) => self.running.remove(place),
            None => match self.ending.remove(&rank) {
                Some(sequence) => sequence,
                None => self.waiting.remove(rank)?,
            },
        };
        self.ranks.remove(&sequence.id());
        if let Some(seat) = sequence.seat.take() {
            self.retire(seat, sequence.last_step);
        }
        Some(sequence)
    }

    /// Gives a seat back. Its blocks stay in use while a step that uses them is in flight. The
    /// slot is free at once: steps run in order, and whoever gets it starts with known tokens.
    fn retire(&mut self, seat: Seat, last_step: u64) {
        self.free_slots.push(seat.slot);
        if let Some(step) = self.in_flight.back_mut()
            && step.number == last_step
        {
            step.retired.push(seat.blocks);
        }
    }

    pub fn has_work(&self) -> bool {
        !self.in_flight.is_empty() || !self.running.is_empty() || self.waiting.len() > 0
    }

    pub fn running(&self) -> u32 {
        self.running.len() as u32
    }

    pub fn waiting(&self) -> u32 {
        self.waiting.len() as u32
    }

    pub fn blocks(&self) -> &BlockPool {
        &self.pool
    }

    /// Cached tokens of the running sequences.
    pub fn kv_tokens(&self) -> u64 {
        self.running.iter().map(|s| s.computed as u64).sum()
    }

    /// Tokens that waiting and running sequences have to catch up, without decoding.
    pub fn waiting_prompt_tokens(&self) -> u64 {
        let running: u64 = self
            .running
            .iter()
            .map(|s| s.to_compute() as u64)
            .filter(|&tokens| tokens > 1)
            .sum();
        self.waiting.tokens() + running
    }
}
