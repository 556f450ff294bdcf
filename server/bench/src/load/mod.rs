//! Load over HTTP: in a closed loop, or the requests of a log at their times.

mod client;
mod goodput;
mod recorder;
mod report;
mod schedule;
mod trace;

use std::fs::File;
use std::io::Write;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::{ArgAction, Args};
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::prompts::{Mix, Prompt, Prompts, token_ids};
use client::Target;
use goodput::Goodput;
use recorder::{Measured, Recorder};
use schedule::{Ramp, Shape, duration_of};
use trace::Arrival;

pub use report::LoadReport;

/// Pause of a user whose request failed, unless the server names one with Retry-After.
const FAILURE_PAUSE: Duration = Duration::from_millis(200);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

#[derive(Args)]
pub struct LoadArgs {
    /// The server, such as http://127.0.0.1:8000
    #[arg(long)]
    url: String,
    /// Model that requests name [default: none, the server's own]
    #[arg(long)]
    model: Option<String>,
    /// Virtual users; several: one run after the other
    #[arg(long, value_delimiter = ',', default_value = "1",
          value_parser = clap::value_parser!(u32).range(1..))]
    concurrency: Vec<u32>,
    /// Requests of each run: a number, or 20x for 20 times the concurrency
    #[arg(long, default_value = "20x")]
    requests: Requests,
    /// Stages of concurrency instead: CONCURRENCY:DURATION,… such as 10:60s,40:120s
    #[arg(long, conflicts_with_all = ["concurrency", "requests"])]
    ramp: Option<Ramp>,
    /// How concurrency goes within a stage of the ramp
    #[arg(long, value_enum, default_value = "step")]
    ramp_shape: Shape,
    /// Requests of a log instead, each at its time, whatever became of those before: CSV with
    /// TIMESTAMP, ContextTokens and GeneratedTokens
    #[arg(long, conflicts_with_all = ["concurrency", "requests", "ramp", "prompt_tokens",
          "max_tokens", "prompt_mix"])]
    trace: Option<PathBuf>,
    /// Part of the trace: FROM..TO, such as 600s..900s
    #[arg(long, requires = "trace", value_parser = trace::window)]
    trace_window: Option<std::ops::Range<Duration>>,
    /// How many times as fast the trace passes
    #[arg(long, requires = "trace", default_value_t = 1.0)]
    trace_speed: f64,
    /// Tokens of each prompt
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..))]
    prompt_tokens: u32,
    /// New tokens of each answer; the model's end token is ignored
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..))]
    max_tokens: u32,
    /// Kinds of requests instead: PROMPT_TOKENS/MAX_TOKENS:WEIGHT,… such as 200/100:3,2000/50:1
    #[arg(long, conflicts_with_all = ["prompt_tokens", "max_tokens"])]
    prompt_mix: Option<Mix>,
    /// Token ids that prompts are made of
    #[arg(long, default_value = "1000..30000", value_parser = token_ids)]
    token_ids: std::ops::Range<u32>,
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Whether answers are streamed; TTFT and ITL are measured only then
    #[arg(long, default_value_t = true, action = ArgAction::Set, value_name = "BOOL",
          default_missing_value = "true", num_args = 0..=1)]
    stream: bool,
    /// Limits of a good answer in milliseconds, such as ttft:2000,tpot:100; ttft:2000+1/1000 adds
    /// 1 ms for each prompt token above 1000. The report and the progress then tell the share of
    /// good ones
    #[arg(long)]
    goodput: Option<Goodput>,
    /// Time for a whole answer
    #[arg(long, default_value = "120s", value_parser = duration_of)]
    timeout: Duration,
    /// Exit with 1 when a request failed
    #[arg(long)]
    require_all: bool,
    /// Where to write a line of JSON every second
    #[arg(long)]
    progress_jsonl: Option<PathBuf>,
    /// Where to write the figures as JSON
    #[arg(long)]
    json: Option<PathBuf>,
}

#[derive(Clone, Copy)]
enum Requests {
    Total(u64),
    PerUser(u64),
}

impl FromStr for Requests {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let (number, per_user) = match text.strip_suffix('x') {
            Some(number) => (number, true),
            None => (text, false),
        };
        match number.parse() {
            Ok(n) if n > 0 && per_user => Ok(Self::PerUser(n)),
            Ok(n) if n > 0 => Ok(Self::Total(n)),
            _ => bail!("{text:?} is not a number of requests, such as 100 or 20x"),
        }
    }
}

