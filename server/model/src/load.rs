//! From a path to a model that is ready to run.

use std::{fmt, path::Path, sync::Arc};

use crate::{
    chat::ChatTemplate, checkpoint::Checkpoint, cpu::CpuExecutor, cuda::CudaExecutor,
    error::LoadError, tokenizer::Tokenizer,
};

/// How much memory the KV cache gets.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum KvMemory {
    Bytes(u64),
    /// This share, in (0, 1], of the memory that the process may use (its cgroup's limit, or what
    /// the machine has available), less the weights.
    Utilization(f64),
}

/// What weights are kept as.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Dtype {
    /// On a GPU as a GGUF file has them (Q8_0, Q4_0, Q4_1, Q4_K, Q6_K); else f16.
    #[default]
    Auto,
    Float16,
    /// 8 bits, with a scale for every 128 weights of a row.
    Int8,
    /// 4 bits, likewise.
    Int4,
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::Float16 => "float16",
            Self::Int8 => "int8",
            Self::Int4 => "int4",
        })
    }
}

#[derive(Clone, Debug)]
pub struct LoadOptions {
    pub dtype: Dtype,
    /// `None`: the model's own context length.
    pub max_model_len: Option<u32>,
    pub kv_memory: KvMemory,
    /// Threads that compute; `None`: as many as the process may use (cgroup limits respected).
    pub threads: Option<usize>,
    /// Ceiling of the dial `max_num_seqs`.
    pub max_num_seqs: u32,
    /// Ceiling of the dial `max_num_batched_tokens`.
    pub max_num_batched_tokens: u32,
}

impl Default for LoadOptions {
    fn default() -> Self {
        Self {
            dtype: Dtype::Auto,
            max_model_len: None,
            kv_memory: KvMemory::Utilization(0.9),
            threads: None,
            max_num_seqs: 128,
            // A CPU computes some hundred prompt tokens a second: more in one step would stall
            // every running sequence for many seconds.
            max_num_batched_tokens: 1024,
        }
    }
}

impl LoadOptions {
    /// Tokens of a sequence at most, for a model of this context length; errors where that or a
    /// ceiling of the dials can't be.
    pub(crate) fn checked_len(&self, context_length: u32) -> Result<u32, LoadError> {
        let asked = self.max_model_len.unwrap_or(context_length);
        if asked == 0 || asked > context_length {
            return Err(LoadError::MaxModelLen {
                asked,
                context: context_length,
            });
        }
        for (name, value) in [
            ("max-num-seqs", self.max_num_seqs),
            ("max-num-batched-tokens", self.max_num_batched_tokens),
        ] {
            if value == 0 {
                return Err(LoadError::Option {
                    name,
                    value: value.to_string(),
                    expected: "at least 1",
                });
            }
        }
        Ok(asked)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LoadPhase {
    /// Reading the files' headers.
    Header,
    Tokenizer,
    Weights,
    KvCache,
}

impl fmt::Display for LoadPhase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Header => "header",
            Self::Tokenizer => "tokenizer",
            Self::Weights => "weights",
            Self::KvCache => "kv cache",
        })
    }
}

/// How far loading has come; `percent` of the whole never goes back and ends at 100.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Progress {
    pub phase: LoadPhase,
    pub percent: f32,
}

/// What the file says about the model, and what it takes in memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModelInfo {
    /// `general.name`, where the file has one.
    pub name: Option<String>,
    pub architecture: String,
    pub parameters: u64,
    pub context_length: u32,
    pub vocab_size: u32,
    pub weight_bytes: u64,
    pub kv_bytes_per_token: u64,
    pub threads: usize,
}

pub struct LoadedModel<E = CpuExecutor> {
    pub executor: E,
    pub tokenizer: Arc<Tokenizer>,
    pub chat_template: Arc<ChatTemplate>,
    pub info: ModelInfo,
}

impl LoadedModel {
    /// Reads a GGUF file or the folder of a Hugging Face checkpoint, turns its weights into f16 and sets up the KV cache. Takes seconds;
    /// call it on a thread of its own. `progress` is called on the calling thread.
    pub fn load(
        path: &Path,
        options: &LoadOptions,
        progress: &dyn Fn(Progress),
    ) -> Result<Self, LoadError> {
        Self::load_with(path, options, progress, CpuExecutor::load)
    }
}

impl LoadedModel<CudaExecutor> {
    /// The same onto the first GPU that the process may use.
    pub fn load_cuda(
        path: &Path,
        options: &LoadOptions,
        progress: &dyn Fn(Progress),
    ) -> Result<Self, LoadError> {
        Self::load_with(path, options, progress, CudaExecutor::load)
    }
}

/// Sets up an executor: checkpoint, tokenizer, options, progress (phase and share of the whole).
type LoadExecutor<E> = fn(
    &Checkpoint,
    &Tokenizer,
    &LoadOptions,
    &dyn Fn(LoadPhase, f32),
) -> Result<(E, ModelInfo), LoadError>;

impl<E> LoadedModel<E> {
    fn load_with(
        path: &Path,
        options: &LoadOptions,
        progress: &dyn Fn(Progress),
        load_executor: LoadExecutor<E>,
    ) -> Result<Self, LoadError> {
        let report = |phase, percent| progress(Progress { phase, percent });
        report(LoadPhase::Header, 0.0);
        let checkpoint = Checkpoint::open(path)?;
        report(LoadPhase::Tokenizer, 1.0);
        let tokenizer = Arc::new(checkpoint.tokenizer()?);
        let chat_template = Arc::new(checkpoint.chat_template(&tokenizer)?);
        let (executor, info) = load_executor(&checkpoint, &tokenizer, options, &|phase, share| {
            report(phase, 3.0 + 97.0 * share);
        })?;
        report(LoadPhase::KvCache, 100.0);
        Ok(Self {
            executor,
            tokenizer,
            chat_template,
            info,
        })
    }
}
