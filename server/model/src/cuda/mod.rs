//! A model on an NVIDIA GPU.

mod executor;
mod forward;
mod ggml;
mod load;
mod memory;
mod product;
mod profile;
mod sizes;
mod staging;
mod step;
mod weights;

pub use executor::{CudaExecutor, DeviceMemory, open};
pub use forward::{Forward, Tuning};
pub use profile::{Breakdown, GpuProfiler, KernelClass, copy_rate};
pub use sizes::Sizes;
pub use step::{Layout, Packed};
pub use weights::{Layer, Matrix, Weights};
