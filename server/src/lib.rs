//! stoker-server: one language model behind OpenAI's HTTP API, with live dials, metrics in
//! vLLM's names and a control port for the operator.
//!
//! [`run`] is the process from bound ports to exit; [`startup`] gets the engine going meanwhile.

mod app;
pub mod args;
mod control;
pub mod download;
mod engine;
mod http;
mod lifecycle;
mod metrics;
pub mod nvtx;
mod objectives;
mod openai;
mod startup;

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use thiserror::Error;
use tokio::net::TcpListener;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use app::App;
use args::Args;
use control::{Control, KeyError, TokenVerifier};
use http::connection::Port;
use lifecycle::{Lifecycle, Phase};
pub use startup::StartError;

/// A drain ends after this long without a request: clients between two requests have come back
/// by then and been told to close.
const DRAIN_QUIET: Duration = Duration::from_secs(1);

/// How long connections get to flush their last answer.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(3);

/// Why the process ends other than by a drain.
#[derive(Debug, Error)]
pub enum RunError {
    #[error(transparent)]
    Key(#[from] KeyError),
    #[error("can't listen on {address} ({flag}): {source}")]
    Bind {
        flag: &'static str,
        address: SocketAddr,
        source: std::io::Error,
    },
    #[error("signals can't be handled: {0}")]
    Signal(std::io::Error),
    #[error("registering the metrics failed: {0}")]
    Metrics(#[from] prometheus::Error),
    #[error(transparent)]
    Start(#[from] StartError),
    #[error("the loading thread died; its message is in the log")]
    LoaderDied,
    #[error("the engine has failed: {0}")]
    Engine(String),
    #[error("a second signal came; the drain was cut short")]
    SecondSignal,
}

impl RunError {
    /// Whether the node's GPU or its driver can't be used.
    pub fn is_device(&self) -> bool {
        matches!(self, Self::Start(error) if error.is_device())
    }

    /// Whether other flags would have helped.
    pub fn is_usage(&self) -> bool {
        match self {
            Self::Key(_) => true,
            Self::Start(error) => error.is_usage(),
            _ => false,
        }
    }
}

/// Serves until told to stop.
pub async fn run(args: Args) -> Result<(), RunError> {
    let mut signals = Signals::new().map_err(RunError::Signal)?;
    let lifecycle = Lifecycle::new();
    let app = Arc::new(App::new(
        &args.model_name(),
        args.max_body_bytes,
        lifecycle.clone(),
    )?);
    let ports = Ports::open(&args, &app).await?;
    let result = serve(&args, &app, &mut signals).await;
    ports.close().await;
    result
}

/// Loads and serves, with the ports open.
async fn serve(args: &Args, app: &Arc<App>, signals: &mut Signals) -> Result<(), RunError> {
    let loaded = load(args.clone(), app.clone());
    tokio::select! {
        loaded = loaded => loaded.map_err(|_| RunError::LoaderDied)??,
        () = signals.next() => {
            app.lifecycle.drain();
            tracing::info!("told to stop while loading");
            return Ok(());
        }
    }
    let mut phase = app.lifecycle.subscribe();
    let failed = phase.wait_for(|phase| matches!(phase, Phase::Failed { .. }));
    tokio::select! {
        failed = failed => {
            if let Ok(Phase::Failed { message }) = failed.as_deref() {
                return Err(RunError::Engine(message.clone()));
            }
            Ok(())
        }
        () = signals.next() => drain(args, app, signals).await,
    }
}

/// Runs the loading on a thread of its own.
fn load(args: Args, app: Arc<App>) -> oneshot::Receiver<Result<(), StartError>> {
    let (sender, receiver) = oneshot::channel();
    std::thread::spawn(move || {
        // Nobody listens any more when the process was told to stop meanwhile.
        let _ = sender.send(startup::start(&args, &app));
    });
    receiver
}

/// Finishes what runs, within the time there is for it.
async fn drain(args: &Args, app: &App, signals: &mut Signals) -> Result<(), RunError> {
    let lifecycle = &app.lifecycle;
    lifecycle.drain();
    tracing::info!(active = lifecycle.active(), "draining");
    let timeout = Duration::from_secs_f64(args.drain_timeout_seconds);
    tokio::select! {
        () = lifecycle.idle_for(DRAIN_QUIET) => {}
        () = tokio::time::sleep(timeout) => {
            tracing::warn!(
                active = lifecycle.active(),
                seconds = args.drain_timeout_seconds,
                "the time to drain is over; ending the requests that still run"
            );
            if let Ok(serving) = app.serving() {
                serving.engine.abort_all();
            }
            // Their clients get an answer that says so.
            let _ = tokio::time::timeout(CLOSE_TIMEOUT, lifecycle.idle_for(Duration::ZERO)).await;
        }
        () = signals.next() => return Err(RunError::SecondSignal),
    }
    tracing::info!("drained");
    Ok(())
}

/// SIGTERM and SIGINT.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    fn new() -> std::io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
        })
    }

    async fn next(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}

/// The two listening ports.
struct Ports {
    shutdown: CancellationToken,
    tasks: TaskTracker,
}

impl Ports {
    async fn open(args: &Args, app: &Arc<App>) -> Result<Self, RunError> {
        let verifier = match (&args.control_key, &args.pod_uid) {
            (Some(path), Some(uid)) => Some(TokenVerifier::new(path.clone(), uid.clone())?),
            _ => None,
        };
        // Without a key anybody who reaches the port may turn the dials.
        let control_host = match verifier {
            Some(_) => args.host,
            None => IpAddr::V4(Ipv4Addr::LOCALHOST),
        };
        let public = bind("--port", SocketAddr::new(args.host, args.port)).await?;
        let control = bind(
            "--control-port",
            SocketAddr::new(control_host, args.control_port),
        )
        .await?;
        if let (Ok(public), Ok(control)) = (public.local_addr(), control.local_addr()) {
            tracing::info!(%public, %control, model = &*app.model_name, "listening");
        }
        let ports = Self {
            shutdown: CancellationToken::new(),
            tasks: TaskTracker::new(),
        };
        let max_age = (args.max_connection_age_seconds > 0.0)
            .then(|| Duration::from_secs_f64(args.max_connection_age_seconds));
        ports.spawn(public, http::router(app.clone()), app, max_age);
        let control_router = control::router(Arc::new(Control {
            app: app.clone(),
            verifier,
        }));
        ports.spawn(control, control_router, app, None);
        Ok(ports)
    }

    fn spawn(
        &self,
        listener: TcpListener,
        router: axum::Router,
        app: &App,
        max_age: Option<Duration>,
    ) {
        let port = Port {
            router,
            lifecycle: app.lifecycle.clone(),
            max_age,
            shutdown: self.shutdown.clone(),
            tasks: self.tasks.clone(),
        };
        self.tasks.spawn(port.serve(listener));
    }

    /// Stops listening and lets connections flush their last answer.
    async fn close(self) {
        self.shutdown.cancel();
        self.tasks.close();
        let _ = tokio::time::timeout(CLOSE_TIMEOUT, self.tasks.wait()).await;
    }
}

async fn bind(flag: &'static str, address: SocketAddr) -> Result<TcpListener, RunError> {
    TcpListener::bind(address)
        .await
        .map_err(|source| RunError::Bind {
            flag,
            address,
            source,
        })
}
