//! Compiles the CUDA kernels (cuda/*.cu) with NVRTC to machine code for each architecture and embeds
//! the results, compressed. Where NVRTC isn't (`make kernels` fetches it) the crate is built for the
//! CPU only, and says so when it is asked for a GPU.
//!
//! Each file's machine code is kept in target/nvrtc/cache by a hash of all it was made from, so that
//! a change compiles what it touches.

// Runs a foreign library; and a build script may stop the build.
#![allow(unsafe_code, clippy::panic, clippy::unwrap_used, clippy::expect_used)]

use std::{
    env,
    ffi::{CStr, CString, c_char, c_int, c_void},
    fs,
    io::Write,
    path::{Path, PathBuf},
    ptr,
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

use sha2::{Digest, Sha256};

/// Machine code is made for these; PTX of the first, which newer drivers compile when they load it,
/// serves GPUs that came later.
const ARCHITECTURES: &str = "75,80,86,89,90";

/// Files that use instructions of one architecture alone: (file, architecture, its full name).
const SPECIAL: &[(&str, &str, &str)] = &[
    ("thin", "90", "90"),
    ("thin_q", "90", "90"),
    ("wide", "90", "90a"),
    ("wide_q", "90", "90a"),
];

/// Files that such files replace on that architecture.
const REPLACED: &[(&str, &str)] = &[("skinny_q", "90"), ("tiled_q", "90")];

const OPTIONS: [&str; 3] = ["--std=c++17", "-default-device", "--generate-line-info"];

fn main() {
    println!("cargo:rerun-if-changed=cuda");
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-env-changed=STOKER_CUDA_ARCHITECTURES");
    let manifest = PathBuf::from(env::var("CARGO_MANIFEST_DIR").unwrap());
    let tools = manifest.join("../../target/nvrtc");
    println!("cargo:rerun-if-changed={}", tools.join("site").display());
    let out = PathBuf::from(env::var("OUT_DIR").unwrap()).join("images.rs");
    let library = tools.join("site/nvidia/cuda_nvrtc/lib/libnvrtc.so.12");
    if !library.exists() {
        println!(
            "cargo:warning=no NVRTC in target/nvrtc: built without CUDA kernels (make kernels fetches it)"
        );
        fs::write(out, "pub(crate) const IMAGES: &[Image] = &[];\n").unwrap();
        return;
    }
    let jobs = jobs(&manifest.join("cuda"));
    let cache = tools.join("cache");
    fs::create_dir_all(&cache).unwrap();
    let compiler = Compiler::open(&library, &tools.join("site/nvidia"), &manifest.join("cuda"));
    let files: Vec<PathBuf> = jobs
        .iter()
        .map(|job| cache.join(job.hash(&manifest)))
        .collect();
    let missing: Vec<usize> = (0..jobs.len()).filter(|&i| !files[i].exists()).collect();
    let (next, failures) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    let threads = env::var("NUM_JOBS")
        .ok()
        .and_then(|n| n.parse().ok())
        .unwrap_or(1usize);
    std::thread::scope(|scope| {
        for _ in 0..threads.min(missing.len()) {
            scope.spawn(|| {
                while let Some(&i) = missing.get(next.fetch_add(1, Ordering::Relaxed)) {
                    match compiler.compile(&jobs[i]) {
                        Ok(code) => write_compressed(&files[i], &code),
                        Err(log) => failures.lock().unwrap().push(log),
                    }
                }
            });
        }
    });
    let failures = failures.into_inner().unwrap();
    assert!(failures.is_empty(), "{}", failures.join("\n"));
    let entries: String = jobs
        .iter()
        .zip(&files)
        .map(|(job, file)| {
            format!(
                "    Image {{ file: {:?}, target: {}, code: include_bytes!({:?}) }},\n",
                job.file,
                job.target(),
                file.display().to_string()
            )
        })
        .collect();
    fs::write(
        out,
        format!("pub(crate) const IMAGES: &[Image] = &[\n{entries}];\n"),
    )
    .unwrap();
}

/// One file for one architecture.
struct Job {
    file: String,
    source: String,
    /// As NVRTC's option names it: sm_90a, compute_75.
    architecture: String,
}

/// The larger ones first, so that two threads end together.
fn jobs(folder: &Path) -> Vec<Job> {
    let mut sources: Vec<(String, String)> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|e| e == "cu"))
        .map(|path| {
            let name = path.file_stem().unwrap().to_string_lossy().into_owned();
            (name, fs::read_to_string(&path).unwrap())
        })
        .collect();
    sources.sort();
    let wanted = env::var("STOKER_CUDA_ARCHITECTURES").unwrap_or_else(|_| ARCHITECTURES.into());
    let wanted: Vec<&str> = wanted.split(',').map(str::trim).collect();
    let mut jobs = Vec::new();
    for (file, source) in sources {
        let mut add = |architecture: String| {
            jobs.push(Job {
                file: file.clone(),
                source: source.clone(),
                architecture,
            });
        };
        match SPECIAL.iter().find(|(name, _, _)| *name == file) {
            Some((_, base, full)) if wanted.contains(base) => add(format!("sm_{full}")),
            Some(_) => {}
            None => {
                for architecture in &wanted {
                    if !REPLACED.contains(&(file.as_str(), architecture)) {
                        add(format!("sm_{architecture}"));
                    }
                }
                add(format!("compute_{}", wanted[0]));
            }
        }
    }
    jobs
}

