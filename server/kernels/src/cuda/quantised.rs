//! Weights of 8 or 4 bits (quantised.cuh): made from f16 on the GPU (quantise.cu), streamed past few
//! rows (skinny_q.cu), multiplied in tiles with many (tiled_q.cu).
#![allow(unsafe_code)]

use std::sync::Arc;

use half::f16;

use super::{
    driver::Gpu,
    error::CudaError,
    few::{self, FewIn, FewOut},
    launch::{Kernels, Shape},
    many::{self, ManyOut},
    memory::{Buffer, Slice},
    step::StepRow,
    stream::Stream,
    weights::Weights,
};
use crate::error::check;

/// Values that share a scale.
pub const GROUP: usize = 128;

/// Parts that a product's sums are made in, at most.
const MOST_PARTS: usize = 8;

/// Bits of a weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bits {
    Eight,
    Four,
}

/// A matrix `[rows, cols]` of 8 or 4 bits a value, with an f16 scale for every [`GROUP`] values of a
/// row.
#[derive(Debug)]
pub struct Quantised {
    bits: Bits,
    values: Buffer<u8>,
    /// `[cols / GROUP, rows]`.
    scales: Buffer<f16>,
    rows: usize,
    cols: usize,
}

/// How a product of few rows is cut: tiles of 16 outputs of a block of threads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QuantisedTile {
    pub tiles: u32,
}

/// Warps of a block that streams weights, which split k.
const WARPS: u32 = 8;
/// Cuts of products of few rows that are compiled: (tiles of outputs, groups of 8 rows).
const CUTS: &[(u32, u32)] = &[(1, 1), (2, 1), (1, 2)];

/// Most rows that streamed products take.
pub const FEW_ROWS_QUANTISED: usize = 16;

/// Outputs of a tile of a product of many rows.
const TILE_OUTPUTS: usize = 64;

/// Bytes of shared memory of a tile of so many rows (tiled_q.cu).
fn tiled_shared(rows: usize, bits: usize, capability: u32) -> u32 {
    let values = |count: usize| count * many::STEP * size_of::<f16>();
    let packed = TILE_OUTPUTS * many::STEP * bits / 8;
    let scales = TILE_OUTPUTS * size_of::<f16>();
    let bytes = match capability >= 80 {
        true => 2 * values(TILE_OUTPUTS) + 4 * (values(rows) + packed + scales),
        false => 2 * (values(TILE_OUTPUTS) + values(rows)),
    };
    bytes as u32
}

pub(crate) fn few_kernels() -> Vec<(String, u32)> {
    let mut names = Vec::new();
    for bits in [8, 4] {
        for operation in few::OPERATIONS {
            for &(tiles, groups) in CUTS {
                names.push((few_name(bits, operation, tiles, groups), 0));
            }
        }
    }
    names
}

fn few_name(bits: usize, operation: &str, tiles: u32, groups: u32) -> String {
    format!("skinny{bits}_{operation}_w{WARPS}_m{tiles}_n{groups}")
}

pub(crate) fn tiled_kernels(capability: u32) -> Vec<(String, u32)> {
    let mut names = Vec::new();
    for bits in [8, 4] {
        for operation in ["f16", "f32", "gate_up"] {
            for rows in [64, 128] {
                names.push((
                    format!("tiled{bits}_{operation}_{rows}"),
                    tiled_shared(rows, bits, capability),
                ));
            }
        }
    }
    names
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
    scales: u64,
    m: i32,
    k: i32,
}

#[repr(C)]
struct DequantiseParameters {
    q: u64,
    scales: u64,
    w: u64,
    m: i32,
    k: i32,
}

#[repr(C)]
struct EmbedParameters {
    rows: u64,
    previous: u64,
    q: u64,
    scales: u64,
    residual: u64,
    norm: u64,
    normed: u64,
    width: i32,
    vocab: i32,
    epsilon: f32,
}

#[repr(C)]
#[derive(Default)]
struct FewParameters {
    w: u64,
    scales: u64,
    x: u64,
    squares: u64,
    out: u64,
    residual: u64,
    next_norm: u64,
    next: u64,
    next_squares: u64,
    logits: u64,
    m: i32,
    k: i32,
    n: i32,
    square_parts: i32,
    epsilon: f32,
}

#[repr(C)]
struct TiledParameters {
    w: u64,
    scales: u64,
    x: u64,
    out: u64,
    sums: u64,
    m: i32,
    k: i32,
    n: i32,
    steps: i32,
}

impl Bits {
    fn count(self) -> usize {
        match self {
            Self::Eight => 8,
            Self::Four => 4,
        }
    }
}

