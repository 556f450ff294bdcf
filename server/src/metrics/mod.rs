//! Metrics in Prometheus' text format: vLLM's names, labels and buckets where it has the metric,
//! and `stoker:` names beside them.
//!
//! Two registries: one with the series that the operator reads every two seconds to decide on
//! (`/metrics?include=scaling`), one with the rest.

mod engine;

use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use prometheus::core::Collector;
use prometheus::{
    Gauge, GaugeVec, Histogram, HistogramOpts, IntCounter, IntCounterVec, Opts, Registry,
    TextEncoder,
};

use crate::engine::Snapshot;
use crate::lifecycle::{Lifecycle, Phase};

pub use engine::{EngineMetrics, Objective};

/// Errors are wrong names or names given twice, so they show at the first start.
type Result<T> = std::result::Result<T, prometheus::Error>;

/// A registry together with the labels that all of its metrics have.
struct Family<'a> {
    registry: &'a Registry,
    model_name: &'a str,
}

impl Family<'_> {
    fn opts(&self, name: &str, help: &str) -> Opts {
        Opts::new(name, help)
            .const_label("model_name", self.model_name)
            .const_label("engine", "0")
    }

    fn register<C: Collector + Clone + 'static>(&self, metric: C) -> Result<C> {
        self.registry.register(Box::new(metric.clone()))?;
        Ok(metric)
    }

    fn gauge(&self, name: &str, help: &str) -> Result<Gauge> {
        self.register(Gauge::with_opts(self.opts(name, help))?)
    }

    fn counter(&self, name: &str, help: &str) -> Result<IntCounter> {
        self.register(IntCounter::with_opts(self.opts(name, help))?)
    }

    fn counters(&self, name: &str, help: &str, labels: &[&str]) -> Result<IntCounterVec> {
        self.register(IntCounterVec::new(self.opts(name, help), labels)?)
    }

    fn histogram(&self, name: &str, help: &str, buckets: &[f64]) -> Result<Histogram> {
        let opts = HistogramOpts {
            common_opts: self.opts(name, help),
            buckets: buckets.to_vec(),
        };
        self.register(Histogram::with_opts(opts)?)
    }
}

/// Which series a scrape asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Include {
    All,
    /// What the operator decides on.
    Scaling,
}

/// All metrics of the process.
pub struct Metrics {
    scaling: Registry,
    rest: Registry,
    model_name: String,
    loading_progress: Gauge,
    loading_eta: Gauge,
    draining: Gauge,
    /// HTTP requests answered, by status code and route.
    pub http_requests: IntCounterVec,
    /// Set when the model is loaded.
    engine: OnceLock<Arc<EngineMetrics>>,
    /// One scrape at a time: gauges are set from a snapshot while it is rendered.
    scrape: Mutex<()>,
}

impl Metrics {
    pub fn new(model_name: &str) -> Result<Self> {
        let (scaling, rest) = (Registry::new(), Registry::new());
        let of_scaling = Family {
            registry: &scaling,
            model_name,
        };
        let of_rest = Family {
            registry: &rest,
            model_name,
        };
        Ok(Self {
            loading_progress: of_scaling.gauge(
                "stoker:loading_progress_ratio",
                "Share of the model's loading that is done.",
            )?,
            loading_eta: of_scaling.gauge(
                "stoker:loading_eta_seconds",
                "Seconds until the model is loaded, at the pace so far; 0 when it is.",
            )?,
            draining: of_scaling.gauge(
                "stoker:draining",
                "1 while this replica leaves or has left the rotation.",
            )?,
            http_requests: of_rest.counters(
                "stoker:http_requests_total",
                "HTTP requests answered, by status code and route.",
                &["code", "path"],
            )?,
            scaling,
            rest,
            model_name: model_name.to_owned(),
            engine: OnceLock::new(),
            scrape: Mutex::new(()),
        })
    }

    /// Sets what takes the device's memory, part by part in bytes; once.
    pub fn device_memory(&self, parts: &[(&str, u64)]) -> Result<()> {
        let family = Family {
            registry: &self.rest,
            model_name: &self.model_name,
        };
        let help = "Memory of the device: weights, KV cache, what the largest step takes, and all there is.";
        let opts = family.opts("stoker:device_memory_bytes", help);
        let gauges = family.register(GaugeVec::new(opts, &["part"])?)?;
        for &(part, bytes) in parts {
            gauges.with_label_values(&[part]).set(bytes as f64);
        }
        Ok(())
    }

    /// Registers the engine's metrics, once the model is loaded.
    pub fn engine_started(&self, max_model_len: u32) -> Result<Arc<EngineMetrics>> {
        let engine = Arc::new(EngineMetrics::new(
            &Family {
                registry: &self.scaling,
                model_name: &self.model_name,
            },
            &Family {
                registry: &self.rest,
                model_name: &self.model_name,
            },
            max_model_len,
        )?);
        // Registering a second time has failed above already.
        let _ = self.engine.set(engine.clone());
        Ok(engine)
    }

    /// The metrics as text. `snapshot` is the engine's, where there is one.
    pub fn render(
        &self,
        include: Include,
        lifecycle: &Lifecycle,
        snapshot: Option<Snapshot>,
    ) -> Result<String> {
        let _one_at_a_time = self.scrape.lock().unwrap_or_else(PoisonError::into_inner);
        self.loading_progress.set(lifecycle.progress());
        self.loading_eta.set(lifecycle.loading_eta());
        let leaving = matches!(
            lifecycle.phase(),
            Phase::LameDuck | Phase::Draining { .. } | Phase::Failed { .. }
        );
        self.draining.set(f64::from(u8::from(leaving)));
        if let (Some(engine), Some(snapshot)) = (self.engine.get(), snapshot) {
            engine.update(&snapshot);
        }
        let mut families = self.scaling.gather();
        if include == Include::All {
            families.extend(self.rest.gather());
        }
        TextEncoder::new().encode_to_string(&families)
    }
}
