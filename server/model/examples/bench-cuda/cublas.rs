//! cuBLAS as a yardstick, where it is.
#![allow(unsafe_code)]

use std::{
    ffi::{c_int, c_void},
    sync::Arc,
    time::Instant,
};

use half::f16;
use libloading::{Library, Symbol};
use stoker_kernels::cuda::{Buffer, Gpu};

use crate::Error;

const NAMES: [&str; 3] = ["libcublas.so.13", "libcublas.so.12", "libcublas.so"];
const SIDE: usize = 8192;
const TIMES: usize = 20;

const TRANSPOSED: c_int = 1;
const AS_IT_IS: c_int = 0;
const F16: c_int = 2;
const COMPUTE_F32: c_int = 68;
const DEFAULT: c_int = -1;

type Handle = *mut c_void;
type Gemm = unsafe extern "C" fn(
    Handle,
    c_int,
    c_int,
    c_int,
    c_int,
    c_int,
    *const c_void,
    *const c_void,
    c_int,
    c_int,
    *const c_void,
    c_int,
    c_int,
    *const c_void,
    *mut c_void,
    c_int,
    c_int,
    c_int,
    c_int,
) -> c_int;

/// Operations a second of an f16 product of 8192 x 8192 x 8192 with random values; `None` without
/// cuBLAS. STOKER_CUBLAS names its file where the loader doesn't find it.
pub fn rate(gpu: &Arc<Gpu>) -> Result<Option<f64>, Error> {
    let named = std::env::var("STOKER_CUBLAS").ok();
    let names = named.iter().map(String::as_str).chain(NAMES);
    // SAFETY: NVIDIA's initialisers have no preconditions.
    let Some(library) = names
        .into_iter()
        .find_map(|n| unsafe { Library::new(n) }.ok())
    else {
        return Ok(None);
    };
    let buffer = |seed: u64| -> Result<Buffer<f16>, Error> {
        let mut state = seed;
        let values: Vec<f16> = (0..SIDE * SIDE)
            .map(|_| {
                state = state.wrapping_mul(6364136223846793005).wrapping_add(1);
                f16::from_f32((state >> 40) as f32 / (1u32 << 23) as f32 - 1.0)
            })
            .collect();
        Ok(Buffer::from_slice(gpu, "a bench", &values)?)
    };
    let (a, b, c) = (buffer(1)?, buffer(2)?, buffer(3)?);
    let side = SIDE as c_int;
    let (one, zero) = (1.0f32, 0.0f32);
    let mut handle: Handle = std::ptr::null_mut();
    // SAFETY: the functions are called as cublas_v2.h declares them; the buffers have SIDE x SIDE
    // values each and outlive the work, which is waited for.
    unsafe {
        let create: Symbol<unsafe extern "C" fn(*mut Handle) -> c_int> =
            library.get(c"cublasCreate_v2".to_bytes_with_nul())?;
        let gemm: Symbol<Gemm> = library.get(c"cublasGemmEx".to_bytes_with_nul())?;
        let status = create(&mut handle);
        if status != 0 {
            return Err(format!("cublasCreate gives {status}").into());
        }
        let run = || -> Result<(), Error> {
            match gemm(
                handle,
                TRANSPOSED,
                AS_IT_IS,
                side,
                side,
                side,
                (&raw const one).cast(),
                a.all().address() as *const c_void,
                F16,
                side,
                b.all().address() as *const c_void,
                F16,
                side,
                (&raw const zero).cast(),
                c.all().address() as *mut c_void,
                F16,
                side,
                COMPUTE_F32,
                DEFAULT,
            ) {
                0 => Ok(()),
                status => Err(format!("cublasGemmEx gives {status}").into()),
            }
        };
        for _ in 0..3 {
            run()?;
        }
        gpu.synchronize()?;
        let begun = Instant::now();
        for _ in 0..TIMES {
            run()?;
        }
        gpu.synchronize()?;
        let seconds = begun.elapsed().as_secs_f64() / TIMES as f64;
        Ok(Some(2.0 * (SIDE as f64).powi(3) / seconds))
    }
}