impl Job {
    fn target(&self) -> String {
        let digits: String = self
            .architecture
            .chars()
            .filter(char::is_ascii_digit)
            .collect();
        match self.architecture.starts_with("sm_") {
            true => format!("Target::Machine({digits})"),
            false => format!("Target::Ptx({digits})"),
        }
    }

    fn hash(&self, manifest: &Path) -> String {
        let mut hash = Sha256::new();
        hash.update(&self.architecture);
        for option in OPTIONS {
            hash.update(option);
        }
        let folder = manifest.join("cuda");
        let mut headers: Vec<(String, String)> = fs::read_dir(&folder)
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .filter(|path| path.extension().is_some_and(|e| e == "cuh"))
            .map(|path| {
                let name = path.file_name().unwrap().to_string_lossy().into_owned();
                (name, fs::read_to_string(&path).unwrap())
            })
            .collect();
        headers.sort();
        // All that the file includes, and what that includes.
        let mut included = self.source.clone();
        loop {
            let (found, rest): (Vec<_>, Vec<_>) = headers
                .into_iter()
                .partition(|(name, _)| included.contains(&format!("#include \"{name}\"")));
            if found.is_empty() {
                break;
            }
            included.extend(found.into_iter().map(|(_, text)| text));
            headers = rest;
        }
        hash.update(&included);
        let hash: String = hash.finalize().iter().map(|b| format!("{b:02x}")).collect();
        format!("{}.{}.{}", self.file, self.architecture, &hash[..24])
    }
}

fn write_compressed(path: &Path, code: &[u8]) {
    let mut encoder = flate2::write::ZlibEncoder::new(Vec::new(), flate2::Compression::best());
    encoder.write_all(code).unwrap();
    let partial = path.with_extension(format!("{}.partial", std::process::id()));
    fs::write(&partial, encoder.finish().unwrap()).unwrap();
    fs::rename(partial, path).unwrap();
}

type Program = *mut c_void;

struct Compiler {
    library: libloading::Library,
    options: Vec<CString>,
}

