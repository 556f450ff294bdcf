//! Upstream and load for tests/bench-router.sh.
//!
//! `upstream PORT`: answers like a replica that takes no time: JSON at once, streams event by
//! event, and with `"idle": true` a stream that falls silent after its first event.
//! `latency URL… `: 200 requests/s of 1 KB to each URL in turn. `streams URL`: as many streams
//! as fit. `idle URL N PID`: opens N silent streams and reads the memory of process PID.
//! Each prints one line of JSON.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use bytes::Bytes;
use clap::{Parser, Subcommand};
use http_body::{Body, Frame};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::net::{TcpListener, TcpStream};

#[derive(Parser)]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Upstream {
        port: u16,
    },
    Latency {
        addresses: Vec<String>,
        #[arg(long, default_value_t = 200)]
        rate: u64,
        #[arg(long, default_value_t = 10)]
        seconds: u64,
    },
    Streams {
        address: String,
        #[arg(long, default_value_t = 32)]
        concurrency: usize,
        #[arg(long, default_value_t = 5)]
        seconds: u64,
        #[arg(long, default_value_t = 100)]
        events: usize,
    },
    Idle {
        address: String,
        streams: usize,
        pid: u32,
    },
    /// The latency of key "calm" while key "flood" keeps its limit and while it sends `times` as much.
    Fairness {
        address: String,
        #[arg(long, default_value_t = 4.0)]
        calm: f64,
        /// Requests a second that "flood" may send.
        #[arg(long, default_value_t = 1.0)]
        limit: f64,
        #[arg(long, default_value_t = 50.0)]
        times: f64,
        #[arg(long, default_value_t = 20)]
        seconds: u64,
    },
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let result = match Args::parse().command {
        Command::Upstream { port } => return upstream(port).await,
        Command::Latency {
            addresses,
            rate,
            seconds,
        } => latency(&addresses, rate, seconds).await?,
        Command::Streams {
            address,
            concurrency,
            seconds,
            events,
        } => streams(&address, concurrency, seconds, events).await?,
        Command::Idle {
            address,
            streams,
            pid,
        } => idle(&address, streams, pid).await?,
        Command::Fairness {
            address,
            calm,
            limit,
            times,
            seconds,
        } => {
            let beside = async |rate| {
                let flood = tokio::spawn(paced(address.clone(), "flood", rate, seconds));
                let (p95, _) = paced(address.clone(), "calm", calm, seconds).await?;
                let (_, refused) = flood.await??;
                anyhow::Ok((p95, refused))
            };
            let (kept, _) = beside(limit).await?;
            let (flooded, refused) = beside(limit * times).await?;
            json!({"p95_beside_limit_ms": kept, "p95_beside_flood_ms": flooded,
                   "ratio": flooded / kept, "flood_refused": refused})
        }
    };
    println!("{result}");
    Ok(())
}

// The upstream ------------------------------------------------------------------------------

/// Events one by one: each is written before the next is made, as a replica's steps do.
struct Events {
    left: usize,
    idle: bool,
    paused: bool,
}

impl Body for Events {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        if self.left == 0 && self.idle {
            return Poll::Pending;
        }
        if !std::mem::replace(&mut self.paused, true) {
            context.waker().wake_by_ref();
            return Poll::Pending;
        }
        self.paused = false;
        if self.left == 0 {
            return Poll::Ready(None);
        }
        self.left -= 1;
        let event = if self.left == 0 && !self.idle {
            Bytes::from_static(b"data: [DONE]\n\n")
        } else {
            Bytes::from_static(
                b"data: {\"id\":\"cmpl-0123456789abcdef\",\"object\":\"text_completion\",\
                  \"created\":1700000000,\"model\":\"bench\",\"choices\":[{\"index\":0,\
                  \"text\":\" token\",\"logprobs\":null,\"finish_reason\":null}]}\n\n",
            )
        };
        Poll::Ready(Some(Ok(Frame::data(event))))
    }
}

type Answer = Response<http_body_util::combinators::BoxBody<Bytes, Infallible>>;

