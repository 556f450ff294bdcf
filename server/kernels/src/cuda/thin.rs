//! Products of few rows on Hopper: weights stream through shared memory (thin.cu).
#![allow(unsafe_code)]

use cudarc::driver::sys;
use half::f16;

use super::{
    error::CudaError,
    few::{FewOut, Parameters},
    launch::{Kernels, Shape},
    many::{STEP, tensor_map},
    stream::Stream,
    weights::Weights,
};

/// Most rows that this form takes: those of one matrix instruction.
pub(super) const THIN_ROWS: usize = 16;

/// Bytes of shared memory of a block of threads: nearly all that a multiprocessor has. The more there
/// is under way, the better is memory used.
const SHARED: usize = 214 << 10;
/// Stages, at most.
const MOST_STAGES: usize = 32;
/// Warps that multiply; one copies besides, and one works out the norm's scales.
const WARPS: usize = 8;
const THREADS: u32 = 32 * (WARPS as u32 + 2);

/// Outputs of a tile that are compiled, by operation.
const SIZES: [(&str, &[usize]); 4] = [
    ("qkv", &[16, 24, 32, 40, 48]),
    ("residual", &[16, 24, 32, 40, 48]),
    ("gate_up", &[32, 64, 128]),
    ("head", &[128]),
];

#[repr(C)]
struct ThinParameters {
    w: sys::CUtensorMap,
    x: sys::CUtensorMap,
    common: Parameters,
    box_rows: i32,
    stages: i32,
}

pub(crate) fn kernels() -> Vec<(String, u32)> {
    SIZES
        .iter()
        .flat_map(|(operation, sizes)| sizes.iter().map(move |size| name(operation, *size)))
        .map(|name| (name, SHARED as u32))
        .collect()
}

fn name(operation: &str, outputs: usize) -> String {
    format!("thin_{operation}_{outputs}")
}

/// Tiles that are compiled for a kind of output.
pub(super) fn sizes(out: &FewOut) -> &'static [usize] {
    let wanted = out.operation();
    SIZES
        .iter()
        .find(|(operation, _)| *operation == wanted)
        .map_or(&[], |(_, sizes)| sizes)
}

/// The tile that keeps the processors busy for the least time. Of the short products that add to the
/// residual a quarter of the processors is left to the next kernel, whose weights come the sooner.
pub(super) fn best(out: &FewOut, outputs: usize, processors: usize) -> usize {
    let processors = match out {
        FewOut::Residual { .. } => (processors * 3 / 4).max(1),
        _ => processors,
    };
    sizes(out)
        .iter()
        .copied()
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
    w: &Weights,
    common: Parameters,
    operation: &str,
    outputs: usize,
) -> Result<(), CudaError> {
    let (m, k, n) = (w.rows(), w.cols(), common.n as usize);
    if n == 0 {
        return Ok(());
    }
    let box_rows = n.next_multiple_of(8);
    let boxes = match outputs {
        0..=48 => 4,
        49..=64 => 2,
        _ => 1,
    };
    // Barriers, the warps' sums, and what it takes to begin at a multiple of 1024.
    let pitch = (outputs + 23) / 32 * 32 + 8;
    let parts = (boxes * STEP / 16).min(WARPS);
    let before = 16 * MOST_STAGES + parts * box_rows * pitch * size_of::<f32>() + 1024;
    let stage = boxes * (outputs + box_rows) * STEP * size_of::<f16>();
    let stages = ((SHARED - before) / stage).min(MOST_STAGES);
    let p = ThinParameters {
        w: tensor_map(w.values().pointer(), m, k, outputs)?,
        x: tensor_map(common.x, n, k, box_rows)?,
        common,
        box_rows: box_rows as i32,
        stages: stages as i32,
    };
    let tiles = m.div_ceil(outputs) as u32;
    let shape = Shape {
        grid: [tiles.min(kernels.gpu().processors()), 1, 1],
        threads: THREADS,
        shared: SHARED as u32,
        early: true,
    };
    let kernel = kernels.kernel(&name(operation, outputs))?;
    // SAFETY: the caller has checked the sizes of all that the kernel reads and writes; the maps end
    // where the matrices do, and the stages fit into the shared memory that is asked for.
    unsafe { kernels.launch(stream, kernel, shape, &p) }
}
