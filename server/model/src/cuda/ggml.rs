//! Quantised tensors of GGUF files as the whole numbers and scales that a GPU keeps, without loss of the
//! numbers; K-quants' scales of scales are multiplied out, to f16.
//!
//! The blocks are ggml's (<https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h>).

use candle_core::quantized::GgmlDType;
use half::f16;
use stoker_kernels::cuda::{Format, UnitRow};

/// What a tensor of this type is kept as. `None`: f16.
pub(super) fn format(dtype: GgmlDType) -> Option<Format> {
    match dtype {
        GgmlDType::Q8_0 => Some(Format::INT8_BY_32),
        GgmlDType::Q4_0 | GgmlDType::Q4_1 | GgmlDType::Q4K => Some(Format::INT4_BY_32),
        GgmlDType::Q6K => Some(Format::INT8_BY_16),
        _ => None,
    }
}

/// Values of a unit, of whichever of these formats.
const UNIT: usize = 64;
const UNITS_OF_256: usize = 256 / UNIT;

/// Takes the `index`-th unit of a row's blocks apart; `values` is of [`format`]. False where the row isn't
/// that long, or the type isn't one of these.
pub(super) fn unit_row(dtype: GgmlDType, row: &[u8], index: usize, values: &mut UnitRow) -> bool {
    let size = dtype.type_size();
    let found = match dtype {
        GgmlDType::Q4K | GgmlDType::Q6K => {
            let block = row.chunks_exact(size).nth(index / UNITS_OF_256);
            block.map(|block| match dtype {
                GgmlDType::Q4K => q4_k(block, index % UNITS_OF_256, values),
                _ => q6_k(block, index % UNITS_OF_256, values),
            })
        }
        GgmlDType::Q8_0 | GgmlDType::Q4_0 | GgmlDType::Q4_1 => {
            let blocks = row.chunks_exact(2 * size).nth(index);
            blocks.map(|blocks| {
                for (half, block) in blocks.chunks_exact(size).enumerate() {
                    block_of_32(dtype, block, half, values);
                }
            })
        }
        _ => None,
    };
    found.is_some()
}

fn half_at(block: &[u8], at: usize) -> f16 {
    f16::from_le_bytes([block[at], block[at + 1]])
}

/// A block of 32 values as one half of a unit.
fn block_of_32(dtype: GgmlDType, block: &[u8], half: usize, values: &mut UnitRow) {
    let numbers = &mut values.numbers[32 * half..32 * (half + 1)];
    let scale = half_at(block, 0);
    let least = match dtype {
        GgmlDType::Q4_1 => half_at(block, 2),
        // q - 8, times the scale.
        _ => f16::from_f32(-8.0 * scale.to_f32()),
    };
    values.scales[half] = [scale, least];
    match dtype {
        GgmlDType::Q8_0 => {
            for (to, from) in numbers.iter_mut().zip(&block[2..34]) {
                *to = from ^ 0x80;
            }
        }
        _ => {
            let packed = &block[if dtype == GgmlDType::Q4_1 { 4 } else { 2 }..][..16];
            for (i, byte) in packed.iter().enumerate() {
                numbers[i] = byte & 15;
                numbers[i + 16] = byte >> 4;
            }
        }
    }
}

/// A quarter of 256 values: eight scales and least values of 6 bits each, times one of f16.
fn q4_k(block: &[u8], quarter: usize, values: &mut UnitRow) {
    let (by, least_by) = (half_at(block, 0).to_f32(), half_at(block, 2).to_f32());
    let scales = &block[4..16];
    let packed = &block[16 + 32 * quarter..][..32];
    for half in 0..2 {
        let group = 2 * quarter + half;
        // The last four's upper two bits are those of the first four's bytes.
        let (scale, least) = match group {
            0..4 => (scales[group] & 63, scales[group + 4] & 63),
            _ => (
                scales[group + 4] & 15 | scales[group - 4] >> 6 << 4,
                scales[group + 4] >> 4 | scales[group] >> 6 << 4,
            ),
        };
        values.scales[half] =
            [by * f32::from(scale), -least_by * f32::from(least)].map(f16::from_f32);
        for (to, byte) in values.numbers[32 * half..].iter_mut().zip(packed) {
            *to = byte >> (4 * half) & 15;
        }
    }
}

/// A quarter of 256 values: six bits, 32 above what they mean; sixteen scales of 8 bits, times one of f16.
fn q6_k(block: &[u8], quarter: usize, values: &mut UnitRow) {
    let (half, upper) = (quarter / 2, quarter % 2);
    let low = &block[64 * half..][..64];
    let high = &block[128 + 32 * half..][..32];
    let by = half_at(block, 208).to_f32();
    for (i, to) in values.numbers.iter_mut().enumerate() {
        let (bits_low, bits_high) = (low[i] >> (4 * upper) & 15, high[i % 32]);
        let bits_high = bits_high >> (4 * upper + 2 * (i / 32)) & 3;
        *to = (bits_low | bits_high << 4) + (128 - 32);
    }
    for (i, to) in values.scales.iter_mut().enumerate() {
        let scale = block[192 + 4 * quarter + i] as i8;
        *to = [f16::from_f32(by * f32::from(scale)), f16::ZERO];
    }
}

