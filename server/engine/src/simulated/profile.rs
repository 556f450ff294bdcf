//! The devices that can be imitated.

use std::ops::Range;

use stoker_law::{Law, StepShape};

/// A device with a model on it: Llama 3.2 3B in float16 on some card.
#[derive(Clone, Debug, PartialEq)]
pub struct Profile {
    pub name: &'static str,
    pub law: Law,
    /// Seconds that a step of a single token is shorter than the law says: kernels for one vector
    /// read the weights faster than those for a batch.
    pub single_token_saving: f64,
    /// Bytes of device memory.
    pub memory_bytes: u64,
    pub weight_bytes: u64,
    pub kv_bytes_per_token: u64,
    /// Share of the memory that weights and KV cache may fill.
    pub memory_utilization: f64,
    pub block_size: u32,
    pub max_model_len: u32,
    /// Ceilings of the dials.
    pub max_num_seqs: u32,
    pub max_num_batched_tokens: u32,
    /// Token ids that are generated; Llama 3's without the special ones unless changed.
    pub vocabulary: Range<u32>,
    /// Standard deviation of the logarithm of a step's time; 0 for none.
    pub noise: f64,
    pub seed: u64,
}

impl Profile {
    /// NVIDIA T4, 16 GB. Fits the published direct benchmark of 37, 69, 135.6 and 265.1 tokens a
    /// second at batch 1, 2, 4 and 8 (weights read at 238 GB/s by a single sequence, at 223 to
    /// 218 GB/s by a batch) and some 3,700 prompt tokens a second.
    pub fn t4() -> Self {
        Self {
            name: "t4",
            law: Law {
                base: 28.45e-3,
                per_kv_token: 0.36e-6,
                per_token: 0.27e-3,
                per_sequence: 0.17e-3,
                hidden: 1.0,
            },
            single_token_saving: 1.62e-3,
            memory_bytes: 16_000_000_000,
            weight_bytes: 6_400_000_000,
            kv_bytes_per_token: 114_688,
            memory_utilization: 0.9,
            block_size: 16,
            max_model_len: 8192,
            max_num_seqs: 256,
            max_num_batched_tokens: 8192,
            vocabulary: 0..128_000,
            noise: 0.0,
            seed: 0,
        }
    }

    /// NVIDIA H100, 80 GB. Fits the step times of a prototype (CUDA graphs, own kernels) at batch
    /// 1 to 64 with 200 cached tokens, plus 0.04 ms a step for the host, and the GEMM times of
    /// steps of 1 to 2,048 tokens.
    pub fn h100() -> Self {
        Self {
            name: "h100",
            law: Law {
                base: 2.37e-3,
                per_kv_token: 50e-9,
                per_token: 9.0e-6,
                per_sequence: 10e-6,
                hidden: 0.85,
            },
            single_token_saving: 0.0,
            memory_bytes: 80_000_000_000,
            max_num_seqs: 1024,
            ..Self::t4()
        }
    }

    /// The profile of that name: `t4` or `h100`.
    pub fn by_name(name: &str) -> Option<Self> {
        match name {
            "t4" => Some(Self::t4()),
            "h100" => Some(Self::h100()),
            _ => None,
        }
    }

    /// Tokens that fit the KV cache beside the weights.
    pub fn kv_capacity_tokens(&self) -> u64 {
        let usable = (self.memory_bytes as f64 * self.memory_utilization) as u64;
        usable.saturating_sub(self.weight_bytes) / self.kv_bytes_per_token.max(1)
    }

    /// Duration of a step on this device without noise, in seconds.
    pub fn step_seconds(&self, shape: StepShape) -> f64 {
        let saving = if shape.tokens == 1 {
            self.single_token_saving
        } else {
            0.0
        };
        self.law.step_seconds(shape) - saving
    }
}
