//! Choosing what the next step computes: decodes first, then prompt chunks, then newcomers.

use stoker_law::StepShape;

use super::{InFlight, Scheduler};
use crate::blocks::BlockTable;
use crate::executor::StepBatch;
use crate::sequence::{Seat, Sequence};

/// Share of the blocks (one in so many) that admitting a sequence leaves free for the running
/// ones to grow into.
const HEADROOM: u32 = 100;

/// One in so many seats goes to whoever was set back first, so that nobody waits for good.
const LATE_TURN: u64 = 8;

/// Whether a decoding sequence takes part in the step.
enum Room {
    Made,
    /// Blocks will be free when the step in flight is done.
    NextStep,
    /// The sequence itself was the one to be preempted.
    Lost,
}

impl Scheduler {
    /// Builds the next step; `None` if there is nothing that could be computed now. At most one
    /// step may be in flight. `step_seconds`: how long a step takes these days.
    pub fn schedule(&mut self, now: f64, step_seconds: f64) -> Option<StepBatch> {
        let mut budget = self.limits.max_num_batched_tokens as usize;
        self.plan_decodes(&mut budget);
        self.plan_chunks(&mut budget);
        self.set_back_late(now, step_seconds);
        self.admit(&mut budget);
        self.build(now)
    }

    /// Sequences with one token to compute, all of them if the budget allows, else in turn.
    fn plan_decodes(&mut self, budget: &mut usize) {
        let seats = self.running.len();
        let decodes = self.running.iter().filter(|s| s.to_compute() == 1).count();
        let first = if decodes > *budget && seats > 0 {
            self.turn % seats
        } else {
            0
        };
        // Sequences that wait for blocks of the step in flight.
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
                .is_some_and(|seat| seat.blocks.grow(tokens));
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

    /// Sets those back that can't have their first token in time any more: in a shortage all would
    /// be late if whoever is late already went first.
    fn set_back_late(&mut self, now: f64, step_seconds: f64) {
        if self.waiting.len() == 0 {
            return;
        }
        let (mut decodes, mut ahead) = (0, 0);
        for sequence in &self.running {
            match sequence.to_compute() {
                0 | 1 => decodes += 1,
                tokens => ahead += tokens,
            }
        }
        let budget = self.limits.max_num_batched_tokens as usize;
        let chunk = budget.saturating_sub(decodes).max(1);
        while let Some(first) = self.waiting.first() {
            // The step in flight, and those that its prompt and the ones before it take.
            let steps = 1 + (ahead + first.to_compute()).div_ceil(chunk);
            if first.rank.late || !first.misses_due(now + steps as f64 * step_seconds) {
                return;
            }
            let Some(mut sequence) = self.waiting.pop() else {
                return;
            };
            sequence.rank.late = true;
            self.ranks.insert(sequence.id(), sequence.rank);
            self.waiting.push(sequence);
            self.set_back += 1;
        }
    }

    /// Who gets the next seat.
    fn next_in(&self) -> Option<&Sequence> {
        let late = (self.seats_given % LATE_TURN == LATE_TURN - 1)
            .then(|| self.waiting.first_late())
            .flatten();
        late.or_else(|| self.waiting.first())
    }

    /// Gives seats to waiting sequences, with blocks for all that they have to compute, so that
    /// two half-computed prompts can't block each other.
    fn admit(&mut self, budget: &mut usize) {
        while *budget > 0 && self.running.len() < self.limits.max_num_seqs as usize {
            let Some(next) = self.next_in() else {
                break;
            };
            let rank = next.rank;
            let mut blocks = self.pool.table();
            let headroom = if self.running.is_empty() {
                0
            } else {
                (self.capacity.blocks / HEADROOM) as usize
            };
            let total = next.total();
            let fits = blocks.missing(total) + headroom <= self.pool.free();
            // One that was just preempted may have a token in flight, which no later step could
            // take from the step before it.
            if next.has_pending() || !fits || !blocks.grow(total) {
                break;
            }
            let Some(slot) = self.free_slots.pop() else {
                break;
            };
            let Some(mut sequence) = self.waiting.remove(rank) else {
                break;
            };
            self.seats_given += 1;
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
                batch.rows.push(row);
            }
        }
        step.shape = batch.shape();
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
}
