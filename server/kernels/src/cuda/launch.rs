//! Loading kernels, and starting them.
#![allow(unsafe_code)]

use std::{collections::HashMap, ffi::CString, sync::Arc};

use cudarc::driver::{result, sys};

use super::{
    attention,
    driver::Gpu,
    error::{Context, CudaError},
    few, image, many, quantised, quantised_products,
    stream::Stream,
    thin,
};

/// All kernels, loaded into a GPU.
#[derive(Debug)]
pub struct Kernels {
    gpu: Arc<Gpu>,
    modules: Vec<sys::CUmodule>,
    functions: HashMap<String, Kernel>,
    /// Whether there are products on wgmma.
    wide: bool,
}

// SAFETY: handles that any thread may use.
unsafe impl Send for Kernels {}
// SAFETY: as above.
unsafe impl Sync for Kernels {}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Kernel {
    function: sys::CUfunction,
}

/// How many threads a kernel runs with.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    pub grid: [u32; 3],
    pub threads: u32,
    /// Bytes of dynamic shared memory.
    pub shared: u32,
    /// May begin while the kernel before it still runs (it waits by itself where it must).
    pub early: bool,
}

/// What the compiler made of a kernel.
#[derive(Clone, Debug)]
pub struct Resources {
    pub kernel: String,
    pub registers: u32,
    pub static_shared_bytes: u32,
    pub local_bytes: u32,
}

impl Kernels {
    pub fn load(gpu: &Arc<Gpu>) -> Result<Self, CudaError> {
        let mut kernels = Self {
            gpu: gpu.clone(),
            modules: Vec::new(),
            functions: HashMap::new(),
            wide: false,
        };
        let plain = |names: &[&str]| names.iter().map(|&n| (n.to_owned(), 0)).collect::<Vec<_>>();
        kernels.file(
            "rows",
            plain(&["embed", "norm_rows", "rope_rows", "sum_parts"]),
        )?;
        kernels.file("sample", plain(&["choose"]))?;
        kernels.file("random", plain(&["fill"]))?;
        kernels.file("skinny", few::kernels())?;
        kernels.file("decode", attention::decode_kernels())?;
        kernels.file("prefill", attention::prefill_kernels(gpu.capability()))?;
        kernels.file("tiled", many::tiled_kernels(gpu.capability()))?;
        kernels.file("heads", plain(&["finish_heads"]))?;
        kernels.file("quantise", quantised::quantise_kernels())?;
        kernels.wide = kernels.file("wide", many::wide_kernels())?;
        if kernels.wide {
            kernels.file("thin", thin::kernels(None))?;
            kernels.file("thin_q", quantised_products::thin_kernels())?;
            kernels.file("wide_q", quantised_products::wide_kernels())?;
        } else {
            kernels.file("skinny_q", quantised_products::skinny_kernels())?;
            kernels.file("tiled_q", quantised_products::tiled_kernels())?;
        }
        Ok(kernels)
    }

    pub fn gpu(&self) -> &Arc<Gpu> {
        &self.gpu
    }

    /// Whether products of many rows run on Hopper's own instructions.
    pub fn has_wgmma(&self) -> bool {
        self.wide
    }

    /// Loads a file's kernels, given with the dynamic shared memory that they may need. False where
    /// the file isn't for this GPU.
    fn file(&mut self, file: &'static str, names: Vec<(String, u32)>) -> Result<bool, CudaError> {
        let Some(code) = image::code(file, &self.gpu)? else {
            return Ok(false);
        };
        // SAFETY: an image that the build made, whole, with a zero at its end.
        let module = unsafe { result::module::load_data(code.as_ptr().cast()) }
            .context("loading kernels")?;
        self.modules.push(module);
        for (name, shared) in names {
            let symbol = CString::new(name.as_str()).unwrap_or_default();
            // SAFETY: the module was just loaded.
            let function = unsafe { result::module::get_function(module, symbol) }
                .context("finding a kernel")?;
            if shared > self.gpu.shared_memory() {
                continue;
            }
            if shared > 0 {
                use sys::CUfunction_attribute_enum as A;
                // As many blocks of a multiprocessor as fit; and more than 48 KB for one.
                for (attribute, value) in [
                    (A::CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT, 100),
                    (
                        A::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                        shared as i32,
                    ),
                ] {
                    // SAFETY: the function was just found.
                    unsafe { result::function::set_function_attribute(function, attribute, value) }
                        .context("giving a kernel shared memory")?;
                }
            }
            self.functions.insert(name, Kernel { function });
        }
        Ok(true)
    }

    pub(crate) fn kernel(&self, name: &str) -> Result<Kernel, CudaError> {
        self.functions
            .get(name)
            .copied()
            .ok_or_else(|| CudaError::Driver {
                what: "finding a kernel",
                error: format!("{name} isn't in this build for {}", self.gpu.name()),
            })
    }

    /// What the compiler made of each kernel.
    pub fn resources(&self) -> Result<Vec<Resources>, CudaError> {
        use sys::CUfunction_attribute_enum as A;
        let mut all = Vec::new();
        for (name, kernel) in &self.functions {
            let ask = |attribute| {
                // SAFETY: the function lives as long as `self`.
                unsafe { result::function::get_function_attribute(kernel.function, attribute) }
                    .context("asking for a kernel's resources")
                    .map(|value| value as u32)
            };
            all.push(Resources {
                kernel: name.clone(),
                registers: ask(A::CU_FUNC_ATTRIBUTE_NUM_REGS)?,
                static_shared_bytes: ask(A::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES)?,
                local_bytes: ask(A::CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES)?,
            });
        }
        all.sort_by(|a, b| a.kernel.cmp(&b.kernel));
        Ok(all)
    }

    /// Starts a kernel.
    ///
    /// # Safety
    /// `parameters` is what the kernel takes, and all memory it points to has the size that the
    /// kernel accesses with these parameters, until the stream is past it.
    pub(crate) unsafe fn launch<P>(
        &self,
        stream: &Stream,
        kernel: Kernel,
        shape: Shape,
        parameters: &P,
    ) -> Result<(), CudaError> {
        if shape.grid.contains(&0) {
            return Ok(());
        }
        let early = shape.early && self.gpu.dependent_launch() && !stream.notes_marks();
        let mut attribute = sys::CUlaunchAttribute {
            id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            pad: [0; 4],
            value: sys::CUlaunchAttributeValue {
                programmaticStreamSerializationAllowed: 1,
            },
        };
        let config = sys::CUlaunchConfig {
            gridDimX: shape.grid[0],
            gridDimY: shape.grid[1],
            gridDimZ: shape.grid[2],
            blockDimX: shape.threads,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: shape.shared,
            hStream: stream.raw(),
            attrs: &mut attribute,
            numAttrs: u32::from(early),
        };
        let mut arguments = [std::ptr::from_ref(parameters).cast_mut().cast()];
        // SAFETY: one argument, copied by the call; the rest is the caller's.
        unsafe {
            sys::cuLaunchKernelEx(
                &config,
                kernel.function,
                arguments.as_mut_ptr(),
                std::ptr::null_mut(),
            )
        }
        .result()
        .context("starting a kernel")
    }
}

impl Drop for Kernels {
    fn drop(&mut self) {
        if self.gpu.make_current().is_ok() {
            for &module in &self.modules {
                // SAFETY: loaded in `file`, unloaded here alone.
                let _ = unsafe { result::module::unload(module) };
            }
        }
    }
}
