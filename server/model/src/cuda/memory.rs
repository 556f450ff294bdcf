//! How many KV blocks the GPU's memory holds.

use stoker_kernels::cuda::{CudaError, Gpu};

use super::{Forward, Sizes, forward::blocks_of};
use crate::{
    config::ModelConfig,
    error::LoadError,
    load::{KvMemory, LoadOptions},
};

/// Blocks of the KV cache. Called while everything else has its memory: weights, and what the
/// largest step and the graphs take.
pub(super) fn blocks(
    gpu: &Gpu,
    config: &ModelConfig,
    sizes: &Sizes,
    options: &LoadOptions,
) -> Result<usize, LoadError> {
    let (free, total) = gpu.memory().map_err(LoadError::Cuda)?;
    let budget = match options.kv_memory {
        KvMemory::Bytes(bytes) if bytes > free => {
            return Err(LoadError::Cuda(CudaError::Memory {
                what: "the KV cache",
                bytes,
                free,
                total,
            }));
        }
        KvMemory::Bytes(bytes) => bytes,
        KvMemory::Utilization(share) if share > 0.0 && share <= 1.0 => {
            free.saturating_sub((total as f64 * (1.0 - share)) as u64)
        }
        KvMemory::Utilization(share) => {
            return Err(LoadError::Option {
                name: "gpu-memory-utilization",
                value: share.to_string(),
                expected: "above 0 and at most 1",
            });
        }
    };
    let block_bytes = Forward::block_bytes(config);
    let per_sequence = blocks_of(sizes.max_model_len) as u64;
    let fit = budget / block_bytes;
    if fit < per_sequence {
        return Err(LoadError::KvMemory {
            available: budget,
            fit: fit * stoker_kernels::BLOCK_SIZE as u64,
            max_model_len: sizes.max_model_len as u32,
            needed: per_sequence * block_bytes,
        });
    }
    let useful = per_sequence.saturating_mul(sizes.max_sequences as u64);
    Ok(usize::try_from(fit.min(useful)).unwrap_or(usize::MAX))
}
