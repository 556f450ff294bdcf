//! Where a step's time goes: kernels by class, beside what the memory's rate allows.

use std::sync::{
    Arc, Mutex, PoisonError,
    atomic::{AtomicU32, Ordering},
};

use stoker_engine::executor::StepBatch;
use stoker_kernels::cuda::{Buffer, CudaError, Event, Gpu, Marks, Stream};

use super::{Forward, Matrix};

/// One class of kernels over the steps that were measured.
#[derive(Clone, Debug, PartialEq)]
pub struct KernelClass {
    pub class: &'static str,
    /// Time of the device, in seconds.
    pub seconds: f64,
    /// Bytes of weights and of keys and values that had to be read.
    pub bytes: f64,
    /// Operations of products and attention.
    pub flops: f64,
}

/// Steps whose kernels were timed.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Breakdown {
    pub steps: u32,
    /// Time of the device for them: more than such steps take otherwise, where a kernel begins
    /// before the one before it has ended.
    pub seconds: f64,
    /// In the order in which a step meets them.
    pub classes: Vec<KernelClass>,
}

impl Breakdown {
    fn class(&mut self, class: &'static str) -> &mut KernelClass {
        let at = self.classes.iter().position(|c| c.class == class);
        let at = at.unwrap_or_else(|| {
            self.classes.push(KernelClass {
                class,
                seconds: 0.0,
                bytes: 0.0,
                flops: 0.0,
            });
            self.classes.len() - 1
        });
        &mut self.classes[at]
    }
}

/// What the profiler and the executor share.
#[derive(Debug, Default)]
pub(super) struct Probe {
    /// Steps still to be measured.
    wanted: AtomicU32,
    found: Mutex<Breakdown>,
}

impl Probe {
    /// Whether the next step is to be measured.
    pub(super) fn takes_step(&self) -> bool {
        let less = |wanted: u32| wanted.checked_sub(1);
        self.wanted
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, less)
            .is_ok()
    }

    /// Takes in a measured step that began at `begun`; all its marks have passed.
    pub(super) fn add(
        &self,
        begun: &Event,
        marks: &Marks,
        work: &[Work],
        seconds: f64,
    ) -> Result<(), CudaError> {
        let mut found = self.found.lock().unwrap_or_else(PoisonError::into_inner);
        found.steps += 1;
        found.seconds += seconds;
        let mut before = begun;
        for (class, event) in marks {
            found.class(class).seconds += event.since(before)?.as_secs_f64();
            before = event;
        }
        for work in work {
            let class = found.class(work.class);
            class.bytes += work.bytes;
            class.flops += work.flops;
        }
        Ok(())
    }
}

/// Work of a class in one step.
#[derive(Debug)]
pub(super) struct Work {
    class: &'static str,
    bytes: f64,
    flops: f64,
}

impl Work {
    /// Of each class of products, and of attention.
    pub(super) fn of(forward: &Forward, batch: &StepBatch) -> Vec<Self> {
        let weights = forward.weights();
        let tokens: usize = batch.rows.iter().map(|row| row.tokens.len()).sum();
        let samples = batch.rows.iter().filter(|r| r.sample.is_some()).count();
        let layers = weights.layers.len() as f64;
        let product = |class, matrix: &Matrix, times: f64, rows: usize| Self {
            class,
            bytes: times * matrix.bytes() as f64,
            flops: times * 2.0 * (rows * matrix.rows() * matrix.cols()) as f64,
        };
        let mut all: Vec<Self> = ["qkv", "output", "gate_up", "down"]
            .into_iter()
            .zip(weights.layers.iter().flat_map(|layer| layer.matrices()))
            .map(|(class, matrix)| product(class, matrix, layers, tokens))
            .collect();
        if samples > 0 {
            all.push(product("head", weights.head(), 1.0, samples));
        }
        let shape = forward.config().attention;
        let (mut read, mut pairs) = (0.0, 0.0);
        for row in &batch.rows {
            let (start, new) = (f64::from(row.start), row.tokens.len() as f64);
            read += start + new;
            pairs += new * start + new * (new + 1.0) / 2.0;
        }
        let of_token = (2 * size_of::<u16>() * shape.kv_heads * shape.head_size) as f64;
        all.push(Self {
            class: "attention",
            bytes: layers * of_token * read,
            flops: layers * 4.0 * shape.out_width() as f64 * pairs,
        });
        all
    }
}

/// Profiles the executor that it was taken from.
#[derive(Clone, Debug)]
pub struct GpuProfiler {
    pub(super) gpu: Arc<Gpu>,
    pub(super) probe: Arc<Probe>,
    pub(super) copy_rate: f64,
}

impl GpuProfiler {
    /// Begins (or ends) what a profiler that was started to wait records.
    pub fn record(&self, on: bool) -> Result<(), CudaError> {
        self.gpu.make_current()?;
        self.gpu.profile(on)
    }

    /// Has the kernels of the next steps timed.
    pub fn break_down(&self, steps: u32) {
        let mut found = self
            .probe
            .found
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        *found = Breakdown::default();
        self.probe.wanted.store(steps, Ordering::Relaxed);
    }

    /// What has been found since; no further steps are measured where `enough`.
    pub fn found(&self, enough: bool) -> Breakdown {
        if enough {
            self.probe.wanted.store(0, Ordering::Relaxed);
        }
        let found = self
            .probe
            .found
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        found.clone()
    }

    /// Bytes a second that a copy moves on this card, counting those read and those written.
    pub fn copy_rate(&self) -> f64 {
        self.copy_rate
    }
}

/// Bytes a second that the best of several copies of `bytes` moves, counting those read and those
/// written. Takes twice as much memory for that long.
pub fn copy_rate(gpu: &Arc<Gpu>, stream: &Stream, bytes: usize) -> Result<f64, CudaError> {
    let what = "measuring the memory's rate";
    let from = Buffer::<u8>::zeroed(gpu, what, bytes)?;
    let to = Buffer::<u8>::zeroed(gpu, what, bytes)?;
    let (begun, ended) = (Event::new(gpu)?, Event::new(gpu)?);
    let mut best = f64::INFINITY;
    for _ in 0..8 {
        stream.record(&begun)?;
        stream.copy(from.all(), to.all())?;
        stream.record(&ended)?;
        ended.synchronize()?;
        best = best.min(ended.since(&begun)?.as_secs_f64());
    }
    Ok(2.0 * bytes as f64 / best)
}
