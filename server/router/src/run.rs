//! The process: listeners, the saved table, signals, and a graceful end.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::args::Args;
use crate::control::{Control, serve_control, serve_metrics};
use crate::listener::{bind, listen};
use crate::metrics::Metrics;
use crate::record::AccessLog;
use crate::registry::Router;
use crate::saved;
use crate::tls::Tls;
use crate::token::Gate;
use crate::workers::Workers;

/// Runs a router until SIGTERM or SIGINT, and then until what it has is done.
///
/// # Errors
/// What keeps it from starting.
pub async fn run(args: Args) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let log = if args.access_log {
        AccessLog::to(std::io::stdout())?
    } else {
        AccessLog::off()
    };
    let router = Router::new(args.config(), Metrics::new()?, log);
    let saved = args.state_dir.as_deref().and_then(saved::load);
    let epoch = saved.as_ref().and_then(|saved| saved.epoch);
    if let Some(saved) = saved {
        match router.apply(&saved.table, saved.epoch) {
            Ok(()) => tracing::info!(version = saved.table.version, "serving by the saved table"),
            Err(error) => tracing::warn!(%error, "the saved table can't be used"),
        }
    }
    let gate = match (args.control_key, args.pod_uid) {
        (Some(key), Some(uid)) => Some(Gate::new(key, uid, epoch.unwrap_or(0))),
        _ => None,
    };
    let control_host = match gate {
        Some(_) => args.host,
        None => IpAddr::V4(Ipv4Addr::LOCALHOST),
    };
    let public = bind(SocketAddr::new(args.host, args.port)).await?;
    let control_port = bind(SocketAddr::new(control_host, args.control_port)).await?;
    let metrics = bind(SocketAddr::new(args.host, args.metrics_port)).await?;
    tracing::info!(
        api = %public.local_addr()?, control = %control_port.local_addr()?,
        metrics = %metrics.local_addr()?, "listening"
    );
    let available = || std::thread::available_parallelism().map_or(1, usize::from);
    let workers = Workers::start(args.workers.unwrap_or_else(available))?;
    let stop = CancellationToken::new();
    let connections = TaskTracker::new();
    if let (Some(certificate), Some(key)) = (args.tls_cert, args.tls_key) {
        let tls = Arc::new(Tls::new(certificate, key)?);
        let listener = bind(SocketAddr::new(args.host, args.tls_port)).await?;
        tracing::info!(tls = %listener.local_addr()?, "listening");
        tokio::spawn(Arc::clone(&tls).reload());
        let listening = listen(
            Arc::clone(&router),
            listener,
            Some(tls),
            workers.clone(),
            connections.clone(),
            stop.clone(),
        );
        tokio::spawn(listening);
    }
    let control = Arc::new(Control {
        router: Arc::clone(&router),
        gate,
        state_folder: args.state_dir,
    });
    tokio::spawn(serve_control(control, control_port));
    tokio::spawn(serve_metrics(Arc::clone(&router), metrics));
    tokio::spawn(Arc::clone(&router).tick());
    tokio::spawn(listen(
        Arc::clone(&router),
        public,
        None,
        workers,
        connections.clone(),
        stop.clone(),
    ));
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    router.drain();
    tracing::info!(connections = connections.len(), "leaving");
    tokio::time::sleep(Duration::from_secs(args.lame_duck_seconds)).await;
    tracing::info!(connections = connections.len(), "draining");
    stop.cancel();
    connections.close();
    let limit = Duration::from_secs(args.drain_timeout_seconds);
    tokio::time::timeout(limit, connections.wait())
        .await
        .with_context(|| {
            format!(
                "{} requests were cut off at the end of the drain timeout",
                connections.len()
            )
        })?;
    tracing::info!("drained");
    Ok(())
}