impl Quantised {
    /// Whether a matrix is made of whole groups, of whole sixteens of rows.
    pub fn fits(rows: usize, cols: usize) -> bool {
        cols.is_multiple_of(GROUP) && rows.is_multiple_of(16)
    }

    fn zeroed(gpu: &Arc<Gpu>, bits: Bits, rows: usize, cols: usize) -> Result<Self, CudaError> {
        if !Self::fits(rows, cols) {
            return Err(CudaError::Matrix { rows, cols });
        }
        Ok(Self {
            bits,
            values: Buffer::zeroed(gpu, "weights", rows * cols * bits.count() / 8)?,
            scales: Buffer::zeroed(gpu, "weights", rows * (cols / GROUP))?,
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

    /// All cuts that [`Kernels::few_quantised`] can be asked for with so many rows.
    pub fn few_tiles(rows: usize) -> Vec<QuantisedTile> {
        let groups = few::groups(rows);
        CUTS.iter()
            .filter(|cut| cut.1 == groups)
            .map(|&(tiles, _)| QuantisedTile { tiles })
            .collect()
    }

    /// The cut that is fastest on the whole, as measured (docs/kernels.md).
    fn best_tile(&self, out: &FewOut, rows: usize) -> QuantisedTile {
        let wide = matches!(
            (self.bits, out),
            (Bits::Eight, FewOut::Residual { .. })
                | (
                    Bits::Four,
                    FewOut::F16(_) | FewOut::GateUp(_) | FewOut::Logits { .. }
                )
        );
        QuantisedTile {
            tiles: if wide && few::groups(rows) == 1 { 2 } else { 1 },
        }
    }

    pub fn bits(&self) -> Bits {
        self.bits
    }

    pub fn bytes(&self) -> u64 {
        self.values.bytes() + self.scales.bytes()
    }

    /// As the kernels pack them.
    pub fn values(&self) -> Slice<'_, u8> {
        self.values.all()
    }

    /// `[cols / GROUP, rows]`.
    pub fn scales(&self) -> Slice<'_, f16> {
        self.scales.all()
    }
}

/// How a product of many rows is cut: tiles of `rows` x 64 outputs, and parts of k.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TiledShape {
    pub rows: usize,
    pub parts: usize,
}

