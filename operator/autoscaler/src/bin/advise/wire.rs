//! The protocol's messages. Fields that aren't needed aren't read.

use serde::{Deserialize, Serialize};

/// Seconds, tokens; counters are cumulative since the start.
#[derive(Clone, Debug, Deserialize)]
pub struct Observation {
    pub t: f64,
    /// In force.
    pub max_num_seqs: u32,
    pub max_num_batched_tokens: u32,
    pub desired: u32,
    pub min_replicas: u32,
    pub max_replicas: u32,
    /// Of a replica.
    #[serde(default)]
    pub kv_capacity_tokens: u64,
    /// Expected start of a replica on a warm node.
    pub start_s: Option<f64>,
    pub goals: Goals,
    pub replicas: Vec<Replica>,
}

#[derive(Clone, Copy, Debug, Deserialize)]
pub struct Goals {
    pub ttft_s: f64,
    #[serde(default)]
    pub ttft_free_tokens: f64,
    #[serde(default)]
    pub ttft_s_per_token: f64,
    pub itl_s: f64,
}

#[derive(Clone, Debug, Deserialize)]
pub struct Replica {
    /// A number or a name.
    pub id: serde_json::Value,
    pub state: State,
    pub age_s: f64,
    #[serde(default)]
    pub running: u32,
    #[serde(default)]
    pub waiting: u32,
    #[serde(default)]
    pub kv_tokens: u64,
    #[serde(flatten)]
    pub counters: Counters,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    Starting,
    Ready,
    Draining,
}

/// Histograms are counts a bucket, the last one without an upper bound.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Counters {
    pub prompt_tokens: f64,
    pub generation_tokens: f64,
    pub arrived: f64,
    pub arrived_prompt_tokens: f64,
    pub finished: f64,
    pub preemptions: f64,
    pub timeouts: f64,
    pub ttft_over_goal: f64,
    pub itl_over_goal: f64,
    pub ttft_hist: Vec<f64>,
    pub itl_hist: Vec<f64>,
    pub prompt_hist: Vec<f64>,
    pub gen_hist: Vec<f64>,
    pub reg_decode: Sums,
    pub reg_prefill: Sums,
}

/// Sums over steps, for least squares: `y` seconds, `s` sequences, `k` cached tokens read, `p` prompt
/// tokens.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Sums {
    pub n: f64,
    pub y: f64,
    pub s: f64,
    pub k: f64,
    pub p: f64,
    pub ss: f64,
    pub sk: f64,
    pub kk: f64,
    pub pp: f64,
    pub ys: f64,
    pub yk: f64,
    pub yp: f64,
}

impl Sums {
    fn with(self, other: Self, of: impl Fn(f64, f64) -> f64) -> Self {
        Sums {
            n: of(self.n, other.n),
            y: of(self.y, other.y),
            s: of(self.s, other.s),
            k: of(self.k, other.k),
            p: of(self.p, other.p),
            ss: of(self.ss, other.ss),
            sk: of(self.sk, other.sk),
            kk: of(self.kk, other.kk),
            pp: of(self.pp, other.pp),
            ys: of(self.ys, other.ys),
            yk: of(self.yk, other.yk),
            yp: of(self.yp, other.yp),
        }
    }

    pub fn plus(self, other: Self) -> Self {
        self.with(other, |a, b| a + b)
    }

    pub fn less(self, other: Self) -> Self {
        self.with(other, |a, b| a - b)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Advice {
    pub replicas: u32,
    pub max_num_seqs: u32,
    pub max_num_batched_tokens: u32,
}
