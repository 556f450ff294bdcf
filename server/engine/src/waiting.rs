//! The queue of requests that have no seat.

use std::collections::BTreeMap;

use crate::sequence::{Rank, Sequence};

/// Ordered by rank; preempted sequences stand at the place they came from.
#[derive(Debug, Default)]
pub(crate) struct WaitingQueue {
    sequences: BTreeMap<Rank, Sequence>,
    /// Tokens to compute of all of them.
    tokens: u64,
}

impl WaitingQueue {
    pub fn len(&self) -> usize {
        self.sequences.len()
    }

    pub fn tokens(&self) -> u64 {
        self.tokens
    }

    pub fn push(&mut self, sequence: Sequence) {
        self.tokens += sequence.to_compute() as u64;
        self.sequences.insert(sequence.rank, sequence);
    }

    pub fn first(&self) -> Option<&Sequence> {
        self.sequences.values().next()
    }

    /// The first of those that were set back, where it has the priority of the very first.
    pub fn first_late(&self) -> Option<&Sequence> {
        let priority = self.first()?.rank.priority;
        let late = Rank {
            priority,
            late: true,
            order: 0,
        };
        let (rank, sequence) = self.sequences.range(late..).next()?;
        (rank.priority == priority).then_some(sequence)
    }

    pub fn pop(&mut self) -> Option<Sequence> {
        let (_, sequence) = self.sequences.pop_first()?;
        self.tokens -= sequence.to_compute() as u64;
        Some(sequence)
    }

    pub fn remove(&mut self, rank: Rank) -> Option<Sequence> {
        let sequence = self.sequences.remove(&rank)?;
        self.tokens -= sequence.to_compute() as u64;
        Some(sequence)
    }

    /// For taking in a token that was in flight: it leaves the number of tokens to compute as it
    /// is.
    pub fn get_mut(&mut self, rank: Rank) -> Option<&mut Sequence> {
        self.sequences.get_mut(&rank)
    }
}
