//! A replica's counters and histograms, cumulative since its start: vLLM's and stoker's.

use stoker_autoscaler::{Counters, Histogram};
use stoker_law::StepShape;

use crate::flight::{Flight, Goals};

const TTFT: [f64; 22] = [
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
];
const ITL: [f64; 19] = [
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0,
    40.0, 80.0,
];
static LENGTH: [f64; 15] = [
    1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1e3, 2e3, 5e3, 1e4, 2e4, 5e4,
];

#[derive(Clone, Copy, Debug)]
pub struct Buckets<const N: usize> {
    bounds: &'static [f64],
    /// Values up to each bound and above the one before; the last has no bound.
    pub counts: [u64; N],
    pub sum: f64,
}

impl<const N: usize> Buckets<N> {
    fn new(bounds: &'static [f64]) -> Self {
        Buckets {
            bounds,
            counts: [0; N],
            sum: 0.0,
        }
    }

    pub fn add(&mut self, value: f64, times: u64) {
        let place = self
            .bounds
            .iter()
            .take_while(|bound| value > **bound)
            .count();
        if let Some(count) = self.counts.get_mut(place) {
            *count += times;
        }
        self.sum += value * times as f64;
    }

    pub fn count(&self) -> u64 {
        self.counts.iter().sum()
    }

    fn cumulative(&self) -> Histogram {
        let bounds = self.bounds.iter().copied().chain([f64::INFINITY]);
        let mut below = 0.0;
        let buckets = bounds.zip(&self.counts).map(|(bound, count)| {
            below += *count as f64;
            (bound, below)
        });
        Histogram {
            buckets: buckets.collect(),
            sum: self.sum,
            count: self.count() as f64,
        }
    }
}

/// Sums over steps, for least squares: `y` seconds, `s` sequences, `k` cached tokens read, `p` prompt
/// tokens.
#[derive(Clone, Copy, Debug, Default, serde::Serialize)]
pub struct Sums {
    pub n: f64,
    pub y: f64,
    pub s: f64,
    pub k: f64,
    pub p: f64,
    pub ss: f64,
    pub sk: f64,
    pub kk: f64,
    pub sp: f64,
    pub kp: f64,
    pub pp: f64,
    pub ys: f64,
    pub yk: f64,
    pub yp: f64,
    pub yy: f64,
}

impl Sums {
    fn add(&mut self, y: f64, s: f64, k: f64, p: f64) {
        self.n += 1.0;
        self.y += y;
        self.s += s;
        self.k += k;
        self.p += p;
        self.ss += s * s;
        self.sk += s * k;
        self.kk += k * k;
        self.sp += s * p;
        self.kp += k * p;
        self.pp += p * p;
        self.ys += y * s;
        self.yk += y * k;
        self.yp += y * p;
        self.yy += y * y;
    }
}

#[derive(Clone, Copy, Debug)]
pub struct Tally {
    pub received: u64,
    pub prompt_tokens_received: u64,
    pub prompt_tokens: u64,
    pub generation_tokens: u64,
    pub finished: u64,
    pub preemptions: u64,
    pub all_met: u64,
    pub all_missed: u64,
    pub ttft_met: u64,
    pub ttft_missed: u64,
    pub itl_met: u64,
    pub itl_missed: u64,
    pub timeouts: u64,
    /// That requests which ended had been here, together.
    pub served_seconds: f64,
    /// Steps without prompts, and with some.
    pub decodes: Sums,
    pub prefills: Sums,
    pub ttft: Buckets<23>,
    pub itl: Buckets<20>,
    pub prompt_length: Buckets<16>,
    pub generation_length: Buckets<16>,
}

impl Default for Tally {
    fn default() -> Self {
        Tally {
            received: 0,
            prompt_tokens_received: 0,
            prompt_tokens: 0,
            generation_tokens: 0,
            finished: 0,
            preemptions: 0,
            all_met: 0,
            all_missed: 0,
            ttft_met: 0,
            ttft_missed: 0,
            itl_met: 0,
            itl_missed: 0,
            timeouts: 0,
            served_seconds: 0.0,
            decodes: Sums::default(),
            prefills: Sums::default(),
            ttft: Buckets::new(&TTFT),
            itl: Buckets::new(&ITL),
            prompt_length: Buckets::new(&LENGTH),
            generation_length: Buckets::new(&LENGTH),
        }
    }
}

impl Tally {
    /// Of an engine for so many tokens: there are no buckets for lengths that it doesn't take.
    pub fn new(max_model_len: u32) -> Self {
        let within = LENGTH.partition_point(|bound| *bound <= f64::from(max_model_len));
        let (lengths, _) = LENGTH.split_at(within);
        Tally {
            prompt_length: Buckets::new(lengths),
            generation_length: Buckets::new(lengths),
            ..Tally::default()
        }
    }

    pub fn received(&mut self, flight: &Flight) {
        self.received += 1;
        self.prompt_tokens_received += u64::from(flight.prompt);
    }

    /// A step has ended.
    pub fn step(&mut self, shape: StepShape, seconds: f64) {
        let prompts = shape.tokens.saturating_sub(shape.sequences);
        let sums = if prompts == 0 {
            &mut self.decodes
        } else {
            &mut self.prefills
        };
        let (s, k) = (f64::from(shape.sequences), shape.kv_tokens as f64);
        sums.add(seconds, s, k, f64::from(prompts));
    }

    /// The first token has come.
    pub fn first_token(&mut self, flight: &Flight, goals: &Goals) {
        self.prompt_tokens += u64::from(flight.prompt);
        self.ttft.add(flight.ttft(), 1);
        if flight.meets_ttft(goals) {
            self.ttft_met += 1;
        } else {
            self.ttft_missed += 1;
        }
    }

    /// The last token has come.
    pub fn finished(&mut self, flight: &Flight, goals: &Goals) {
        self.finished += 1;
        self.served_seconds += flight.last_token - flight.sent;
        self.prompt_length.add(f64::from(flight.prompt), 1);
        self.generation_length.add(f64::from(flight.output), 1);
        if flight.meets_itl(goals) {
            self.itl_met += 1;
        } else {
            self.itl_missed += 1;
        }
        if flight.good(goals) {
            self.all_met += 1;
        } else {
            self.all_missed += 1;
        }
    }

    /// The client gave up before a token came.
    pub fn timed_out(&mut self) {
        self.finished += 1;
        self.timeouts += 1;
        self.ttft_missed += 1;
        self.all_missed += 1;
    }

    /// As the operator reads it.
    pub fn counters(&self) -> Counters {
        let number = |n: u64| n as f64;
        Counters {
            requests_received: number(self.received),
            prompt_tokens_received: number(self.prompt_tokens_received),
            prompt_tokens: number(self.prompt_tokens),
            generation_tokens: number(self.generation_tokens),
            requests_finished: number(self.finished),
            preemptions: number(self.preemptions),
            all_met: number(self.all_met),
            all_missed: number(self.all_missed),
            ttft_met: number(self.ttft_met),
            ttft_missed: number(self.ttft_missed),
            itl_met: number(self.itl_met),
            itl_missed: number(self.itl_missed),
            ttft: self.ttft.cumulative(),
            itl: self.itl.cumulative(),
            prompt_length: self.prompt_length.cumulative(),
            generation_length: self.generation_length.cumulative(),
        }
    }
}
