//! Load time, memory and speed of a model on the CPU: decoding at several batch sizes and prompt
//! processing, for each number of threads given.
//!
//! `cargo run --release -p stoker-model --example throughput -- MODEL.gguf [THREADS...]`
//!
//! "cpu" figures count the process's CPU seconds instead of the clock, so that a busy machine
//! doesn't spoil them.

use std::{
    error::Error,
    fs,
    path::Path,
    time::{Duration, Instant},
};

use stoker_engine::executor::{Executor, InputToken, Row, Sampling, StepBatch};
use stoker_model::{KvMemory, LoadOptions, LoadedModel};

const GREEDY: Sampling = Sampling {
    temperature: 0.0,
    top_p: 1.0,
    top_k: 0,
    seed: 0,
};
const PROMPT: u32 = 32;
const NEW_TOKENS: u32 = 100;

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let model = arguments
        .next()
        .ok_or("usage: throughput MODEL.gguf [THREADS...]")?;
    let mut threads: Vec<usize> = arguments.map(|a| a.parse()).collect::<Result<_, _>>()?;
    if threads.is_empty() {
        threads.push(std::thread::available_parallelism()?.get());
    }
    println!("instruction set: {}", stoker_kernels::instruction_set());
    for threads in threads {
        measure(Path::new(&model), threads)?;
    }
    Ok(())
}

fn measure(model: &Path, threads: usize) -> Result<(), Box<dyn Error>> {
    let options = LoadOptions {
        kv_memory: KvMemory::Bytes(512 << 20),
        threads: Some(threads),
        ..LoadOptions::default()
    };
    let meter = Meter::start();
    let mut loaded = LoadedModel::load(model, &options, &|_| {})?;
    let (wall, cpu) = meter.read();
    println!(
        "\n{threads} threads: loaded in {wall:.2} s ({cpu:.2} CPU s), weights {} MB, resident {} MB",
        loaded.info.weight_bytes / 1_000_000,
        resident_kilobytes()? / 1000,
    );
    let executor = &mut loaded.executor;
    println!("{:<24} {:>10} {:>12}", "", "tok/s", "tok/cpu-s");
    for batch in [1, 2, 4, 8, 16, 32] {
        prompts(executor, batch, PROMPT)?;
        let meter = Meter::start();
        for position in PROMPT..PROMPT + NEW_TOKENS {
            decode(executor, batch, position)?;
        }
        report(
            &format!("decode, batch {batch}"),
            batch * NEW_TOKENS,
            &meter,
        );
    }
    for tokens in [32, 128, 512] {
        let meter = Meter::start();
        let repeats = 1024 / tokens;
        for _ in 0..repeats {
            prompts(executor, 1, tokens)?;
        }
        report(&format!("prompt of {tokens}"), repeats * tokens, &meter);
    }
    println!("resident after that: {} MB", resident_kilobytes()? / 1000);
    Ok(())
}

fn prompts(executor: &mut dyn Executor, batch: u32, tokens: u32) -> Result<(), Box<dyn Error>> {
    let prompt = (0..tokens).map(|i| InputToken::Known(100 + i * 37 % 40_000));
    let prompt: Vec<InputToken> = prompt.collect();
    let rows = (0..batch)
        .map(|slot| row(slot, prompt.clone(), 0))
        .collect();
    run(executor, rows)
}

fn decode(executor: &mut dyn Executor, batch: u32, position: u32) -> Result<(), Box<dyn Error>> {
    let tokens = vec![InputToken::FromPreviousStep];
    let rows = (0..batch)
        .map(|slot| row(slot, tokens.clone(), position))
        .collect();
    run(executor, rows)
}

fn row(slot: u32, tokens: Vec<InputToken>, start: u32) -> Row {
    Row {
        slot,
        tokens,
        start,
        blocks: (slot * 32..(slot + 1) * 32).collect(),
        sample: Some(GREEDY),
    }
}

fn run(executor: &mut dyn Executor, rows: Vec<Row>) -> Result<(), Box<dyn Error>> {
    let ticket = executor.submit(StepBatch { rows })?;
    executor.wait(ticket)?;
    Ok(())
}

fn report(what: &str, tokens: u32, meter: &Meter) {
    let (wall, cpu) = meter.read();
    println!(
        "{what:<24} {:>10.1} {:>12.1}",
        f64::from(tokens) / wall,
        f64::from(tokens) / cpu
    );
}

struct Meter {
    wall: Instant,
    cpu: Duration,
}

impl Meter {
    fn start() -> Self {
        Self {
            wall: Instant::now(),
            cpu: cpu_time(),
        }
    }

    fn read(&self) -> (f64, f64) {
        let cpu = cpu_time().saturating_sub(self.cpu);
        (
            self.wall.elapsed().as_secs_f64(),
            cpu.as_secs_f64().max(1e-9),
        )
    }
}

/// User and system time of the process, ended threads included, in steps of 10 ms.
fn cpu_time() -> Duration {
    let stat = fs::read_to_string("/proc/self/stat").unwrap_or_default();
    // The name in parentheses may hold spaces; utime and stime are the 12th and 13th after it.
    let fields = stat
        .rsplit(')')
        .next()
        .unwrap_or_default()
        .split_whitespace();
    let ticks: u64 = fields
        .skip(11)
        .take(2)
        .filter_map(|f| f.parse::<u64>().ok())
        .sum();
    Duration::from_millis(ticks * 10)
}

fn resident_kilobytes() -> Result<u64, Box<dyn Error>> {
    let status = fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:"));
    Ok(line
        .ok_or("no VmRSS")?
        .trim()
        .trim_end_matches(" kB")
        .parse()?)
}
