//! The model on the CPU.

use stoker_engine::executor::{Capacity, Executor, ExecutorError, StepBatch, StepOutput, Ticket};

use crate::{
    error::LoadError,
    gguf::GgufFile,
    load::{LoadOptions, LoadPhase, ModelInfo},
    tokenizer::Tokenizer,
};

/// Runs steps on a thread of its own.
pub struct CpuExecutor {
    capacity: Capacity,
}

impl CpuExecutor {
    pub(crate) fn load(
        _file: &GgufFile,
        _tokenizer: &Tokenizer,
        _options: &LoadOptions,
        _progress: &dyn Fn(LoadPhase, f32),
    ) -> Result<(Self, ModelInfo), LoadError> {
        Err(LoadError::Option {
            name: "device",
            value: "cpu".into(),
            expected: "another one until the CPU executor's next commit",
        })
    }
}

impl Executor for CpuExecutor {
    fn capacity(&self) -> Capacity {
        self.capacity
    }

    fn submit(&mut self, _batch: StepBatch) -> Result<Ticket, ExecutorError> {
        Err(ExecutorError::Device {
            step: 0,
            message: "not loaded".into(),
        })
    }

    fn wait(&mut self, ticket: Ticket) -> Result<StepOutput, ExecutorError> {
        Err(ExecutorError::Device {
            step: ticket.0,
            message: "not loaded".into(),
        })
    }
}
