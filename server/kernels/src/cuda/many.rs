//! Products of many rows, in tiles on tensor cores: wgmma on Hopper (wide.cuh), mma.sync elsewhere
//! (tiled.cu).
#![allow(unsafe_code)]

use cudarc::driver::sys;
use half::f16;

use super::{
    error::{Context, CudaError},
    launch::{Kernels, Shape},
    memory::Slice,
    stream::Stream,
    weights::Weights,
};
use crate::error::check;

/// Values along k that are loaded at once.
pub(super) const STEP: usize = 64;
/// Parts that a product's sums are made in, at most.
const MOST_PARTS: usize = 8;

/// What becomes of a product.
#[derive(Clone, Copy, Debug)]
pub enum ManyOut<'a> {
    /// `[rows, outputs]`.
    F16(Slice<'a, f16>),
    /// silu(gate) x up, `[rows, outputs / 2]`, where the matrix holds both interleaved.
    GateUp(Slice<'a, f16>),
    /// Partial sums to be added up, `[parts, rows, outputs]`.
    Sums(Slice<'a, f32>),
}

/// How a product is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ManyShape {
    /// Rows are the first operand (many of them), or weights are.
    pub rows_first: bool,
    /// Columns of a tile: outputs where rows are first, else rows.
    pub columns: usize,
    /// Parts of k.
    pub parts: usize,
}

#[repr(C)]
pub(super) struct TiledParameters {
    pub(super) w: u64,
    pub(super) x: u64,
    pub(super) out: u64,
    pub(super) sums: u64,
    pub(super) m: i32,
    pub(super) k: i32,
    pub(super) n: i32,
    pub(super) steps: i32,
}

#[repr(C)]
pub(super) struct WideParameters {
    pub(super) a: sys::CUtensorMap,
    pub(super) b: sys::CUtensorMap,
    pub(super) packed: u64,
    pub(super) out: u64,
    pub(super) sums: u64,
    pub(super) m: i32,
    pub(super) k: i32,
    pub(super) n: i32,
    pub(super) parts: i32,
    pub(super) steps: i32,
    pub(super) stages: i32,
}

/// Columns of tiles whose first operand is the weights.
pub(super) const FEW_COLUMNS: [usize; 6] = [32, 64, 96, 128, 192, 256];
/// The same where it is the rows.
const MANY_COLUMNS: [usize; 2] = [128, 256];
/// Rows of a tile's first operand.
pub(super) const FIRST: usize = 128;
/// Bytes of shared memory of a block of threads: all that a multiprocessor has. Before its stages are
/// barriers, and what it takes to begin at a multiple of 1024.
const MOST_SHARED: usize = 226 << 10;
const BEFORE_STAGES: usize = 2048;
const MOST_STAGES: usize = 16;

/// Stages of so many bytes, and the shared memory that a block needs for them.
pub(super) fn stages(bytes: usize) -> (usize, u32) {
    let stages = ((MOST_SHARED - BEFORE_STAGES) / bytes).min(MOST_STAGES);
    (stages, (BEFORE_STAGES + stages * bytes) as u32)
}

fn stage_bytes(columns: usize) -> usize {
    (FIRST + columns) * STEP * size_of::<f16>()
}

fn wide_shared(columns: usize) -> u32 {
    stages(stage_bytes(columns)).1
}

pub(crate) fn wide_kernels() -> Vec<(String, u32)> {
    let few = FEW_COLUMNS.iter().flat_map(|&columns| {
        ["f32", "gate_up"].map(|op| (format!("wide_few_{op}_{columns}"), wide_shared(columns)))
    });
    let many = MANY_COLUMNS.iter().flat_map(|&columns| {
        ["f16", "f32", "gate_up"]
            .map(|op| (format!("wide_many_{op}_{columns}"), wide_shared(columns)))
    });
    few.chain(many).collect()
}

/// Bytes of shared memory of a tile of `side` rows and outputs.
fn tiled_shared(side: usize, capability: u32) -> u32 {
    let stages = match (capability >= 80, side) {
        (false, _) => 2,
        (true, 64) => 4,
        (true, _) => 3,
    };
    (stages * 2 * side * STEP * 2) as u32
}

pub(crate) fn tiled_kernels(capability: u32) -> Vec<(String, u32)> {
    [64, 128]
        .into_iter()
        .flat_map(|side| {
            ["f16", "f32", "gate_up"]
                .map(|op| (format!("tiled_{op}_{side}"), tiled_shared(side, capability)))
        })
        .collect()
}

/// Where a product's outputs go, and how k is cut.
pub(super) struct Placed {
    /// 0 where sums are written.
    pub(super) halves: u64,
    pub(super) sums: u64,
    /// Steps of a part.
    pub(super) steps: usize,
}

impl ManyOut<'_> {
    /// Of `n` rows times an `[m, k]` matrix in so many parts, in steps of so many values along k. An
    /// error where there is no room for the outputs, or they can't be cut so.
    pub(super) fn placed(
        &self,
        n: usize,
        (m, k): (usize, usize),
        parts: usize,
        along: usize,
    ) -> Result<Placed, CudaError> {
        let (mut halves, mut sums) = (0, 0);
        match self {
            Self::F16(to) => {
                check("outputs of a product", m % 2, 0)?;
                halves = to.at_least("output of a product", n * m)?;
            }
            Self::GateUp(to) => {
                check("rows of gate and up", m % 16, 0)?;
                halves = to.at_least("output of gate and up", n * m / 2)?;
            }
            Self::Sums(to) => sums = to.at_least("sums of a product", parts * n * m)?,
        }
        if !matches!(self, Self::Sums(_)) {
            check("parts of a product", parts, 1)?;
        }
        let (possible, steps) = split(k, parts, along);
        check("parts of a product", possible, parts)?;
        Ok(Placed {
            halves,
            sums,
            steps,
        })
    }

    pub(super) fn operation(&self) -> &'static str {
        match self {
            Self::F16(_) => "f16",
            Self::GateUp(_) => "gate_up",
            Self::Sums(_) => "f32",
        }
    }
}

