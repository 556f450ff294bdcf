//! The router's own metrics, `stoker_router_*`.

use prometheus::core::Collector;
use prometheus::{
    Encoder, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge,
    IntGaugeVec, Opts, Registry, TextEncoder,
};

const FAST: &[f64] = &[
    0.000_02, 0.000_05, 0.000_1, 0.000_2, 0.000_5, 0.001, 0.002, 0.005, 0.01, 0.05, 0.25,
];
const SLOW: &[f64] = &[
    0.001, 0.005, 0.02, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0,
];

/// All metrics of one router.
#[derive(Clone, Debug)]
pub struct Metrics {
    registry: Registry,
    pub requests: IntCounterVec,
    added_seconds: HistogramVec,
    queue_seconds: HistogramVec,
    cold_start_seconds: HistogramVec,
    retries: IntCounterVec,
    ejections: IntCounterVec,
    affinity_hits: IntCounterVec,
    broken_streams: IntCounterVec,
    pub queue_length: IntGaugeVec,
    pub queued_tokens: IntGaugeVec,
    pub outstanding_requests: IntGaugeVec,
    pub outstanding_tokens: IntGaugeVec,
    pub usable_replicas: IntGaugeVec,
    pub connections: IntGauge,
    pub table_version: IntGauge,
    pub access_log_lost: IntCounter,
}

/// Those of one service, looked up once.
#[derive(Clone, Debug)]
pub struct ServiceMetrics {
    pub added_seconds: Histogram,
    pub queue_seconds: Histogram,
    pub cold_start_seconds: Histogram,
    pub affinity_hits: IntCounter,
    pub broken_streams: IntCounter,
    pub retries: [IntCounter; 4],
    pub ejections: [IntCounter; 3],
}

impl Metrics {
    /// # Errors
    /// Only when two metrics had the same name.
    pub fn new() -> prometheus::Result<Self> {
        let registry = Registry::new();
        let service = &["service"][..];
        let gauge = |name: &str, help: &str| {
            let gauge = IntGaugeVec::new(Opts::new(name, help), service)?;
            register(&registry, gauge)
        };
        let counter = |name: &str, help: &str, labels: &[&str]| {
            register(
                &registry,
                IntCounterVec::new(Opts::new(name, help), labels)?,
            )
        };
        let histogram = |name: &str, help: &str, buckets: &[f64]| {
            let options = HistogramOpts::new(name, help).buckets(buckets.to_vec());
            register(&registry, HistogramVec::new(options, service)?)
        };
        Ok(Self {
            requests: counter(
                "stoker_router_requests_total",
                "Requests answered, by the status that the client got",
                &["service", "code"],
            )?,
            added_seconds: histogram(
                "stoker_router_added_seconds",
                "Time that the router itself took before it sent a request on, queue left out",
                FAST,
            )?,
            queue_seconds: histogram(
                "stoker_router_queue_seconds",
                "Time that requests waited in the router for room at a replica",
                SLOW,
            )?,
            cold_start_seconds: histogram(
                "stoker_router_cold_start_seconds",
                "From the first request without a replica to the first one sent on",
                SLOW,
            )?,
            retries: counter(
                "stoker_router_retries_total",
                "Attempts that failed before the first byte and were made again elsewhere",
                &["service", "reason"],
            )?,
            ejections: counter(
                "stoker_router_ejections_total",
                "Times that a replica was taken out of the rotation for its behaviour",
                &["service", "reason"],
            )?,
            affinity_hits: counter(
                "stoker_router_affinity_hits_total",
                "Requests sent to a replica that had seen the beginning of their prompt",
                service,
            )?,
            broken_streams: counter(
                "stoker_router_broken_streams_total",
                "Streams that ended with an error event because their replica went away",
                service,
            )?,
            queue_length: gauge("stoker_router_queue_length", "Requests waiting now")?,
            queued_tokens: gauge(
                "stoker_router_queued_tokens",
                "Tokens (prompt and answer, estimated) of the requests waiting now",
            )?,
            outstanding_requests: gauge(
                "stoker_router_outstanding_requests",
                "Requests at replicas now",
            )?,
            outstanding_tokens: gauge(
                "stoker_router_outstanding_tokens",
                "Tokens still to do of the requests at replicas, estimated",
            )?,
            usable_replicas: gauge(
                "stoker_router_usable_replicas",
                "Replicas in the rotation that are healthy",
            )?,
            connections: register(
                &registry,
                IntGauge::new("stoker_router_connections", "Open client connections")?,
            )?,
            table_version: register(
                &registry,
                IntGauge::new(
                    "stoker_router_table_version",
                    "Version of the routing table",
                )?,
            )?,
            access_log_lost: register(
                &registry,
                IntCounter::new(
                    "stoker_router_access_log_lost_total",
                    "Access log lines dropped because the output was too slow",
                )?,
            )?,
            registry,
        })
    }

    #[must_use]
    pub fn service(&self, service: &str) -> ServiceMetrics {
        let retries = |reason| self.retries.with_label_values(&[service, reason]);
        let ejections = |reason| self.ejections.with_label_values(&[service, reason]);
        ServiceMetrics {
            added_seconds: self.added_seconds.with_label_values(&[service]),
            queue_seconds: self.queue_seconds.with_label_values(&[service]),
            cold_start_seconds: self.cold_start_seconds.with_label_values(&[service]),
            affinity_hits: self.affinity_hits.with_label_values(&[service]),
            broken_streams: self.broken_streams.with_label_values(&[service]),
            retries: ["connect", "refused", "broken", "timeout"].map(retries),
            ejections: ["failing", "not_ready", "unresponsive"].map(ejections),
        }
    }

    /// Forgets the gauges of a service that is no more; counters stay.
    pub fn forget(&self, service: &str) {
        for gauge in [
            &self.queue_length,
            &self.queued_tokens,
            &self.outstanding_requests,
            &self.outstanding_tokens,
            &self.usable_replicas,
        ] {
            let _ = gauge.remove_label_values(&[service]);
        }
    }

    /// Prometheus' text format.
    #[must_use]
    pub fn text(&self) -> Vec<u8> {
        let mut text = Vec::with_capacity(16 << 10);
        let _ = TextEncoder::new().encode(&self.registry.gather(), &mut text);
        text
    }
}

fn register<M: Collector + Clone + 'static>(
    registry: &Registry,
    metric: M,
) -> prometheus::Result<M> {
    registry.register(Box::new(metric.clone()))?;
    Ok(metric)
}