/// A bound of the values' magnitudes.
pub(super) fn largest(format: Format, values: &UnitRow) -> f32 {
    let offset = i32::from(format.offset());
    let groups = values.numbers.chunks_exact(format.group());
    let bounds = groups.zip(&values.scales).map(|(numbers, [scale, least])| {
        let magnitudes = numbers
            .iter()
            .map(|&n| (i32::from(n) - offset).unsigned_abs());
        let least = if format.has_least() {
            least.to_f32().abs()
        } else {
            0.0
        };
        magnitudes.max().unwrap_or(0) as f32 * scale.to_f32().abs() + least
    });
    // `f32::max` would lose a NaN.
    bounds.fold(0.0, |most: f32, bound| {
        match most.is_nan() || bound <= most {
            true => most,
            false => bound,
        }
    })
}

#[cfg(test)]
mod tests {
    use candle_core::{
        Device, Tensor,
        quantized::{QStorage, QTensor},
    };

    use super::*;

    const TYPES: [GgmlDType; 5] = [
        GgmlDType::Q8_0,
        GgmlDType::Q4_0,
        GgmlDType::Q4_1,
        GgmlDType::Q4K,
        GgmlDType::Q6K,
    ];

    /// Any bytes as blocks, with scales of a size that models have.
    fn blocks(dtype: GgmlDType, count: usize) -> Vec<u8> {
        let mut state = 12_345u32;
        let mut bytes: Vec<u8> = (0..count * dtype.type_size())
            .map(|_| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (state >> 24) as u8
            })
            .collect();
        for (i, block) in bytes.chunks_exact_mut(dtype.type_size()).enumerate() {
            let scales = match dtype {
                GgmlDType::Q4_1 | GgmlDType::Q4K => vec![0, 2],
                GgmlDType::Q6K => vec![208],
                _ => vec![0],
            };
            for (j, at) in scales.into_iter().enumerate() {
                let scale = 0.001 * (1 + i % 7 + j) as f32 * if i % 3 == 0 { -1.0 } else { 1.0 };
                block[at..at + 2].copy_from_slice(&f16::from_f32(scale).to_le_bytes());
            }
        }
        bytes
    }

    fn dequantised(dtype: GgmlDType, row: &[u8], cols: usize) -> Vec<f32> {
        let storage = QStorage::from_data(row.into(), &Device::Cpu, dtype).unwrap();
        let tensor: Tensor = QTensor::new(storage, (1, cols))
            .unwrap()
            .dequantize(&Device::Cpu)
            .unwrap();
        tensor.flatten_all().unwrap().to_vec1().unwrap()
    }

    #[test]
    fn numbers_and_scales_mean_what_the_blocks_do() {
        for dtype in TYPES {
            let cols = 1024;
            let row = blocks(dtype, cols / dtype.block_size());
            let expected = dequantised(dtype, &row, cols);
            let format = format(dtype).unwrap();
            let mut values = format.unit_row();
            for (index, expected) in expected.chunks_exact(UNIT).enumerate() {
                assert!(unit_row(dtype, &row, index, &mut values));
                assert!(largest(format, &values) < 1000.0);
                for (i, expected) in expected.iter().enumerate() {
                    let [scale, least] = values.scales[i / format.group()].map(f16::to_f32);
                    let number = f32::from(values.numbers[i]) - f32::from(format.offset());
                    let least = if format.has_least() { least } else { 0.0 };
                    let found = number * scale + least;
                    // f16's rounding of a scale and of a least value, where they were products.
                    let most = match dtype {
                        GgmlDType::Q4K | GgmlDType::Q6K => {
                            ((number * scale).abs() + least.abs()) / 2048.0 + 1e-6
                        }
                        _ => 1e-6 * expected.abs(),
                    };
                    assert!(
                        (found - expected).abs() <= most,
                        "{dtype:?} {index} {i}: {found}, not {expected}"
                    );
                }
            }
            assert!(!unit_row(dtype, &row, cols / UNIT, &mut values));
        }
        assert!(format(GgmlDType::Q5_0).is_none());
    }

    #[test]
    fn the_largest_value_counts_numbers_scales_and_least_values() {
        let format = Format::INT4_BY_32;
        let mut values = format.unit_row();
        assert_eq!(largest(format, &values), 0.0);
        values.numbers[40] = 15;
        values.scales[1] = [-4000.0, 5000.0].map(f16::from_f32);
        assert_eq!(largest(format, &values), 65_000.0);
        values.scales[1][1] = f16::INFINITY;
        assert_eq!(largest(format, &values), f32::INFINITY);
        values.scales[0][0] = f16::NAN;
        values.scales[1][1] = f16::ZERO;
        assert!(largest(format, &values).is_nan());
    }
}
