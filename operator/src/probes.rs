//! /metrics, /healthz and /readyz.

use std::net::{Ipv6Addr, SocketAddr};

use anyhow::Context as _;
use axum::Router;
use axum::routing::get;
use metrics::{Unit, describe_counter, describe_gauge, describe_histogram};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};
use tokio::net::TcpListener;

const SECONDS: [f64; 10] = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0];

/// Installs the recorder of the process. The series and their meaning are listed here.
pub fn install_metrics() -> anyhow::Result<PrometheusHandle> {
    let handle = PrometheusBuilder::new()
        .set_buckets_for_metric(Matcher::Suffix("_seconds".to_owned()), &SECONDS)
        .and_then(PrometheusBuilder::install_recorder)
        .context("could not set up metrics")?;
    describe_gauge!("stoker_operator_leader", "1 while this process leads");
    describe_gauge!("stoker_operator_services", "InferenceServices that are run");
    describe_counter!("stoker_operator_reconciles_total", "Reconciles by result");
    describe_counter!(
        "stoker_operator_reconcile_errors_total",
        "Failed reconciles by step"
    );
    describe_histogram!(
        "stoker_operator_reconcile_seconds",
        Unit::Seconds,
        "Duration of a reconcile"
    );
    describe_counter!("stoker_operator_status_writes_total", "Statuses written");
    describe_counter!(
        "stoker_operator_memory_writes_total",
        "ConfigMaps with scaling memories written"
    );
    describe_counter!(
        "stoker_operator_scrapes_total",
        "Scrapes of replicas by result"
    );
    describe_counter!(
        "stoker_operator_decisions_total",
        "Scaling decisions by reason"
    );
    describe_counter!(
        "stoker_operator_pushes_total",
        "Pushes of dials and objectives by result"
    );
    metrics::gauge!("stoker_operator_leader").set(0.0);
    Ok(handle)
}

/// Serves until the process ends. A candidate that waits for the lease is as ready as the leader.
pub async fn serve(port: u16, metrics: PrometheusHandle) -> anyhow::Result<()> {
    let at = SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), port);
    let listener = match TcpListener::bind(at).await {
        Ok(listener) => listener,
        // A host without IPv6.
        Err(_) => TcpListener::bind(("0.0.0.0", port))
            .await
            .with_context(|| format!("could not listen on metrics port {port}"))?,
    };
    let upkeep = metrics.clone();
    tokio::spawn(async move {
        loop {
            tokio::time::sleep(std::time::Duration::from_secs(5)).await;
            upkeep.run_upkeep();
        }
    });
    let router = Router::new()
        .route("/metrics", get(|| async move { metrics.render() }))
        .route("/healthz", get(|| async { "ok" }))
        .route("/readyz", get(|| async { "ok" }));
    tokio::spawn(async move { axum::serve(listener, router).await });
    Ok(())
}
