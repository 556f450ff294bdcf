//! Traces in the format of Azure's public dataset: TIMESTAMP, ContextTokens, GeneratedTokens.

use std::path::Path;

use thiserror::Error;

use super::{Request, Trace};

#[derive(Debug, Error)]
pub enum TraceError {
    #[error("can't read the trace: {0}")]
    Read(#[from] std::io::Error),
    #[error("the trace's first line must name TIMESTAMP, ContextTokens and GeneratedTokens: {0:?}")]
    Header(String),
    #[error("line {line} of the trace has no valid {field}: {value:?}")]
    Field {
        line: usize,
        field: &'static str,
        value: String,
    },
    #[error("the trace has no requests")]
    Empty,
}

impl Trace {
    /// Reads a file; its name becomes the trace's.
    pub fn read(path: &Path) -> Result<Self, TraceError> {
        let name = path.file_stem().unwrap_or_default().to_string_lossy();
        Self::parse(name, &std::fs::read_to_string(path)?)
    }

    /// In the format that [`Trace::read`] reads; times are seconds since the trace began.
    pub fn write(&self, path: &Path) -> std::io::Result<()> {
        let mut text = "TIMESTAMP,ContextTokens,GeneratedTokens\n".to_owned();
        for request in &self.requests {
            let Request {
                arrival,
                prompt,
                output,
            } = request;
            text.push_str(&format!("{arrival:.6},{prompt},{output}\n"));
        }
        std::fs::write(path, text)
    }

    pub fn parse(name: impl Into<String>, text: &str) -> Result<Self, TraceError> {
        let mut lines = text.lines().enumerate();
        let header = lines.next().map_or("", |(_, line)| line);
        let names: Vec<&str> = header.trim_start_matches('\u{feff}').split(',').collect();
        let column = |name: &str| {
            let found = names
                .iter()
                .position(|n| n.trim().eq_ignore_ascii_case(name));
            found.ok_or_else(|| TraceError::Header(header.into()))
        };
        let (time, prompt, output) = (
            column("TIMESTAMP")?,
            column("ContextTokens")?,
            column("GeneratedTokens")?,
        );
        let mut requests = Vec::new();
        for (index, line) in lines.filter(|(_, line)| !line.trim().is_empty()) {
            let fields: Vec<&str> = line.split(',').map(str::trim).collect();
            let field = |place: usize| fields.get(place).copied().unwrap_or("");
            let wrong = |field: &'static str, value: &str| TraceError::Field {
                line: index + 1,
                field,
                value: value.into(),
            };
            let tokens = |place, name| {
                let value = field(place);
                let tokens: Result<u32, _> = value.parse();
                // Requests of no token exist in such logs; an engine computes at least one.
                tokens.map(|n| n.max(1)).map_err(|_| wrong(name, value))
            };
            requests.push(Request {
                arrival: seconds(field(time)).ok_or_else(|| wrong("TIMESTAMP", field(time)))?,
                prompt: tokens(prompt, "ContextTokens")?,
                output: tokens(output, "GeneratedTokens")?,
            });
        }
        let start = requests.iter().map(|r| r.arrival).reduce(f64::min);
        let start = start.ok_or(TraceError::Empty)?;
        for request in &mut requests {
            request.arrival -= start;
        }
        Ok(Trace::new(name, requests))
    }
}

/// Seconds since the Unix epoch of `2023-11-16 18:15:46.6805900`, or a plain number of seconds.
fn seconds(text: &str) -> Option<f64> {
    if let Ok(seconds) = text.parse::<f64>() {
        return seconds.is_finite().then_some(seconds);
    }
    let text = text.split(['+', 'Z']).next()?;
    let (date, time) = text.split_once([' ', 'T'])?;
    let mut date = date.split('-').map(|part| part.parse::<i64>().ok());
    let (year, month, day) = (date.next()??, date.next()??, date.next()??);
    let mut time = time.split(':').map(|part| part.parse::<f64>().ok());
    let (hour, minute, second) = (time.next()??, time.next()??, time.next()??);
    if !(1..=12).contains(&month) || !(1..=31).contains(&day) {
        return None;
    }
    Some(days(year, month, day) as f64 * 86_400.0 + hour * 3600.0 + minute * 60.0 + second)
}

/// Days since 1970-01-01 (Howard Hinnant's `days_from_civil`).
fn days(year: i64, month: i64, day: i64) -> i64 {
    let year = if month <= 2 { year - 1 } else { year };
    let era = year.div_euclid(400);
    let of_era = year.rem_euclid(400);
    let of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    era * 146_097 + of_era * 365 + of_era / 4 - of_era / 100 + of_year - 719_468
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_dates_numbers_and_columns_in_any_order() {
        let trace = Trace::parse(
            "x",
            "GeneratedTokens,TIMESTAMP,ContextTokens\n\
             7,2023-11-30 23:59:59.5,100\n\
             0,2023-12-01T00:00:01.25Z,200\n",
        )
        .unwrap();
        assert_eq!(trace.duration, 1.75);
        let second = trace.requests[1];
        assert_eq!((second.prompt, second.output), (200, 1));
        let plain = Trace::parse(
            "y",
            "timestamp,contexttokens,generatedtokens\n3,1,2\n1.5,3,4",
        );
        assert_eq!(plain.unwrap().requests[1].arrival, 1.5);
        assert_eq!(seconds("1970-01-02 00:00:01"), Some(86_401.0));
        assert_eq!(days(2000, 3, 1), 11_017);
    }

    #[test]
    fn what_is_written_reads_the_same() {
        let text = "TIMESTAMP,ContextTokens,GeneratedTokens\n0,10,2\n1.5,20,3\n3,30,4\n";
        let trace = Trace::parse("x", text).unwrap();
        let folder = std::env::temp_dir().join(format!("stoker-trace-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let path = folder.join("x.csv");
        trace.write(&path).unwrap();
        assert_eq!(Trace::read(&path).unwrap(), trace);
        std::fs::remove_dir_all(&folder).unwrap();
        let hastened = trace.hastened(2);
        let arrivals: Vec<f64> = hastened.requests.iter().map(|r| r.arrival).collect();
        assert_eq!(arrivals, [0.0, 1.5]);
    }

    #[test]
    fn says_what_is_wrong_and_where() {
        let error = |text: &str| Trace::parse("x", text).unwrap_err().to_string();
        assert!(error("a,b,c\n1,2,3").contains("TIMESTAMP"));
        let header = "TIMESTAMP,ContextTokens,GeneratedTokens\n";
        assert!(error(header).contains("no requests"));
        let bad = error(&format!("{header}1,2,3\n2,many,3\n"));
        assert!(bad.contains("line 3") && bad.contains("ContextTokens") && bad.contains("many"));
        assert!(error(&format!("{header}yesterday,2,3\n")).contains("TIMESTAMP"));
    }

    #[test]
    fn the_shared_trace_is_what_its_readme_says() {
        let path = concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/../traces/azure_llm_2023_conv.csv"
        );
        let trace = Trace::read(Path::new(path)).unwrap();
        assert_eq!(trace.requests.len(), 19_366);
        assert!((trace.duration - 3501.7).abs() < 0.1, "{}", trace.duration);
        let mut prompts: Vec<u32> = trace.requests.iter().map(|r| r.prompt).collect();
        prompts.sort_unstable();
        assert_eq!(prompts[prompts.len() / 2], 1020);
    }
}
