//! Weights of 8 and 4 bits against their form in plain loops.

use half::f16;
use stoker_kernels::cuda::{
    EIGHT, FewIn, FewOut, Format, Order, PREVIOUS, Quantised, StepRow, UnitRow,
};

use crate::{
    products::product,
    support::{Device, Errors, Random, device, floats},
};

/// Formats that f16 weights are turned into.
const MADE: [Format; 2] = [Format::INT8, Format::INT4];
/// Values that share a scale in these.
const GROUP: usize = 128;

/// What `quantise` makes of a matrix: whole numbers (offset), `[rows, cols]`, and scales,
/// `[rows, cols / GROUP]`.
struct Expected {
    q: Vec<u8>,
    scales: Vec<f16>,
    /// Numbers times scales.
    values: Vec<f32>,
    /// The same as f16.
    halves: Vec<f32>,
}

fn quantise(w: &[f32], format: Format) -> Expected {
    let mut expected = Expected {
        q: Vec::new(),
        scales: Vec::new(),
        values: Vec::new(),
        halves: Vec::new(),
    };
    for group in w.chunks_exact(GROUP) {
        // Of equal magnitudes the positive one.
        let most = group
            .iter()
            .fold(0.0f32, |most, &v| match v.abs().total_cmp(&most.abs()) {
                std::cmp::Ordering::Greater => v,
                std::cmp::Ordering::Equal => v.max(most),
                std::cmp::Ordering::Less => most,
            });
        let (scale, low, high, offset) = match format.bits() {
            8 => (most.abs() / 127.0, -127.0, 127.0, 128.0),
            _ => (most / -8.0, -8.0, 7.0, 8.0),
        };
        let scale = f16::from_f32(scale);
        expected.scales.push(scale);
        let by = scale.to_f32();
        for v in group {
            let steps = match by {
                0.0 => 0.0,
                by => (v / by).round_ties_even().clamp(low, high),
            };
            expected.q.push((steps + offset) as u8);
            expected.values.push(steps * by);
            expected.halves.push(f16::from_f32(steps * by).to_f32());
        }
    }
    expected
}

/// The numbers and scales of a packed matrix, as quantised.cuh lays them out.
fn unpack(w: &Quantised) -> (Vec<u8>, Vec<f16>) {
    let packed = w.values().read().unwrap();
    let values = w.format().bits() * GROUP;
    let unit_bytes = w.format().unit_bytes();
    let (mut q, mut scales) = (Vec::new(), Vec::new());
    for (row, col) in (0..w.rows()).flat_map(|row| (0..w.cols()).map(move |col| (row, col))) {
        let unit = &packed[(col / GROUP * (w.rows() / 8) + row / 8) * unit_bytes..][..unit_bytes];
        if col % GROUP == 0 {
            let scale = &unit[values + row % 8 * 2..];
            scales.push(f16::from_le_bytes([scale[0], scale[1]]));
        }
        let (piece, at) = (col % GROUP / 32, col % 32);
        // Which of the four lanes of a row, and which value of its piece.
        let (t, i) = match w.order() {
            Order::Runs => (at / 8, at % 8),
            Order::Fragments => (at % 8 / 2, at / 8 * 2 + at % 2),
        };
        let lane = row % 8 * 4 + t;
        q.push(match w.format().bits() {
            8 => unit[piece / 2 * 512 + lane * 16 + piece % 2 * 8 + i],
            _ => {
                let nibble = i / 2 + i % 2 * 4;
                unit[piece / 2 * 256 + lane * 8 + piece % 2 * 4 + nibble / 2] >> (nibble % 2 * 4)
                    & 15
            }
        });
    }
    (q, scales)
}

/// Random weights of a size that models have, a few groups of them zeros or far larger.
fn weights(random: &mut Random, rows: usize, cols: usize) -> Vec<f16> {
    let mut values = random.halves(rows * cols);
    for value in &mut values {
        *value = f16::from_f32(value.to_f32() * 0.1);
    }
    values[..GROUP].fill(f16::ZERO);
    values[GROUP] = f16::from_f32(-3.0);
    values
}

fn quantised(d: &Device, rows: usize, cols: usize, w: &[f16], format: Format) -> Quantised {
    let w = d.weights(rows, cols, w);
    let quantised = d.kernels.quantise(&d.stream, &w, format).unwrap();
    d.stream.synchronize().unwrap();
    quantised
}

