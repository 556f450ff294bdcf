//! Products of few rows on Hopper: weights stream through shared memory (thin.cuh).
#![allow(unsafe_code)]

use cudarc::driver::sys;
use half::f16;

use super::{
    error::CudaError,
    few::{AnyWeights, FewOut, Parameters},
    format::{EIGHT, Format},
    launch::{Kernels, Shape},
    many::{STEP, boxes_map, tensor_map},
    stream::Stream,
};

/// Most rows that this form takes: those of one matrix instruction.
pub(super) const THIN_ROWS: usize = 16;

/// Bytes of shared memory of a block of threads: nearly all that a multiprocessor has. The more there
/// is under way, the better is memory used.
const SHARED: usize = 214 << 10;
/// The same with 4 bits, whose kernels are done sooner if less is under way and so comes in the order
/// in which it is multiplied, by rows (docs/kernels.md).
const SHARED_FOUR: [(usize, usize); 3] = [(2, 80 << 10), (4, 90 << 10), (8, 140 << 10)];
/// Stages, at most.
const MOST_STAGES: usize = 32;
/// Warps that multiply, with f16 and with quantised weights; one copies besides, and one works out the
/// norm's scales.
const WARPS: [usize; 2] = [8, 16];

/// Outputs of a tile that are compiled, by operation.
const SIZES: [(&str, &[usize]); 4] = [
    ("qkv", &[16, 24, 32, 40, 48]),
    ("residual", &[16, 24, 32, 40, 48]),
    ("gate_up", &[32, 64, 128]),
    ("head", &[128]),
];
/// One that is for f16 alone: quantised weights would take too many registers.
const HALVES_ONLY: usize = 48;

#[repr(C)]
struct ThinParameters {
    w: sys::CUtensorMap,
    x: sys::CUtensorMap,
    packed: u64,
    common: Parameters,
    stages: i32,
}

/// Kernels for f16, or for weights of a format.
pub(crate) fn kernels(format: Option<Format>) -> Vec<(String, u32)> {
    let operations = SIZES.map(|(operation, _)| operation).into_iter();
    operations
        .flat_map(|operation| {
            let sizes = sizes(operation, format.is_some()).into_iter();
            sizes.map(move |size| (name(format, operation, size), SHARED as u32))
        })
        .collect()
}

fn name(format: Option<Format>, operation: &str, outputs: usize) -> String {
    let weights = format.map_or(String::new(), Format::name);
    format!("thin{weights}_{operation}_{outputs}")
}

/// Bytes of shared memory of a block that multiplies so many rows.
fn shared(w: AnyWeights, rows: usize) -> usize {
    let four = matches!(w, AnyWeights::Quantised(w) if w.format().bits() == 4);
    SHARED_FOUR
        .iter()
        .find(|(most, _)| four && rows <= *most)
        .map_or(SHARED, |&(_, bytes)| bytes)
}

/// What a stage has.
struct Stage {
    /// Boxes of rows' values, [`STEP`] of each row.
    boxes: usize,
    /// Parts of k, that warps share out.
    parts: usize,
    bytes: usize,
}

impl Stage {
    fn of(w: AnyWeights, outputs: usize, rows: usize) -> Self {
        let (boxes, parts, weights) = match w {
            AnyWeights::F16(_) => {
                let boxes = match outputs {
                    0..=48 => 4,
                    49..=64 => 2,
                    _ => 1,
                };
                let weights = boxes * outputs * STEP * size_of::<f16>();
                (boxes, (boxes * STEP / 16).min(WARPS[0]), weights)
            }
            AnyWeights::Quantised(w) => {
                let parts = match outputs {
                    0..=48 => WARPS[1],
                    49..=64 => WARPS[1] / 2,
                    _ => WARPS[1] / 4,
                };
                // Two warps share the columns of a unit of 128.
                let format = w.format();
                let along = parts / (format.unit() / STEP);
                let weights = along * outputs / EIGHT * format.unit_bytes();
                (along * format.unit() / STEP, parts, weights)
            }
        };
        let rows = boxes * rows * STEP * size_of::<f16>();
        Self {
            boxes,
            parts,
            bytes: rows.next_multiple_of(1024) + weights.next_multiple_of(1024),
        }
    }
}

/// Tiles that are compiled for an operation.
pub(super) fn sizes(operation: &str, quantised: bool) -> Vec<usize> {
    let of_operation = SIZES.iter().filter(|(name, _)| *name == operation);
    of_operation
        .flat_map(|(_, sizes)| sizes.iter().copied())
        .filter(|&size| !quantised || size != HALVES_ONLY)
        .collect()
}

/// The tile that keeps the processors busy for the least time. Of the short products that add to the
/// residual a quarter of the processors is left to the next kernel, whose weights come the sooner.
pub(super) fn best(out: &FewOut, w: AnyWeights, processors: usize) -> usize {
    let outputs = w.size().0;
    let processors = match out {
        FewOut::Residual { .. } => (processors * 3 / 4).max(1),
        _ => processors,
    };
    sizes(out.operation(), matches!(w, AnyWeights::Quantised(_)))
        .into_iter()
        .min_by_key(|&size| {
            let rounds = outputs.div_ceil(size).div_ceil(processors);
            // Of equals the one with fewer rounds.
            (rounds * size, rounds)
        })
        .unwrap_or(64)
}

/// Starts a product whose parameters were checked, in tiles of `outputs`.
pub(super) fn launch(
    kernels: &Kernels,
    stream: &Stream,
    w: AnyWeights,
    common: Parameters,
    operation: &str,
    outputs: usize,
) -> Result<(), CudaError> {
    let ((m, k), n) = (w.size(), common.n as usize);
    if n == 0 {
        return Ok(());
    }
    // Barriers, the warps' sums, and what it takes to begin at a multiple of 1024.
    let pitch = (outputs + 23) / 32 * 32 + 8;
    let stage = Stage::of(w, outputs, n);
    let before = 16 * MOST_STAGES + stage.parts * n * pitch * size_of::<f32>() + 1024;
    let shared = shared(w, n);
    let stages = ((shared - before) / stage.bytes).min(MOST_STAGES);
    let (map, packed, format) = match w {
        AnyWeights::F16(w) => (tensor_map(w.values().pointer(), m, k, outputs)?, 0, None),
        AnyWeights::Quantised(w) => {
            let none = sys::CUtensorMap { opaque: [0; 16] };
            (none, w.values().pointer(), Some(w.format()))
        }
    };
    let p = ThinParameters {
        w: map,
        x: boxes_map(common.x, n, k, stage.boxes)?,
        packed,
        common,
        stages: stages as i32,
    };
    let tiles = m.div_ceil(outputs) as u32;
    let shape = Shape {
        grid: [tiles.min(kernels.gpu().processors()), 1, 1],
        threads: 32 * (WARPS[usize::from(format.is_some())] as u32 + 2),
        shared: shared as u32,
        early: true,
    };
    let kernel = kernels.kernel(&name(format, operation, outputs))?;
    // SAFETY: the caller has checked the sizes of all that the kernel reads and writes; the maps end
    // where the matrices do, and the stages fit into the shared memory that is asked for.
    unsafe { kernels.launch(stream, kernel, shape, &p) }
}
