//! A stand-in replica that misbehaves on demand. It speaks HTTP by hand, so that it can break
//! off at any byte.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::SeqCst};
use std::time::Duration;

use parking_lot::Mutex;
use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::Notify;

/// What it does with a generation request.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Behaviour {
    Answer,
    /// Closes the connection before it answers.
    DieBeforeFirstByte,
    /// Sends the head of an answer and nothing else.
    DieAfterHead,
    /// Breaks off after so many events, or half a body.
    DieAfter(u32),
    /// Ends a stream properly, but without [DONE].
    EndEarly(u32),
    /// Accepts and says nothing; its probes still answer.
    Hang,
    /// Says nothing to anything, like a stopped process, until it behaves otherwise.
    HangAll,
    /// 503 to requests and to /ready.
    Drain,
    /// 429 to requests.
    Full,
}

pub struct Replica {
    pub address: SocketAddr,
    pub id: String,
    pub behaviour: Mutex<Behaviour>,
    /// Between two events.
    pub pace: Mutex<Duration>,
    pub requests: AtomicU64,
    pub running: AtomicU32,
    pub most_running: AtomicU32,
    /// Requests whose client went away.
    pub cancelled: AtomicU64,
    pub order: Mutex<Vec<String>>,
    pub heads: Mutex<Vec<String>>,
    pub max_num_seqs: AtomicU32,
    pub killed: AtomicBool,
    kill: Notify,
}

struct Running(Arc<Replica>);

impl Drop for Running {
    fn drop(&mut self) {
        self.0.running.fetch_sub(1, SeqCst);
    }
}

impl Replica {
    pub async fn start(id: &str) -> Arc<Self> {
        Self::start_at(id, "127.0.0.1:0".parse().unwrap()).await
    }

    pub async fn start_at(id: &str, address: SocketAddr) -> Arc<Self> {
        let socket = TcpSocket::new_v4().unwrap();
        socket.set_reuseaddr(true).unwrap();
        socket.bind(address).unwrap();
        let listener = socket.listen(1024).unwrap();
        let replica = Arc::new(Self {
            address: listener.local_addr().unwrap(),
            id: id.into(),
            behaviour: Mutex::new(Behaviour::Answer),
            pace: Mutex::new(Duration::from_millis(2)),
            requests: AtomicU64::new(0),
            running: AtomicU32::new(0),
            most_running: AtomicU32::new(0),
            cancelled: AtomicU64::new(0),
            order: Mutex::default(),
            heads: Mutex::default(),
            max_num_seqs: AtomicU32::new(8),
            killed: AtomicBool::new(false),
            kill: Notify::new(),
        });
        tokio::spawn(Arc::clone(&replica).accept(listener));
        replica
    }

    pub fn behave(&self, behaviour: Behaviour) {
        *self.behaviour.lock() = behaviour;
    }

    pub fn pace(&self, milliseconds: u64) {
        *self.pace.lock() = Duration::from_millis(milliseconds);
    }

    /// As kill -9: the port is closed and every connection reset.
    pub fn kill(&self) {
        self.killed.store(true, SeqCst);
        self.kill.notify_waiters();
    }

    pub fn entry(&self, weight: u32) -> Value {
        serde_json::json!({"id": self.id, "address": self.address.to_string(), "weight": weight,
                           "max_num_seqs": self.max_num_seqs.load(SeqCst)})
    }

    async fn accept(self: Arc<Self>, listener: TcpListener) {
        loop {
            let killed = self.kill.notified();
            if self.killed.load(SeqCst) {
                return;
            }
            let (stream, _) = tokio::select! {
                accepted = listener.accept() => accepted.unwrap(),
                () = killed => return,
            };
            let replica = Arc::clone(&self);
            tokio::spawn(async move {
                let killed = replica.kill.notified();
                if replica.killed.load(SeqCst) {
                    return;
                }
                #[allow(deprecated, reason = "a reset is wanted")]
                let _ = stream.set_linger(Some(Duration::ZERO));
                tokio::select! {
                    _ = replica.connection(stream) => {}
                    () = killed => {}
                }
            });
        }
    }

    async fn connection(self: &Arc<Self>, mut stream: TcpStream) -> Option<()> {
        let mut buffer = Vec::new();
        loop {
            let end = loop {
                if let Some(end) = find(&buffer, b"\r\n\r\n") {
                    break end + 4;
                }
                if stream.read_buf(&mut buffer).await.ok()? == 0 {
                    return None;
                }
            };
            let head = String::from_utf8(buffer[..end].to_vec()).unwrap();
            let length = head.lines().find_map(|line| {
                let (name, value) = line.split_once(':')?;
                let length = name.eq_ignore_ascii_case("content-length");
                length.then(|| value.trim().parse::<usize>().unwrap())
            });
            let length = length.unwrap_or(0);
            while buffer.len() < end + length {
                if stream.read_buf(&mut buffer).await.ok()? == 0 {
                    return None;
                }
            }
            let body = buffer[end..end + length].to_vec();
            buffer.drain(..end + length);
            let path = head.split(' ').nth(1).unwrap().to_owned();
            self.answer(&mut stream, &path, &head, &body).await?;
        }
    }

