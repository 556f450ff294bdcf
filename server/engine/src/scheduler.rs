//! What goes into the next step, and what becomes of its tokens.
//!
//! One rule for all: a sequence has `total` tokens, `computed` of which are (or will be, once the
//! steps in flight are done) in the KV cache; a step lets it catch up by as many tokens as the
//! budget allows, and the step that computes its last token samples the next one. Decoding is
//! catching up by one.

use std::collections::{BTreeMap, HashMap, VecDeque};

use stoker_law::StepShape;

use crate::blocks::{BlockPool, BlockTable};
use crate::executor::{Capacity, Slot, StepBatch};
use crate::request::{AddError, Event, Limits, Request, RequestId};
use crate::sequence::{Rank, Seat, Sequence};
use crate::waiting::WaitingQueue;

/// Share of the blocks (one in so many) that admitting a sequence leaves free for the running
/// ones to grow into.
const HEADROOM: u32 = 100;

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

/// Whether a decoding sequence takes part in the step.
enum Room {
    Made,
    /// Blocks will be free when the step in flight is done.
    NextStep,
    /// The sequence itself was the one to be preempted.
    Lost,
}

impl Scheduler {
    pub fn new(capacity: Capacity, limits: Limits, max_waiting: usize) -> Self {
        Self {
            capacity,
            limits,
            max_waiting,
            pool: BlockPool::new(capacity.blocks),
            free_slots: (0..capacity.max_num_seqs.max(1)).rev().collect(),
            waiting: WaitingQueue::default(),
            running: Vec::new(),
            ending: BTreeMap::new(),
            in_flight: VecDeque::with_capacity(2),
            ranks: HashMap::new(),
            next_order: 0,
            steps: 0,
            turn: 0,
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

    /// Builds the next step; `None` if there is nothing that could be computed now. At most one
    /// step may be in flight.
    pub fn schedule(&mut self, now: f64) -> Option<StepBatch> {
        let mut budget = self.limits.max_num_batched_tokens as usize;
        let preemptions = self.preemptions;
        let delayed = self.plan_decodes(&mut budget);
        self.plan_chunks(&mut budget);
        // While blocks are short, a newcomer would only take them from those who run.
        if delayed == 0 && self.preemptions == preemptions {
            self.admit(&mut budget);
        }
        self.build(now)
    }

    /// Sequences with one token to compute, all of them if the budget allows, else in turn.
    /// Returns how many have to wait for blocks of the step in flight.
    fn plan_decodes(&mut self, budget: &mut usize) -> usize {
        let seats = self.running.len();
        let decodes = self.running.iter().filter(|s| s.to_compute() == 1).count();
        let first = if decodes > *budget && seats > 0 {
            self.turn % seats
        } else {
            0
        };
        let mut delayed = 0;
        for place in (first..seats).chain(0..first) {
            if *budget == 0 {
                // The first that was left out starts the next step.
                self.turn = place;
                break;
            }
            // Preemption shortens `running` from its end.
            let Some(sequence) = self.running.get(place) else {
                continue;
            };
            if sequence.to_compute() != 1 {
                continue;
            }
            match self.make_room(place, delayed, budget) {
                Room::Made => {
                    if let Some(sequence) = self.running.get_mut(place) {
                        sequence.planned = 1;
                        *budget -= 1;
                    }
                }
                Room::NextStep => delayed += 1,
                Room::Lost => {}
            }
        }
        delayed
    }

    /// Finds a block for the next token of the sequence at `place`, from the pool or by preempting
    /// the last of the running sequences. `delayed` sequences wait for retired blocks already.
    fn make_room(&mut self, place: usize, delayed: usize, budget: &mut usize) -> Room {
        loop {
            let Some(sequence) = self.running.get_mut(place) else {
                return Room::Lost;
            };
            let tokens = sequence.computed + 1;
            let grown = sequence
                .seat
                .as_mut()
                .is_some_and(|seat| seat.blocks.grow(tokens, &self.pool));
            if grown {
                return Room::Made;
            }
            let retired: usize = self
                .in_flight
                .iter()
                .flat_map(|step| &step.retired)
                .map(BlockTable::len)
                .sum();
            if retired > delayed {
                return Room::NextStep;
            }
            let Some(mut victim) = self.running.pop() else {
                return Room::Lost;
            };
            *budget += victim.planned;
            self.preemptions += 1;
            if let Some(seat) = victim.preempt() {
                self.retire(seat, victim.last_step);
            }
            self.waiting.push(victim);
        }
    }

    /// Chunks of the running sequences' prompts. Their blocks were given with the seat.
    fn plan_chunks(&mut self, budget: &mut usize) {
        for sequence in &mut self.running {
            if *budget == 0 {
                break;
            }
            if sequence.to_compute() > 1 {
                sequence.planned = sequence.to_compute().min(*budget);
                *budget -= sequence.planned;
            }
        }
    }

    /// Gives seats to waiting sequences, with blocks for all that they have to compute, so that
    /// two half-computed prompts can't block each other.
    fn admit(&mut self, budget: &mut usize) {
        while *budget > 0 && self.running.len() < self.limits.max_num_seqs as usize {
            let Some(first) = self.waiting.first() else {
                break;
            };
            let mut blocks = BlockTable::new(self.capacity.block_size);
            let headroom = if self.running.is_empty() {
                0
            } else {
                (self.capacity.blocks / HEADROOM) as usize
            };
            let total = first.total();
            let fits = blocks.missing(total) + headroom <= self.pool.free();
            if first.has_pending() || !fits || !blocks.grow(total, &self.pool) {
                break;
            }
            let Some(slot) = self.free_slots.pop() else {
                break;
            };
            let Some(mut sequence) = self.waiting.pop() else {
                break;
            };
            sequence.seat = Some(Seat { slot, blocks });
            sequence.planned = total.min(*budget);
            *budget -= sequence.planned;
            let place = self.running.partition_point(|s| s.rank < sequence.rank);
            self.running.insert(place, sequence);
        }
    }

    /// Turns plans into rows, decodes first, and notes the step as in flight.
    fn build(&mut self, now: f64) -> Option<StepBatch> {
        let planned = self.running.iter().filter(|s| s.planned > 0).count();
        if planned == 0 {
            return None;
        }
        self.steps += 1;
        let mut step = InFlight {
            number: self.steps,
            rows: Vec::with_capacity(planned),
            shape: StepShape::default(),
            retired: Vec::new(),
        };
        let mut batch = StepBatch {
            rows: Vec::with_capacity(planned),
        };
        let mut some_end = false;
        for decodes in [true, false] {
            for sequence in &mut self.running {
                if (sequence.to_compute() == 1) != decodes {
                    continue;
                }
                // In the second round, decoding sequences have one token to compute again; but
                // their plan is taken.
                let Some(row) = sequence.take_row(step.number) else {
                    continue;
                };
                sequence.timing.first_scheduled.get_or_insert(now);
                some_end |= row.sample.is_some() && sequence.all_sampled();
                step.rows.push((sequence.rank, row.sample.is_some()));
                step.shape.sequences += 1;
                step.shape.tokens += row.tokens.len() as u32;
                step.shape.kv_tokens += u64::from(row.start) + row.tokens.len() as u64;
                batch.rows.push(row);
            }
        }
        if some_end {
            for mut sequence in self.running.extract_if(.., |s| s.all_sampled()) {
                if let Some(seat) = sequence.seat.take() {
                    self.free_slots.push(seat.slot);
                    step.retired.push(seat.blocks);
                }
                self.ending.insert(sequence.rank, sequence);
            }
        }
        self.in_flight.push_back(step);
        Some(batch)
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