async fn respond(request: Request<Incoming>) -> Result<Answer, Infallible> {
    let path = request.uri().path().to_owned();
    let body = request.into_body().collect().await;
    let body = body.map_or_else(|_| Bytes::new(), |body| body.to_bytes());
    if path == "/metrics" {
        let text = "stoker:max_num_seqs 100000\nvllm:num_requests_running 0\n";
        return Ok(Response::new(BodyExt::boxed(Full::new(text.into()))));
    }
    let request: Value = serde_json::from_slice(&body).unwrap_or_default();
    let mut response = if request["stream"] == true {
        let events = request["max_tokens"].as_u64().unwrap_or(100);
        let idle = request["idle"] == true;
        Response::new(BodyExt::boxed(Events {
            left: usize::try_from(events).unwrap_or(1),
            idle,
            paused: false,
        }))
    } else {
        let text = json!({"id": "cmpl-1", "object": "text_completion", "choices": [
            {"index": 0, "text": "x".repeat(900), "finish_reason": "length"}],
            "usage": {"prompt_tokens": 250, "completion_tokens": 16}});
        Response::new(BodyExt::boxed(Full::new(text.to_string().into())))
    };
    let kind = if request["stream"] == true {
        "text/event-stream"
    } else {
        "application/json"
    };
    let kind = hyper::header::HeaderValue::from_static(kind);
    response
        .headers_mut()
        .insert(hyper::header::CONTENT_TYPE, kind);
    Ok(response)
}

async fn upstream(port: u16) -> anyhow::Result<()> {
    let listener = TcpListener::bind(("127.0.0.1", port)).await?;
    loop {
        let (stream, _) = listener.accept().await?;
        stream.set_nodelay(true)?;
        tokio::spawn(async move {
            let service = service_fn(respond);
            let connection = http1::Builder::new().serve_connection(TokioIo::new(stream), service);
            let _ = connection.await;
        });
    }
}

// The clients -------------------------------------------------------------------------------

async fn connect(address: &str) -> anyhow::Result<SendRequest<Full<Bytes>>> {
    let stream = TcpStream::connect(address)
        .await
        .with_context(|| format!("{address} can't be reached"))?;
    stream.set_nodelay(true)?;
    let (sender, connection) = handshake(TokioIo::new(stream)).await?;
    tokio::spawn(async move {
        let _ = connection.await;
    });
    Ok(sender)
}

fn request(body: &Value) -> anyhow::Result<Request<Full<Bytes>>> {
    let request = Request::post("/v1/completions")
        .header("host", "bench")
        .header("content-type", "application/json");
    Ok(request.body(Full::new(body.to_string().into()))?)
}

fn percentile(sorted: &[f64], percent: f64) -> f64 {
    let at = (percent / 100.0 * (sorted.len() as f64 - 1.0)).round();
    sorted.get(at as usize).copied().unwrap_or(f64::NAN)
}

/// Requests to the addresses in turn, so that all see the same machine.
async fn latency(addresses: &[String], rate: u64, seconds: u64) -> anyhow::Result<Value> {
    let body = json!({"model": "bench", "max_tokens": 16, "prompt": "x".repeat(950)});
    let mut pools: Vec<Vec<SendRequest<Full<Bytes>>>> = addresses.iter().map(|_| vec![]).collect();
    let mut times: Vec<Vec<f64>> = addresses.iter().map(|_| vec![]).collect();
    let start = tokio::time::Instant::now();
    let gap = Duration::from_secs_f64(1.0 / (rate * addresses.len() as u64) as f64);
    let warm_up = rate as usize;
    for number in 0..rate * seconds {
        for (place, address) in addresses.iter().enumerate() {
            let turn = number * addresses.len() as u64 + place as u64;
            tokio::time::sleep_until(start + gap * u32::try_from(turn)?).await;
            let mut sender = match pools[place].pop() {
                Some(sender) if !sender.is_closed() => sender,
                _ => connect(address).await?,
            };
            let began = Instant::now();
            let response = sender.send_request(request(&body)?).await?;
            ensure!(response.status() == 200, "status {}", response.status());
            let body = response.into_body().collect().await?.to_bytes();
            ensure!(body.len() > 900, "a short answer");
            times[place].push(began.elapsed().as_secs_f64() * 1000.0);
            pools[place].push(sender);
        }
    }
    let results: Vec<Value> = times
        .iter()
        .map(|times| {
            let mut times = times.get(warm_up..).unwrap_or_default().to_vec();
            times.sort_by(f64::total_cmp);
            json!({"p50_ms": percentile(&times, 50.0), "p99_ms": percentile(&times, 99.0),
                   "requests": times.len()})
        })
        .collect();
    Ok(Value::from(results))
}