    async fn answer(
        self: &Arc<Self>,
        stream: &mut TcpStream,
        path: &str,
        head: &str,
        body: &[u8],
    ) -> Option<()> {
        while *self.behaviour.lock() == Behaviour::HangAll {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let behaviour = *self.behaviour.lock();
        match path.split('?').next().unwrap() {
            "/ready" | "/health" => {
                let ready = behaviour != Behaviour::Drain;
                let status = if ready {
                    "200 OK"
                } else {
                    "503 Service Unavailable"
                };
                return plain(stream, status, "{}").await;
            }
            "/metrics" => {
                let text = format!(
                    "vllm:num_requests_running {}\nstoker:max_num_seqs {}\n",
                    self.running.load(SeqCst),
                    self.max_num_seqs.load(SeqCst)
                );
                return plain(stream, "200 OK", &text).await;
            }
            _ => {}
        }
        self.requests.fetch_add(1, SeqCst);
        self.heads.lock().push(head.to_owned());
        match behaviour {
            Behaviour::DieBeforeFirstByte => return None,
            Behaviour::Hang => {
                let mut byte = [0];
                let _ = stream.read(&mut byte).await;
                self.cancelled.fetch_add(1, SeqCst);
                return None;
            }
            Behaviour::Drain => return plain(stream, "503 Service Unavailable", "{}").await,
            Behaviour::Full => {
                let text = "{\"error\":{\"message\":\"queue full\"}}";
                return plain(stream, "429 Too Many Requests", text).await;
            }
            _ => {}
        }
        let running = self.running.fetch_add(1, SeqCst) + 1;
        let _running = Running(Arc::clone(self));
        self.most_running.fetch_max(running, SeqCst);
        let request: Value = serde_json::from_slice(body).unwrap_or_default();
        let name = request["user"].as_str().unwrap_or("").to_owned();
        self.order.lock().push(name);
        let tokens = request["max_tokens"].as_u64().unwrap_or(5) as u32;
        if request["stream"] == true {
            self.stream(stream, behaviour, tokens).await
        } else {
            let pace = *self.pace.lock();
            tokio::time::sleep(pace * tokens).await;
            self.whole(stream, behaviour, tokens).await
        }
    }

    async fn whole(&self, stream: &mut TcpStream, behaviour: Behaviour, tokens: u32) -> Option<()> {
        let body = serde_json::json!({
            "id": self.id, "choices": [{"text": "x".repeat(tokens as usize)}],
            "usage": {"prompt_tokens": 4, "completion_tokens": tokens},
        });
        let body = body.to_string();
        if matches!(behaviour, Behaviour::DieAfter(_) | Behaviour::DieAfterHead) {
            let half = &body[..body.len() / 2];
            let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n", body.len());
            stream.write_all((head + half).as_bytes()).await.ok()?;
            tokio::time::sleep(Duration::from_millis(5)).await;
            return None;
        }
        plain(stream, "200 OK", &body).await
    }

    async fn stream(
        &self,
        stream: &mut TcpStream,
        behaviour: Behaviour,
        tokens: u32,
    ) -> Option<()> {
        let head = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\
                    transfer-encoding: chunked\r\n\r\n";
        stream.write_all(head.as_bytes()).await.ok()?;
        if behaviour == Behaviour::DieAfterHead {
            tokio::time::sleep(Duration::from_millis(5)).await;
            return None;
        }
        let pace = *self.pace.lock();
        for number in 0..tokens {
            match behaviour {
                Behaviour::DieAfter(events) if events == number => {
                    // Half an event, which the client must never see.
                    let _ = stream.write_all(b"10\r\ndata: {\"broken").await;
                    tokio::time::sleep(Duration::from_millis(5)).await;
                    return None;
                }
                Behaviour::EndEarly(events) if events == number => {
                    return stream.write_all(b"0\r\n\r\n").await.ok();
                }
                _ => {}
            }
            let event = format!("data: {{\"token\":{number},\"from\":\"{}\"}}\n\n", self.id);
            if chunk(stream, &event).await.is_none() {
                self.cancelled.fetch_add(1, SeqCst);
                return None;
            }
            if pace.is_zero() {
                continue;
            }
            let mut byte = [0];
            tokio::select! {
                read = stream.read(&mut byte) => {
                    assert!(!matches!(read, Ok(1..)), "a second request on a busy connection");
                    self.cancelled.fetch_add(1, SeqCst);
                    return None;
                }
                () = tokio::time::sleep(pace) => {}
            }
        }
        chunk(stream, "data: [DONE]\n\n").await?;
        stream.write_all(b"0\r\n\r\n").await.ok()
    }
}

async fn chunk(stream: &mut TcpStream, text: &str) -> Option<()> {
    let chunk = format!("{:x}\r\n{text}\r\n", text.len());
    stream.write_all(chunk.as_bytes()).await.ok()
}

async fn plain(stream: &mut TcpStream, status: &str, text: &str) -> Option<()> {
    let answer = format!(
        "HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{text}",
        text.len()
    );
    stream.write_all(answer.as_bytes()).await.ok()
}

fn find(bytes: &[u8], what: &[u8]) -> Option<usize> {
    bytes.windows(what.len()).position(|window| window == what)
}
