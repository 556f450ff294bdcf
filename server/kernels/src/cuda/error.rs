use cudarc::driver::result::DriverError;
use thiserror::Error;

use crate::error::KernelError;

#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum CudaError {
    #[error(
        "this build has no CUDA kernels: NVRTC wasn't there when it was made; run `make kernels` and build again, or use --device cpu"
    )]
    NoKernels,
    #[error(
        "no NVIDIA driver is here: libcuda.so.1 can't be opened; run on a node with a GPU (in a container with nvidia's runtime), or use --device cpu"
    )]
    NoDriver,
    #[error(
        "the NVIDIA driver supports CUDA {found}, and {needed} is needed (driver R525 or newer)"
    )]
    OldDriver { found: String, needed: String },
    #[error("the NVIDIA driver is here but has no GPU for this process; ask for nvidia.com/gpu: 1")]
    NoDevice,
    #[error(
        "{device} has compute capability {found}; this build's kernels are for {built} and newer"
    )]
    Architecture {
        device: String,
        found: String,
        built: String,
    },
    #[error(
        "the GPU's memory is used up: {bytes} bytes for {what} can't be had, {free} of {total} are free"
    )]
    Memory {
        what: &'static str,
        bytes: u64,
        free: u64,
        total: u64,
    },
    #[error("the kernels for {file} can't be unpacked: {message}; the program file is damaged")]
    Image { file: &'static str, message: String },
    #[error("{what} failed: {error}")]
    Driver { what: &'static str, error: String },
    #[error("{found} query heads share a KV head, and {most} is the most that is supported")]
    Group { found: usize, most: usize },
    #[error("head size {found} isn't supported on a GPU: it must be 64, 96 or 128")]
    HeadSize { found: usize },
    #[error(
        "a matrix of {rows} x {cols} isn't supported on a GPU: it needs at least 16 rows, and columns in multiples of 64"
    )]
    Matrix { rows: usize, cols: usize },
    #[error(transparent)]
    Kernel(#[from] KernelError),
}

impl CudaError {
    /// Whether another GPU or driver would have helped, and not another model.
    pub fn is_of_device(&self) -> bool {
        !matches!(
            self,
            Self::Group { .. } | Self::HeadSize { .. } | Self::Matrix { .. } | Self::Kernel(_)
        )
    }
}

/// Names the call that failed.
pub(crate) trait Context<T> {
    fn context(self, what: &'static str) -> Result<T, CudaError>;
}

impl<T> Context<T> for Result<T, DriverError> {
    fn context(self, what: &'static str) -> Result<T, CudaError> {
        self.map_err(|error| {
            let name = error.error_name().map(|n| n.to_string_lossy().into_owned());
            let text = error
                .error_string()
                .map(|n| n.to_string_lossy().into_owned());
            CudaError::Driver {
                what,
                error: match (name, text) {
                    (Ok(name), Ok(text)) => format!("{name} ({text})"),
                    _ => format!("{:?}", error.0),
                },
            }
        })
    }
}
