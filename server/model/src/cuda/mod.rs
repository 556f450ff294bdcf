//! A model on an NVIDIA GPU.

mod executor;
mod forward;
mod load;
mod memory;
mod product;
mod sizes;
mod step;
mod weights;

use std::sync::Arc;

use stoker_kernels::cuda::{Gpu, GpuOptions};

use crate::error::LoadError;

/// The first GPU that the process may use.
///
/// # Errors
/// Where there is none that this build can use: says what was found and what is needed.
pub fn open() -> Result<Arc<Gpu>, LoadError> {
    Ok(Gpu::open(GpuOptions::default())?)
}

pub use executor::CudaExecutor;
pub use forward::{Forward, Tuning};
pub use sizes::Sizes;
pub use step::{Layout, Packed};
pub use weights::{Layer, Matrix, Weights};
