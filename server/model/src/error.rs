//! What can be wrong with a model file or with the options it is loaded with.

use std::path::PathBuf;

use stoker_kernels::{KernelError, cuda::CudaError};
use thiserror::Error;

#[derive(Debug, Error)]
pub enum LoadError {
    #[error("can't open the model file {}: {source}; check --model and that its volume is mounted", path.display())]
    Open {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("{} isn't a GGUF file: it begins with {found:?} instead of \"GGUF\"; give a file made by llama.cpp's convert_hf_to_gguf.py", path.display())]
    NotGguf { path: PathBuf, found: String },
    #[error("{} is a damaged or unreadable GGUF file: {message}; fetch it again or compare its checksum", path.display())]
    Format { path: PathBuf, message: String },
    #[error("{key} is {found:?}, which isn't supported; supported: {supported}")]
    Architecture {
        key: &'static str,
        found: String,
        supported: String,
    },
    #[error("metadata {key}: {problem}; the file can't be run as it is")]
    Metadata { key: String, problem: String },
    #[error("{} has no model: {problem}", path.display())]
    NoModel { path: PathBuf, problem: String },
    #[error("{} can't be read: {message}; fetch it again or compare its checksum", path.display())]
    File { path: PathBuf, message: String },
    #[error("{}: {key} {problem}; the model can't be run as it is", path.display())]
    Setting {
        path: PathBuf,
        key: String,
        problem: String,
    },
    #[error(
        "tensor {name} holds the value {value}, which f16 can't; take a checkpoint whose weights stay within 65504"
    )]
    Overflow { name: String, value: f32 },
    #[error("tensor {name} is missing; the file is incomplete or of another architecture")]
    MissingTensor { name: String },
    #[error("tensor {name} has shape {found:?} where {expected:?} is needed (rows, columns)")]
    TensorShape {
        name: String,
        found: Vec<usize>,
        expected: Vec<usize>,
    },
    #[error(
        "tensor {name} has type {found}, which can't be read into f16; convert the model to F16, BF16, F32, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0 or a K-quant"
    )]
    TensorType { name: String, found: String },
    #[error(
        "the file has tensors that this architecture doesn't use, and ignoring them would give wrong answers: {names}"
    )]
    UnusedTensors { names: String },
    #[error("the tokenizer can't be built: {message}")]
    Tokenizer { message: String },
    #[error(
        "the model's chat template (tokenizer.chat_template, tokenizer_config.json or chat_template.jinja) doesn't parse: {message}"
    )]
    ChatTemplate { message: String },
    #[error("--max-model-len {asked} is outside 1..={context}, the model's context length")]
    MaxModelLen { asked: u32, context: u32 },
    #[error(
        "{available} bytes for the KV cache hold {fit} tokens, fewer than one sequence of --max-model-len {max_model_len} needs ({needed} bytes); {}",
        remedy(*fit)
    )]
    KvMemory {
        available: u64,
        fit: u64,
        max_model_len: u32,
        needed: u64,
    },
    #[error("can't start {threads} worker threads: {message}; lower --threads")]
    Threads { threads: usize, message: String },
    #[error("the model can't be set up for the CPU: {0}")]
    Kernel(#[from] KernelError),
    #[error("--device cuda: {0}")]
    Cuda(#[from] CudaError),
    #[error(
        "--device cuda: the model attends within a window of {window} tokens, which isn't supported on a GPU beyond it; lower --max-model-len from {max_model_len} to {window}, or use --device cpu"
    )]
    Window { window: usize, max_model_len: u32 },
    #[error("the option --{name} is {value}, but must be {expected}")]
    Option {
        name: &'static str,
        value: String,
        expected: &'static str,
    },
}

/// What helps where the KV cache has room for `fit` tokens.
fn remedy(fit: u64) -> String {
    match fit {
        0 => "nothing is left beside the weights: give the server more memory, or a smaller model or --dtype".into(),
        _ => format!("lower --max-model-len to at most {fit} or give the server more memory"),
    }
}
