//! Which kernels a product of rows and weights runs on, by the weights' type and the number of rows.

use half::f16;
use stoker_kernels::cuda::{
    self, Bits, CudaError, FewIn, FewOut, FewTile, Gpu, Kernels, ManyOut, ManyShape, Slice, Stream,
    TiledShape,
};

use super::{Matrix, Weights};
use crate::config::ModelConfig;

/// Rows from which it is faster on Hopper to turn quantised weights into f16 first.
const DEQUANTISE_ROWS: usize = 256;

/// How a product of many rows is cut.
#[derive(Clone, Copy, Debug)]
pub(super) enum Cut {
    F16(ManyShape),
    /// After the weights were turned into f16.
    Dequantised(ManyShape),
    Tiled(TiledShape),
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
        (m, k, bits): (usize, usize, Option<Bits>),
        rows: usize,
        becomes: Becomes,
    ) -> Self {
        let parts = becomes == Becomes::Parts;
        let f16 = || kernels.many_shape(m, k, rows, parts, becomes == Becomes::F16);
        match bits {
            None => Self::F16(f16()),
            // A single sum is the head's, whose samples are never that many.
            Some(_)
                if rows > DEQUANTISE_ROWS && kernels.has_wgmma() && becomes != Becomes::Sums =>
            {
                Self::Dequantised(f16())
            }
            Some(bits) => Self::Tiled(kernels.tiled_shape((m, k), bits, rows, parts)),
        }
    }

    pub fn parts(self) -> usize {
        match self {
            Self::F16(shape) | Self::Dequantised(shape) => shape.parts,
            Self::Tiled(shape) => shape.parts,
        }
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

/// `x * w^T` of few rows, and what follows; see [`Kernels::few`]. A `tile` of `None`: the best known.
pub(super) fn few(
    kernels: &Kernels,
    stream: &Stream,
    rows: usize,
    input: FewIn,
    w: &Matrix,
    out: FewOut,
    tile: Option<FewTile>,
) -> Result<usize, CudaError> {
    match w {
        Matrix::F16(w) => kernels.few(stream, rows, input, w, out, tile),
        Matrix::Quantised(w) => kernels.few_quantised(stream, rows, input, w, out, tile),
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
    match (w, cut) {
        (Matrix::F16(w), Cut::F16(shape)) => kernels.many(stream, rows, x, w, out, shape),
        (Matrix::Quantised(w), Cut::Dequantised(shape)) => {
            let to = scratch.of(w.rows(), w.cols())?;
            kernels.dequantise(stream, w, to)?;
            kernels.many_of_new_weights(stream, rows, x, to, out, shape)
        }
        (Matrix::Quantised(w), Cut::Tiled(shape)) => {
            kernels.many_quantised(stream, rows, x, w, out, shape)
        }
        _ => Err(CudaError::Matrix {
            rows: w.rows(),
            cols: w.cols(),
        }),
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
                let cut = Cut::of(kernels, (m, k, matrix.bits()), n, Becomes::Parts);
                cut.parts() * n * m
            })
            .max()
            .unwrap_or(0)
    };
    products.into_iter().map(of).max().unwrap_or(0)
}