/// Runs the load; false when a request failed and none may.
pub fn run(args: LoadArgs) -> Result<bool> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(load(args))
}

async fn load(args: LoadArgs) -> Result<bool> {
    if args.goodput.is_some() && !args.stream {
        bail!("--goodput needs streamed answers: leave out --stream false");
    }
    let mix = args
        .prompt_mix
        .clone()
        .unwrap_or_else(|| Mix::single(args.prompt_tokens, args.max_tokens));
    let mut bench = Bench {
        target: Target {
            url: format!("{}/v1/completions", args.url.trim_end_matches('/')),
            model: args.model.clone(),
            stream: args.stream,
            timeout: args.timeout,
        },
        prompts: Prompts {
            mix,
            token_ids: args.token_ids.clone(),
            seed: args.seed,
        },
        goodput: args.goodput.clone(),
        numbers: Arc::new(AtomicU64::new(0)),
        progress: match &args.progress_jsonl {
            Some(path) => {
                Some(File::create(path).with_context(|| format!("making {}", path.display()))?)
            }
            None => None,
        },
    };
    let mut runs = Vec::new();
    if let Some(path) = &args.trace {
        let whole = Duration::ZERO..Duration::MAX;
        let window = args.trace_window.as_ref().unwrap_or(&whole);
        let arrivals = trace::read(path, window, args.trace_speed)?;
        let (most, measured) = bench.replay(arrivals).await?;
        runs.push(report::LoadRun::new(most, measured));
    } else if let Some(ramp) = &args.ramp {
        let plan = Plan::Ramp(ramp.clone(), args.ramp_shape);
        runs.push(report::LoadRun::new(ramp.most(), bench.run(plan).await?));
    } else {
        for &concurrency in &args.concurrency {
            let requests = match args.requests {
                Requests::Total(n) => n,
                Requests::PerUser(n) => n * u64::from(concurrency),
            };
            let plan = Plan::Fixed {
                concurrency,
                requests,
            };
            runs.push(report::LoadRun::new(concurrency, bench.run(plan).await?));
        }
    }
    let report = LoadReport::new(args.url.clone(), args.model.clone(), runs);
    report.print();
    if let Some(path) = &args.json {
        crate::write_json(path, &report)?;
    }
    Ok(report.failed == 0 || !args.require_all)
}

/// How many users, and until when.
#[derive(Clone)]
enum Plan {
    Fixed { concurrency: u32, requests: u64 },
    Ramp(Ramp, Shape),
}

impl Plan {
    fn most(&self) -> u32 {
        match self {
            Self::Fixed { concurrency, .. } => *concurrency,
            Self::Ramp(ramp, _) => ramp.most(),
        }
    }

    /// Users now; `None`: no more requests.
    fn concurrency(&self, elapsed: Duration) -> Option<u32> {
        match self {
            Self::Fixed { concurrency, .. } => Some(*concurrency),
            Self::Ramp(ramp, shape) => ramp.concurrency(*shape, elapsed),
        }
    }
}

struct Bench {
    target: Target,
    prompts: Prompts,
    goodput: Option<Goodput>,
    /// Numbers of prompts, so that no two requests of a run are alike.
    numbers: Arc<AtomicU64>,
    progress: Option<File>,
}

/// One virtual user.
struct User {
    index: u32,
    target: Target,
    prompts: Prompts,
    numbers: Arc<AtomicU64>,
    /// Requests that may still be sent.
    left: Arc<AtomicU64>,
    /// How many users are to be active; `None`: the end.
    active: watch::Receiver<Option<u32>>,
    recorder: Arc<Recorder>,
}

