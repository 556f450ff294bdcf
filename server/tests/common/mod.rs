//! A server in a process of its own, on free ports of loopback.

#![allow(
    dead_code,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "each test file uses a part; a failed helper fails its test"
)]

use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;

use serde_json::{Value, json};

/// Longer than anything takes on a busy machine; never waited for when all is well.
pub const PATIENCE: Duration = Duration::from_secs(60);

pub struct Server {
    child: Child,
    lines: Arc<Mutex<String>>,
    pub url: String,
    pub control_url: String,
    pub http: reqwest::Client,
}

impl Server {
    /// Starts the simulated H100 with more flags, and waits until it is ready.
    pub async fn start(flags: &[&str]) -> Self {
        let device = ["--device", "simulated", "--simulated-profile", "h100"];
        let server = Self::launch(&[&device, flags].concat());
        server.wait_ready().await;
        server
    }

    /// Starts the binary and waits until its ports are open.
    pub fn launch(flags: &[&str]) -> Self {
        Self::launch_with(flags, &[])
    }

    /// The same, with further environment variables.
    pub fn launch_with(flags: &[&str], environment: &[(&str, &str)]) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_stoker-server"));
        command
            .args(["--host", "127.0.0.1", "--port", "0", "--control-port", "0"])
            .args(["--log-format", "json"])
            .args(flags)
            .env_remove("POD_UID")
            .env_remove("HF_ENDPOINT")
            .env_remove("HF_TOKEN")
            .envs(environment.iter().copied())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let mut log = BufReader::new(child.stderr.take().unwrap());
        let (sender, ports) = mpsc::channel();
        let lines = Arc::new(Mutex::new(String::new()));
        let written = lines.clone();
        std::thread::spawn(move || {
            let mut line = String::new();
            while log.read_line(&mut line).is_ok_and(|n| n > 0) {
                eprint!("server: {line}");
                written.lock().unwrap().push_str(&line);
                let event: Value = serde_json::from_str(&line).unwrap_or_default();
                if event["message"] == "listening" {
                    let address = |name| format!("http://{}", event[name].as_str().unwrap());
                    let _ = sender.send((address("public"), address("control")));
                }
                line.clear();
            }
        });
        let (url, control_url) = ports.recv_timeout(PATIENCE).expect("no port was opened");
        Self {
            child,
            lines,
            url,
            control_url,
            http: reqwest::Client::builder().no_proxy().build().unwrap(),
        }
    }

    /// What it has logged so far.
    pub fn log(&self) -> String {
        self.lines.lock().unwrap().clone()
    }

    pub async fn wait_ready(&self) {
        eventually("ready", async || self.get("/ready").await.0 == 200).await;
    }

    pub async fn get(&self, path: &str) -> (u16, String) {
        let response = self.http.get(self.url.clone() + path).send().await.unwrap();
        (response.status().as_u16(), response.text().await.unwrap())
    }

    pub async fn post(&self, path: &str, body: &Value) -> (u16, Value) {
        let response = self.response(path, body).await;
        (response.status().as_u16(), response.json().await.unwrap())
    }

    pub async fn response(&self, path: &str, body: &Value) -> reqwest::Response {
        self.http
            .post(self.url.clone() + path)
            .json(body)
            .send()
            .await
            .unwrap()
    }

    /// Completes a prompt and gives the whole answer.
    pub async fn complete(&self, body: Value) -> Value {
        let (status, answer) = self.post("/v1/completions", &body).await;
        assert_eq!(status, 200, "{answer}");
        answer
    }

    /// The data of a streamed answer's events.
    pub async fn stream(&self, path: &str, mut body: Value) -> Vec<String> {
        body["stream"] = json!(true);
        let response = self.response(path, &body).await;
        assert_eq!(response.status(), 200);
        let kind = response.headers()["content-type"].to_str().unwrap();
        assert!(kind.starts_with("text/event-stream"), "{kind}");
        let text = response.text().await.unwrap();
        assert!(text.ends_with("data: [DONE]\n\n"), "{text}");
        let events: Vec<String> = text
            .split_terminator("\n\n")
            .map(|event| event.strip_prefix("data: ").expect(event).to_owned())
            .collect();
        events[..events.len() - 1].to_vec()
    }

    /// The value of a series of /metrics, by the beginning of its line's labels and name.
    pub async fn metric(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        let (_, text) = self.get("/metrics").await;
        series(&text, name, labels).unwrap_or_else(|| panic!("no {name} {labels:?} in {text}"))
    }

    /// Waits until nothing runs, waits or holds memory.
    pub async fn wait_empty(&self) {
        for gauge in [
            "vllm:num_requests_running",
            "vllm:num_requests_waiting",
            "stoker:kv_tokens",
            "vllm:kv_cache_usage_perc",
            "stoker:waiting_prompt_tokens",
        ] {
            eventually(gauge, async || self.metric(gauge, &[]).await == 0.0).await;
        }
    }

    pub async fn control(
        &self,
        method: reqwest::Method,
        path: &str,
        body: Option<Value>,
    ) -> (u16, Value) {
        let mut request = self
            .http
            .request(method, format!("{}/control/v1/{path}", self.control_url));
        if let Some(body) = body {
            request = request.json(&body);
        }
        let response = request.send().await.unwrap();
        (response.status().as_u16(), response.json().await.unwrap())
    }

    /// Sends SIGTERM.
    pub fn terminate(&self) {
        let pid = self.child.id().to_string();
        let sent = Command::new("kill").args(["-TERM", &pid]).status().unwrap();
        assert!(sent.success());
    }

    pub async fn wait_exit(mut self) -> ExitStatus {
        let mut status = None;
        eventually("exit", async || {
            status = self.child.try_wait().unwrap();
            status.is_some()
        })
        .await;
        status.unwrap()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Runs the binary to its end; exit code and standard error.
pub fn run_to_end(flags: &[&str]) -> (i32, String) {
    run_to_end_with(flags, &[])
}

/// The same, with further environment variables.
pub fn run_to_end_with(flags: &[&str], environment: &[(&str, &str)]) -> (i32, String) {
    let mut child = Command::new(env!("CARGO_BIN_EXE_stoker-server"))
        .args(flags)
        .env_remove("POD_UID")
        .env_remove("HF_ENDPOINT")
        .env_remove("HF_TOKEN")
        .envs(environment.iter().copied())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut text = String::new();
    let mut stderr = child.stderr.take().unwrap();
    stderr.read_to_string(&mut text).unwrap();
    (child.wait().unwrap().code().unwrap(), text)
}

/// Waits until `check` holds.
pub async fn eventually(what: &str, mut check: impl AsyncFnMut() -> bool) {
    let start = std::time::Instant::now();
    while !check().await {
        assert!(start.elapsed() < PATIENCE, "{what}: still not");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// The value of a series in Prometheus' text format.
pub fn series(text: &str, name: &str, labels: &[(&str, &str)]) -> Option<f64> {
    text.lines()
        .filter(|line| {
            line.strip_prefix(name)
                .is_some_and(|rest| rest.starts_with('{'))
        })
        .find(|line| {
            labels
                .iter()
                .all(|(label, value)| line.contains(&format!("{label}=\"{value}\"")))
        })
        .and_then(|line| line.rsplit(' ').next()?.parse().ok())
}
