//! What a profiler's library does with NVTX: takes the tables, listens to ranges, and writes them
//! down, a line each, into the file that NVTX_RECORD names. The test compiles it to a shared library.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::fs::File;
use std::io::Write;
use std::sync::{Mutex, OnceLock};

type Table = *const *mut *const c_void;

#[repr(C)]
struct Callbacks {
    size: usize,
    get_module_function_table: extern "C" fn(c_int, *mut Table, *mut c_uint) -> c_int,
}

#[repr(C)]
struct Version {
    size: usize,
    version: u32,
    reserved: u32,
    set_injection_version: extern "C" fn(u32),
}

static RECORD: OnceLock<Mutex<File>> = OnceLock::new();

fn write(line: &str) {
    if let Some(file) = RECORD.get() {
        let thread = std::thread::current().id();
        writeln!(file.lock().unwrap(), "{thread:?} {line}").unwrap();
    }
}

extern "C" fn push(name: *const c_char) -> c_int {
    write(&format!("> {}", unsafe { CStr::from_ptr(name) }.to_str().unwrap()));
    0
}

extern "C" fn pop() -> c_int {
    write("<");
    0
}

#[unsafe(no_mangle)]
extern "C" fn InitializeInjectionNvtx2(export: extern "C" fn(u32) -> *const c_void) -> c_int {
    let version = unsafe { &*export(3).cast::<Version>() };
    assert_eq!((version.size, version.version), (size_of::<Version>(), 3));
    (version.set_injection_version)(3);
    let callbacks = unsafe { &*export(1).cast::<Callbacks>() };
    assert_eq!(callbacks.size, size_of::<Callbacks>());
    for (module, functions) in [(1, 16), (2, 9), (3, 15), (4, 7), (5, 16), (6, 7)] {
        let (mut table, mut size): (Table, c_uint) = (std::ptr::null(), 0);
        assert_eq!((callbacks.get_module_function_table)(module, &mut table, &mut size), 1);
        assert_eq!(size, functions);
        for at in 0..=functions as usize {
            let place = unsafe { *table.add(at) };
            assert_eq!(place.is_null(), at == 0 || at == functions as usize);
        }
        if module == 1 {
            unsafe {
                **table.add(9) = push as *const c_void;
                **table.add(11) = pop as *const c_void;
            }
        }
    }
    assert_eq!((callbacks.get_module_function_table)(7, &mut std::ptr::null(), &mut 0), 0);
    let file = File::create(std::env::var("NVTX_RECORD").unwrap()).unwrap();
    RECORD.set(Mutex::new(file)).unwrap();
    1
}
