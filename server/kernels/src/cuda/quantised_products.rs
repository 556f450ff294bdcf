//! Products with weights of 8 or 4 bits: streamed past few rows (skinny_q.cu), multiplied in tiles with
//! many (tiled_q.cu).
#![allow(unsafe_code)]

use half::f16;

use super::{
    error::CudaError,
    few::{self, FewIn, FewOut},
    launch::{Kernels, Shape},
    many::{self, ManyOut, Placed},
    memory::Slice,
    quantised::{Bits, Quantised},
    stream::Stream,
};
use crate::error::check;

/// Parts that a product's sums are made in, at most.
const MOST_PARTS: usize = 8;

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

#[repr(C)]
struct FewParameters {
    w: u64,
    scales: u64,
    common: few::Parameters,
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

/// How a product of many rows is cut: tiles of `rows` x 64 outputs, and parts of k.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TiledShape {
    pub rows: usize,
    pub parts: usize,
}

impl Quantised {
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
            (self.bits(), out),
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
}

impl Kernels {
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
        let (m, k) = (w.rows(), w.cols());
        let tile = tile.unwrap_or_else(|| w.best_tile(&out, rows));
        let parts = m.div_ceil(16 * tile.tiles as usize);
        let p = FewParameters {
            w: w.values().pointer(),
            scales: w.scales().pointer(),
            common: few::Parameters::new(rows, (m, k), &input, &out, parts)?,
        };
        let name = few_name(
            w.bits().count(),
            out.operation(),
            tile.tiles,
            few::groups(rows),
        );
        let kernel = self.kernel(&name)?;
        let threads = 32 * WARPS;
        // Blocks of a multiprocessor, as measured: 4 bits do better with fewer, that let the next
        // kernel begin.
        let blocks = match (w.bits(), few::groups(rows)) {
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
        let (m, k, n) = (w.rows(), w.cols(), rows);
        let Placed {
            halves,
            sums,
            steps,
        } = out.placed(n, (m, k), shape.parts)?;
        let p = TiledParameters {
            w: w.values().pointer(),
            scales: w.scales().pointer(),
            x: x.at_least("input of a product", n * k)?,
            out: halves,
            sums,
            m: m as i32,
            k: k as i32,
            n: n as i32,
            steps: steps as i32,
        };
        let (bits, tile) = (w.bits().count(), shape.rows);
        let launch = Shape {
            grid: [
                m.div_ceil(TILE_OUTPUTS) as u32,
                n.div_ceil(tile) as u32,
                shape.parts as u32,
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
