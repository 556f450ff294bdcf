//! Embedding and norms (rows.cu), and random weights for benches (random.cu).
#![allow(unsafe_code)]

use half::f16;

use super::{
    error::CudaError,
    launch::{Kernels, Shape},
    memory::Slice,
    step::{StepRow, StepSample},
    stream::Stream,
    weights::Weights,
};
use crate::error::check;

/// Widest row that a norm takes: 1024 threads with eight values each.
const MOST_WIDTH: usize = 1024 * 8;

#[repr(C)]
struct EmbedParameters {
    rows: u64,
    previous: u64,
    table: u64,
    residual: u64,
    norm: u64,
    normed: u64,
    width: i32,
    vocab: i32,
    epsilon: f32,
}

#[repr(C)]
struct NormParameters {
    residual: u64,
    partials: u64,
    parts: i32,
    part_stride: u64,
    samples: u64,
    norm: u64,
    normed: u64,
    width: i32,
    epsilon: f32,
}

#[repr(C)]
struct SumParameters {
    partials: u64,
    out: u64,
    parts: i32,
    count: i32,
}

#[repr(C)]
struct FillParameters {
    to: u64,
    count: u64,
    seed: u64,
    size: f32,
}

/// Rows that are normed.
#[derive(Clone, Copy, Debug)]
pub struct NormRows<'a> {
    /// `[rows, width]`.
    pub residual: Slice<'a, f32>,
    /// Added first: `[parts, rows, width]`.
    pub sums: Slice<'a, f32>,
    pub parts: usize,
    /// Rows of the step.
    pub rows: usize,
    /// Only the rows of these samples, in their order; the residual stays as it is then.
    pub samples: Option<Slice<'a, StepSample>>,
    pub weights: Slice<'a, f32>,
    pub epsilon: f32,
    /// `[rows or samples, width]`.
    pub out: Slice<'a, f16>,
}

impl Kernels {
    /// Embeds each row's token into `residual` and norms it into `normed`. `previous` holds the
    /// token that the step before sampled for each slot.
    #[allow(clippy::too_many_arguments)]
    pub fn embed(
        &self,
        stream: &Stream,
        rows: Slice<StepRow>,
        previous: Slice<u32>,
        table: &Weights,
        residual: Slice<f32>,
        norm: Slice<f32>,
        normed: Slice<f16>,
        epsilon: f32,
    ) -> Result<(), CudaError> {
        let width = table.cols();
        let p = EmbedParameters {
            rows: rows.pointer(),
            previous: previous.pointer(),
            table: table.values().pointer(),
            residual: residual.at_least("residual", rows.len() * width)?,
            norm: norm.at_least("weights of a norm", width)?,
            normed: normed.at_least("output of a norm", rows.len() * width)?,
            width: width as i32,
            vocab: table.rows() as i32,
            epsilon,
        };
        let shape = Shape {
            grid: [rows.len() as u32, 1, 1],
            threads: 256,
            shared: 0,
            early: false,
        };
        // SAFETY: sizes were checked above; the kernel keeps ids within the vocabulary; slots are
        // the caller's to check.
        unsafe { self.launch(stream, self.kernel("embed")?, shape, &p) }
    }

    /// Adds sums to the residual and norms it.
    pub fn norm(&self, stream: &Stream, n: &NormRows) -> Result<(), CudaError> {
        let width = n.weights.len();
        if width > MOST_WIDTH || !width.is_multiple_of(4) {
            check("width of a norm (a multiple of 4)", width, MOST_WIDTH)?;
        }
        let outputs = n.samples.map_or(n.rows, Slice::len);
        let p = NormParameters {
            residual: n.residual.at_least("residual", n.rows * width)?,
            partials: n
                .sums
                .at_least("sums of a product", n.parts * n.rows * width)?,
            parts: n.parts as i32,
            part_stride: (n.rows * width) as u64,
            samples: n.samples.map_or(0, Slice::pointer),
            norm: n.weights.pointer(),
            normed: n.out.at_least("output of a norm", outputs * width)?,
            width: width as i32,
            epsilon: n.epsilon,
        };
        let shape = Shape {
            grid: [outputs as u32, 1, 1],
            threads: (width / 4).next_multiple_of(32).min(1024) as u32,
            shared: 0,
            early: true,
        };
        // SAFETY: sizes were checked above; that samples name rows of the step is the caller's.
        unsafe { self.launch(stream, self.kernel("norm_rows")?, shape, &p) }
    }

    /// Adds up the parts of a product ([`super::ManyOut::Sums`]): `count` sums, a multiple of 4, in
    /// f16 without infinities.
    pub fn sum(
        &self,
        stream: &Stream,
        sums: Slice<f32>,
        parts: usize,
        out: Slice<f16>,
        count: usize,
    ) -> Result<(), CudaError> {
        check("sums (a multiple of 4)", count % 4, 0)?;
        let p = SumParameters {
            partials: sums.at_least("sums of a product", parts * count)?,
            out: out.at_least("output of a product", count)?,
            parts: parts as i32,
            count: count as i32,
        };
        let shape = Shape {
            grid: [count.div_ceil(1024) as u32, 1, 1],
            threads: 256,
            shared: 0,
            early: true,
        };
        // SAFETY: sizes were checked above.
        unsafe { self.launch(stream, self.kernel("sum_parts")?, shape, &p) }
    }

    /// Random values in -size..size, for benches.
    pub fn fill(
        &self,
        stream: &Stream,
        to: Slice<f16>,
        seed: u64,
        size: f32,
    ) -> Result<(), CudaError> {
        let p = FillParameters {
            to: to.pointer(),
            count: to.len() as u64,
            seed: seed << 34,
            size,
        };
        let shape = Shape {
            grid: [to.len().div_ceil(1024).min(4096) as u32, 1, 1],
            threads: 256,
            shared: 0,
            early: false,
        };
        // SAFETY: the kernel writes `count` values, as many as the slice has.
        unsafe { self.launch(stream, self.kernel("fill")?, shape, &p) }
    }
}
