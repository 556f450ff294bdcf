//! What the machine code for a T4 (sm_75) takes, read out of the embedded images: no such GPU is
//! needed for it. docs/kernels.md has the table that the test prints.

use super::{attention, few, image, many, quantised_products};

/// A multiprocessor of compute capability 7.5.
const REGISTERS: u32 = 64 << 10;
const SHARED_BYTES: u32 = 64 << 10;
const WARPS: u32 = 32;
const BLOCKS: u32 = 16;

/// Local memory of a thread that is let pass: a register or two, spilled outside of loops.
const MOST_STACK: u32 = 16;

/// What ptxas made of one kernel.
#[derive(Debug)]
struct Compiled {
    name: String,
    registers: u32,
    static_shared: u32,
    /// Bytes of local memory: spilled registers and arrays that aren't in registers.
    stack: u32,
    threads: u32,
}

impl Compiled {
    /// Warps of a multiprocessor that run at once, with so much dynamic shared memory a block.
    fn warps(&self, dynamic_shared: u32) -> u32 {
        let warps = self.threads.div_ceil(32);
        // Registers are given to warps in pieces of 256.
        let registers = (self.registers * 32).next_multiple_of(256) * warps;
        let shared = self.static_shared + dynamic_shared;
        let blocks = (REGISTERS / registers)
            .min(WARPS / warps)
            .min(SHARED_BYTES.checked_div(shared).unwrap_or(BLOCKS))
            .min(BLOCKS);
        blocks * warps
    }
}

/// The parts of an ELF file: name, sh_info, bytes.
fn sections(elf: &[u8]) -> Vec<(String, u32, u64, &[u8])> {
    let half = |at: usize| u16::from_le_bytes(elf[at..at + 2].try_into().unwrap()) as usize;
    let word = |at: usize| u32::from_le_bytes(elf[at..at + 4].try_into().unwrap());
    let long = |at: usize| u64::from_le_bytes(elf[at..at + 8].try_into().unwrap());
    let (table, size, count, names) = (long(40) as usize, half(58), half(60), half(62));
    let header = |i: usize| table + i * size;
    let names = long(header(names) + 24) as usize;
    const NO_BYTES: u32 = 8;
    (0..count)
        .map(header)
        .map(|at| {
            let name = &elf[names + word(at) as usize..];
            let name = name.split(|&b| b == 0).next().unwrap();
            let bytes = long(at + 32);
            let data = match word(at + 4) {
                NO_BYTES => &[][..],
                _ => &elf[long(at + 24) as usize..][..bytes as usize],
            };
            let name = String::from_utf8_lossy(name).into_owned();
            (name, word(at + 44), bytes, data)
        })
        .collect()
}

/// The attributes of an .nv.info section: (kind, words).
fn attributes(mut info: &[u8]) -> Vec<(u8, Vec<u32>)> {
    const WITH_SIZE: u8 = 4;
    let mut found = Vec::new();
    while let [format, kind, low, high, rest @ ..] = info {
        let size = usize::from(u16::from_le_bytes([*low, *high]));
        if *format == WITH_SIZE {
            let words = rest[..size].as_chunks::<4>().0;
            found.push((
                *kind,
                words.iter().map(|w| u32::from_le_bytes(*w)).collect(),
            ));
            info = &rest[size..];
        } else {
            info = rest;
        }
    }
    found
}

fn compiled(elf: &[u8]) -> Vec<Compiled> {
    const MAX_THREADS: u8 = 0x05;
    const FRAME_SIZE: u8 = 0x11;
    let sections = sections(elf);
    let find = |name: String| sections.iter().find(|section| section.0 == name);
    let mut kernels: Vec<Compiled> = Vec::new();
    let common = find(".nv.info".to_owned()).map_or(vec![], |section| attributes(section.3));
    for (name, info, _, _) in &sections {
        let Some(name) = name.strip_prefix(".text.") else {
            continue;
        };
        // The symbol's index is in the low bytes, the registers are in the high one.
        let (symbol, registers) = (info & 0xff_ffff, info >> 24);
        let own = find(format!(".nv.info.{name}")).map_or(vec![], |section| attributes(section.3));
        // Where a kernel states none, its name does: decode_128_w4 has 4 warps.
        let warps = name.rsplit("_w").next().and_then(|w| w.parse().ok());
        let threads = own
            .iter()
            .find(|(kind, _)| *kind == MAX_THREADS)
            .map_or(32 * warps.unwrap_or(32), |(_, words)| {
                words.iter().product()
            });
        let stack = common
            .iter()
            .find(|(kind, words)| *kind == FRAME_SIZE && words[0] == symbol)
            .map_or(0, |(_, words)| words[1]);
        let shared = find(format!(".nv.shared.{name}")).map_or(0, |section| section.2);
        kernels.push(Compiled {
            name: name.to_owned(),
            registers,
            static_shared: shared as u32,
            stack,
            threads,
        });
    }
    kernels
}

/// The largest dynamic shared memory of each kernel that has any.
fn dynamic_shared() -> Vec<(String, u32)> {
    let mut all = many::tiled_kernels(75);
    all.extend(quantised_products::tiled_kernels());
    all.extend(attention::decode_kernels());
    all.extend(attention::prefill_kernels(75));
    all
}

#[test]
fn kernels_fit_a_t4() {
    let images = image::machine_code(75);
    if images.is_empty() {
        eprintln!("SKIPPED: built without kernels for sm_75");
        return;
    }
    let kernels: Vec<Compiled> = images.iter().flat_map(|elf| compiled(elf)).collect();
    let dynamic = dynamic_shared();
    let mut names: Vec<String> = few::kernels().into_iter().map(|(name, _)| name).collect();
    names.extend(dynamic.iter().map(|(name, _)| name.clone()));
    for name in names {
        assert!(kernels.iter().any(|k| k.name == name), "{name} is missing");
    }
    eprintln!("kernel                         registers  shared bytes  warps of 32");
    let mut wrong = Vec::new();
    for kernel in &kernels {
        let more = dynamic.iter().find(|(name, _)| *name == kernel.name);
        let more = more.map_or(0, |(_, bytes)| *bytes);
        let (shared, warps) = (kernel.static_shared + more, kernel.warps(more));
        eprintln!(
            "{:30} {:9} {shared:13} {warps:11}",
            kernel.name, kernel.registers
        );
        if kernel.registers == 0
            || kernel.stack > MOST_STACK
            || shared > SHARED_BYTES
            || warps < kernel.threads.div_ceil(32).max(4)
        {
            wrong.push(format!("{kernel:?}, {shared} shared, {warps} warps"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
