//! Biases of queries, keys and values, and norms of single heads (heads.cu).
#![allow(unsafe_code)]

use half::f16;

use super::{
    error::CudaError,
    launch::{Kernels, Shape},
    memory::Slice,
    stream::Stream,
};
use crate::{AttentionShape, error::check};

/// What is done to a row of queries, keys and values before rope.
#[derive(Clone, Copy, Debug)]
pub struct Heads<'a> {
    /// `[qkv_width]`.
    pub bias: Option<Slice<'a, f32>>,
    /// Weights of the norms of a query's and a key's head, `[head_size]` each.
    pub norms: Option<[Slice<'a, f32>; 2]>,
    pub epsilon: f32,
}

#[repr(C)]
struct Parameters {
    qkv: u64,
    width: i32,
    bias: u64,
    query_norm: u64,
    key_norm: u64,
    heads: i32,
    kv_heads: i32,
    size: i32,
    epsilon: f32,
}

impl Kernels {
    /// Adds the bias and norms the heads of `qkv`, `[rows, qkv_width]`.
    pub fn finish_heads(
        &self,
        stream: &Stream,
        rows: usize,
        shape: AttentionShape,
        qkv: Slice<f16>,
        heads: Heads,
    ) -> Result<(), CudaError> {
        let width = shape.qkv_width();
        let (mut query_norm, mut key_norm) = (0, 0);
        if let Some([query, key]) = heads.norms {
            query_norm = query.at_least("weights of the query norm", shape.head_size)?;
            key_norm = key.at_least("weights of the key norm", shape.head_size)?;
        }
        check("pairs of a head", shape.head_size % 2, 0)?;
        if shape.head_size > 128 {
            return Err(CudaError::HeadSize {
                found: shape.head_size,
            });
        }
        let p = Parameters {
            qkv: qkv.at_least("queries, keys and values", rows * width)?,
            width: width as i32,
            bias: match heads.bias {
                Some(bias) => bias.at_least("bias of queries, keys and values", width)?,
                None => 0,
            },
            query_norm,
            key_norm,
            heads: shape.heads as i32,
            kv_heads: shape.kv_heads as i32,
            size: shape.head_size as i32,
            epsilon: heads.epsilon,
        };
        let launch = Shape {
            grid: [rows as u32, 1, 1],
            threads: 256,
            shared: 0,
            early: true,
        };
        // SAFETY: sizes were checked above.
        unsafe { self.launch(stream, self.kernel("finish_heads")?, launch, &p) }
    }
}
