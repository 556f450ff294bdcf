//! Random weights whose activations neither vanish nor explode.

use std::cell::Cell;

use half::f16;
use stoker_kernels::cuda::{self, CudaError, EIGHT, Format, Kernels, Quantised, Stream};
use stoker_model::{
    config::ModelConfig,
    cuda::{Matrix, Weights},
};

/// Weights in f16, or in a format.
pub fn random(
    kernels: &Kernels,
    config: &ModelConfig,
    format: Option<Format>,
) -> Result<Weights, CudaError> {
    let gpu = kernels.gpu();
    let stream = Stream::new(gpu)?;
    let seed = Cell::new(0);
    let weights = Weights::in_shape(gpu, config, &|rows, cols| {
        let size = 1.0 / (cols as f32).sqrt();
        if let Some(format) = format.filter(|format| format.group() < 128) {
            return kept(kernels, format, (rows, cols), size).map(Matrix::Quantised);
        }
        let matrix = cuda::Weights::zeroed(gpu, rows, cols)?;
        seed.set(seed.get() + 1);
        kernels.fill(&stream, matrix.values(), seed.get(), size)?;
        Matrix::new(kernels, &stream, matrix, format)
    })?;
    stream.synchronize()?;
    Ok(weights)
}

/// A matrix as a GGUF file has it: the same unit of values of up to `size` over and over.
fn kept(
    kernels: &Kernels,
    format: Format,
    (rows, cols): (usize, usize),
    size: f32,
) -> Result<Quantised, CudaError> {
    let matrix = Quantised::zeroed(kernels, format, rows, cols)?;
    let most = (1 << format.bits()) - 1;
    let mut values = format.unit_row();
    let mut unit = vec![0; format.unit_bytes()];
    for row in 0..EIGHT {
        for (i, number) in values.numbers.iter_mut().enumerate() {
            *number = ((row * 131 + i * 2_654_435_761) >> 7 & most) as u8;
        }
        values
            .scales
            .fill([2.0 * size / most as f32, -size].map(f16::from_f32));
        format.pack(matrix.order(), row, &values, &mut unit);
    }
    let units = matrix.values().len() / unit.len();
    matrix.values().write(&unit.repeat(units))?;
    Ok(matrix)
}