impl Kernels {
    /// The matrix in 8 or 4 bits: the value nearest to each, by the scale of its group.
    pub fn quantise(
        &self,
        stream: &Stream,
        w: &Weights,
        bits: Bits,
    ) -> Result<Quantised, CudaError> {
        let quantised = Quantised::zeroed(self.gpu(), bits, w.rows(), w.cols())?;
        let p = QuantiseParameters {
            w: w.values().pointer(),
            q: quantised.values.all().pointer(),
            scales: quantised.scales.all().pointer(),
            m: w.rows() as i32,
            k: w.cols() as i32,
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
            scales: w.scales.all().pointer(),
            w: to.values().pointer(),
            m: w.rows as i32,
            k: w.cols as i32,
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
            scales: table.scales.all().pointer(),
            residual: residual.at_least("residual", rows.len() * width)?,
            norm: norm.at_least("weights of a norm", width)?,
            normed: normed.at_least("output of a norm", rows.len() * width)?,
            width: width as i32,
            vocab: table.rows as i32,
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

    /// [`Kernels::few`] with quantised weights.
    pub fn few_quantised(
        &self,
        stream: &Stream,
        rows: usize,
        input: FewIn,
        w: &Quantised,
        out: FewOut,
        tile: Option<QuantisedTile>,
    ) -> Result<usize, CudaError> {
        if rows > FEW_ROWS_QUANTISED {
            check("rows of a product of few", rows, FEW_ROWS_QUANTISED)?;
        }
        let (m, k) = (w.rows, w.cols);
        let tile = tile.unwrap_or_else(|| w.best_tile(&out, rows));
        let parts = m.div_ceil(16 * tile.tiles as usize);
        let mut p = FewParameters {
            w: w.values.all().pointer(),
            scales: w.scales.all().pointer(),
            x: input.x.at_least("input of a product", rows * k)?,
            m: m as i32,
            k: k as i32,
            n: rows as i32,
            epsilon: input.epsilon,
            ..FewParameters::default()
        };
        if let Some(squares) = input.squares {
            let needed = rows * squares.parts;
            p.squares = squares.values.at_least("squares of a norm", needed)?;
            p.square_parts = squares.parts as i32;
        }
        match out {
            FewOut::F16(to) => p.out = to.at_least("output of a product", rows * m)?,
            FewOut::F32(to) | FewOut::Logits { logits: to, .. } => {
                p.logits = to.at_least("output of a product", rows * m)?;
            }
            FewOut::GateUp(to) => {
                check("rows of gate and up", m % 16, 0)?;
                p.out = to.at_least("output of gate and up", rows * m / 2)?;
            }
            FewOut::Residual {
                residual,
                next_norm,
                next,
                squares,
            } => {
                p.residual = residual.at_least("residual", rows * m)?;
                p.next_norm = next_norm.at_least("weights of a norm", m)?;
                p.next = next.at_least("input of the next product", rows * m)?;
                p.next_squares = squares.at_least("squares of a norm", rows * parts)?;
            }
        }
        let name = few_name(
            w.bits.count(),
            out.operation(),
            tile.tiles,
            few::groups(rows),
        );
        let kernel = self.kernel(&name)?;
        let threads = 32 * WARPS;
        // Blocks of a multiprocessor, as measured: 4 bits do better with fewer, that let the next
        // kernel begin.
        let blocks = match (w.bits, few::groups(rows)) {
            (Bits::Eight, 1) => 3,
            _ => 2,
        };
        let shape = Shape {
            grid: [
                (parts as u32).min(blocks * self.gpu().processors()),
                u32::from(rows > 0),
                1,
            ],
            threads,
            shared: 0,
            early: true,
        };
        // SAFETY: the sizes of all that the kernel reads and writes were checked above; a
        // `Quantised` has whole groups, and at least 16 rows as the `Weights` it was made from.
        unsafe { self.launch(stream, kernel, shape, &p) }?;
        // The highest logits are not looked for.
        Ok(match out {
            FewOut::Logits { .. } => 0,
            _ => parts,
        })
    }

    /// How [`Kernels::many_quantised`] cuts a product. `sums`: its output is [`ManyOut::Sums`], the
    /// only one that can have parts.
    pub fn tiled_shape(&self, m: usize, k: usize, n: usize, sums: bool) -> TiledShape {
        let rows = if n <= 64 { 64 } else { 128 };
        let tiles = m.div_ceil(TILE_OUTPUTS) * n.div_ceil(rows);
        let most = match sums {
            true => MOST_PARTS.min(k.div_ceil(4 * many::STEP)),
            false => 1,
        };
        let wanted = 2 * self.gpu().processors() as usize / tiles.max(1);
        let (parts, _) = many::ManyShape::split(k, wanted.clamp(1, most));
        TiledShape { rows, parts }
    }

    /// [`Kernels::many`] with quantised weights.
    pub fn many_quantised(
        &self,
        stream: &Stream,
        rows: usize,
        x: Slice<f16>,
        w: &Quantised,
        out: ManyOut,
        shape: TiledShape,
    ) -> Result<(), CudaError> {
        let (m, k, n) = (w.rows, w.cols, rows);
        let (mut halves, mut sums) = (0, 0);
        match out {
            ManyOut::F16(to) => {
                check("outputs of a product", m % 2, 0)?;
                halves = to.at_least("output of a product", n * m)?;
            }
            ManyOut::GateUp(to) => {
                check("rows of gate and up", m % 16, 0)?;
                halves = to.at_least("output of gate and up", n * m / 2)?;
            }
            ManyOut::Sums(to) => sums = to.at_least("sums of a product", shape.parts * n * m)?,
        }
        if !matches!(out, ManyOut::Sums(_)) {
            check("parts of a product", shape.parts, 1)?;
        }
        let (parts, steps) = many::ManyShape::split(k, shape.parts);
        check("parts of a product", parts, shape.parts)?;
        let p = TiledParameters {
            w: w.values.all().pointer(),
            scales: w.scales.all().pointer(),
            x: x.at_least("input of a product", n * k)?,
            out: halves,
            sums,
            m: m as i32,
            k: k as i32,
            n: n as i32,
            steps: steps as i32,
        };
        let (bits, tile) = (w.bits.count(), shape.rows);
        let launch = Shape {
            grid: [
                m.div_ceil(TILE_OUTPUTS) as u32,
                n.div_ceil(tile) as u32,
                parts as u32,
            ],
            threads: 128,
            shared: tiled_shared(tile, bits, self.gpu().capability()),
            early: true,
        };
        let name = format!("tiled{bits}_{}_{tile}", out.operation());
        // SAFETY: as in `few_quantised`; the kernel checks rows and outputs against n and m itself.
        unsafe { self.launch(stream, self.kernel(&name)?, launch, &p) }
    }
}
