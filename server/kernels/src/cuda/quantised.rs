//! Weights of 8 or 4 bits (quantised.cuh), made from f16 on the GPU (quantise.cu).
#![allow(unsafe_code)]

use half::f16;

use super::{
    error::CudaError,
    format::{EIGHT, Format, Order},
    launch::{Kernels, Shape},
    memory::{Buffer, Slice},
    step::StepRow,
    stream::Stream,
    weights::Weights,
};
use crate::error::check;

/// Formats that f16 weights are turned into.
const MADE: [Format; 2] = [Format::INT8, Format::INT4];

/// A matrix `[rows, cols]` of 8 or 4 bits a value, packed in units: `[cols / unit][rows / 8]` (see
/// [`Format::unit`]).
#[derive(Debug)]
pub struct Quantised {
    format: Format,
    order: Order,
    values: Buffer<u8>,
    rows: usize,
    cols: usize,
}

pub(crate) fn quantise_kernels() -> Vec<(String, u32)> {
    let made = MADE.map(|format| format!("quantise{}", format.name()));
    let read = ["dequantise", "embed"]
        .into_iter()
        .flat_map(|name| Format::ALL.map(|format| format!("{name}{}", format.name())));
    made.into_iter().chain(read).map(|name| (name, 0)).collect()
}

#[repr(C)]
struct QuantiseParameters {
    w: u64,
    q: u64,
    m: i32,
    k: i32,
    order: Order,
}

#[repr(C)]
struct DequantiseParameters {
    q: u64,
    w: u64,
    m: i32,
    k: i32,
    order: Order,
}

#[repr(C)]
struct EmbedParameters {
    rows: u64,
    previous: u64,
    q: u64,
    residual: u64,
    norm: u64,
    normed: u64,
    width: i32,
    vocab: i32,
    order: Order,
    epsilon: f32,
}

impl Quantised {
    /// Zeros, in the order of this GPU's kernels.
    pub fn zeroed(
        kernels: &Kernels,
        format: Format,
        rows: usize,
        cols: usize,
    ) -> Result<Self, CudaError> {
        if !format.fits(rows, cols) {
            return Err(CudaError::Matrix { rows, cols });
        }
        let bytes = rows / EIGHT * (cols / format.unit()) * format.unit_bytes();
        Ok(Self {
            format,
            order: match kernels.has_wgmma() {
                true => Order::Fragments,
                false => Order::Runs,
            },
            values: Buffer::zeroed(kernels.gpu(), "weights", bytes)?,
            rows,
            cols,
        })
    }

    /// Outputs.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Inputs.
    pub fn cols(&self) -> usize {
        self.cols
    }

    pub fn format(&self) -> Format {
        self.format
    }

    pub fn bytes(&self) -> u64 {
        self.values.bytes()
    }

    pub fn order(&self) -> Order {
        self.order
    }

    /// As the kernels pack them, with their scales.
    pub fn values(&self) -> Slice<'_, u8> {
        self.values.all()
    }
}

impl Kernels {
    /// The matrix as [`Format::INT8`] or [`Format::INT4`]: the value nearest to each, by the scale of its
    /// group.
    pub fn quantise(
        &self,
        stream: &Stream,
        w: &Weights,
        format: Format,
    ) -> Result<Quantised, CudaError> {
        let quantised = Quantised::zeroed(self, format, w.rows(), w.cols())?;
        let p = QuantiseParameters {
            w: w.values().pointer(),
            q: quantised.values.all().pointer(),
            m: w.rows() as i32,
            k: w.cols() as i32,
            order: quantised.order,
        };
        let warps = w.rows() * (w.cols() / format.group());
        let shape = Shape {
            grid: [warps.div_ceil(8) as u32, 1, 1],
            threads: 256,
            shared: 0,
            early: false,
        };
        let kernel = self.kernel(&format!("quantise{}", format.name()))?;
        // SAFETY: both matrices have the same rows and columns, whole groups.
        unsafe { self.launch(stream, kernel, shape, &p) }?;
        Ok(quantised)
    }

    /// Writes the values times their scales to a matrix of the same size.
    pub fn dequantise(
        &self,
        stream: &Stream,
        w: &Quantised,
        to: &Weights,
    ) -> Result<(), CudaError> {
        check("rows of a matrix", to.rows(), w.rows)?;
        check("columns of a matrix", to.cols(), w.cols)?;
        let p = DequantiseParameters {
            q: w.values.all().pointer(),
            w: to.values().pointer(),
            m: w.rows as i32,
            k: w.cols as i32,
            order: w.order,
        };
        let pieces = w.rows * w.cols / 8;
        let shape = Shape {
            grid: [
                pieces
                    .div_ceil(256)
                    .min(8 * self.gpu().processors() as usize) as u32,
                1,
                1,
            ],
            threads: 256,
            shared: 0,
            early: true,
        };
        let kernel = self.kernel(&format!("dequantise{}", w.format.name()))?;
        // SAFETY: both matrices have the same rows and columns.
        unsafe { self.launch(stream, kernel, shape, &p) }
    }

    /// [`Kernels::embed`] from a quantised table.
    #[allow(clippy::too_many_arguments)]
    pub fn embed_quantised(
        &self,
        stream: &Stream,
        rows: Slice<StepRow>,
        previous: Slice<u32>,
        table: &Quantised,
        residual: Slice<f32>,
        norm: Slice<f32>,
        normed: Slice<f16>,
        epsilon: f32,
    ) -> Result<(), CudaError> {
        let width = table.cols;
        let p = EmbedParameters {
            rows: rows.pointer(),
            previous: previous.pointer(),
            q: table.values.all().pointer(),
            residual: residual.at_least("residual", rows.len() * width)?,
            norm: norm.at_least("weights of a norm", width)?,
            normed: normed.at_least("output of a norm", rows.len() * width)?,
            width: width as i32,
            vocab: table.rows as i32,
            order: table.order,
            epsilon,
        };
        let shape = Shape {
            grid: [rows.len() as u32, 1, 1],
            threads: 256,
            shared: 0,
            early: false,
        };
        let kernel = self.kernel(&format!("embed{}", table.format.name()))?;
        // SAFETY: as in `embed`.
        unsafe { self.launch(stream, kernel, shape, &p) }
    }
}
