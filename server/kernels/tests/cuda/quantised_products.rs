//! Products with weights of every format.

use half::f16;
use stoker_kernels::cuda::{FewIn, FewOut, Format, Kernels, ManyOut, Quantised, Squares};

use crate::{
    products::{gated, product, residual, size},
    quantised::made,
    support::{Device, Errors, Random, device, floats},
};

/// A test of each form and format: sanitizers take hours, side by side minutes.
macro_rules! products_of {
    ($($name:ident: $format:expr),*) => {$(
        mod $name {
            use super::*;

            #[test]
            fn few_rows() {
                products_of_few_rows(concat!(stringify!($name), "::few_rows"), $format);
            }

            #[test]
            fn many_rows() {
                products_of_many_rows(concat!(stringify!($name), "::many_rows"), $format);
            }
        }
    )*};
}

products_of! {
    int8: Format::INT8,
    int4: Format::INT4,
    int8_by_32: Format::INT8_BY_32,
    int4_by_32: Format::INT4_BY_32,
    int8_by_16: Format::INT8_BY_16
}

fn products_of_few_rows(test: &str, format: Format) {
    let Some(d) = device(test) else { return };
    let mut errors = Errors::default();
    let mut random = Random(22);
    let sizes = [
        (208, 640),
        (1008, 1536),
        (1056, 128),
        (16, 256),
        (32, 192),
        (960, 576),
        (304, 3072),
    ];
    for (m, k) in sizes.into_iter().filter(|&(m, k)| format.fits(m, k)) {
        let made = made(&d, &mut random, (m, k), format);
        // On Hopper a unit of one scale has its products scaled after they are summed up, not its
        // weights.
        let after = d.kernels.has_wgmma() && format.unit() == format.group();
        let expected = if after { made.values } else { made.halves };
        let w = made.w;
        for rows in [1, 3, 8, 9, 16] {
            let x_halves = random.halves(rows * k);
            let sums = product(&floats(&x_halves), &expected, rows, m, k);
            let x = d.buffer(&x_halves);
            let plain = FewIn {
                x: x.all(),
                squares: None,
                epsilon: 1e-5,
            };
            let what = format!("{format:?}: {rows} x {k} to {m}");
            few(&d, &mut errors, &what, (rows, m, k), &sums, plain, &w);
        }
    }
    errors.finish(test);
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

fn products_of_many_rows(test: &str, format: Format) {
    let Some(d) = device(test) else { return };
    let mut errors = Errors::default();
    let mut random = Random(23);
    let sizes = [(208, 384), (320, 2048), (1056, 128), (208, 576)];
    for (m, k) in sizes.into_iter().filter(|&(m, k)| format.fits(m, k)) {
        let made = made(&d, &mut random, (m, k), format);
        let (expected, w) = (made.halves, made.w);
        for rows in [1, 17, 33, 64, 65, 200] {
            let x = random.halves(rows * k);
            let sums = product(&floats(&x), &expected, rows, m, k);
            let x = d.buffer(&x);
            let what = format!("{format:?}: {rows} x {k} to {m}");
            let size = size(k) / 10.0;
            let run = |out: ManyOut, parts: bool| {
                let shape = d.kernels.many_shape_quantised((m, k), format, rows, parts);
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
    errors.finish(test);
}
