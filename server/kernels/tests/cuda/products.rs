use stoker_kernels::cuda::{
    AnyWeights, FewIn, FewOut, FewTile, Kernels, ManyOut, ManyShape, Squares,
};

use crate::support::{Device, Errors, Random, device, floats};

/// Rows of sums of f16 products are near this size; errors are counted against it.
pub fn size(k: usize) -> f32 {
    (k as f32).sqrt() / 3.0
}

/// `x * w^T` in f64, `[rows, m]`.
pub fn product(x: &[f32], w: &[f32], rows: usize, m: usize, k: usize) -> Vec<f32> {
    let mut out = Vec::with_capacity(rows * m);
    for n in 0..rows {
        let x = &x[n * k..(n + 1) * k];
        for row in 0..m {
            let w = &w[row * k..(row + 1) * k];
            let sum: f64 = x
                .iter()
                .zip(w)
                .map(|(&a, &b)| f64::from(a) * f64::from(b))
                .sum();
            out.push(sum as f32);
        }
    }
    out
}

fn silu(x: f32) -> f32 {
    x / (1.0 + (-x).exp())
}

/// silu(gate) x up of the interleaved outputs of a product.
pub fn gated(sums: &[f32], m: usize, scale: f32) -> Vec<f32> {
    sums.chunks_exact(m)
        .flat_map(|row| {
            (0..m / 2).map(move |i| {
                let at = i / 8 * 16 + i % 8;
                silu(row[at] * scale) * row[at + 8] * scale
            })
        })
        .collect()
}

#[test]
fn few_rows() {
    let Some(d) = device("few_rows") else { return };
    let mut errors = Errors::default();
    let mut random = Random(1);
    for (m, k) in [(208, 576), (1000, 1536), (1056, 128), (16, 64), (304, 3072)] {
        let halves = random.halves(m * k);
        let values = floats(&halves);
        let w = d.weights(m, k, &halves);
        for rows in [1, 3, 8, 9, 16, 17, 32] {
            if rows <= d.kernels.few_rows() {
                few(&d, &mut errors, &mut random, (rows, m, k), &values, &w);
            }
        }
    }
    // An odd number of outputs, and more tiles than blocks of threads.
    for (m, k) in [(1001, 64), (30_000, 128)] {
        let halves = random.halves(m * k);
        let w = d.weights(m, k, &halves);
        let values = floats(&halves);
        for rows in [2, 11] {
            let x = random.halves(rows * k);
            let expected = product(&floats(&x), &values, rows, m, k);
            logits(&d, &mut errors, (rows, m, k), &x, &w, &expected);
        }
    }
    errors.finish("few_rows");
}

/// All that can follow a product of few rows, in all ways that it can be cut.
fn few(
    d: &Device,
    errors: &mut Errors,
    random: &mut Random,
    (rows, m, k): (usize, usize, usize),
    values: &[f32],
    w: &stoker_kernels::cuda::Weights,
) {
    let x_halves = random.halves(rows * k);
    let expected = product(&floats(&x_halves), values, rows, m, k);
    let x = d.buffer(&x_halves);
    let run = |input: FewIn, out: FewOut, tile| {
        d.kernels
            .few(&d.stream, rows, input, w, out, Some(tile))
            .unwrap()
    };
    let plain = FewIn {
        x: x.all(),
        squares: None,
        epsilon: 1e-5,
    };

    // A norm's scale from parts of its squares.
    let parts = 7 + random.below(200);
    let squares: Vec<f32> = random
        .values(rows * parts)
        .iter()
        .map(|v| (v.abs() + 0.1) * k as f32 / parts as f32 / 3.0)
        .collect();
    let scales: Vec<f32> = squares
        .chunks_exact(parts)
        .map(|s| 1.0 / (s.iter().sum::<f32>() / k as f32 + 1e-5).sqrt())
        .collect();
    let squares = d.buffer(&squares);
    let normed = FewIn {
        squares: Some(Squares {
            values: squares.all(),
            parts,
        }),
        ..plain
    };
    let scaled: Vec<f32> = expected
        .chunks_exact(m)
        .zip(&scales)
        .flat_map(|(row, scale)| row.iter().map(move |v| v * scale))
        .collect();
    let gates: Vec<f32> = scaled
        .chunks_exact(m)
        .flat_map(|row| gated(row, m - m % 16, 1.0))
        .collect();
    let what = |out: &str, tile: FewTile| format!("{rows} x {k} to {m}, {tile:?} {out}");
    let size = size(k);

    let out = d.poisoned(rows * m);
    for tile in d.kernels.few_tiles(w, &FewOut::F16(out.all()), rows) {
        out.all().write(&vec![half::f16::NAN; rows * m]).unwrap();
        run(normed, FewOut::F16(out.all()), tile);
        let found = floats(&out.all().read().unwrap());
        errors.compare(&what("f16", tile), &found, &scaled, size, 2e-3);
    }
    let out = d.poisoned_f32(rows * m);
    for tile in d.kernels.few_tiles(w, &FewOut::F32(out.all()), rows) {
        for (input, wanted) in [(normed, &scaled), (plain, &expected)] {
            out.all().write(&vec![f32::NAN; rows * m]).unwrap();
            run(input, FewOut::F32(out.all()), tile);
            let found = out.all().read().unwrap();
            errors.compare(&what("f32", tile), &found, wanted, size, 1e-4);
        }
    }
    if m % 16 == 0 {
        let out = d.poisoned(rows * m / 2);
        for tile in d.kernels.few_tiles(w, &FewOut::GateUp(out.all()), rows) {
            out.all()
                .write(&vec![half::f16::NAN; rows * m / 2])
                .unwrap();
            run(normed, FewOut::GateUp(out.all()), tile);
            let found = floats(&out.all().read().unwrap());
            errors.compare(&what("gate_up", tile), &found, &gates, size, 3e-3);
        }
    }
    residual(
        d,
        errors,
        random,
        (rows, m, k),
        plain,
        w.into(),
        &expected,
        size,
    );
    logits(d, errors, (rows, m, k), &x_halves, w, &expected);
}