/// A random matrix of a format, and what its values mean.
pub struct Made {
    pub w: Quantised,
    /// Numbers times scales, plus least values.
    pub values: Vec<f32>,
    /// The same as f16.
    pub halves: Vec<f32>,
}

pub fn made(d: &Device, random: &mut Random, (rows, cols): (usize, usize), format: Format) -> Made {
    if MADE.contains(&format) {
        let w = weights(random, rows, cols);
        let Expected { values, halves, .. } = quantise(&floats(&w), format);
        let w = quantised(d, rows, cols, &w, format);
        return Made { w, values, halves };
    }
    let w = Quantised::zeroed(&d.kernels, format, rows, cols).unwrap();
    let (unit, bytes) = (format.unit(), format.unit_bytes());
    let mut packed = vec![0; w.values().len()];
    let mut values = Vec::new();
    for row in 0..rows {
        for first in (0..cols).step_by(unit) {
            let part = random_unit(random, format);
            let at = first / unit * (rows / EIGHT) + row / EIGHT;
            format.pack(
                w.order(),
                row % EIGHT,
                &part,
                &mut packed[at * bytes..][..bytes],
            );
            values.extend(part.numbers.iter().enumerate().map(|(i, &number)| {
                let [scale, least] = part.scales[i / format.group()].map(f16::to_f32);
                (f32::from(number) - f32::from(format.offset())) * scale + least
            }));
        }
    }
    w.values().write(&packed).unwrap();
    let halves = values.iter().map(|&v| f16::from_f32(v).to_f32()).collect();
    Made { w, values, halves }
}

/// Values of up to 0.1, a few groups of them zeros or far larger.
fn random_unit(random: &mut Random, format: Format) -> UnitRow {
    let most = (1 << format.bits()) - 1;
    let mut part = format.unit_row();
    part.numbers.fill_with(|| random.below(most + 1) as u8);
    for scales in &mut part.scales {
        let size = match random.below(60) {
            0 => 0.0,
            1 => 3.0,
            _ => 0.1,
        };
        scales[0] = f16::from_f32(random.value() * size / most as f32);
        if format.has_least() {
            scales[1] = f16::from_f32(random.value() * size);
        }
    }
    part
}

#[test]
fn every_format_becomes_f16() {
    let Some(d) = device("every_format_becomes_f16") else {
        return;
    };
    let mut errors = Errors::default();
    let mut random = Random(27);
    for format in Format::ALL {
        for (rows, cols) in [(16, 128), (208, 640), (48, 3072)] {
            let made = made(&d, &mut random, (rows, cols), format);
            let back = d.weights(rows, cols, &vec![f16::NAN; rows * cols]);
            d.kernels.dequantise(&d.stream, &made.w, &back).unwrap();
            let found = floats(&back.values().read().unwrap());
            let what = format!("{rows} x {cols}, {format:?}");
            // The last bit of f16 of a value, where two that are close fall to two sides.
            errors.compare(&what, &found, &made.halves, 1e-3, 1e-3);
        }
    }
    errors.finish("every_format_becomes_f16");
}

#[test]
fn weights_become_numbers_and_scales_and_f16_again() {
    let Some(d) = device("weights_become_numbers_and_scales_and_f16_again") else {
        return;
    };
    let mut errors = Errors::default();
    let mut random = Random(21);
    for (rows, cols) in [(16, 128), (208, 384), (48, 3072)] {
        let w = weights(&mut random, rows, cols);
        for format in MADE {
            let expected = quantise(&floats(&w), format);
            let found = quantised(&d, rows, cols, &w, format);
            let (q, scales) = unpack(&found);
            assert_eq!(scales, expected.scales, "{format:?}");
            // A quotient that lies between two numbers may fall to either side.
            let other = q.iter().zip(&expected.q).filter(|(a, b)| a != b).count();
            assert!(
                other * 10_000 <= q.len(),
                "{format:?}: {other} of {}",
                q.len()
            );
            let back = d.weights(rows, cols, &vec![f16::NAN; rows * cols]);
            d.kernels.dequantise(&d.stream, &found, &back).unwrap();
            let exact: Vec<f32> = q
                .iter()
                .enumerate()
                .map(|(i, &q)| {
                    let scale = expected.scales[i / GROUP];
                    let offset = f32::from(format.offset());
                    f16::from_f32((f32::from(q) - offset) * scale.to_f32()).to_f32()
                })
                .collect();
            let what = format!("{rows} x {cols}, {format:?}");
            errors.compare(
                &what,
                &floats(&back.values().read().unwrap()),
                &exact,
                1e-3,
                0.0,
            );
        }
    }
    errors.finish("weights_become_numbers_and_scales_and_f16_again");
}

