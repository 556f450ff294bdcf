//! A model's weights on the GPU.

use std::sync::Arc;

use stoker_kernels::cuda::{
    self, AnyWeights, Buffer, CudaError, Format, Gpu, Kernels, Quantised, Stream,
};

use crate::config::ModelConfig;

/// A weight matrix `[rows, cols]`.
pub enum Matrix {
    F16(cuda::Weights),
    Quantised(Quantised),
}

pub struct Weights {
    pub embedding: Matrix,
    pub layers: Vec<Layer>,
    pub output_norm: Buffer<f32>,
    /// `None` where the head is the embedding.
    pub(super) output: Option<Matrix>,
    pub rope_factors: Option<Vec<f32>>,
}

pub struct Layer {
    pub attention_norm: Buffer<f32>,
    /// Query, key and value rows, one after the other.
    pub qkv: Matrix,
    /// Of all rows of `qkv`, if the architecture has it.
    pub qkv_bias: Option<Buffer<f32>>,
    /// Norms of a query's and a key's head, if the architecture has them.
    pub head_norms: Option<[Buffer<f32>; 2]>,
    pub output: Matrix,
    pub ffn_norm: Buffer<f32>,
    /// Gate and up rows, interleaved.
    pub gate_up: Matrix,
    pub down: Matrix,
}

impl<'a> From<&'a Matrix> for AnyWeights<'a> {
    fn from(matrix: &'a Matrix) -> Self {
        match matrix {
            Matrix::F16(w) => w.into(),
            Matrix::Quantised(w) => w.into(),
        }
    }
}

impl Matrix {
    /// The matrix in a format made of f16, or as it is; as it is also where it isn't made of whole units.
    pub fn new(
        kernels: &Kernels,
        stream: &Stream,
        weights: cuda::Weights,
        format: Option<Format>,
    ) -> Result<Self, CudaError> {
        match format.filter(|format| format.fits(weights.rows(), weights.cols())) {
            Some(format) => kernels
                .quantise(stream, &weights, format)
                .map(Self::Quantised),
            None => Ok(Self::F16(weights)),
        }
    }

    /// Outputs.
    pub fn rows(&self) -> usize {
        match self {
            Self::F16(w) => w.rows(),
            Self::Quantised(w) => w.rows(),
        }
    }

    /// Inputs.
    pub fn cols(&self) -> usize {
        match self {
            Self::F16(w) => w.cols(),
            Self::Quantised(w) => w.cols(),
        }
    }

    pub fn bytes(&self) -> u64 {
        match self {
            Self::F16(w) => w.bytes(),
            Self::Quantised(w) => w.bytes(),
        }
    }

    /// Of quantised weights.
    pub fn format(&self) -> Option<Format> {
        match self {
            Self::F16(_) => None,
            Self::Quantised(w) => Some(w.format()),
        }
    }

    pub fn is_quantised(&self) -> bool {
        self.format().is_some()
    }
}

impl Layer {
    pub fn matrices(&self) -> [&Matrix; 4] {
        [&self.qkv, &self.output, &self.gate_up, &self.down]
    }
}

impl Weights {
    /// Weights in the shape of a model, each matrix as `matrix` makes it of its rows and columns; for
    /// benches.
    pub fn in_shape(
        gpu: &Arc<Gpu>,
        config: &ModelConfig,
        matrix: &dyn Fn(usize, usize) -> Result<Matrix, CudaError>,
    ) -> Result<Self, CudaError> {
        let norm = || Buffer::from_slice(gpu, "weights", &vec![1.0; config.hidden]);
        let shape = config.attention;
        let layer = || {
            Ok(Layer {
                attention_norm: norm()?,
                qkv: matrix(shape.qkv_width(), config.hidden)?,
                qkv_bias: None,
                head_norms: None,
                output: matrix(config.hidden, shape.out_width())?,
                ffn_norm: norm()?,
                gate_up: matrix(2 * config.inner, config.hidden)?,
                down: matrix(config.hidden, config.inner)?,
            })
        };
        Ok(Self {
            embedding: matrix(config.vocab, config.hidden)?,
            layers: (0..config.layers)
                .map(|_| layer())
                .collect::<Result<_, CudaError>>()?,
            output_norm: norm()?,
            output: None,
            rope_factors: None,
        })
    }

    /// The language-model head, `[vocab, hidden]`.
    pub fn head(&self) -> &Matrix {
        self.output.as_ref().unwrap_or(&self.embedding)
    }

    /// Whether most weights are of 8 or 4 bits.
    pub fn is_quantised(&self) -> bool {
        let bytes = |quantised| -> u64 {
            let all = self.matrices();
            all.filter(|m| m.is_quantised() == quantised)
                .map(|m| (m.rows() * m.cols()) as u64)
                .sum()
        };
        bytes(true) > bytes(false)
    }

    /// Memory that the matrices take.
    pub fn bytes(&self) -> u64 {
        self.matrices().map(Matrix::bytes).sum()
    }

    fn matrices(&self) -> impl Iterator<Item = &Matrix> {
        self.layers
            .iter()
            .flat_map(Layer::matrices)
            .chain([&self.embedding])
            .chain(&self.output)
    }
}
