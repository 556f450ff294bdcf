//! Memory of the GPU, and of the host where the GPU can reach it.
#![allow(unsafe_code)]

use std::{ffi::c_void, marker::PhantomData, ops::Range, sync::Arc};

use cudarc::driver::{result, sys};
use half::f16;

use super::{
    driver::Gpu,
    error::{Context, CudaError},
    step::{StepRow, StepSample, StepSequence, StepTile},
};
use crate::error::check;

/// Types without padding, references or invalid values.
///
/// # Safety
/// Any bytes are a valid value.
pub unsafe trait Plain: Copy + Send + Sync + 'static {}
// SAFETY: numbers.
unsafe impl Plain for u8 {}
// SAFETY: as above.
unsafe impl Plain for u32 {}
// SAFETY: as above.
unsafe impl Plain for u64 {}
// SAFETY: as above.
unsafe impl Plain for f32 {}
// SAFETY: as above.
unsafe impl Plain for [f32; 2] {}
// SAFETY: as above.
unsafe impl Plain for f16 {}
// SAFETY: structures of numbers without padding.
unsafe impl Plain for StepRow {}
// SAFETY: as above.
unsafe impl Plain for StepSequence {}
// SAFETY: as above.
unsafe impl Plain for StepSample {}
// SAFETY: as above.
unsafe impl Plain for StepTile {}

/// Memory of the GPU, freed when dropped.
#[derive(Debug)]
pub struct Buffer<T> {
    gpu: Arc<Gpu>,
    pointer: sys::CUdeviceptr,
    len: usize,
    values: PhantomData<T>,
}

/// A part of a [`Buffer`].
#[derive(Clone, Copy, Debug)]
pub struct Slice<'a, T> {
    pointer: sys::CUdeviceptr,
    len: usize,
    values: PhantomData<&'a T>,
}

impl<T: Plain> Buffer<T> {
    /// Zeros. `what` says in an error what the memory was for.
    pub fn zeroed(gpu: &Arc<Gpu>, what: &'static str, len: usize) -> Result<Self, CudaError> {
        let bytes = (len * size_of::<T>()).max(1);
        // SAFETY: plain allocation.
        let pointer = unsafe { result::malloc_sync(bytes) }.map_err(|error| {
            match (error.0, gpu.memory()) {
                (sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY, Ok((free, total))) => CudaError::Memory {
                    what,
                    bytes: bytes as u64,
                    free,
                    total,
                },
                _ => Err::<(), _>(error)
                    .context(what)
                    .err()
                    .unwrap_or(CudaError::NoDevice),
            }
        })?;
        let buffer = Self {
            gpu: gpu.clone(),
            pointer,
            len,
            values: PhantomData,
        };
        // SAFETY: the memory was just allocated with this size.
        unsafe { result::memset_d8_sync(pointer, 0, bytes) }.context("zeroing memory")?;
        // Neither this nor a copy is over when its call returns, and streams don't wait for it.
        gpu.synchronize()?;
        Ok(buffer)
    }

    pub fn from_slice(gpu: &Arc<Gpu>, what: &'static str, values: &[T]) -> Result<Self, CudaError> {
        let buffer = Self::zeroed(gpu, what, values.len())?;
        buffer.all().write(values)?;
        Ok(buffer)
    }

    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub fn bytes(&self) -> u64 {
        (self.len * size_of::<T>()) as u64
    }

    pub fn all(&self) -> Slice<'_, T> {
        Slice {
            pointer: self.pointer,
            len: self.len,
            values: PhantomData,
        }
    }

    pub fn slice(&self, range: Range<usize>) -> Result<Slice<'_, T>, CudaError> {
        self.all().slice(range)
    }
}

impl<T> Drop for Buffer<T> {
    fn drop(&mut self) {
        if self.gpu.make_current().is_ok() {
            // SAFETY: allocated in `zeroed` and freed here alone; the driver waits for work that
            // is under way.
            let _ = unsafe { result::free_sync(self.pointer) };
        }
    }
}

impl<'a, T: Plain> Slice<'a, T> {
    pub(crate) fn pointer(self) -> sys::CUdeviceptr {
        self.pointer
    }

    /// Where it begins in the GPU's memory, for other libraries.
    pub fn address(self) -> u64 {
        self.pointer
    }

    pub fn len(self) -> usize {
        self.len
    }

    pub fn is_empty(self) -> bool {
        self.len == 0
    }

