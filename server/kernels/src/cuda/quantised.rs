//! Weights of 8 or 4 bits (quantised.cuh), made from f16 on the GPU (quantise.cu).
#![allow(unsafe_code)]

use std::sync::Arc;

use half::f16;

use super::{
    driver::Gpu,
    error::CudaError,
    launch::{Kernels, Shape},
    memory::{Buffer, Slice},
    step::StepRow,
    stream::Stream,
    weights::Weights,
};
use crate::error::check;

/// Values that share a scale.
pub const GROUP: usize = 128;

/// Bits of a weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bits {
    Eight,
    Four,
}

/// Which columns stand together, by the kernels that unpack them.
#[repr(i32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    Runs,
    /// Of Hopper's kernels.
    Fragments,
}

/// A matrix `[rows, cols]` of 8 or 4 bits a value, with an f16 scale for every [`GROUP`] values of a
/// row.
#[derive(Debug)]
pub struct Quantised {
    bits: Bits,
    order: Order,
    values: Buffer<u8>,
    rows: usize,
    cols: usize,
}

pub(crate) fn quantise_kernels() -> Vec<(String, u32)> {
    ["quantise", "dequantise", "embed"]
        .iter()
        .flat_map(|name| [8, 4].map(|bits| (format!("{name}{bits}"), 0)))
        .collect()
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

impl Bits {
    pub(super) fn count(self) -> usize {
        match self {
            Self::Eight => 8,
            Self::Four => 4,
        }
    }

    /// Columns of a unit: what eight rows have together (quantised.cuh).
    pub(super) fn unit(self) -> usize {
        GROUP
    }

    /// Bytes of a unit, with its scales.
    pub(super) fn unit_bytes(self) -> usize {
        let unit = self.unit();
        unit * self.count() + unit / GROUP * 8 * size_of::<f16>()
    }
}

impl Quantised {
    /// Whether a matrix is made of whole groups, of whole sixteens of rows.
    pub fn fits(rows: usize, cols: usize) -> bool {
        cols.is_multiple_of(GROUP) && rows.is_multiple_of(16)
    }

    fn zeroed(
        gpu: &Arc<Gpu>,
        (bits, order): (Bits, Order),
        rows: usize,
        cols: usize,
    ) -> Result<Self, CudaError> {
        if !Self::fits(rows, cols) {
            return Err(CudaError::Matrix { rows, cols });
        }
        Ok(Self {
            bits,
            order,
            values: Buffer::zeroed(
                gpu,
                "weights",
                rows / 8 * (cols / bits.unit()) * bits.unit_bytes(),
            )?,
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

    pub fn bits(&self) -> Bits {
        self.bits
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
    /// The matrix in 8 or 4 bits: the value nearest to each, by the scale of its group.
    pub fn quantise(
        &self,
        stream: &Stream,
        w: &Weights,
        bits: Bits,
    ) -> Result<Quantised, CudaError> {
        let order = match self.has_wgmma() {
            true => Order::Fragments,
            false => Order::Runs,
        };
        let quantised = Quantised::zeroed(self.gpu(), (bits, order), w.rows(), w.cols())?;
        let p = QuantiseParameters {
            w: w.values().pointer(),
            q: quantised.values.all().pointer(),
            m: w.rows() as i32,
            k: w.cols() as i32,
            order,
        };
        let warps = w.rows() * (w.cols() / GROUP);
        let shape = Shape {
            grid: [warps.div_ceil(8) as u32, 1, 1],
            threads: 256,
            shared: 0,
            early: false,
        };
        let kernel = self.kernel(&format!("quantise{}", bits.count()))?;
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
        let kernel = self.kernel(&format!("dequantise{}", w.bits.count()))?;
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
        let kernel = self.kernel(&format!("embed{}", table.bits.count()))?;
        // SAFETY: as in `embed`.
        unsafe { self.launch(stream, kernel, shape, &p) }
    }
}
