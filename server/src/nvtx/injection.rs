//! NVTX 3 as a program meets it: a profiler names a library in the environment, which asks for a
//! table of functions and fills in those that it wants to hear of. The structures and numbers are
//! those of nvtxTypes.h (NVTX 3, load sequence 2).
#![allow(unsafe_code)]

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::ptr;
use std::sync::atomic::{AtomicPtr, Ordering};

use libloading::os::unix::Library;

/// Where a profiler says which library it is, for programs of 64 bits.
const VARIABLE: &str = "NVTX_INJECTION64_PATH";

const NVTX_VERSION: u32 = 3;

/// `NVTX_ETID_CALLBACKS` and `NVTX_ETID_VERSIONINFO`.
const CALLBACKS: u32 = 1;
const VERSION_INFO: u32 = 3;

/// How many functions each module (`NVTX_CB_MODULE_…`) has, the first of which is none: none at 0,
/// then the core, CUDA, OpenCL, the CUDA runtime, domains, and synchronisation. We call the core's
/// alone; profilers take no program that lacks a table.
const FUNCTIONS: [usize; 7] = [0, 16, 9, 15, 7, 16, 7];
const MOST_FUNCTIONS: usize = 16;
const CORE: usize = 1;

/// `NVTX_CBID_CORE_RangePushA` and `NVTX_CBID_CORE_RangePop`.
const RANGE_PUSH: usize = 9;
const RANGE_POP: usize = 11;

/// Functions of each module; null where the profiler doesn't listen.
static SLOTS: [[AtomicPtr<c_void>; MOST_FUNCTIONS]; 7] =
    [const { [const { AtomicPtr::new(ptr::null_mut()) }; MOST_FUNCTIONS] }; 7];

/// A module's places for functions, as the profiler gets them; a null ends them.
type Table = [AtomicPtr<AtomicPtr<c_void>>; MOST_FUNCTIONS + 1];

static TABLES: [Table; 7] =
    [const { [const { AtomicPtr::new(ptr::null_mut()) }; MOST_FUNCTIONS + 1] }; 7];

/// `NvtxExportTableCallbacks`.
#[repr(C)]
struct ExportedCallbacks {
    size: usize,
    get_module_function_table: unsafe extern "C" fn(c_int, *mut *const Table, *mut c_uint) -> c_int,
}

/// `NvtxExportTableVersionInfo`.
#[repr(C)]
struct ExportedVersion {
    size: usize,
    version: u32,
    reserved: u32,
    set_injection_version: extern "C" fn(u32),
}

static EXPORTED_CALLBACKS: ExportedCallbacks = ExportedCallbacks {
    size: size_of::<ExportedCallbacks>(),
    get_module_function_table: module_function_table,
};

static EXPORTED_VERSION: ExportedVersion = ExportedVersion {
    size: size_of::<ExportedVersion>(),
    version: NVTX_VERSION,
    reserved: 0,
    set_injection_version: ignore_version,
};

type ExportTable = extern "C" fn(u32) -> *const c_void;
type Initialize = unsafe extern "C" fn(ExportTable) -> c_int;

extern "C" fn export_table(id: u32) -> *const c_void {
    match id {
        CALLBACKS => ptr::from_ref(&EXPORTED_CALLBACKS).cast(),
        VERSION_INFO => ptr::from_ref(&EXPORTED_VERSION).cast(),
        _ => ptr::null(),
    }
}

extern "C" fn ignore_version(_: u32) {}

/// # Safety
/// `table` and `size` are null or may be written.
unsafe extern "C" fn module_function_table(
    module: c_int,
    table: *mut *const Table,
    size: *mut c_uint,
) -> c_int {
    let module = usize::try_from(module).unwrap_or(0);
    let functions = FUNCTIONS.get(module).copied().unwrap_or(0);
    if functions == 0 {
        return 0;
    }
    if !table.is_null() {
        // SAFETY: the caller's.
        unsafe { *table = &TABLES[module] };
    }
    if !size.is_null() {
        // SAFETY: the caller's.
        unsafe { *size = functions as c_uint };
    }
    1
}

/// A profiler's library, which stays loaded until the program ends.
pub struct Injection(());

impl Injection {
    /// The library that the environment names, if it is one and has taken the tables.
    pub fn load() -> Option<Self> {
        let path = std::env::var_os(VARIABLE)?;
        for (functions, (table, slots)) in FUNCTIONS.iter().zip(TABLES.iter().zip(&SLOTS)) {
            let places = table.iter().zip(slots).take(*functions).skip(1);
            for (place, slot) in places {
                place.store(ptr::from_ref(slot).cast_mut(), Ordering::Relaxed);
            }
        }
        // SAFETY: whoever sets the environment may run code in this process.
        let library = unsafe { Library::new(&path) }.ok()?;
        // SAFETY: the symbol has this type, by NVTX.
        let initialize = unsafe { library.get::<Initialize>(b"InitializeInjectionNvtx2\0") };
        // SAFETY: as NVTX has it called: once, with the function that gives the tables.
        let attached = initialize.is_ok_and(|initialize| unsafe { initialize(export_table) } != 0);
        if !attached {
            return None;
        }
        // What the tables point to now is in it.
        std::mem::forget(library);
        Some(Self(()))
    }

    /// Begins a range of the calling thread.
    pub fn push(&self, name: &CStr) {
        type Push = unsafe extern "C" fn(*const c_char) -> c_int;
        // SAFETY: null, or what the profiler put there, which has this type.
        let push = unsafe { std::mem::transmute::<*mut c_void, Option<Push>>(slot(RANGE_PUSH)) };
        if let Some(push) = push {
            // SAFETY: the profiler's function, which copies the text.
            unsafe { push(name.as_ptr()) };
        }
    }

    /// Ends the thread's newest range.
    pub fn pop(&self) {
        type Pop = unsafe extern "C" fn() -> c_int;
        // SAFETY: as above.
        let pop = unsafe { std::mem::transmute::<*mut c_void, Option<Pop>>(slot(RANGE_POP)) };
        if let Some(pop) = pop {
            // SAFETY: the profiler's function.
            unsafe { pop() };
        }
    }
}

/// Looked up each time: a profiler may begin to listen at any moment.
fn slot(at: usize) -> *mut c_void {
    SLOTS[CORE][at].load(Ordering::Acquire)
}
