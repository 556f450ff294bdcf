//! Weights of 8 and 4 bits against their form in plain loops.

use half::f16;
use stoker_kernels::{
    AttentionShape, Norm, add_bias,
    cuda::{
        Bits, FewIn, FewOut, GROUP, Heads, Kernels, ManyOut, Order, Quantised, Squares, StepRow,
    },
    norm_heads,
};

use crate::{
    products::{gated, product, residual, size},
    support::{Device, Errors, Random, device, floats},
};

const BOTH: [Bits; 2] = [Bits::Eight, Bits::Four];

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

fn quantise(w: &[f32], bits: Bits) -> Expected {
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
        let (scale, low, high, offset) = match bits {
            Bits::Eight => (most.abs() / 127.0, -127.0, 127.0, 128.0),
            Bits::Four => (most / -8.0, -8.0, 7.0, 8.0),
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
    let values = match w.bits() {
        Bits::Eight => 8 * GROUP,
        Bits::Four => 4 * GROUP,
    };
    let unit_bytes = values + 8 * 2;
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
        q.push(match w.bits() {
            Bits::Eight => unit[piece / 2 * 512 + lane * 16 + piece % 2 * 8 + i],
            Bits::Four => {
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

fn quantised(d: &Device, rows: usize, cols: usize, w: &[f16], bits: Bits) -> Quantised {
    let w = d.weights(rows, cols, w);
    let quantised = d.kernels.quantise(&d.stream, &w, bits).unwrap();
    d.stream.synchronize().unwrap();
    quantised
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
        for bits in BOTH {
            let expected = quantise(&floats(&w), bits);
            let found = quantised(&d, rows, cols, &w, bits);
            let (q, scales) = unpack(&found);
            assert_eq!(scales, expected.scales, "{bits:?}");
            // A quotient that lies between two numbers may fall to either side.
            let other = q.iter().zip(&expected.q).filter(|(a, b)| a != b).count();
            assert!(
                other * 10_000 <= q.len(),
                "{bits:?}: {other} of {}",
                q.len()
            );
            let back = d.weights(rows, cols, &vec![f16::NAN; rows * cols]);
            d.kernels.dequantise(&d.stream, &found, &back).unwrap();
            let exact: Vec<f32> = q
                .iter()
                .enumerate()
                .map(|(i, &q)| {
                    let scale = expected.scales[i / GROUP];
                    let offset = if bits == Bits::Eight { 128.0 } else { 8.0 };
                    f16::from_f32((f32::from(q) - offset) * scale.to_f32()).to_f32()
                })
                .collect();
            let what = format!("{rows} x {cols}, {bits:?}");
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

#[test]
fn quantised_products_of_few_rows() {
    let Some(d) = device("quantised_products_of_few_rows") else {
        return;
    };
    let mut errors = Errors::default();
    let mut random = Random(22);
    for (m, k) in [
        (208, 640),
        (1008, 1536),
        (1056, 128),
        (16, 256),
        (304, 3072),
    ] {
        let w = weights(&mut random, m, k);
        for bits in BOTH {
            let expected = quantise(&floats(&w), bits);
            // On Hopper products are scaled after they are summed up, not the weights.
            let expected = match d.kernels.has_wgmma() {
                true => expected.values,
                false => expected.halves,
            };
            let w = quantised(&d, m, k, &w, bits);
            for rows in [1, 3, 8, 9, 16] {
                let x_halves = random.halves(rows * k);
                let sums = product(&floats(&x_halves), &expected, rows, m, k);
                let x = d.buffer(&x_halves);
                let plain = FewIn {
                    x: x.all(),
                    squares: None,
                    epsilon: 1e-5,
                };
                let what = format!("{bits:?}: {rows} x {k} to {m}");
                few(&d, &mut errors, &what, (rows, m, k), &sums, plain, &w);
            }
        }
    }
    errors.finish("quantised_products_of_few_rows");
}

/// Every output of a product; weights are a tenth of those that `size` is for.
fn few(
    d: &Device,
    errors: &mut Errors,
    what: &str,
    (rows, m, k): (usize, usize, usize),
    expected: &[f32],
    plain: FewIn,
    w: &Quantised,
) {
    let run = |input: FewIn, out: FewOut, tile| {
        d.kernels
            .few(&d.stream, rows, input, w, out, Some(tile))
            .unwrap()
    };
    let mut random = Random((rows * m * k) as u64);
    let size = size(k) / 10.0;
    let tiles = |out: &FewOut| d.kernels.few_tiles(w, out, rows);
    let out = d.poisoned_f32(rows * m);
    for tile in tiles(&FewOut::F32(out.all())) {
        let best = d.buffer(&vec![0u64; rows * Kernels::few_best_parts(m)]);
        let to = FewOut::Logits {
            logits: out.all(),
            best: best.all(),
        };
        let parts = run(plain, to, tile);
        let found = out.all().read().unwrap();
        errors.compare(&format!("{what} f32"), &found, expected, size, 1e-4);
        let best = best.all().read().unwrap();
        for (row, best) in best.chunks_exact(parts.max(1)).take(rows).enumerate() {
            let highest = found[row * m..(row + 1) * m]
                .iter()
                .copied()
                .fold(f32::NEG_INFINITY, f32::max);
            let id = !best.iter().max().copied().unwrap() as u32 as usize;
            assert!(parts == 0 || found[row * m + id] == highest, "{what}");
        }
        out.all().write(&vec![f32::NAN; rows * m]).unwrap();
    }

    let parts = 5;
    let squares: Vec<f32> = random
        .values(rows * parts)
        .iter()
        .map(|v| (v.abs() + 0.1) * k as f32 / 20.0)
        .collect();
    let scaled: Vec<f32> = expected
        .chunks_exact(m)
        .zip(squares.chunks_exact(parts))
        .flat_map(|(row, squares)| {
            let scale = 1.0 / (squares.iter().sum::<f32>() / k as f32 + 1e-5).sqrt();
            row.iter().map(move |v| v * scale)
        })
        .collect();
    let squares = d.buffer(&squares);
    let normed = FewIn {
        squares: Some(Squares {
            values: squares.all(),
            parts,
        }),
        ..plain
    };
    let out = d.poisoned(rows * m);
    for tile in tiles(&FewOut::F16(out.all())) {
        run(normed, FewOut::F16(out.all()), tile);
        let found = floats(&out.all().read().unwrap());
        errors.compare(
            &format!("{what} f16, {tile:?}"),
            &found,
            &scaled,
            size,
            2e-3,
        );
        out.all().write(&vec![f16::NAN; rows * m]).unwrap();
    }
    let out = d.poisoned(rows * m / 2);
    let gates: Vec<f32> = scaled
        .chunks_exact(m)
        .flat_map(|row| gated(row, m, 1.0))
        .collect();
    for tile in tiles(&FewOut::GateUp(out.all())) {
        run(normed, FewOut::GateUp(out.all()), tile);
        let found = floats(&out.all().read().unwrap());
        errors.compare(
            &format!("{what} gate_up, {tile:?}"),
            &found,
            &gates,
            size,
            3e-3,
        );
        out.all().write(&vec![f16::NAN; rows * m / 2]).unwrap();
    }

    residual(
        d,
        errors,
        &mut random,
        (rows, m, k),
        plain,
        w.into(),
        expected,
        size,
    );
}

#[test]
fn quantised_products_of_many_rows() {
    let Some(d) = device("quantised_products_of_many_rows") else {
        return;
    };
    let mut errors = Errors::default();
    let mut random = Random(23);
    for (m, k) in [(208, 384), (320, 2048), (1056, 128)] {
        let w = weights(&mut random, m, k);
        for bits in BOTH {
            let expected = quantise(&floats(&w), bits).halves;
            let w = quantised(&d, m, k, &w, bits);
            for rows in [1, 17, 33, 64, 65, 200] {
                let x = random.halves(rows * k);
                let sums = product(&floats(&x), &expected, rows, m, k);
                let x = d.buffer(&x);
                let what = format!("{bits:?}: {rows} x {k} to {m}");
                let size = size(k) / 10.0;
                let run = |out: ManyOut, parts: bool| {
                    let shape = d.kernels.many_shape_quantised((m, k), bits, rows, parts);
                    d.kernels
                        .many_quantised(&d.stream, rows, x.all(), &w, out, shape)
                        .unwrap();
                    shape.parts
                };
                let out = d.poisoned_f32(8 * rows * m);
                let parts = run(ManyOut::Sums(out.all()), true);
                let all = out.all().read().unwrap();
                let found: Vec<f32> = (0..rows * m)
                    .map(|i| (0..parts).map(|part| all[part * rows * m + i]).sum())
                    .collect();
                errors.compare(&format!("{what} sums"), &found, &sums, size, 2e-4);
                if !d.kernels.has_wgmma() {
                    let out = d.poisoned(rows * m);
                    run(ManyOut::F16(out.all()), false);
                    let found = floats(&out.all().read().unwrap());
                    errors.compare(&format!("{what} f16"), &found, &sums, size, 2e-3);
                }
                let out = d.poisoned(rows * m / 2);
                run(ManyOut::GateUp(out.all()), false);
                let gates: Vec<f32> = sums
                    .chunks_exact(m)
                    .flat_map(|row| gated(row, m, 1.0))
                    .collect();
                let found = floats(&out.all().read().unwrap());
                errors.compare(&format!("{what} gate_up"), &found, &gates, size, 3e-3);
            }
        }
    }
    errors.finish("quantised_products_of_many_rows");
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
        for (bits, most) in [(Bits::Eight, 0.01), (Bits::Four, 0.11)] {
            let w = quantised(&d, m, k, &w, bits);
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
            eprintln!("{bits:?}, {k} to {m}: error {:.2} %", error * 100.0);
            assert!(error < most, "{bits:?}: {error}");
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
    let w = weights(&mut random, vocab, width);
    let norm = random.values(width);
    for bits in BOTH {
        let expected = quantise(&floats(&w), bits).halves;
        let table = quantised(&d, vocab, width, &w, bits);
        // Row 0 has groups of zeros; the last one is the token that slot 2 sampled.
        let tokens = [7, 299, 150, stoker_kernels::cuda::PREVIOUS | 2];
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
        errors.compare(&format!("{bits:?} residual"), &found, &wanted, 0.1, 1e-3);
        let found = floats(&normed.all().read().unwrap());
        errors.compare(
            &format!("{bits:?} normed"),
            &found,
            &wanted_normed,
            1.0,
            2e-3,
        );
    }
    errors.finish("rows_of_a_quantised_embedding");
}

#[test]
fn heads_get_their_bias_and_norms() {
    let Some(d) = device("heads_get_their_bias_and_norms") else {
        return;
    };
    let mut errors = Errors::default();
    let mut random = Random(26);
    for head_size in [64, 96, 128] {
        let shape = AttentionShape {
            heads: 6,
            kv_heads: 2,
            head_size,
            window: None,
        };
        let width = shape.qkv_width();
        for (rows, biased, normed) in [(1, true, false), (5, false, true), (9, true, true)] {
            let bias = random.values(width);
            let norms = [(); 2].map(|()| random.values(head_size));
            let halves = random.halves(rows * width);
            let mut expected = floats(&halves);
            if biased {
                add_bias(&mut expected, width, &bias).unwrap();
            }
            if normed {
                let [query, key] = norms.clone().map(|weight| Norm {
                    weight,
                    epsilon: 1e-6,
                });
                norm_heads(&mut expected, width, shape, &query, &key).unwrap();
            }
            let qkv = d.buffer(&halves);
            let bias = d.buffer(&bias);
            let norms = norms.map(|norm| d.buffer(&norm));
            let heads = Heads {
                bias: biased.then_some(bias.all()),
                norms: normed.then_some([norms[0].all(), norms[1].all()]),
                epsilon: 1e-6,
            };
            d.kernels
                .finish_heads(&d.stream, rows, shape, qkv.all(), heads)
                .unwrap();
            let found = floats(&qkv.all().read().unwrap());
            let what = format!("{head_size}, {rows} rows");
            errors.compare(&what, &found, &expected, 1.0, 1e-3);
        }
    }
    errors.finish("heads_get_their_bias_and_norms");
}
