//! Products of few rows, whose time is that of reading the weights: through shared memory on Hopper
//! (thin.cuh), else straight into registers (skinny.cu).
#![allow(unsafe_code)]

use half::f16;

use super::{
    error::CudaError,
    launch::{Kernels, Shape},
    memory::Slice,
    quantised::Quantised,
    quantised_products,
    stream::Stream,
    thin::{self, THIN_ROWS},
    weights::Weights,
};
use crate::error::check;

/// Most rows that this form takes on any GPU; [`Kernels::few_rows`] tells how many on this one.
pub const FEW_ROWS: usize = SKINNY_ROWS;
/// Those where weights go into registers.
const SKINNY_ROWS: usize = 32;

/// Blocks of 8 warps that a multiprocessor holds, by their registers.
const BLOCKS_PER_PROCESSOR: u32 = 3;

/// How a product is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FewTile {
    /// Warps that split k, and tiles of 16 outputs a block of threads.
    Skinny { warps: u32, tiles: u32 },
    /// Outputs of a tile.
    Thin { outputs: usize },
}

/// Cuts that are compiled: (warps, tiles of outputs, groups of 8 rows).
const CUTS: &[(u32, u32, u32)] = &[
    (4, 1, 1),
    (8, 1, 1),
    (4, 2, 1),
    (8, 2, 1),
    (4, 1, 2),
    (8, 1, 2),
    (4, 2, 2),
    (8, 2, 2),
    (4, 2, 4),
    (8, 1, 4),
    (8, 2, 4),
];

/// Sums of squares of each row, in parts: what a norm's scale is made of.
#[derive(Clone, Copy, Debug)]
pub struct Squares<'a> {
    /// `[rows, parts]`.
    pub values: Slice<'a, f32>,
    pub parts: usize,
}

/// What a product reads.
#[derive(Clone, Copy, Debug)]
pub struct FewIn<'a> {
    /// `[rows, cols]`.
    pub x: Slice<'a, f16>,
    /// Where `x` is not normed yet: what its norm's scale is made of.
    pub squares: Option<Squares<'a>>,
    pub epsilon: f32,
}

/// What becomes of a product.
#[derive(Clone, Copy, Debug)]
pub enum FewOut<'a> {
    /// `[rows, outputs]`.
    F16(Slice<'a, f16>),
    /// `[rows, outputs]`.
    F32(Slice<'a, f32>),
    /// Logits, `[rows, outputs]`, and the highest of each part of them, `[rows, parts]`, of which
    /// [`Kernels::few`] gives the number; 0: it has not been looked for.
    Logits {
        logits: Slice<'a, f32>,
        best: Slice<'a, u64>,
    },
    /// silu(gate) x up, `[rows, outputs / 2]`, where the matrix holds both interleaved.
    GateUp(Slice<'a, f16>),
    /// Added to the residual; and the new residual times the next norm's weights, with its squares.
    Residual {
        residual: Slice<'a, f32>,
        next_norm: Slice<'a, f32>,
        next: Slice<'a, f16>,
        /// `[rows, parts]`, of which [`Kernels::few`] gives the number.
        squares: Slice<'a, f32>,
    },
}

/// The weights of a product, of any type.
#[derive(Clone, Copy)]
pub enum AnyWeights<'a> {
    F16(&'a Weights),
    Quantised(&'a Quantised),
}

impl<'a> From<&'a Weights> for AnyWeights<'a> {
    fn from(w: &'a Weights) -> Self {
        Self::F16(w)
    }
}

impl<'a> From<&'a Quantised> for AnyWeights<'a> {
    fn from(w: &'a Quantised) -> Self {
        Self::Quantised(w)
    }
}

impl AnyWeights<'_> {
    /// Outputs and inputs.
    pub(super) fn size(&self) -> (usize, usize) {
        match self {
            Self::F16(w) => (w.rows(), w.cols()),
            Self::Quantised(w) => (w.rows(), w.cols()),
        }
    }
}

/// What the kernels of both forms take.
#[repr(C)]
#[derive(Default)]
pub(super) struct Parameters {
    pub(super) x: u64,
    squares: u64,
    out: u64,
    residual: u64,
    next_norm: u64,
    next: u64,
    next_squares: u64,
    logits: u64,
    best: u64,
    m: i32,
    k: i32,
    pub(super) n: i32,
    square_parts: i32,
    epsilon: f32,
}

impl Parameters {
    /// Of `rows` rows times an `[m, k]` matrix, whose outputs are cut in `parts`; all that is read and
    /// written is large enough. The highest logits are not asked for.
    pub(super) fn new(
        rows: usize,
        (m, k): (usize, usize),
        input: &FewIn,
        out: &FewOut,
        parts: usize,
    ) -> Result<Self, CudaError> {
        let mut p = Self {
            x: input.x.at_least("input of a product", rows * k)?,
            m: m as i32,
            k: k as i32,
            n: rows as i32,
            epsilon: input.epsilon,
            ..Self::default()
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
        Ok(p)
    }
}

#[repr(C)]
struct SkinnyParameters {
    w: u64,
    common: Parameters,
}

pub(super) const OPERATIONS: [&str; 4] = ["qkv", "residual", "gate_up", "head"];

pub(crate) fn kernels() -> Vec<(String, u32)> {
    OPERATIONS
        .iter()
        .flat_map(|operation| {
            CUTS.iter()
                .map(move |&(warps, tiles, groups)| (name(operation, warps, tiles, groups), 0))
        })
        .collect()
}

fn name(operation: &str, warps: u32, tiles: u32, groups: u32) -> String {
    format!("skinny_{operation}_w{warps}_m{tiles}_n{groups}")
}

impl FewOut<'_> {
    pub(super) fn operation(&self) -> &'static str {
        match self {
            Self::F16(_) => "qkv",
            Self::F32(_) | Self::Logits { .. } => "head",
            Self::GateUp(_) => "gate_up",
            Self::Residual { .. } => "residual",
        }
    }
}