/// Parts of k, none of them empty, in steps of so many values: their number, and each one's steps.
pub(super) fn split(k: usize, wanted: usize, along: usize) -> (usize, usize) {
    let all = k.div_ceil(along);
    let steps = all.div_ceil(wanted.clamp(1, all));
    (all.div_ceil(steps), steps)
}

impl ManyShape {
    /// The first of the cuts that cost least; `otherwise` where there is none.
    pub(super) fn cheapest(
        otherwise: Self,
        cuts: impl Iterator<Item = Self>,
        cost: impl Fn(&Self) -> f64,
    ) -> Self {
        cuts.map(|shape| (cost(&shape), shape))
            .min_by(|a, b| a.0.total_cmp(&b.0))
            .map_or(otherwise, |(_, shape)| shape)
    }

    /// Blocks of threads.
    pub(super) fn tiles(&self, m: usize, n: usize) -> usize {
        let (a, b) = match self.rows_first {
            true => (n, m),
            false => (m, n),
        };
        a.div_ceil(FIRST) * b.div_ceil(self.columns) * self.parts
    }

    /// Time that a product with weights of so many bits takes by a simple model, in units of one step
    /// of a full tile.
    pub(super) fn cost(
        &self,
        (m, k, n): (usize, usize, usize),
        bits: usize,
        processors: usize,
        sums: bool,
    ) -> f64 {
        let (_, steps) = split(k, self.parts, STEP);
        let rounds = self.tiles(m, n).div_ceil(processors) as f64;
        // A narrow tile is bound by what it loads: 128 + columns rows for 128 x columns products.
        let loads = (FIRST * bits / 16 + self.columns) as f64;
        // And what is quantised takes so long to unpack.
        let unpacking = if bits < 16 { 0.25 } else { 0.0 };
        let step = (self.columns as f64 / 256.0)
            .max(loads / 384.0 * 0.75)
            .max(unpacking);
        // Filling the ring, and writing the results.
        let ends = 4.0 + self.columns as f64 / 64.0;
        // Sums are written, and read again by the next kernel.
        let traffic = match sums {
            true => (self.parts * n * m) as f64 * 8.0 / (processors as f64 * 14e3),
            false => 0.0,
        };
        rounds * (steps as f64 * step + ends) + traffic
    }
}

impl Kernels {
    /// How a product is cut on this GPU. `sums`: its output is [`ManyOut::Sums`], the only one
    /// that can have parts; `halves`: it is [`ManyOut::F16`].
    pub fn many_shape(&self, m: usize, k: usize, n: usize, sums: bool, halves: bool) -> ManyShape {
        let processors = self.gpu().processors() as usize;
        let most = if sums {
            MOST_PARTS.min(k.div_ceil(4 * STEP))
        } else {
            1
        };
        if !self.has_wgmma() {
            let side = if n <= 64 { 64 } else { 128 };
            let tiles = m.div_ceil(side) * n.div_ceil(side);
            let parts = (2 * processors / tiles.max(1)).clamp(1, most);
            let (parts, _) = split(k, parts, STEP);
            return ManyShape {
                rows_first: true,
                columns: side,
                parts,
            };
        }
        let few = FEW_COLUMNS.iter().map(|&columns| (false, columns));
        let many = MANY_COLUMNS.iter().map(|&columns| (true, columns));
        let first = ManyShape {
            rows_first: true,
            columns: MANY_COLUMNS[0],
            parts: 1,
        };
        let tiles = few
            .chain(many)
            .filter(|&(rows_first, _)| rows_first || !halves);
        let cuts = tiles.flat_map(|(rows_first, columns)| {
            (1..=most).map(move |parts| ManyShape {
                rows_first,
                columns,
                parts: split(k, parts, STEP).0,
            })
        });
        ManyShape::cheapest(first, cuts, |shape| {
            shape.cost((m, k, n), 16, processors, sums)
        })
    }

    /// `x * w^T` for any number of rows, and what follows it. The weights were written before the
    /// kernel that this one follows: they are read before that one has ended.
    pub fn many(
        &self,
        stream: &Stream,
        rows: usize,
        x: Slice<f16>,
        w: &Weights,
        out: ManyOut,
        shape: ManyShape,
    ) -> Result<(), CudaError> {
        self.many_from(stream, rows, x, w, out, shape, true)
    }

