//! Products with weights of 8 or 4 bits: streamed past few rows (thin.cuh on Hopper, else skinny_q.cu),
//! multiplied in tiles with many (wide.cuh, else tiled_q.cu).
#![allow(unsafe_code)]

use cudarc::driver::sys;
use half::f16;

use super::{
    error::CudaError,
    few::{self, FewOut, FewTile},
    format::Format,
    launch::{Kernels, Shape},
    many::{self, ManyOut, ManyShape, Placed, STEP, TiledParameters, WideParameters},
    memory::Slice,
    quantised::Quantised,
    stream::Stream,
    thin,
};

/// Parts that a product's sums are made in, at most.
const MOST_PARTS: usize = 8;

/// Most rows that streamed products take.
pub const FEW_ROWS_QUANTISED: usize = 16;

/// Cuts of products of few rows that are compiled before Hopper: (tiles of 16 outputs, groups of 8
/// rows).
const CUTS: &[(u32, u32)] = &[(1, 1), (2, 1), (1, 2)];
/// Warps of a block that streams weights, which split k.
const WARPS: u32 = 8;

/// Values along k of a step of a product of many rows.
const ALONG: usize = 128;
/// Rows and outputs of its tiles before Hopper, and their shared memory: two steps of rows.
const TILE_ROWS: usize = 64;
const TILE_OUTPUTS: usize = 128;
const TILE_SHARED: u32 = (2 * TILE_ROWS * ALONG * size_of::<f16>()) as u32;
/// Rows of its tiles on Hopper.
const WIDE_ROWS: [usize; 5] = [32, 64, 96, 128, 192];

pub(crate) fn thin_kernels() -> Vec<(String, u32)> {
    Format::ALL
        .into_iter()
        .flat_map(|format| thin::kernels(Some(format)))
        .collect()
}

pub(crate) fn skinny_kernels() -> Vec<(String, u32)> {
    let mut names = Vec::new();
    for format in Format::ALL {
        for operation in few::OPERATIONS {
            for &(tiles, groups) in CUTS {
                names.push((few_name(format, operation, tiles, groups), 0));
            }
        }
    }
    names
}

pub(super) fn few_name(format: Format, operation: &str, tiles: u32, groups: u32) -> String {
    let name = format.name();
    format!("skinny{name}_{operation}_w{WARPS}_m{tiles}_n{groups}")
}

pub(crate) fn wide_kernels() -> Vec<(String, u32)> {
    let mut names = Vec::new();
    for format in Format::ALL {
        for operation in ["f32", "gate_up"] {
            for rows in WIDE_ROWS {
                let shared = many::stages(wide_stage(format, rows)).1;
                names.push((wide_name(format, operation, rows), shared));
            }
        }
    }
    names
}

fn wide_name(format: Format, operation: &str, rows: usize) -> String {
    format!("wide{}_{operation}_{rows}", format.name())
}

/// Bytes of a stage: weights of [`ALONG`] values along k, made a multiple of 1024, and rows.
fn wide_stage(format: Format, rows: usize) -> usize {
    let weights = ALONG / format.unit() * many::FIRST / 8 * format.unit_bytes();
    weights.next_multiple_of(1024) + rows * ALONG * size_of::<f16>()
}

pub(crate) fn tiled_kernels() -> Vec<(String, u32)> {
    let mut names = Vec::new();
    for format in Format::ALL {
        for operation in ["f16", "f32", "gate_up"] {
            names.push((format!("tiled{}_{operation}", format.name()), TILE_SHARED));
        }
    }
    names
}

/// The cut before Hopper that is fastest on the whole, as measured (docs/kernels.md).
pub(super) fn skinny_tile(format: Format, out: &FewOut, rows: usize) -> FewTile {
    let wide = matches!(
        (format.bits(), out),
        (8, FewOut::Residual { .. })
            | (
                4,
                FewOut::F16(_) | FewOut::GateUp(_) | FewOut::Logits { .. }
            )
    );
    FewTile::Skinny {
        warps: WARPS,
        tiles: if wide && few::groups(rows) == 1 { 2 } else { 1 },
    }
}

/// Blocks of a multiprocessor, as measured: 4 bits do better with fewer, that let the next kernel begin.
pub(super) fn skinny_blocks(format: Format, rows: usize) -> u32 {
    match (format.bits(), few::groups(rows)) {
        (8, 1) => 3,
        _ => 2,
    }
}