/// What 8 and 4 bits cost: the output's error against f16 weights, relative to the output, with
/// normally distributed weights and inputs. docs/kernels.md states these limits.
#[test]
fn the_error_of_a_matrix_is_below_one_and_eleven_percent() {
    let Some(d) = device("the_error_of_a_matrix_is_below_one_and_eleven_percent") else {
        return;
    };
    let mut random = Random(24);
    // Sums of uniform numbers are nearly normal.
    let mut normal = |len: usize, size: f32| -> Vec<f16> {
        (0..len)
            .map(|_| f16::from_f32(size / 2.0 * (0..12).map(|_| random.value()).sum::<f32>()))
            .collect()
    };
    for (m, k) in [(512, 3072), (256, 8192)] {
        let rows = 8;
        let w = normal(m * k, 0.02);
        let x = normal(rows * k, 1.0);
        let exact = product(&floats(&x), &floats(&w), rows, m, k);
        let x = d.buffer(&x);
        for (format, most) in [(Format::INT8, 0.01), (Format::INT4, 0.11)] {
            let w = quantised(&d, m, k, &w, format);
            let out = d.poisoned_f32(rows * m);
            let input = FewIn {
                x: x.all(),
                squares: None,
                epsilon: 1e-5,
            };
            let to = FewOut::F32(out.all());
            d.kernels.few(&d.stream, rows, input, &w, to, None).unwrap();
            let found = out.all().read().unwrap();
            let square = |values: &mut dyn Iterator<Item = f32>| -> f64 {
                values.map(|v| f64::from(v).powi(2)).sum()
            };
            let error = square(&mut found.iter().zip(&exact).map(|(a, b)| a - b));
            let error = (error / square(&mut exact.iter().copied())).sqrt();
            eprintln!("{format:?}, {k} to {m}: error {:.2} %", error * 100.0);
            assert!(error < most, "{format:?}: {error}");
        }
    }
}

#[test]
fn rows_of_a_quantised_embedding() {
    let Some(d) = device("rows_of_a_quantised_embedding") else {
        return;
    };
    let mut errors = Errors::default();
    let mut random = Random(25);
    let (vocab, width) = (304, 384);
    let norm = random.values(width);
    for format in Format::ALL {
        let made = made(&d, &mut random, (vocab, width), format);
        let (expected, table) = (made.halves, made.w);
        // Row 0 has groups of zeros; the last one is the token that slot 2 sampled.
        let tokens = [7, 299, 150, PREVIOUS | 2];
        let rows: Vec<StepRow> = tokens
            .iter()
            .map(|&token| StepRow {
                token,
                ..StepRow::default()
            })
            .collect();
        let previous = d.buffer(&[1u32, 2, 33]);
        let residual = d.poisoned_f32(4 * width);
        let normed = d.poisoned(4 * width);
        let (rows, weights) = (d.buffer(&rows), d.buffer(&norm));
        d.kernels
            .embed_quantised(
                &d.stream,
                rows.all(),
                previous.all(),
                &table,
                residual.all(),
                weights.all(),
                normed.all(),
                1e-5,
            )
            .unwrap();
        let mut wanted = Vec::new();
        let mut wanted_normed = Vec::new();
        for token in [7, 299, 150, 33] {
            let row = &expected[token * width..(token + 1) * width];
            let mean = row.iter().map(|v| v * v).sum::<f32>() / width as f32;
            let scale = 1.0 / (mean + 1e-5).sqrt();
            wanted.extend_from_slice(row);
            wanted_normed.extend(row.iter().zip(&norm).map(|(v, n)| v * scale * n));
        }
        let found = residual.all().read().unwrap();
        errors.compare(&format!("{format:?} residual"), &found, &wanted, 0.1, 1e-3);
        let found = floats(&normed.all().read().unwrap());
        errors.compare(
            &format!("{format:?} normed"),
            &found,
            &wanted_normed,
            1.0,
            2e-3,
        );
    }
    errors.finish("rows_of_a_quantised_embedding");
}
