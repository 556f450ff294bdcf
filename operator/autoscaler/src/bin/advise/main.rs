//! The policy as a program: one JSON observation a line in, one decision a line out.
//!
//! A line that can't be read is told on stderr with its number and field and answered with `{}`:
//! leave everything as it is. The program goes on, and exits with 2 in the end.

mod advisor;
mod fit;
mod wire;

use std::io::{self, BufRead, Read, Write};
use std::process::ExitCode;

use advisor::Advisor;

/// Bytes of a line that are read; a longer one isn't an observation.
const LONGEST: u64 = 64 << 20;

fn main() -> ExitCode {
    match run(io::stdin().lock(), io::stdout().lock(), io::stderr().lock()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(2),
        // Whoever listened has gone.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(io::stderr(), "stoker-advise: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Answers every line; true when all could be read.
fn run(
    mut input: impl BufRead,
    mut output: impl Write,
    mut errors: impl Write,
) -> io::Result<bool> {
    let mut advisor = Advisor::default();
    let (mut number, mut sound) = (0u64, true);
    let mut line = Vec::new();
    loop {
        line.clear();
        let read = input.by_ref().take(LONGEST).read_until(b'\n', &mut line)?;
        if read == 0 {
            return Ok(sound);
        }
        number += 1;
        if line.iter().all(u8::is_ascii_whitespace) {
            continue;
        }
        let answer = match serde_json::from_slice::<wire::Observation>(&line) {
            Ok(observation) => serde_json::to_string(&advisor.advise(&observation))?,
            Err(error) => {
                writeln!(errors, "line {number}: not an observation: {error}")?;
                sound = false;
                "{}".to_owned()
            }
        };
        writeln!(output, "{answer}")?;
        output.flush()?;
    }
}
