//! A language model behind the engine's [`Executor`](stoker_engine::executor::Executor): weights,
//! tokenizer and chat template out of a GGUF file or a Hugging Face folder
//! ([`checkpoint::Checkpoint`]), and the executors that run them on the CPU and on an NVIDIA GPU.
//!
//! [`LoadedModel::load`] is the way in. A server without a model file (`--device simulated`) takes
//! [`Tokenizer::simulated`] and [`ChatTemplate::chatml`] instead.

pub mod architecture;
pub mod chat;
pub mod checkpoint;
pub mod config;
pub mod cpu;
pub mod cuda;
pub mod error;
pub mod gguf;
pub mod load;
pub mod safetensors;
pub mod tensor;
pub mod tensors;
pub mod tokenizer;

pub use chat::{ChatError, ChatMessage, ChatTemplate};
pub use cpu::CpuExecutor;
pub use cuda::CudaExecutor;
pub use error::LoadError;
pub use load::{Dtype, KvMemory, LoadOptions, LoadPhase, LoadedModel, ModelInfo, Progress};
pub use tokenizer::{DecodeStream, EncodeOptions, Tokenizer, TokenizerError};