/// The residual with a product added, and what the next product finds of it. Outputs are of `size`.
#[allow(clippy::too_many_arguments, reason = "each is a part of the product")]
pub fn residual(
    d: &Device,
    errors: &mut Errors,
    random: &mut Random,
    (rows, m, k): (usize, usize, usize),
    plain: FewIn,
    w: AnyWeights,
    expected: &[f32],
    size: f32,
) {
    let before = random.values(rows * m);
    let norm = random.values(m);
    let residual = d.buffer(&before);
    let next_norm = d.buffer(&norm);
    let next = d.poisoned(rows * m);
    let next_squares = d.poisoned_f32(rows * Kernels::few_square_parts(m));
    let out = FewOut::Residual {
        residual: residual.all(),
        next_norm: next_norm.all(),
        next: next.all(),
        squares: next_squares.all(),
    };
    let after: Vec<f32> = before.iter().zip(expected).map(|(a, b)| a + b).collect();
    for tile in d.kernels.few_tiles(w, &out, rows) {
        let what = |out: &str| format!("{rows} x {k} to {m}, {tile:?} {out}");
        residual.all().write(&before).unwrap();
        next.all().write(&vec![half::f16::NAN; rows * m]).unwrap();
        let parts = d
            .kernels
            .few(&d.stream, rows, plain, w, out, Some(tile))
            .unwrap();
        let found = residual.all().read().unwrap();
        errors.compare(&what("residual"), &found, &after, size, 1e-4);
        let wanted: Vec<f32> = after
            .iter()
            .enumerate()
            .map(|(i, v)| v * norm[i % m])
            .collect();
        let found = floats(&next.all().read().unwrap());
        errors.compare(&what("next"), &found, &wanted, size, 2e-3);
        let sums: Vec<f32> = next_squares.all().read().unwrap()[..rows * parts]
            .chunks_exact(parts)
            .map(|s| s.iter().sum())
            .collect();
        let wanted: Vec<f32> = after
            .chunks_exact(m)
            .map(|row| row.iter().map(|v| v * v).sum())
            .collect();
        errors.compare(&what("squares"), &sums, &wanted, 1.0, 1e-3);
    }
}

/// Logits, and where they are looked for the highest of them.
fn logits(
    d: &Device,
    errors: &mut Errors,
    (rows, m, k): (usize, usize, usize),
    x: &[half::f16],
    w: &stoker_kernels::cuda::Weights,
    expected: &[f32],
) {
    let x = d.buffer(x);
    let input = FewIn {
        x: x.all(),
        squares: None,
        epsilon: 1e-5,
    };
    let logits = d.poisoned_f32(rows * m);
    let best = d.buffer(&vec![u64::MAX; rows * Kernels::few_best_parts(m)]);
    let out = FewOut::Logits {
        logits: logits.all(),
        best: best.all(),
    };
    for tile in d.kernels.few_tiles(w, &out, rows) {
        let what = format!("{rows} x {k} to {m}, {tile:?} logits");
        logits.all().write(&vec![f32::NAN; rows * m]).unwrap();
        let parts = d
            .kernels
            .few(&d.stream, rows, input, w, out, Some(tile))
            .unwrap();
        let found = logits.all().read().unwrap();
        errors.compare(&what, &found, expected, size(k), 1e-4);
        let best = best.all().read().unwrap();
        for (row, best) in best.chunks_exact(parts.max(1)).take(rows).enumerate() {
            if parts == 0 {
                continue;
            }
            let id = !best.iter().max().copied().unwrap() as u32 as usize;
            let row = &found[row * m..(row + 1) * m];
            let highest = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let wanted = row.iter().position(|v| *v == highest).unwrap();
            assert_eq!(id, wanted, "{what}: the highest");
        }
    }
}

