//! The fused blocks that a transformer is made of, on the CPU; [`cuda`] has them on a GPU.
//!
//! A layer is five calls: [`norm_qkv`] (with [`add_bias`] and [`norm_heads`] after it where an
//! architecture asks for them), [`rope_attention`], [`output_residual`], [`norm_gate_up`],
//! [`down_residual`]; a step ends with [`norm_head_sample`]. All rows of a step (tokens of
//! different sequences, decodes and prompt chunks mixed) go through each block together.
//!
//! - Weights are f16 in panels of 16 rows ([`Matrix`]); the KV cache is f16 in blocks of
//!   [`BLOCK_SIZE`] tokens ([`KvCache`]) whose parts are such panels too, so that one small
//!   matrix kernel ([`mod@tile`]) does the work of every block. Activations are f32, row-major.
//! - A row's result doesn't depend on the rows beside it, on how a prompt was cut into chunks, on
//!   the number of threads, or (AVX2 and AVX-512) on the instruction set: every output element is
//!   one chain of fused multiply-adds in the order of the inner dimension. So a sequence's greedy
//!   tokens are the same alone and in any batch.
//! - Work is spread over the rayon pool that the caller runs in.
//! - [`reference`] has the same blocks in plain loops; tests compare against it.

pub mod cuda;
pub mod reference;

#[cfg(test)]
mod testing;

mod attention;
mod buffer;
mod error;
mod feed_forward;
mod gemm;
mod head;
mod kv;
mod matrix;
mod norm;
mod parallel;
mod qkv_options;
mod rope;
mod sampling;
mod tile;
mod vector;

pub use attention::{AttentionShape, Sequence, rope_attention};
pub use error::KernelError;
pub use feed_forward::{down_residual, norm_gate_up};
pub use gemm::{norm_qkv, output_residual};
pub use head::{Pick, norm_head, norm_head_sample};
pub use kv::{BLOCK_SIZE, KvCache};
pub use matrix::Matrix;
pub use norm::Norm;
pub use qkv_options::{add_bias, norm_heads};
pub use rope::Rope;
pub use sampling::{SamplingParams, sample};

/// The instruction set that the kernels use on this machine.
pub fn instruction_set() -> &'static str {
    tile::Isa::detect().name()
}
