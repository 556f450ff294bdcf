//! The model on the CPU: weights as f16 panels, activations in f32, one forward pass for all rows
//! of a step.

mod executor;
mod forward;
mod memory;
mod weights;

pub use executor::CpuExecutor;
pub use forward::{Forward, ForwardError, Input};
pub use weights::Weights;
