//! One GPU: found, checked and opened.

use std::sync::Arc;

use cudarc::driver::{result, sys};

use super::{
    error::{Context, CudaError},
    image,
};

/// CUDA 12.0, as the driver counts.
const LEAST_DRIVER: i32 = 12_000;
/// Programmatic dependent launch can be captured into graphs from here on.
const GRAPHS_WITH_DEPENDENT_LAUNCH: i32 = 12_030;

#[derive(Clone, Copy, Debug, Default)]
pub struct GpuOptions {
    /// Run the oldest architecture's PTX, compiled by the driver, whatever the GPU: how code for a
    /// T4 is proven on another card.
    pub oldest_code: bool,
}

impl GpuOptions {
    /// `oldest_code` where STOKER_CUDA_OLDEST_CODE is set, to anything.
    pub fn from_environment() -> Self {
        Self {
            oldest_code: std::env::var_os("STOKER_CUDA_OLDEST_CODE").is_some(),
        }
    }
}

/// An opened GPU. Its context is shared by all that hold one.
#[derive(Debug)]
pub struct Gpu {
    device: sys::CUdevice,
    context: sys::CUcontext,
    name: String,
    capability: u32,
    options: GpuOptions,
    driver: i32,
    processors: u32,
    shared_memory: u32,
}

// SAFETY: a context may be used from any thread that has made it current; the handles are plain
// addresses.
#[allow(unsafe_code)]
unsafe impl Send for Gpu {}
// SAFETY: as above; the driver locks.
#[allow(unsafe_code)]
unsafe impl Sync for Gpu {}