async fn streams(
    address: &str,
    concurrency: usize,
    seconds: u64,
    events: usize,
) -> anyhow::Result<Value> {
    let done = Arc::new(AtomicU64::new(0));
    let end = Instant::now() + Duration::from_secs(seconds);
    let mut tasks = Vec::new();
    let start = Instant::now();
    for _ in 0..concurrency {
        let (done, address) = (Arc::clone(&done), address.to_owned());
        tasks.push(tokio::spawn(async move {
            let body = json!({"model": "bench", "max_tokens": events, "stream": true,
                              "prompt": "x".repeat(950)});
            let mut sender = connect(&address).await?;
            while Instant::now() < end {
                let sent = sender.send_request(request(&body)?).await;
                let mut answer = sent?.into_body();
                // Frames may end anywhere, within an event too.
                let mut seen = stoker_router::sse::Events::default();
                while let Some(frame) = answer.frame().await {
                    if let Ok(data) = frame?.into_data() {
                        seen.push(data);
                    }
                }
                if seen.count != events as u64 || !seen.is_complete() {
                    bail!("{} events came instead of {events}", seen.count);
                }
                done.fetch_add(1, Relaxed);
                sender.ready().await?;
            }
            Ok(())
        }));
    }
    for task in tasks {
        task.await??;
    }
    let rate = done.load(Relaxed) as f64 / start.elapsed().as_secs_f64();
    Ok(json!({"requests_per_second": rate, "events_per_second": rate * events as f64}))
}

async fn idle(address: &str, streams: usize, pid: u32) -> anyhow::Result<Value> {
    let memory = || -> anyhow::Result<f64> {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let kilobytes = line.and_then(|line| line.split_whitespace().next());
        Ok(kilobytes.context("no VmRSS")?.parse::<f64>()? / 1024.0)
    };
    let before = memory()?;
    let body = json!({"model": "bench", "max_tokens": 1, "stream": true, "idle": true,
                      "prompt": "x".repeat(950)});
    let mut open = Vec::with_capacity(streams);
    for _ in 0..streams {
        let mut sender = connect(address).await?;
        let response = sender.send_request(request(&body)?).await?;
        ensure!(response.status() == 200, "status {}", response.status());
        let mut answer = response.into_body();
        let first = answer.frame().await.context("no first event")??;
        ensure!(first.is_data(), "no first event");
        open.push((sender, answer));
    }
    tokio::time::sleep(Duration::from_secs(2)).await;
    let after = memory()?;
    for (_, answer) in &mut open {
        // The first event may have come in two pieces.
        while let Ok(more) = tokio::time::timeout(Duration::ZERO, answer.frame()).await {
            let data = more.context("a stream ended")??.into_data();
            let data = data.unwrap_or_default();
            let text = String::from_utf8_lossy(&data);
            ensure!(data.len() < 200, "more than one event came: {text}");
        }
    }
    Ok(json!({"streams": open.len(), "before_mb": before, "mb": after}))
}

/// Requests at a steady rate with one key; (p95 in ms of those answered, number refused).
async fn paced(
    address: String,
    key: &'static str,
    rate: f64,
    seconds: u64,
) -> anyhow::Result<(f64, u64)> {
    let body = json!({"model": "bench", "max_tokens": 20, "ignore_eos": true,
                      "prompt": "x ".repeat(100)});
    let mut tasks = Vec::new();
    let start = tokio::time::Instant::now();
    for number in 0..(rate * seconds as f64) as u64 {
        tokio::time::sleep_until(start + Duration::from_secs_f64(number as f64 / rate)).await;
        let mut request = request(&body)?;
        let bearer = hyper::header::HeaderValue::try_from(format!("Bearer {key}"))?;
        request
            .headers_mut()
            .insert(hyper::header::AUTHORIZATION, bearer);
        let address = address.clone();
        tasks.push(tokio::spawn(async move {
            let began = Instant::now();
            let mut sender = connect(&address).await?;
            let response = sender.send_request(request).await?;
            let status = response.status();
            response.into_body().collect().await?;
            ensure!(status == 200 || status == 429, "status {status}");
            anyhow::Ok((status == 200).then(|| began.elapsed().as_secs_f64() * 1000.0))
        }));
    }
    let (mut times, mut refused) = (Vec::new(), 0);
    for task in tasks {
        match task.await?? {
            Some(time) => times.push(time),
            None => refused += 1,
        }
    }
    times.sort_by(f64::total_cmp);
    Ok((percentile(&times, 95.0), refused))
}
