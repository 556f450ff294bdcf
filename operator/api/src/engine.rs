//! How a replica's engine runs.

use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// How the engine runs, and how far its dials may move.
#[derive(KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("self.device != 'simulated' || has(self.simulatedProfile)")
        .message("engine.device simulated needs engine.simulatedProfile: set it to t4 or h100")
        .field_path(".device"),
    validation = Rule::new("self.device == 'simulated' || !has(self.simulatedProfile)")
        .message("engine.simulatedProfile is only read with engine.device simulated: remove it, or set engine.device: simulated")
        .field_path(".device"),
    validation = Rule::new("self.maxNumBatchedTokens.min >= self.maxNumSeqs.min && self.maxNumBatchedTokens.initial >= self.maxNumSeqs.initial && self.maxNumBatchedTokens.max >= self.maxNumSeqs.max")
        .message("a step computes at least one token of every running sequence: raise min, initial and max of engine.maxNumBatchedTokens to at least those of engine.maxNumSeqs")
        .field_path(".maxNumBatchedTokens"),
    validation = Rule::new("!has(self.extraArgs) || self.extraArgs.all(a, !a.matches('^--(model|served-model-name|host|port|control-port|control-key|max-model-len|max-num-seqs|max-num-batched-tokens|gpu-memory-utilization|device|dtype|simulated-profile|pod-uid|objectives|hub-endpoint|model-cache|prepare-model-cache)(=.*)?$'))")
        .message("engine.extraArgs must not set a flag that Stoker sets itself (--model, --served-model-name, --host, --port, --control-port, --control-key, --max-model-len, --max-num-seqs, --max-num-batched-tokens, --gpu-memory-utilization, --device, --dtype, --simulated-profile, --pod-uid, --objectives, --hub-endpoint, --model-cache, --prepare-model-cache): use the fields of the spec")
        .field_path(".extraArgs"),
)]
pub struct Engine {
    /// What computes: `cuda` (an NVIDIA GPU), `cpu`, or `simulated` (steps last as long as on the GPU of simulatedProfile, and tokens are made up). There is no silent fall back from one to another.
    pub device: Device,

    /// GPU whose step times device simulated keeps: `t4` or `h100`, each with a 3B model.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub simulated_profile: Option<SimulatedProfile>,

    /// Longest sequence in tokens, prompt and answer together; without it the model's own limit.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 16, max = 1_048_576))]
    pub max_model_len: Option<i32>,

    /// Share of the device's memory that weights and KV cache may take.
    #[serde(default = "memory_utilization")]
    #[schemars(range(min = 0.1, max = 0.98))]
    pub memory_utilization: f64,

    /// The cap: sequences that one replica runs at once.
    #[serde(default)]
    pub max_num_seqs: MaxNumSeqs,

    /// The budget: tokens that one step may compute, and so how much prompt work may delay running sequences.
    #[serde(default)]
    pub max_num_batched_tokens: MaxNumBatchedTokens,

    /// Further flags of stoker-server, one an item, such as `--max-waiting=64`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(
        length(max = 32),
        inner(
            length(min = 1, max = 256),
            regex(pattern = "^--[a-z][a-z0-9-]*(=.*)?$")
        )
    )]
    pub extra_args: Vec<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Device {
    Cpu,
    Cuda,
    Simulated,
}

impl Device {
    /// As `--device` of the server spells it.
    pub fn as_str(self) -> &'static str {
        match self {
            Device::Cpu => "cpu",
            Device::Cuda => "cuda",
            Device::Simulated => "simulated",
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum SimulatedProfile {
    T4,
    H100,
}

impl SimulatedProfile {
    /// As `--simulated-profile` of the server spells it.
    pub fn as_str(self) -> &'static str {
        match self {
            SimulatedProfile::T4 => "t4",
            SimulatedProfile::H100 => "h100",
        }
    }
}

/// The cap: sequences that one replica runs at once.
#[derive(KubeSchema, Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("self.min <= self.initial && self.initial <= self.max")
        .message("engine.maxNumSeqs needs min <= initial <= max (defaults: min 1, initial 8, max 256): a changed bound may ask for another initial"),
)]
pub struct MaxNumSeqs {
    /// Never fewer than this.
    #[serde(default = "MaxNumSeqs::default_min")]
    #[schemars(range(min = 1, max = 4096))]
    pub min: i32,

    /// Never more than this; what fits into the KV cache is known to the engine.
    #[serde(default = "MaxNumSeqs::default_max")]
    #[schemars(range(min = 1, max = 4096))]
    pub max: i32,

    /// What a replica starts with, until enough is known about its speed.
    #[serde(default = "MaxNumSeqs::default_initial")]
    #[schemars(range(min = 1, max = 4096))]
    pub initial: i32,
}

/// The budget: tokens that one step may compute.
#[derive(KubeSchema, Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("self.min <= self.initial && self.initial <= self.max")
        .message("engine.maxNumBatchedTokens needs min <= initial <= max (defaults: min 64, initial 512, max 8192): a changed bound may ask for another initial"),
)]
pub struct MaxNumBatchedTokens {
    /// Never fewer than this.
    #[serde(default = "MaxNumBatchedTokens::default_min")]
    #[schemars(range(min = 1, max = 131_072))]
    pub min: i32,

    /// Never more than this.
    #[serde(default = "MaxNumBatchedTokens::default_max")]
    #[schemars(range(min = 1, max = 131_072))]
    pub max: i32,

    /// What a replica starts with, until enough is known about its speed.
    #[serde(default = "MaxNumBatchedTokens::default_initial")]
    #[schemars(range(min = 1, max = 131_072))]
    pub initial: i32,
}

fn memory_utilization() -> f64 {
    0.9
}

impl MaxNumSeqs {
    fn default_min() -> i32 {
        1
    }
    fn default_max() -> i32 {
        256
    }
    fn default_initial() -> i32 {
        8
    }
}

impl Default for MaxNumSeqs {
    fn default() -> Self {
        MaxNumSeqs {
            min: Self::default_min(),
            max: Self::default_max(),
            initial: Self::default_initial(),
        }
    }
}

impl MaxNumBatchedTokens {
    fn default_min() -> i32 {
        64
    }
    fn default_max() -> i32 {
        8192
    }
    fn default_initial() -> i32 {
        512
    }
}

impl Default for MaxNumBatchedTokens {
    fn default() -> Self {
        MaxNumBatchedTokens {
            min: Self::default_min(),
            max: Self::default_max(),
            initial: Self::default_initial(),
        }
    }
}
