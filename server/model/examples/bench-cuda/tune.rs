//! Products by themselves, and cuts of them tried inside the whole step.

use half::f16;
use stoker_kernels::cuda::{self, Buffer, FewTile, Stream};
use stoker_model::cuda::{Layer, Matrix, Tuning};

use crate::{Bench, CONTEXT, Error};

/// As [`Tuning::tiles`] has them.
const PRODUCTS: [&str; 5] = ["qkv", "output", "gate_up", "down", "head"];

/// Each product of a layer by itself, over all layers: bytes or operations against the limit.
pub fn products(bench: &Bench, stream: &Stream) -> Result<(), Error> {
    let gpu = bench.kernels.gpu();
    let config = &bench.config;
    let most = 8192;
    let x = Buffer::<f16>::zeroed(gpu, "a bench", most * config.inner)?;
    bench.kernels.fill(stream, x.all(), 77, 1.0)?;
    let out = Buffer::<f16>::zeroed(gpu, "a bench", most * config.inner)?;
    let sums = Buffer::<f32>::zeroed(gpu, "a bench", most * config.inner)?;
    let (begun, ended) = (cuda::Event::new(gpu)?, cuda::Event::new(gpu)?);
    println!(
        "products {:4}  rows    qkv         output        gate_up          down   TB/s (to 256 rows) or TFLOP/s",
        bench.dtype()
    );
    // Larger steps turn quantised weights into f16.
    let sizes = &[1, 8, 16, 32, 64, 128, 256, 512, 2048, 8192];
    for &rows in match bench.format {
        None => &sizes[..],
        Some(_) => &sizes[..7],
    } {
        print!("{rows:15}");
        for which in 0..4 {
            let run = |layer: &Layer| -> Result<(), Error> {
                let w = layer.matrices()[which];
                let k = &bench.kernels;
                let gate_up = which == 2;
                if rows <= 16 {
                    let input = cuda::FewIn {
                        x: x.all(),
                        squares: None,
                        epsilon: 1e-5,
                    };
                    let to = match gate_up {
                        true => cuda::FewOut::GateUp(out.all()),
                        false => cuda::FewOut::F16(out.all()),
                    };
                    k.few(stream, rows, input, w, to, None)?;
                    return Ok(());
                }
                let halves = which == 0 && rows > 384;
                let to = match (gate_up, halves) {
                    (true, _) => cuda::ManyOut::GateUp(out.all()),
                    (_, true) => cuda::ManyOut::F16(out.all()),
                    _ => cuda::ManyOut::Sums(sums.all()),
                };
                let (size, parts) = ((w.rows(), w.cols()), !gate_up && !halves);
                match w {
                    Matrix::F16(w) => {
                        let shape = k.many_shape(size.0, size.1, rows, parts, halves);
                        k.many(stream, rows, x.all(), w, to, shape)?;
                    }
                    Matrix::Quantised(w) => {
                        let shape = k.many_shape_quantised(size, w.format(), rows, parts);
                        k.many_quantised(stream, rows, x.all(), w, to, shape)?;
                    }
                }
                Ok(())
            };
            let mut best = f64::INFINITY;
            for _ in 0..4 {
                stream.record(&begun)?;
                for layer in &bench.weights.layers {
                    run(layer)?;
                }
                stream.record(&ended)?;
                ended.synchronize()?;
                best = best.min(ended.since(&begun)?.as_secs_f64() / config.layers as f64);
            }
            let w = bench.weights.layers[0].matrices()[which];
            let amount = match rows <= 256 {
                true => w.bytes() as f64,
                false => w.bytes() as f64 * rows as f64,
            };
            print!(" {:7.1} us {:5.2}", best * 1e6, amount / best / 1e12);
        }
        println!();
    }
    Ok(())
}

/// Cuts of the products, each tried inside the whole step.
pub fn tune(bench: &Bench) -> Result<(), Error> {
    let measure = |batch, tuning| -> Result<f64, Error> {
        let executor = bench.executor(batch, 512, 1024, Some(tuning))?;
        Ok(bench.decode(executor, batch, CONTEXT)?.1)
    };
    for batch in [1, 8, 16] {
        let base = Tuning::best();
        println!(
            "tune {} batch {batch}: as it is {:.3} ms",
            bench.dtype(),
            measure(batch, base)? * 1e3
        );
        for (which, sizes) in [
            (0, &[24, 32, 40, 48][..]),
            (1, &[16, 24, 32, 40, 48]),
            (2, &[32, 64, 128]),
            (3, &[16, 24, 32, 40, 48]),
        ] {
            print!("  {}:", PRODUCTS[which]);
            for &outputs in sizes {
                // That one is compiled for f16 alone.
                if outputs == 48 && bench.weights.is_quantised() {
                    continue;
                }
                let mut tuning = base;
                tuning.tiles[which] = Some(FewTile::Thin { outputs });
                print!(" {outputs}: {:.3}", measure(batch, tuning)? * 1e3);
            }
            println!();
        }
    }
    Ok(())
}
