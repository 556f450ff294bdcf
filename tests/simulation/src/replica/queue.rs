//! The surrogate's queue: those who can be in time, then those who can't, as stoker-engine has it.

use std::collections::VecDeque;

/// One in so many seats goes to whoever was set back first.
const LATE_TURN: u64 = 8;

/// What is to be done for a request.
#[derive(Clone, Copy, Debug)]
pub(super) struct Work {
    pub request: u32,
    /// Tokens to compute: the prompt, and after a preemption what was generated.
    pub tokens: u32,
    /// Tokens to generate.
    pub left: u32,
    /// When the first token is to be out.
    pub due: f64,
    /// Whether it was set back since that can't be.
    pub late: bool,
}

/// Requests without a seat, in order of arrival.
#[derive(Debug, Default)]
pub(super) struct Queue {
    in_time: VecDeque<Work>,
    late: VecDeque<Work>,
    seats_given: u64,
}

impl Queue {
    pub fn push(&mut self, work: Work) {
        self.in_time.push_back(work);
    }

    /// Who lost a seat comes first again.
    pub fn put_back(&mut self, work: Work) {
        self.of(work.late).push_front(work);
    }

    /// Who gets the next seat.
    pub fn first(&self) -> Option<&Work> {
        let turn = self.seats_given % LATE_TURN == LATE_TURN - 1;
        let (first, then) = if turn {
            (&self.late, &self.in_time)
        } else {
            (&self.in_time, &self.late)
        };
        first.front().or_else(|| then.front())
    }

    /// Gives that seat.
    pub fn pop(&mut self) -> Option<Work> {
        let late = self.first()?.late;
        self.seats_given += 1;
        self.of(late).pop_front()
    }

    /// Sets those back whose first token would come too late.
    pub fn set_back(&mut self, first_token: impl Fn(&Work) -> f64) {
        while let Some(work) = self.in_time.front().copied()
            && first_token(&work) > work.due
        {
            self.in_time.pop_front();
            self.late.push_back(Work { late: true, ..work });
        }
    }

    pub fn remove(&mut self, request: u32) {
        for queue in [&mut self.in_time, &mut self.late] {
            queue.retain(|work| work.request != request);
        }
    }

    pub fn len(&self) -> usize {
        self.in_time.len() + self.late.len()
    }

    pub fn tokens(&self) -> u64 {
        let all = self.in_time.iter().chain(&self.late);
        all.map(|work| u64::from(work.tokens)).sum()
    }

    fn of(&mut self, late: bool) -> &mut VecDeque<Work> {
        if late {
            &mut self.late
        } else {
            &mut self.in_time
        }
    }
}