#[test]
fn many_rows() {
    let Some(d) = device("many_rows") else { return };
    let mut errors = Errors::default();
    let mut random = Random(2);
    let mut shapes: Vec<ManyShape> = Vec::new();
    for parts in [1, 2, 3, 5] {
        if d.kernels.has_wgmma() {
            let few = [32, 64, 96, 128, 192, 256].map(|columns| (false, columns));
            for (rows_first, columns) in few.into_iter().chain([(true, 128), (true, 256)]) {
                shapes.push(ManyShape {
                    rows_first,
                    columns,
                    parts,
                });
            }
        } else {
            shapes.extend([64, 128].map(|columns| ManyShape {
                rows_first: true,
                columns,
                parts,
            }));
        }
    }
    for (m, k) in [(208, 576), (1000, 1536), (288, 128), (656, 320)] {
        let halves = random.halves(m * k);
        let values = floats(&halves);
        let w = d.weights(m, k, &halves);
        for rows in [1, 17, 64, 100, 200, 300] {
            let x_halves = random.halves(rows * k);
            let expected = product(&floats(&x_halves), &values, rows, m, k);
            let x = d.buffer(&x_halves);
            for &shape in &shapes {
                let what = format!("{rows} x {k} to {m}, {shape:?}");
                // Parts that this k can't be cut into evenly are refused.
                let steps = k.div_ceil(64);
                if steps.div_ceil(steps.div_ceil(shape.parts.min(steps))) != shape.parts {
                    continue;
                }
                let out = d.poisoned_f32(shape.parts * rows * m);
                d.kernels
                    .many(
                        &d.stream,
                        rows,
                        x.all(),
                        &w,
                        ManyOut::Sums(out.all()),
                        shape,
                    )
                    .unwrap();
                let parts = out.all().read().unwrap();
                let sums: Vec<f32> = (0..rows * m)
                    .map(|i| (0..shape.parts).map(|s| parts[s * rows * m + i]).sum())
                    .collect();
                errors.compare(&format!("{what} sums"), &sums, &expected, size(k), 1e-4);
                if shape.parts > 1 {
                    continue;
                }
                if shape.rows_first {
                    let out = d.poisoned(rows * m);
                    d.kernels
                        .many(&d.stream, rows, x.all(), &w, ManyOut::F16(out.all()), shape)
                        .unwrap();
                    errors.compare(
                        &format!("{what} f16"),
                        &floats(&out.all().read().unwrap()),
                        &expected,
                        size(k),
                        2e-3,
                    );
                }
                if m % 16 == 0 {
                    let out = d.poisoned(rows * m / 2);
                    d.kernels
                        .many(
                            &d.stream,
                            rows,
                            x.all(),
                            &w,
                            ManyOut::GateUp(out.all()),
                            shape,
                        )
                        .unwrap();
                    let gates = gated(&expected, m, 1.0);
                    errors.compare(
                        &format!("{what} gate_up"),
                        &floats(&out.all().read().unwrap()),
                        &gates,
                        size(k),
                        3e-3,
                    );
                }
            }
        }
    }
    errors.finish("many_rows");
}

/// Large enough that blocks of threads take several tiles each, and that tiles come in groups.
#[test]
fn many_rows_in_rounds() {
    let Some(d) = device("many_rows_in_rounds") else {
        return;
    };
    let mut errors = Errors::default();
    let mut random = Random(3);
    let (m, k, rows) = (5120, 256, 2304);
    let halves = random.halves(m * k);
    let x_halves = random.halves(rows * k);
    let w = d.weights(m, k, &halves);
    let x = d.buffer(&x_halves);
    let shape = d.kernels.many_shape(m, k, rows, false, true);
    let out = d.poisoned(rows * m);
    d.kernels
        .many(&d.stream, rows, x.all(), &w, ManyOut::F16(out.all()), shape)
        .unwrap();
    let found = floats(&out.all().read().unwrap());
    let (values, x_values) = (floats(&halves), floats(&x_halves));
    // A sample of the rows, and every element's presence.
    assert!(found.iter().all(|v| v.is_finite()));
    for _ in 0..40 {
        let row = random.below(rows);
        let expected = product(&x_values[row * k..(row + 1) * k], &values, 1, m, k);
        errors.compare(
            &format!("row {row}, {shape:?}"),
            &found[row * m..(row + 1) * m],
            &expected,
            size(k),
            2e-3,
        );
    }
    errors.finish("many_rows_in_rounds");
}