impl Compiler {
    fn open(library: &Path, headers: &Path, own: &Path) -> Self {
        // SAFETY: NVRTC's initialisers have no preconditions.
        let library = unsafe { libloading::Library::new(library) }.unwrap_or_else(|e| {
            panic!(
                "{}: {e}; remove target/nvrtc and run make kernels",
                library.display()
            )
        });
        let include = |path: PathBuf| format!("--include-path={}", path.display());
        let folders = [
            headers.join("cuda_runtime/include"),
            headers.join("cuda_cccl/include"),
            own.to_owned(),
        ];
        let options = OPTIONS
            .map(str::to_owned)
            .into_iter()
            .chain(folders.map(include))
            .map(|option| CString::new(option).unwrap())
            .collect();
        Self { library, options }
    }

    /// Machine code or PTX of a job; the compiler's log where it fails.
    fn compile(&self, job: &Job) -> Result<Vec<u8>, String> {
        let source = CString::new(job.source.as_str()).unwrap();
        let name = CString::new(format!("{}.cu", job.file)).unwrap();
        let architecture =
            CString::new(format!("--gpu-architecture={}", job.architecture)).unwrap();
        let options: Vec<*const c_char> = [&architecture]
            .into_iter()
            .chain(&self.options)
            .map(|o| o.as_ptr())
            .collect();
        let (get, size) = match job.architecture.starts_with("sm_") {
            true => (c"nvrtcGetCUBIN", c"nvrtcGetCUBINSize"),
            false => (c"nvrtcGetPTX", c"nvrtcGetPTXSize"),
        };
        // SAFETY: the functions are called as nvrtc.h declares them; all strings end with a zero and
        // outlive the calls; buffers have the sizes that were asked for.
        unsafe {
            let create: libloading::Symbol<
                unsafe extern "C" fn(
                    *mut Program,
                    *const c_char,
                    *const c_char,
                    c_int,
                    *const *const c_char,
                    *const *const c_char,
                ) -> c_int,
            > = self
                .library
                .get(c"nvrtcCreateProgram".to_bytes_with_nul())
                .unwrap();
            let compile: libloading::Symbol<
                unsafe extern "C" fn(Program, c_int, *const *const c_char) -> c_int,
            > = self
                .library
                .get(c"nvrtcCompileProgram".to_bytes_with_nul())
                .unwrap();
            let destroy: libloading::Symbol<unsafe extern "C" fn(*mut Program) -> c_int> = self
                .library
                .get(c"nvrtcDestroyProgram".to_bytes_with_nul())
                .unwrap();
            let mut program: Program = ptr::null_mut();
            let created = create(
                &mut program,
                source.as_ptr(),
                name.as_ptr(),
                0,
                ptr::null(),
                ptr::null(),
            );
            assert_eq!(created, 0, "nvrtcCreateProgram failed");
            let result = compile(program, options.len() as c_int, options.as_ptr());
            let code = if result == 0 {
                Ok(self.bytes(program, size, get))
            } else {
                let log = self.bytes(program, c"nvrtcGetProgramLogSize", c"nvrtcGetProgramLog");
                Err(format!(
                    "{}.cu for {}:\n{}",
                    job.file,
                    job.architecture,
                    String::from_utf8_lossy(&log)
                ))
            };
            destroy(&mut program);
            code
        }
    }

    /// # Safety
    /// `size` and `get` are a pair of NVRTC's functions that give a program's bytes.
    unsafe fn bytes(&self, program: Program, size: &CStr, get: &CStr) -> Vec<u8> {
        // SAFETY: the caller's; the buffer is as long as `size` says.
        unsafe {
            let size: libloading::Symbol<unsafe extern "C" fn(Program, *mut usize) -> c_int> =
                self.library.get(size.to_bytes_with_nul()).unwrap();
            let get: libloading::Symbol<unsafe extern "C" fn(Program, *mut c_char) -> c_int> =
                self.library.get(get.to_bytes_with_nul()).unwrap();
            let mut length = 0;
            assert_eq!(size(program, &mut length), 0);
            let mut bytes = vec![0u8; length];
            assert_eq!(get(program, bytes.as_mut_ptr().cast()), 0);
            bytes
        }
    }
}