impl Bench {
    async fn run(&mut self, plan: Plan) -> Result<Measured> {
        let recorder = Arc::new(Recorder::new(self.goodput.clone()));
        let (active, receiver) = watch::channel(plan.concurrency(Duration::ZERO));
        let left = Arc::new(AtomicU64::new(match &plan {
            Plan::Fixed { requests, .. } => *requests,
            Plan::Ramp(..) => u64::MAX,
        }));
        let mut users = JoinSet::new();
        for index in 0..plan.most() {
            let user = User {
                index,
                target: self.target.clone(),
                prompts: self.prompts.clone(),
                numbers: self.numbers.clone(),
                left: left.clone(),
                active: receiver.clone(),
                recorder: recorder.clone(),
            };
            users.spawn(user.run());
        }
        let mut tick = tokio::time::interval(Duration::from_millis(100));
        let mut ticks = 0u64;
        loop {
            tokio::select! {
                user = users.join_next() => match user {
                    Some(user) => user??,
                    None => break,
                },
                _ = tick.tick() => {
                    let concurrency = plan.concurrency(recorder.elapsed());
                    active.send_if_modified(|now| std::mem::replace(now, concurrency) != concurrency);
                    if ticks.is_multiple_of(10) && ticks > 0 {
                        self.report_progress(&recorder, concurrency.unwrap_or(0))?;
                    }
                    ticks += 1;
                }
            }
        }
        self.report_progress(&recorder, 0)?;
        Ok(recorder.finish())
    }

    /// Sends each request when it is due. Also gives how many were under way at most.
    async fn replay(&mut self, arrivals: Vec<Arrival>) -> Result<(u32, Measured)> {
        let recorder = Arc::new(Recorder::new(self.goodput.clone()));
        // Requests share connections that are idle, like those of one application.
        let client = self.target.client()?;
        let mut requests = JoinSet::new();
        let mut due = arrivals.into_iter().peekable();
        let mut tick = tokio::time::interval(Duration::from_secs(1));
        let start = tokio::time::Instant::now();
        let mut most = 0;
        while due.peek().is_some() || !requests.is_empty() {
            let next = due.peek().map(|arrival| start + arrival.at);
            tokio::select! {
                () = tokio::time::sleep_until(next.unwrap_or(start)), if next.is_some() => {
                    let Some(arrival) = due.next() else { continue };
                    let number = self.numbers.fetch_add(1, Ordering::Relaxed);
                    let prompt = self.prompts.of(arrival.kind, number);
                    let (target, client) = (self.target.clone(), client.clone());
                    let recorder = recorder.clone();
                    requests.spawn(async move {
                        request(&target, &client, &prompt, &recorder).await;
                    });
                    most = most.max(requests.len());
                }
                Some(ended) = requests.join_next() => ended?,
                _ = tick.tick() => self.report_progress(&recorder, requests.len() as u32)?,
            }
        }
        self.report_progress(&recorder, 0)?;
        Ok((most as u32, recorder.finish()))
    }

    fn report_progress(&mut self, recorder: &Recorder, concurrency: u32) -> Result<()> {
        if let Some(file) = &mut self.progress {
            let line = serde_json::to_string(&recorder.progress(concurrency))?;
            writeln!(file, "{line}").context("writing the progress")?;
        }
        Ok(())
    }
}

impl User {
    async fn run(mut self) -> Result<()> {
        let client = self.target.client()?;
        loop {
            if !self.wanted().await {
                return Ok(());
            }
            let taken = self
                .left
                .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| n.checked_sub(1));
            if taken.is_err() {
                return Ok(());
            }
            let number = self.numbers.fetch_add(1, Ordering::Relaxed);
            let prompt = self.prompts.get(number);
            if let Some(pause) = request(&self.target, &client, &prompt, &self.recorder).await {
                tokio::time::sleep(pause.min(LONGEST_PAUSE)).await;
            }
        }
    }

    /// Waits until this user is among the wanted ones; false at the end.
    async fn wanted(&mut self) -> bool {
        let index = self.index;
        let active = self
            .active
            .wait_for(|active| active.is_none_or(|active| index < active))
            .await;
        active.is_ok_and(|active| active.is_some())
    }
}

/// Sends a request and counts what became of it. Gives the pause that a failure asks for.
async fn request(
    target: &Target,
    client: &reqwest::Client,
    prompt: &Prompt,
    recorder: &Recorder,
) -> Option<Duration> {
    recorder.sent();
    let sent = Instant::now();
    match target.send(client, prompt, recorder).await {
        Ok(answer) => {
            recorder.answered(&answer, sent.elapsed());
            None
        }
        Err(failure) => {
            let pause = failure.retry_after.unwrap_or(FAILURE_PAUSE);
            recorder.failed(failure);
            Some(pause)
        }
    }
}
