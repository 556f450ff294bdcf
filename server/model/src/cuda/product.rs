//! Which kernels a product of rows and weights runs on, by the weights' type and the number of rows.

use half::f16;
use stoker_kernels::cuda::{
    self, CudaError, Format, Gpu, Kernels, ManyOut, ManyShape, Slice, Stream,
};

use super::{Matrix, Weights};
use crate::config::ModelConfig;

/// Rows from which it is faster on Hopper to turn quantised weights into f16 first.
const DEQUANTISE_ROWS: usize = 256;

/// How a product of many rows is made.
#[derive(Clone, Copy, Debug)]
pub(super) struct Cut {
    shape: ManyShape,
    /// The weights are turned into f16 first.
    dequantised: bool,
}

/// What a product of many rows becomes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Becomes {
    /// [`ManyOut::Sums`] in any number of parts.
    Parts,
    /// [`ManyOut::Sums`] in one part.
    Sums,
    F16,
    GateUp,
}

impl Cut {
    pub fn of(
        kernels: &Kernels,
        (m, k, format): (usize, usize, Option<Format>),
        rows: usize,
        becomes: Becomes,
    ) -> Self {
        let parts = becomes == Becomes::Parts;
        let large = rows > DEQUANTISE_ROWS && kernels.has_wgmma();
        // A single sum is the head's, whose samples are never that many.
        let dequantised = format.is_some() && large && becomes != Becomes::Sums;
        let shape = match format {
            Some(format) if !dequantised => {
                kernels.many_shape_quantised((m, k), format, rows, parts)
            }
            _ => kernels.many_shape(m, k, rows, parts, becomes == Becomes::F16),
        };
        Self { shape, dequantised }
    }

    pub fn parts(self) -> usize {
        self.shape.parts
    }
}

/// Room for a layer's matrices in f16: those that large steps dequantise.
pub(super) struct Scratch {
    matrices: Vec<cuda::Weights>,
}

impl Scratch {
    pub fn new(
        gpu: &std::sync::Arc<Gpu>,
        kernels: &Kernels,
        weights: &Weights,
        most_rows: usize,
    ) -> Result<Self, CudaError> {
        let mut sizes: Vec<(usize, usize)> = Vec::new();
        if kernels.has_wgmma() && most_rows > DEQUANTISE_ROWS {
            let layers = weights.layers.iter().flat_map(|layer| layer.matrices());
            sizes.extend(
                layers
                    .filter(|matrix| matrix.is_quantised())
                    .map(|matrix| (matrix.rows(), matrix.cols())),
            );
            sizes.sort_unstable();
            sizes.dedup();
        }
        let zeroed = |(rows, cols)| cuda::Weights::zeroed(gpu, rows, cols);
        Ok(Self {
            matrices: sizes.into_iter().map(zeroed).collect::<Result<_, _>>()?,
        })
    }

    fn of(&self, rows: usize, cols: usize) -> Result<&cuda::Weights, CudaError> {
        self.matrices
            .iter()
            .find(|matrix| matrix.rows() == rows && matrix.cols() == cols)
            .ok_or(CudaError::Matrix { rows, cols })
    }
}

/// `x * w^T` of many rows, and what follows; see [`Kernels::many`].
pub(super) fn many(
    kernels: &Kernels,
    stream: &Stream,
    scratch: &Scratch,
    (rows, x): (usize, Slice<f16>),
    w: &Matrix,
    out: ManyOut,
    cut: Cut,
) -> Result<(), CudaError> {
    match w {
        Matrix::F16(w) => kernels.many(stream, rows, x, w, out, cut.shape),
        Matrix::Quantised(w) if cut.dequantised => {
            let to = scratch.of(w.rows(), w.cols())?;
            kernels.dequantise(stream, w, to)?;
            kernels.many_of_new_weights(stream, rows, x, to, out, cut.shape)
        }
        Matrix::Quantised(w) => kernels.many_quantised(stream, rows, x, w, out, cut.shape),
    }
}

/// Sums that a layer's products leave in a step of up to `rows` rows, at most; from `halves_rows` on
/// queries, keys and values are written in f16.
pub(super) fn most_sums(
    kernels: &Kernels,
    config: &ModelConfig,
    weights: &Weights,
    rows: usize,
    halves_rows: usize,
) -> usize {
    let shape = config.attention;
    let Some(layer) = weights.layers.first() else {
        return 0;
    };
    let products = [
        (shape.qkv_width(), config.hidden, &layer.qkv, halves_rows),
        (config.hidden, shape.out_width(), &layer.output, rows),
        (config.hidden, config.inner, &layer.down, rows),
    ];
    let of = |(m, k, matrix, most): (usize, usize, &Matrix, usize)| {
        (1..=most.min(rows))
            .map(|n| {
                let cut = Cut::of(kernels, (m, k, matrix.format()), n, Becomes::Parts);
                cut.parts() * n * m
            })
            .max()
            .unwrap_or(0)
    };
    products.into_iter().map(of).max().unwrap_or(0)
}
