use half::f16;
use stoker_kernels::{
    cuda::{NormRows, PREVIOUS, StepRow, StepSample},
    reference,
};

use crate::support::{Errors, Random, device, floats};

#[test]
fn embedding_and_its_norm() {
    let Some(d) = device("embedding_and_its_norm") else {
        return;
    };
    let mut errors = Errors::default();
    let mut random = Random(4);
    for width in [64, 576, 3072] {
        let vocab = 50;
        let table = random.halves(vocab * width);
        let norm = random.values(width);
        let weights = d.weights(vocab, width, &table);
        let previous = d.buffer(&[3u32, 49, 7, 11]);
        let tokens = [0, 49, PREVIOUS | 1, 13, PREVIOUS | 3, 1];
        let ids = [0, 49, 49, 13, 11, 1];
        let rows: Vec<StepRow> = tokens
            .iter()
            .map(|&token| StepRow {
                token,
                ..StepRow::default()
            })
            .collect();
        let rows = d.buffer(&rows);
        let residual = d.poisoned_f32(ids.len() * width);
        let normed = d.poisoned(ids.len() * width);
        let norm_weights = d.buffer(&norm);
        d.kernels
            .embed(
                &d.stream,
                rows.all(),
                previous.all(),
                &weights,
                residual.all(),
                norm_weights.all(),
                normed.all(),
                1e-5,
            )
            .unwrap();
        let (residual, normed) = (
            residual.all().read().unwrap(),
            floats(&normed.all().read().unwrap()),
        );
        for (i, id) in ids.into_iter().enumerate() {
            let row = floats(&table[id * width..(id + 1) * width]);
            errors.compare(
                "embedding",
                &residual[i * width..(i + 1) * width],
                &row,
                1.0,
                0.0,
            );
            let expected = reference::norm(&row, &norm, 1e-5);
            errors.compare(
                "its norm",
                &normed[i * width..(i + 1) * width],
                &expected,
                0.1,
                1e-3,
            );
        }
    }
    errors.finish("embedding_and_its_norm");
}

#[test]
fn norms_of_sums() {
    let Some(d) = device("norms_of_sums") else {
        return;
    };
    let mut errors = Errors::default();
    let mut random = Random(5);
    for (width, rows, parts) in [(64, 1, 0), (576, 5, 1), (3072, 9, 3), (8192, 2, 2)] {
        let before = random.values(rows * width);
        let sums = random.values(parts * rows * width);
        let norm = random.values(width);
        let after: Vec<f32> = (0..rows * width)
            .map(|i| before[i] + (0..parts).map(|s| sums[s * rows * width + i]).sum::<f32>())
            .collect();
        let expected: Vec<f32> = after
            .chunks_exact(width)
            .flat_map(|row| reference::norm(row, &norm, 1e-5))
            .collect();
        let (residual, sums, weights) = (d.buffer(&before), d.buffer(&sums), d.buffer(&norm));
        let picks: Vec<usize> = vec![rows - 1, 0, rows / 2];
        let samples: Vec<StepSample> = picks
            .iter()
            .map(|&row| StepSample {
                row: row as u32,
                ..StepSample::default()
            })
            .collect();
        let samples = d.buffer(&samples);
        for samples in [Some(samples.all()), None] {
            let out = d.poisoned(rows.max(3) * width);
            d.kernels
                .norm(
                    &d.stream,
                    &NormRows {
                        residual: residual.all(),
                        sums: sums.all(),
                        parts,
                        rows,
                        samples,
                        weights: weights.all(),
                        epsilon: 1e-5,
                        out: out.all(),
                    },
                )
                .unwrap();
            let found = floats(&out.all().read().unwrap());
            let wanted: Vec<f16> = match samples {
                Some(_) => picks
                    .iter()
                    .flat_map(|&row| {
                        expected[row * width..(row + 1) * width]
                            .iter()
                            .map(|&v| f16::from_f32(v))
                    })
                    .collect(),
                None => expected.iter().map(|&v| f16::from_f32(v)).collect(),
            };
            errors.compare("norm", &found[..wanted.len()], &floats(&wanted), 0.1, 1e-3);
        }
        errors.compare(
            "residual",
            &residual.all().read().unwrap(),
            &after,
            1.0,
            1e-6,
        );
    }
    errors.finish("norms_of_sums");
}

#[test]
fn sums_of_parts() {
    let Some(d) = device("sums_of_parts") else {
        return;
    };
    let mut errors = Errors::default();
    let mut random = Random(8);
    for (count, parts) in [(4, 1), (5120, 3), (102_400, 8)] {
        let values = random.values(parts * count);
        let expected: Vec<f32> = (0..count)
            .map(|i| (0..parts).map(|s| values[s * count + i]).sum())
            .collect();
        let (sums, out) = (d.buffer(&values), d.poisoned(count));
        d.kernels
            .sum(&d.stream, sums.all(), parts, out.all(), count)
            .unwrap();
        let found = floats(&out.all().read().unwrap());
        errors.compare("sums", &found, &expected, 1.0, 1e-3);
    }
    errors.finish("sums_of_parts");
}
