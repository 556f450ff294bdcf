//! What became of each request, and what counts as good.

use stoker_autoscaler::{ItlOf, Objectives};

use crate::trace::Trace;

/// Objectives of the service and patience of its clients. Seconds and tokens.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Goals {
    /// TTFT within `ttft` plus `ttft_per_token` for each prompt token above `ttft_free_tokens`.
    pub ttft: f64,
    pub ttft_free_tokens: f64,
    pub ttft_per_token: f64,
    /// Mean gap between a request's tokens.
    pub itl: f64,
    /// Strict form: at most 5 % of a request's gaps are longer than this.
    pub gap: f64,
    /// A client that has no token by then gives up.
    pub timeout: f64,
    /// Share of requests to be good, in percent.
    pub good_percent: f64,
}

impl Default for Goals {
    fn default() -> Self {
        Goals {
            ttft: 2.0,
            ttft_free_tokens: 1000.0,
            ttft_per_token: 1e-3,
            itl: 0.1,
            gap: 0.15,
            timeout: 60.0,
            good_percent: 99.0,
        }
    }
}

impl Goals {
    /// Seconds that the first token may take after a prompt of so many tokens.
    pub fn ttft_within(&self, prompt: f64) -> f64 {
        self.ttft + self.ttft_per_token * (prompt - self.ttft_free_tokens).max(0.0)
    }

    pub fn objectives(&self) -> Objectives {
        Objectives {
            good_percent: self.good_percent,
            ttft_seconds: self.ttft,
            ttft_free_prompt_tokens: self.ttft_free_tokens,
            ttft_seconds_per_prompt_token: self.ttft_per_token,
            itl_seconds: self.itl,
            itl_of: ItlOf::Mean,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Not sent yet.
    Ahead,
    /// Waits in front of the replicas: none is ready, or none has room.
    Held,
    /// In the replica with this number.
    Sent(u32),
    Done,
    TimedOut,
    /// Its replica died, or refused it.
    Failed,
}

#[derive(Clone, Copy, Debug)]
pub struct Flight {
    pub arrival: f64,
    pub prompt: u32,
    pub output: u32,
    pub state: State,
    /// When a replica got it; NaN before.
    pub sent: f64,
    /// NaN before it has come.
    pub first_token: f64,
    pub last_token: f64,
    /// Gaps longer than the strict goal.
    pub slow_gaps: u32,
}

impl Flight {
    /// Of prompt and answer.
    pub fn tokens(&self) -> f64 {
        f64::from(self.prompt) + f64::from(self.output)
    }

    pub fn ttft(&self) -> f64 {
        self.first_token - self.arrival
    }

    /// 0 where there are no gaps.
    pub fn mean_itl(&self) -> f64 {
        match self.output {
            0 | 1 => 0.0,
            n => (self.last_token - self.first_token) / f64::from(n - 1),
        }
    }

    /// When the first token is to be out.
    pub fn due(&self, goals: &Goals) -> f64 {
        self.arrival + goals.ttft_within(f64::from(self.prompt))
    }

    pub fn meets_ttft(&self, goals: &Goals) -> bool {
        self.ttft() <= goals.ttft_within(f64::from(self.prompt))
    }

    pub fn meets_itl(&self, goals: &Goals) -> bool {
        self.mean_itl() <= goals.itl
    }

    pub fn good(&self, goals: &Goals) -> bool {
        self.state == State::Done && self.meets_ttft(goals) && self.meets_itl(goals)
    }

    pub fn strict(&self, goals: &Goals) -> bool {
        let gaps = self.output.saturating_sub(1);
        self.state == State::Done
            && self.meets_ttft(goals)
            && f64::from(self.slow_gaps) <= 0.05 * f64::from(gaps)
    }
}

/// All requests of a run.
#[derive(Clone, Debug)]
pub struct Ledger {
    pub flights: Vec<Flight>,
    pub goals: Goals,
}

impl Ledger {
    pub fn new(trace: &Trace, goals: Goals) -> Self {
        let flights = trace.requests.iter().map(|request| Flight {
            arrival: request.arrival,
            prompt: request.prompt.max(1),
            output: request.output.max(1),
            state: State::Ahead,
            sent: f64::NAN,
            first_token: f64::NAN,
            last_token: f64::NAN,
            slow_gaps: 0,
        });
        Ledger {
            flights: flights.collect(),
            goals,
        }
    }

    pub fn get(&self, request: u32) -> Option<&Flight> {
        self.flights.get(request as usize)
    }

    pub fn get_mut(&mut self, request: u32) -> Option<&mut Flight> {
        self.flights.get_mut(request as usize)
    }
}
