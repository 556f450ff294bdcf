//! The GPU, random values, and comparing.

use std::sync::Arc;

use half::f16;
use stoker_kernels::cuda::{Buffer, CudaError, Gpu, GpuOptions, Kernels, Plain, Stream, Weights};

pub struct Device {
    pub gpu: Arc<Gpu>,
    pub kernels: Kernels,
    pub stream: Stream,
}

/// The GPU; `None`, and a word about it, where there is none.
pub fn device(test: &str) -> Option<Device> {
    match Gpu::open(GpuOptions::from_environment()) {
        Ok(gpu) => {
            let kernels = Kernels::load(&gpu).unwrap();
            let stream = Stream::new(&gpu).unwrap();
            Some(Device {
                gpu,
                kernels,
                stream,
            })
        }
        Err(error @ (CudaError::NoDriver | CudaError::NoKernels | CudaError::NoDevice)) => {
            eprintln!("SKIPPED {test}: {error}");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

impl Device {
    pub fn buffer<T: Plain>(&self, values: &[T]) -> Buffer<T> {
        Buffer::from_slice(&self.gpu, "a test", values).unwrap()
    }

    /// Room for results, filled with what no kernel would write.
    pub fn poisoned(&self, len: usize) -> Buffer<f16> {
        self.buffer(&vec![f16::NAN; len])
    }

    pub fn poisoned_f32(&self, len: usize) -> Buffer<f32> {
        self.buffer(&vec![f32::NAN; len])
    }

    pub fn weights(&self, rows: usize, cols: usize, values: &[f16]) -> Weights {
        let weights = Weights::zeroed(&self.gpu, rows, cols).unwrap();
        weights.values().write(values).unwrap();
        weights
    }
}

/// splitmix64.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, end: usize) -> usize {
        (self.next() % end as u64) as usize
    }

    pub fn value(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1u32 << 23) as f32 - 1.0
    }

    pub fn values(&mut self, len: usize) -> Vec<f32> {
        (0..len).map(|_| self.value()).collect()
    }

    pub fn halves(&mut self, len: usize) -> Vec<f16> {
        (0..len).map(|_| f16::from_f32(self.value())).collect()
    }
}

pub fn floats(values: &[f16]) -> Vec<f32> {
    values.iter().map(|v| v.to_f32()).collect()
}

/// What was found against what was expected, over all comparisons of a test.
#[derive(Default)]
pub struct Errors {
    pub compared: usize,
    pub largest: f32,
    failures: Vec<String>,
}

impl Errors {
    /// Differences count relative to the larger of `size` and the expected value.
    pub fn compare(&mut self, what: &str, found: &[f32], expected: &[f32], size: f32, most: f32) {
        assert_eq!(found.len(), expected.len(), "{what}");
        let mut wrong = 0;
        let mut worst = (0.0, 0);
        for (i, (f, e)) in found.iter().zip(expected).enumerate() {
            let error = (f - e).abs() / e.abs().max(size);
            if error > worst.0 || error.is_nan() {
                worst = (error, i);
            }
            wrong += usize::from(error > most || error.is_nan());
        }
        self.compared += found.len();
        if worst.0 > self.largest || worst.0.is_nan() {
            self.largest = worst.0;
        }
        if wrong > 0 {
            self.failures.push(format!(
                "{what}: {wrong} of {} are off by more than {most}; element {}: {} instead of {}",
                found.len(),
                worst.1,
                found[worst.1],
                expected[worst.1]
            ));
        }
    }

    /// Prints what was compared, and fails if anything was wrong.
    pub fn finish(self, test: &str) {
        eprintln!(
            "{test}: {} values compared, largest error {:.2e}",
            self.compared, self.largest
        );
        assert!(
            self.failures.is_empty(),
            "{} failures:\n{}",
            self.failures.len(),
            self.failures[..self.failures.len().min(12)].join("\n")
        );
    }
}
