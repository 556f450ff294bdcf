//! The order of work: streams, events and graphs.
#![allow(unsafe_code)]

use std::{cell::RefCell, ptr, sync::Arc, time::Duration};

use cudarc::driver::{
    result::{self, stream::StreamKind},
    sys,
};

use super::{
    driver::Gpu,
    error::{Context, CudaError},
    memory::{Pinned, Plain, Slice},
};
use crate::error::check;

/// `CU_EVENT_RECORD_EXTERNAL`: an event that is recorded each time that a graph comes past it.
const RECORD_EXTERNAL: u32 = 1;

/// Work that is done in order.
#[derive(Debug)]
pub struct Stream {
    gpu: Arc<Gpu>,
    stream: sys::CUstream,
    /// What [`Stream::mark`] has noted; `None`: nothing is to be noted.
    marks: RefCell<Option<Marks>>,
}

/// Moments in a stream, each with what ended there.
pub type Marks = Vec<(&'static str, Event)>;

// SAFETY: a handle that any thread may use.
unsafe impl Send for Stream {}

impl Stream {
    pub fn new(gpu: &Arc<Gpu>) -> Result<Self, CudaError> {
        let stream = result::stream::create(StreamKind::NonBlocking).context("making a stream")?;
        Ok(Self {
            gpu: gpu.clone(),
            stream,
            marks: RefCell::new(None),
        })
    }

    pub fn gpu(&self) -> &Arc<Gpu> {
        &self.gpu
    }

    pub(crate) fn raw(&self) -> sys::CUstream {
        self.stream
    }

    pub fn synchronize(&self) -> Result<(), CudaError> {
        // SAFETY: the stream lives.
        unsafe { result::stream::synchronize(self.stream) }.context("waiting for a step")
    }

    /// Copies the first values of `from`, which the host leaves alone until that is done.
    pub fn upload<T: Plain>(
        &self,
        from: &Pinned<T>,
        count: usize,
        to: Slice<T>,
    ) -> Result<(), CudaError> {
        if count > from.len() {
            check("values to upload", count, from.len())?;
        }
        let to = to.at_least("room for an upload", count)?;
        // SAFETY: both sides have `count` values.
        unsafe {
            sys::cuMemcpyHtoDAsync_v2(to, from.address(), count * size_of::<T>(), self.stream)
        }
        .result()
        .context("copying a step to the GPU")
    }

    /// Copies the first `count` runs of `run` bytes to `to`, where each begins `pitch` bytes after the
    /// one before; see [`Self::upload`].
    pub fn upload_runs(
        &self,
        from: &Pinned<u8>,
        (count, run): (usize, usize),
        to: Slice<u8>,
        pitch: usize,
    ) -> Result<(), CudaError> {
        if count * run > from.len() {
            check("bytes to upload", count * run, from.len())?;
        }
        let room = count.saturating_sub(1) * pitch + run;
        let copy = sys::CUDA_MEMCPY2D_v2 {
            srcXInBytes: 0,
            srcY: 0,
            srcMemoryType: sys::CUmemorytype::CU_MEMORYTYPE_HOST,
            srcHost: from.address(),
            srcDevice: 0,
            srcArray: ptr::null_mut(),
            srcPitch: run,
            dstXInBytes: 0,
            dstY: 0,
            dstMemoryType: sys::CUmemorytype::CU_MEMORYTYPE_DEVICE,
            dstHost: ptr::null_mut(),
            dstDevice: to.at_least("room for an upload", room)?,
            dstArray: ptr::null_mut(),
            dstPitch: pitch,
            WidthInBytes: run,
            Height: count,
        };
        // SAFETY: both sides have all runs, checked above.
        unsafe { sys::cuMemcpy2DAsync_v2(&copy, self.stream) }
            .result()
            .context("copying weights to the GPU")
    }

    /// Copies within the GPU.
    pub fn copy<T: Plain>(&self, from: Slice<T>, to: Slice<T>) -> Result<(), CudaError> {
        check("values to copy", from.len(), to.len())?;
        // SAFETY: both sides have as many values.
        unsafe {
            result::memcpy_dtod_async(
                to.pointer(),
                from.pointer(),
                from.len() * size_of::<T>(),
                self.stream,
            )
        }
        .context("copying within the GPU")
    }

    /// Records what `work` puts into the stream as a graph, instead of running it.
    pub fn capture<E: From<CudaError>>(
        &self,
        work: impl FnOnce() -> Result<(), E>,
    ) -> Result<Graph, E> {
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream lives and isn't being captured: `work` gets no handle to begin with.
        unsafe { result::stream::begin_capture(self.stream, mode) }.context("recording a graph")?;
        let done = work();
        // SAFETY: begun above. Ended also when `work` failed, or the stream would stay unusable.
        let graph =
            unsafe { result::stream::end_capture(self.stream) }.context("ending a recording");
        done?;
        let graph = graph?;
        // SAFETY: the graph was just made.
        let executable =
            unsafe { result::graph::instantiate(graph, sys::CUgraphInstantiate_flags(0)) }
                .context("making a graph");
        // SAFETY: what runs is a copy.
        let _ = unsafe { result::graph::destroy(graph) };
        let executable = executable?;
        // SAFETY: both live.
        unsafe { result::graph::upload(executable, self.stream) }.context("uploading a graph")?;
        Ok(Graph {
            gpu: self.gpu.clone(),
            graph: executable,
        })
    }

    pub fn launch(&self, graph: &Graph) -> Result<(), CudaError> {
        // SAFETY: both live.
        unsafe { result::graph::launch(graph.graph, self.stream) }.context("launching a graph")
    }

    pub fn record(&self, event: &Event) -> Result<(), CudaError> {
        // SAFETY: both live.
        unsafe { result::event::record(event.event, self.stream) }.context("recording an event")
    }

    /// Notes marks until they are taken. Meanwhile no kernel begins before the one before it has
    /// ended.
    pub fn note_marks(&self) {
        *self.marks.borrow_mut() = Some(Marks::new());
    }

    /// Marks the end of `what`, the work since the last mark; does nothing if none are noted.
    pub fn mark(&self, what: &'static str) -> Result<(), CudaError> {
        if let Some(marks) = self.marks.borrow_mut().as_mut() {
            let event = Event::new(&self.gpu)?;
            // SAFETY: both live. Also while a graph is recorded, of which it becomes a part.
            unsafe {
                sys::cuEventRecordWithFlags(event.event, self.stream, RECORD_EXTERNAL).result()
            }
            .context("recording an event")?;
            marks.push((what, event));
        }
        Ok(())
    }

    /// Ends what `note_marks` began.
    pub fn take_marks(&self) -> Marks {
        self.marks.take().unwrap_or_default()
    }

    pub(crate) fn notes_marks(&self) -> bool {
        self.marks.borrow().is_some()
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if self.gpu.make_current().is_ok() {
            // SAFETY: made in `new` and destroyed here alone; work under way goes on to its end.
            let _ = unsafe { result::stream::destroy(self.stream) };
        }
    }
}

/// A recorded step.
#[derive(Debug)]
pub struct Graph {
    gpu: Arc<Gpu>,
    graph: sys::CUgraphExec,
}

// SAFETY: a handle that one thread at a time uses: methods that launch take the stream's thread.
unsafe impl Send for Graph {}

impl Drop for Graph {
    fn drop(&mut self) {
        if self.gpu.make_current().is_ok() {
            // SAFETY: made in `capture` and destroyed here alone.
            let _ = unsafe { result::graph::exec_destroy(self.graph) };
        }
    }
}

/// A moment in a stream.
#[derive(Debug)]
pub struct Event {
    gpu: Arc<Gpu>,
    event: sys::CUevent,
}

// SAFETY: a handle that any thread may use.
unsafe impl Send for Event {}

impl Event {
    /// One whose waiters sleep.
    pub fn new(gpu: &Arc<Gpu>) -> Result<Self, CudaError> {
        let flags = sys::CUevent_flags::CU_EVENT_BLOCKING_SYNC;
        let event = result::event::create(flags).context("making an event")?;
        Ok(Self {
            gpu: gpu.clone(),
            event,
        })
    }

    pub fn synchronize(&self) -> Result<(), CudaError> {
        // SAFETY: the event lives.
        unsafe { result::event::synchronize(self.event) }.context("waiting for a step")
    }

    /// Time from another event to this one; both have passed.
    pub fn since(&self, earlier: &Event) -> Result<Duration, CudaError> {
        // SAFETY: both events live.
        let milliseconds = unsafe { result::event::elapsed(earlier.event, self.event) }
            .context("timing a step")?;
        Ok(Duration::from_secs_f64(
            f64::from(milliseconds.max(0.0)) / 1e3,
        ))
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        if self.gpu.make_current().is_ok() {
            // SAFETY: made in `new` and destroyed here alone.
            let _ = unsafe { result::event::destroy(self.event) };
        }
    }
}