    /// [`Kernels::many`] right after the kernel that wrote the weights.
    pub fn many_of_new_weights(
        &self,
        stream: &Stream,
        rows: usize,
        x: Slice<f16>,
        w: &Weights,
        out: ManyOut,
        shape: ManyShape,
    ) -> Result<(), CudaError> {
        self.many_from(stream, rows, x, w, out, shape, false)
    }

    #[allow(clippy::too_many_arguments)]
    fn many_from(
        &self,
        stream: &Stream,
        rows: usize,
        x: Slice<f16>,
        w: &Weights,
        out: ManyOut,
        shape: ManyShape,
        early: bool,
    ) -> Result<(), CudaError> {
        let (m, k, n) = (w.rows(), w.cols(), rows);
        let x = x.at_least("input of a product", n * k)?;
        let Placed {
            halves,
            sums,
            steps,
        } = out.placed(n, (m, k), shape.parts, STEP)?;
        if n == 0 {
            return Ok(());
        }
        if !self.has_wgmma() {
            let kernel = self.kernel(&format!("tiled_{}_{}", out.operation(), shape.columns))?;
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
            let side = shape.columns;
            let launch = Shape {
                grid: [
                    m.div_ceil(side) as u32,
                    n.div_ceil(side) as u32,
                    shape.parts as u32,
                ],
                threads: if side == 64 { 128 } else { 256 },
                shared: tiled_shared(side, self.gpu().capability()),
                early,
            };
            // SAFETY: the sizes of all that the kernel reads and writes were checked above; it
            // checks rows and outputs against n and m itself.
            return unsafe { self.launch(stream, kernel, launch, &p) };
        }
        let which = if shape.rows_first { "many" } else { "few" };
        let kernel = self.kernel(&format!(
            "wide_{which}_{}_{}",
            out.operation(),
            shape.columns
        ))?;
        let rows_box = if shape.rows_first {
            FIRST
        } else {
            shape.columns
        };
        let weights_box = if shape.rows_first {
            shape.columns
        } else {
            FIRST
        };
        let x = tensor_map(x, n, k, rows_box)?;
        let w = tensor_map(w.values().pointer(), m, k, weights_box)?;
        let (a, b) = if shape.rows_first { (x, w) } else { (w, x) };
        let p = WideParameters {
            a,
            b,
            packed: 0,
            out: halves,
            sums,
            m: m as i32,
            k: k as i32,
            n: n as i32,
            parts: shape.parts as i32,
            steps: steps as i32,
            stages: stages(stage_bytes(shape.columns)).0 as i32,
        };
        let tiles = shape.tiles(m, n);
        let launch = Shape {
            grid: [tiles.min(self.gpu().processors() as usize) as u32, 1, 1],
            threads: 288,
            shared: wide_shared(shape.columns),
            early,
        };
        // SAFETY: as above; the maps end where the matrices do.
        unsafe { self.launch(stream, kernel, launch, &p) }
    }
}

/// A row-major f16 matrix as the copy engine sees it, in boxes of `rows_box` rows of 64 values.
pub(super) fn tensor_map(
    pointer: u64,
    rows: usize,
    cols: usize,
    rows_box: usize,
) -> Result<sys::CUtensorMap, CudaError> {
    let row = (cols * size_of::<f16>()) as u64;
    map(pointer, [cols as u64, rows as u64], [row], [STEP, rows_box])
}

/// The same with all its rows in a box, of which `boxes` along them are taken at once: `cols` are whole
/// boxes.
pub(super) fn boxes_map(
    pointer: u64,
    rows: usize,
    cols: usize,
    boxes: usize,
) -> Result<sys::CUtensorMap, CudaError> {
    let [row, along] = [cols, STEP].map(|values| (values * size_of::<f16>()) as u64);
    let sizes = [STEP, rows, cols / STEP].map(|size| size as u64);
    map(pointer, sizes, [row, along], [STEP, rows, boxes])
}

/// An f16 tensor in boxes with 128-byte swizzle; strides are bytes, from the second dimension on.
fn map<const RANK: usize, const STRIDES: usize>(
    pointer: u64,
    sizes: [u64; RANK],
    strides: [u64; STRIDES],
    boxes: [usize; RANK],
) -> Result<sys::CUtensorMap, CudaError> {
    check("strides of a tensor", STRIDES + 1, RANK)?;
    let mut map = sys::CUtensorMap { opaque: [0; 16] };
    let boxes = boxes.map(|size| size as u32);
    let steps = [1; RANK];
    // SAFETY: the arrays have as many elements as the rank asks for; the map is written only.
    unsafe {
        sys::cuTensorMapEncodeTiled(
            &mut map,
            sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
            RANK as u32,
            pointer as *mut _,
            sizes.as_ptr(),
            strides.as_ptr(),
            boxes.as_ptr(),
            steps.as_ptr(),
            sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
            sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
            sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    }
    .result()
    .context("describing a matrix to the copy engine")?;
    Ok(map)
}