    pub fn slice(self, range: Range<usize>) -> Result<Slice<'a, T>, CudaError> {
        if range.start > range.end || range.end > self.len {
            check("a part of a buffer", range.end, self.len)?;
        }
        Ok(Slice {
            pointer: self.pointer + (range.start * size_of::<T>()) as u64,
            len: range.len(),
            values: PhantomData,
        })
    }

    /// The same memory, byte by byte.
    pub fn as_bytes(self) -> Slice<'a, u8> {
        Slice {
            pointer: self.pointer,
            len: self.len * size_of::<T>(),
            values: PhantomData,
        }
    }

    /// Checks that there are at least so many values.
    pub(crate) fn at_least(self, what: &'static str, len: usize) -> Result<u64, CudaError> {
        if self.len < len {
            check(what, self.len, len)?;
        }
        Ok(self.pointer)
    }

    /// Copies values in, and waits for that.
    pub fn write(self, values: &[T]) -> Result<(), CudaError> {
        check("values to write", values.len(), self.len)?;
        // SAFETY: both sides have this many values.
        unsafe { result::memcpy_htod_sync(self.pointer, values) }.context("copying to the GPU")?;
        result::ctx::synchronize().context("waiting for the GPU")
    }

    /// Copies the values out, after all work that was begun.
    pub fn read(self) -> Result<Vec<T>, CudaError> {
        result::ctx::synchronize().context("waiting for the GPU")?;
        // SAFETY: zeros are valid values (`Plain`).
        let mut values = vec![unsafe { std::mem::zeroed() }; self.len];
        // SAFETY: both sides have this many values.
        unsafe { result::memcpy_dtoh_sync(&mut values, self.pointer) }
            .context("copying from the GPU")?;
        Ok(values)
    }
}

impl<'a> Slice<'a, u8> {
    /// `count` values of another type that begin at byte `offset`.
    pub fn cast<T: Plain>(self, offset: usize, count: usize) -> Result<Slice<'a, T>, CudaError> {
        let bytes = self.slice(offset..offset + count * size_of::<T>())?;
        check(
            "alignment of a part of a buffer",
            bytes.pointer as usize % align_of::<T>(),
            0,
        )?;
        Ok(Slice {
            pointer: bytes.pointer,
            len: count,
            values: PhantomData,
        })
    }
}

/// Memory of the host that the GPU reads and writes directly, freed when dropped.
#[derive(Debug)]
pub struct Pinned<T> {
    gpu: Arc<Gpu>,
    pointer: *mut T,
    len: usize,
}

// SAFETY: owned memory.
unsafe impl<T: Plain> Send for Pinned<T> {}

impl<T: Plain> Pinned<T> {
    pub fn zeroed(gpu: &Arc<Gpu>, len: usize) -> Result<Self, CudaError> {
        let bytes = (len * size_of::<T>()).max(1);
        // SAFETY: plain allocation, reachable from all contexts and mapped.
        let pointer = unsafe {
            result::malloc_host(
                bytes,
                sys::CU_MEMHOSTALLOC_PORTABLE | sys::CU_MEMHOSTALLOC_DEVICEMAP,
            )
        }
        .context("pinning host memory")?;
        // SAFETY: just allocated with this size.
        unsafe { pointer.cast::<u8>().write_bytes(0, bytes) };
        Ok(Self {
            gpu: gpu.clone(),
            pointer: pointer.cast(),
            len,
        })
    }

    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// For the host to fill, while no copy from here is under way.
    pub fn as_mut_slice(&mut self) -> &mut [T] {
        // SAFETY: owned, initialised in `zeroed`, and `T` is plain.
        unsafe { std::slice::from_raw_parts_mut(self.pointer, self.len) }
    }

    /// The first `count` values of another type; see [`Self::as_mut_slice`].
    pub fn as_mut_slice_of<U: Plain>(&mut self, count: usize) -> Result<&mut [U], CudaError> {
        let room = self.len * size_of::<T>() / size_of::<U>();
        if count > room {
            check("room in pinned memory", room, count)?;
        }
        // SAFETY: within the memory, which begins a page; both types are plain.
        Ok(unsafe { std::slice::from_raw_parts_mut(self.pointer.cast(), count) })
    }

    /// Puts values of another type at a byte of this memory; see [`Self::as_mut_slice`].
    pub fn put<U: Plain>(&mut self, offset: usize, values: &[U]) -> Result<(), CudaError> {
        let bytes = size_of_val(values);
        if offset + bytes > self.len * size_of::<T>() {
            check(
                "room in pinned memory",
                self.len * size_of::<T>(),
                offset + bytes,
            )?;
        }
        // SAFETY: within the memory, checked above; both are plain, and don't overlap.
        unsafe {
            std::ptr::copy_nonoverlapping(
                values.as_ptr().cast::<u8>(),
                self.pointer.cast::<u8>().add(offset),
                bytes,
            );
        }
        Ok(())
    }

    /// A value that the GPU wrote; the caller has waited for it.
    pub fn get(&self, index: usize) -> Option<T> {
        // SAFETY: within the memory; volatile, since another device writes here.
        (index < self.len).then(|| unsafe { self.pointer.add(index).read_volatile() })
    }

    pub(crate) fn address(&self) -> *const c_void {
        self.pointer.cast()
    }

    /// The same memory as the GPU sees it: with unified addressing at the same address.
    pub fn on_gpu(&self) -> Slice<'_, T> {
        Slice {
            pointer: self.pointer as u64,
            len: self.len,
            values: PhantomData,
        }
    }
}

impl<T> Drop for Pinned<T> {
    fn drop(&mut self) {
        if self.gpu.make_current().is_ok() {
            // SAFETY: allocated in `zeroed` and freed here alone.
            let _ = unsafe { result::free_host(self.pointer.cast()) };
        }
    }
}
