//! What is told of one request when it is over: a line in the access log and metrics. Never the
//! prompt, never the key.

use std::io::Write;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::{SystemTime, UNIX_EPOCH};

use hyper::StatusCode;
use serde::Serialize;

use crate::clock;
use crate::metrics::Metrics;

/// Lines that may wait for a slow output; more are dropped and counted.
const LINES: usize = 8192;

/// Writes lines from a thread of its own, so that a slow output delays no request.
#[derive(Clone, Debug)]
pub struct AccessLog(Option<SyncSender<Vec<u8>>>);

impl AccessLog {
    #[must_use]
    pub fn off() -> Self {
        Self(None)
    }

    /// # Errors
    /// When no thread can be started.
    pub fn to(output: impl Write + Send + 'static) -> std::io::Result<Self> {
        let (sender, lines) = sync_channel(LINES);
        std::thread::Builder::new()
            .name("access-log".into())
            .spawn(move || write_lines(&lines, output))?;
        Ok(Self(Some(sender)))
    }
}

fn write_lines(lines: &Receiver<Vec<u8>>, mut output: impl Write) {
    let mut batch = Vec::new();
    while let Ok(line) = lines.recv() {
        batch.extend_from_slice(&line);
        while batch.len() < 64 << 10 {
            let Ok(line) = lines.try_recv() else { break };
            batch.extend_from_slice(&line);
        }
        // An output that is gone must not stop the router.
        let _ = output.write_all(&batch).and_then(|()| output.flush());
        batch.clear();
    }
}

/// How a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    Complete,
    /// The client went away.
    ClientGone,
    /// The replica went away after the first byte; the client got an error event.
    ReplicaGone,
}

/// Collects, and tells when dropped.
#[derive(Debug)]
pub struct Record {
    pub metrics: Arc<Metrics>,
    pub log: AccessLog,
    pub started: f64,
    pub line: Line,
}

#[derive(Debug, Serialize)]
pub struct Line {
    /// Seconds since 1970 when the request came.
    pub time: f64,
    pub request_id: String,
    pub service: Option<Arc<str>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub key: Option<Arc<str>>,
    pub client: IpAddr,
    pub method: String,
    pub path: String,
    pub status: u16,
    pub outcome: Outcome,
    pub duration_ms: f64,
    pub queue_ms: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cold_start_ms: Option<f64>,
    pub attempts: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub replica: Option<String>,
    pub prompt_tokens_estimated: u64,
    pub response_bytes: u64,
    pub events: u64,
}

impl Record {
    #[must_use]
    pub fn new(metrics: Arc<Metrics>, log: AccessLog, client: IpAddr) -> Box<Self> {
        let time = SystemTime::now().duration_since(UNIX_EPOCH);
        Box::new(Self {
            metrics,
            log,
            started: clock::now(),
            line: Line {
                time: time.map_or(0.0, |time| time.as_secs_f64()),
                request_id: String::new(),
                service: None,
                key: None,
                client,
                method: String::new(),
                path: String::new(),
                // Until an answer begins: the client closed its connection (nginx's number).
                status: 499,
                outcome: Outcome::ClientGone,
                duration_ms: 0.0,
                queue_ms: 0.0,
                cold_start_ms: None,
                attempts: 0,
                replica: None,
                prompt_tokens_estimated: 0,
                response_bytes: 0,
                events: 0,
            },
        })
    }

    pub fn answered(&mut self, status: StatusCode) {
        self.line.status = status.as_u16();
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        let mut digits = [0; 3];
        let code = code(self.line.status, &mut digits);
        let service = self.line.service.as_deref().unwrap_or("");
        self.metrics
            .requests
            .with_label_values(&[service, code])
            .inc();
        let Some(lines) = &self.log.0 else { return };
        let duration = clock::now() - self.started;
        self.line.duration_ms = (duration * 1e6).round() / 1e3;
        let mut text = Vec::with_capacity(512);
        if serde_json::to_writer(&mut text, &self.line).is_ok() {
            text.push(b'\n');
            if lines.try_send(text).is_err() {
                self.metrics.access_log_lost.inc();
            }
        }
    }
}

fn code(status: u16, digits: &mut [u8; 3]) -> &str {
    let mut rest = status;
    for digit in digits.iter_mut().rev() {
        *digit = b'0' + (rest % 10) as u8;
        rest /= 10;
    }
    std::str::from_utf8(digits).unwrap_or("")
}