impl Gpu {
    /// Opens the first GPU that the process may use, and makes it the calling thread's.
    #[allow(unsafe_code)]
    pub fn open(options: GpuOptions) -> Result<Arc<Self>, CudaError> {
        if image::none() {
            return Err(CudaError::NoKernels);
        }
        // SAFETY: opens a library by its name; NVIDIA's initialisers have no preconditions.
        if !unsafe { sys::is_culib_present() } {
            return Err(CudaError::NoDriver);
        }
        let mut driver = 0;
        // SAFETY: writes one integer.
        unsafe { sys::cuDriverGetVersion(&mut driver) }
            .result()
            .context("asking for the driver's version")?;
        check_driver(driver)?;
        if let Err(error) = result::init() {
            return Err(match error.0 {
                sys::CUresult::CUDA_ERROR_NO_DEVICE => CudaError::NoDevice,
                _ => Err::<(), _>(error)
                    .context("starting the driver")
                    .err()
                    .unwrap_or(CudaError::NoDriver),
            });
        }
        if result::device::get_count().context("counting GPUs")? == 0 {
            return Err(CudaError::NoDevice);
        }
        let device = result::device::get(0).context("opening the first GPU")?;
        let name = result::device::get_name(device).context("asking for the GPU's name")?;
        let attribute = |attribute| {
            // SAFETY: the device was given by the driver.
            unsafe { result::device::get_attribute(device, attribute) }
                .context("asking for the GPU's properties")
        };
        use sys::CUdevice_attribute as A;
        let major = attribute(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
        let minor = attribute(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
        let capability = (major * 10 + minor) as u32;
        check_capability(&name, capability, image::oldest())?;
        let processors = attribute(A::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)? as u32;
        let shared_memory =
            attribute(A::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)? as u32;
        // The engine waits with a step to spare: it needn't spin for the answer.
        // SAFETY: the device was given by the driver; a flag that is set already stays.
        let _ = unsafe {
            sys::cuDevicePrimaryCtxSetFlags_v2(
                device,
                sys::CUctx_flags_enum::CU_CTX_SCHED_BLOCKING_SYNC as u32,
            )
        };
        // SAFETY: the device was given by the driver.
        let context = unsafe { result::primary_ctx::retain(device) }.context("making a context")?;
        let gpu = Arc::new(Self {
            device,
            context,
            name,
            capability,
            options,
            driver,
            processors,
            shared_memory,
        });
        gpu.make_current()?;
        Ok(gpu)
    }

    /// Makes this GPU the one that the calling thread's work is for. Cheap.
    #[allow(unsafe_code)]
    pub fn make_current(&self) -> Result<(), CudaError> {
        // SAFETY: the context lives as long as `self`.
        unsafe { result::ctx::set_current(self.context) }.context("entering the GPU's context")
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// 10 x major + minor of the compute capability that kernels run as.
    pub fn capability(&self) -> u32 {
        match self.options.oldest_code {
            true => image::oldest(),
            false => self.capability,
        }
    }

    /// The driver's CUDA version, as 13.0.
    pub fn driver_version(&self) -> String {
        version(self.driver)
    }

    /// Streaming multiprocessors.
    pub fn processors(&self) -> u32 {
        self.processors
    }

    /// Bytes of shared memory that one block of threads can have.
    pub(crate) fn shared_memory(&self) -> u32 {
        self.shared_memory
    }

    pub(crate) fn options(&self) -> GpuOptions {
        self.options
    }

    /// Whether a kernel may begin before the one before it has ended.
    pub(crate) fn dependent_launch(&self) -> bool {
        self.capability() >= 90 && self.driver >= GRAPHS_WITH_DEPENDENT_LAUNCH
    }

    /// Free and total bytes of the GPU's memory.
    pub fn memory(&self) -> Result<(u64, u64), CudaError> {
        let (free, total) = result::mem_get_info().context("asking for free memory")?;
        Ok((free as u64, total as u64))
    }

    /// Waits until all work is done.
    pub fn synchronize(&self) -> Result<(), CudaError> {
        result::ctx::synchronize().context("waiting for the GPU")
    }

    /// Begins (or ends) what a profiler that was started to wait records.
    #[allow(unsafe_code)]
    pub fn profile(&self, on: bool) -> Result<(), CudaError> {
        // SAFETY: no arguments; without a profiler nothing happens.
        let result = unsafe {
            match on {
                true => sys::cuProfilerStart(),
                false => sys::cuProfilerStop(),
            }
        };
        result.result().context("telling the profiler")
    }
}

impl Drop for Gpu {
    #[allow(unsafe_code)]
    fn drop(&mut self) {
        // SAFETY: retained once in `open`; all that was made in the context holds an Arc of `self`.
        // What fails at the end of a process harms nobody.
        let _ = unsafe { result::primary_ctx::release(self.device) };
    }
}

/// Whether a driver loads what the build made.
fn check_driver(found: i32) -> Result<(), CudaError> {
    match found < LEAST_DRIVER {
        true => Err(CudaError::OldDriver {
            found: version(found),
            needed: version(LEAST_DRIVER),
        }),
        false => Ok(()),
    }
}

/// Whether there is code for a device: newer ones compile the oldest PTX.
fn check_capability(device: &str, found: u32, oldest: u32) -> Result<(), CudaError> {
    let capability = |number: u32| format!("{}.{}", number / 10, number % 10);
    match found < oldest {
        true => Err(CudaError::Architecture {
            device: device.to_owned(),
            found: capability(found),
            built: capability(oldest),
        }),
        false => Ok(()),
    }
}

fn version(number: i32) -> String {
    format!("{}.{}", number / 1000, number % 1000 / 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_old_driver_and_an_old_gpu_are_told_what_is_needed() {
        assert_eq!(check_driver(13_000), Ok(()));
        assert_eq!(check_driver(12_000), Ok(()));
        let error = check_driver(11_080).unwrap_err().to_string();
        for word in ["11.8", "12.0", "R525"] {
            assert!(error.contains(word), "{error}");
        }
        assert_eq!(check_capability("H100", 90, 75), Ok(()));
        assert_eq!(check_capability("a card of tomorrow", 120, 75), Ok(()));
        let error = check_capability("Tesla P100", 60, 75).unwrap_err();
        assert_eq!(
            error.to_string(),
            "Tesla P100 has compute capability 6.0; this build's kernels are for 7.5 and newer"
        );
    }
}