impl Kernels {
    /// [`Kernels::few_tiles`] of quantised weights.
    pub(super) fn few_tiles_quantised(&self, out: &FewOut, rows: usize) -> Vec<FewTile> {
        if self.has_wgmma() {
            let sizes = thin::sizes(out.operation(), true).into_iter();
            return sizes.map(|outputs| FewTile::Thin { outputs }).collect();
        }
        let groups = few::groups(rows);
        CUTS.iter()
            .filter(|cut| cut.1 == groups)
            .map(|&(tiles, _)| FewTile::Skinny {
                warps: WARPS,
                tiles,
            })
            .collect()
    }

    /// How [`Kernels::many_quantised`] cuts a product. `sums`: its output is [`ManyOut::Sums`], the
    /// only one that can have parts.
    pub fn many_shape_quantised(
        &self,
        (m, k): (usize, usize),
        format: Format,
        n: usize,
        sums: bool,
    ) -> ManyShape {
        let processors = self.gpu().processors() as usize;
        let most = match sums {
            true => MOST_PARTS.min(k.div_ceil(4 * STEP)),
            false => 1,
        };
        let cut = |columns, parts| ManyShape {
            rows_first: false,
            columns,
            parts: many::split(k, parts, ALONG).0,
        };
        if !self.has_wgmma() {
            let tiles = m.div_ceil(TILE_OUTPUTS) * n.div_ceil(TILE_ROWS);
            let wanted = 2 * processors / tiles.max(1);
            return cut(TILE_ROWS, wanted.clamp(1, most));
        }
        let cuts = WIDE_ROWS
            .into_iter()
            .flat_map(|rows| (1..=most).map(move |parts| cut(rows, parts)));
        ManyShape::cheapest(cut(WIDE_ROWS[0], 1), cuts, |shape| {
            shape.cost((m, k, n), format.bits(), processors, sums)
        })
    }

    /// [`Kernels::many`] with quantised weights. On Hopper there is no [`ManyOut::F16`].
    pub fn many_quantised(
        &self,
        stream: &Stream,
        rows: usize,
        x: Slice<f16>,
        w: &Quantised,
        out: ManyOut,
        shape: ManyShape,
    ) -> Result<(), CudaError> {
        let (m, k, n, format) = (w.rows(), w.cols(), rows, w.format());
        let Placed {
            halves,
            sums,
            steps,
        } = out.placed(n, (m, k), shape.parts, ALONG)?;
        let x = x.at_least("input of a product", n * k)?;
        if n == 0 {
            return Ok(());
        }
        let tiles = [
            m.div_ceil(TILE_OUTPUTS),
            n.div_ceil(shape.columns),
            shape.parts,
        ];
        if self.has_wgmma() {
            let (stages, shared) = many::stages(wide_stage(format, shape.columns));
            let p = WideParameters {
                a: sys::CUtensorMap { opaque: [0; 16] },
                b: many::tensor_map(x, n, k, shape.columns)?,
                packed: w.values().pointer(),
                out: halves,
                sums,
                m: m as i32,
                k: k as i32,
                n: n as i32,
                parts: shape.parts as i32,
                steps: steps as i32,
                stages: stages as i32,
            };
            let blocks = tiles.iter().product::<usize>() as u32;
            let launch = Shape {
                grid: [blocks.min(self.gpu().processors()), 1, 1],
                threads: 288,
                shared,
                early: true,
            };
            let kernel = self.kernel(&wide_name(format, out.operation(), shape.columns))?;
            // SAFETY: the sizes of all that the kernel reads and writes were checked above; a
            // `Quantised` has whole units, and the kernel checks rows and outputs itself.
            return unsafe { self.launch(stream, kernel, launch, &p) };
        }
        let p = TiledParameters {
            w: w.values().pointer(),
            x,
            out: halves,
            sums,
            m: m as i32,
            k: k as i32,
            n: n as i32,
            steps: steps as i32,
        };
        let launch = Shape {
            grid: tiles.map(|count| count as u32),
            threads: 128,
            shared: TILE_SHARED,
            early: true,
        };
        let kernel = self.kernel(&format!("tiled{}_{}", format.name(), out.operation()))?;
        // SAFETY: as above.
        unsafe { self.launch(stream, kernel, launch, &p) }
    }
}