/// Groups of 8 rows, as kernels are compiled for.
pub(super) fn groups(rows: usize) -> u32 {
    match rows {
        0..=8 => 1,
        9..=16 => 2,
        _ => 4,
    }
}

impl Kernels {
    /// Most rows that this form takes on this GPU.
    pub fn few_rows(&self) -> usize {
        match self.has_wgmma() {
            true => THIN_ROWS,
            false => SKINNY_ROWS,
        }
    }

    /// All cuts of a product of so many rows that can be asked for.
    pub fn few_tiles<'a>(
        &self,
        w: impl Into<AnyWeights<'a>>,
        out: &FewOut,
        rows: usize,
    ) -> Vec<FewTile> {
        if let AnyWeights::Quantised(_) = w.into() {
            return self.few_tiles_quantised(out, rows);
        }
        let groups = groups(rows);
        let skinny = CUTS
            .iter()
            .filter(|cut| rows <= SKINNY_ROWS && cut.2 == groups)
            .map(|&(warps, tiles, _)| FewTile::Skinny { warps, tiles });
        let thin = thin::sizes(out.operation(), false)
            .into_iter()
            .filter(|_| self.has_wgmma())
            .map(|outputs| FewTile::Thin { outputs });
        skinny.chain(thin).collect()
    }

    /// What is fastest on the whole, as measured (docs/kernels.md).
    fn few_tile(&self, w: AnyWeights, out: &FewOut, rows: usize) -> FewTile {
        if self.has_wgmma() {
            let processors = self.gpu().processors() as usize;
            return FewTile::Thin {
                outputs: thin::best(out, w, processors),
            };
        }
        if let AnyWeights::Quantised(w) = w {
            return quantised_products::skinny_tile(w.format(), out, rows);
        }
        let (warps, tiles) = match (out, groups(rows)) {
            (FewOut::GateUp(_), 1) | (FewOut::F16(_), 2) | (_, 4) => (8, 2),
            _ => (8, 1),
        };
        FewTile::Skinny { warps, tiles }
    }

    /// Most parts that [`FewOut::Residual`] gives its squares in, for so many outputs.
    pub fn few_square_parts(outputs: usize) -> usize {
        outputs.div_ceil(16)
    }

    /// Most parts that [`FewOut::Logits`] looks for the highest in.
    pub fn few_best_parts(outputs: usize) -> usize {
        outputs.div_ceil(128)
    }

    /// `x * w^T` for at most [`Kernels::few_rows`] rows (with quantised weights
    /// [`FEW_ROWS_QUANTISED`](quantised_products::FEW_ROWS_QUANTISED)), and what follows it. Gives the
    /// parts that [`FewOut::Residual`] has its squares in, or [`FewOut::Logits`] its highest. `tile`
    /// chooses how it's cut; `None`: the best known.
    pub fn few<'a>(
        &self,
        stream: &Stream,
        rows: usize,
        input: FewIn,
        w: impl Into<AnyWeights<'a>>,
        out: FewOut,
        tile: Option<FewTile>,
    ) -> Result<usize, CudaError> {
        let w = w.into();
        let most = match w {
            AnyWeights::F16(_) => self.few_rows(),
            AnyWeights::Quantised(_) => quantised_products::FEW_ROWS_QUANTISED,
        };
        if rows > most {
            check("rows of a product of few", rows, most)?;
        }
        let (m, k) = w.size();
        let tile = tile.unwrap_or_else(|| self.few_tile(w, &out, rows));
        let parts = m.div_ceil(match tile {
            FewTile::Skinny { tiles, .. } => 16 * tiles as usize,
            FewTile::Thin { outputs } => outputs,
        });
        let mut p = Parameters::new(rows, (m, k), &input, &out, parts)?;
        if let (FewOut::Logits { best, .. }, FewTile::Thin { .. }) = (&out, tile) {
            p.best = best.at_least("highest logits", rows * parts)?;
        }
        let found = match (&out, p.best) {
            (FewOut::Logits { .. }, 0) => 0,
            _ => parts,
        };
        let operation = out.operation();
        match tile {
            FewTile::Thin { outputs } => {
                // Pairs of outputs are written at once.
                if operation != "head" {
                    check("outputs of a product", m % 2, 0)?;
                }
                thin::launch(self, stream, w, p, operation, outputs)?;
            }
            FewTile::Skinny { warps, tiles } => {
                let groups = groups(rows);
                // What runs at once; with rather few tiles a block each.
                let (pointer, kernel, blocks) = match w {
                    AnyWeights::F16(w) => (
                        w.values().pointer(),
                        name(operation, warps, tiles, groups),
                        BLOCKS_PER_PROCESSOR * 8 / warps,
                    ),
                    AnyWeights::Quantised(w) => (
                        w.values().pointer(),
                        quantised_products::few_name(w.format(), operation, tiles, groups),
                        quantised_products::skinny_blocks(w.format(), rows),
                    ),
                };
                let shape = Shape {
                    grid: [
                        (parts as u32).min(blocks * self.gpu().processors()),
                        u32::from(rows > 0),
                        1,
                    ],
                    threads: 32 * warps,
                    shared: 0,
                    early: true,
                };
                let p = SkinnyParameters {
                    w: pointer,
                    common: p,
                };
                // SAFETY: the sizes of all that the kernel reads and writes were checked above; a
                // matrix has `m k` values, in multiples of what the kernel takes at once.
                unsafe { self.launch(stream, self.kernel(&kernel)?, shape, &p) }?;
            }
        }
        Ok(found)
    }
}
