//! The engine's metrics.

use prometheus::core::{AtomicF64, GenericCounter};
use prometheus::{Gauge, Histogram, IntCounter, IntCounterVec};
use stoker_engine::Timing;

use super::{Family, Result};
use crate::engine::Snapshot;
use crate::openai::FinishReason;

/// vLLM's buckets (vllm/v1/metrics/loggers.py).
const TTFT_BUCKETS: &[f64] = &[
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
];
const ITL_BUCKETS: &[f64] = &[
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0,
    40.0, 80.0,
];
const LATENCY_BUCKETS: &[f64] = &[
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0,
    480.0, 960.0, 1920.0, 7680.0,
];
const ITERATION_BUCKETS: &[f64] = &[
    1.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0,
];

/// An objective that a request meets or misses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Objective {
    /// Time to first token.
    Ttft,
    /// Inter-token latency.
    Itl,
    /// Both.
    All,
}

impl Objective {
    fn label(self) -> &'static str {
        match self {
            Self::Ttft => "ttft",
            Self::Itl => "itl",
            Self::All => "all",
        }
    }
}

pub struct EngineMetrics {
    pub requests_received: IntCounter,
    pub received_prompt_tokens: IntCounter,
    pub time_to_first_token: Histogram,
    pub inter_token_latency: Histogram,
    pub iteration_tokens: Histogram,
    objective_requests: IntCounterVec,
    request_success: IntCounterVec,
    request_prompt_tokens: Histogram,
    request_generation_tokens: Histogram,
    time_per_output_token: Histogram,
    e2e_latency: Histogram,
    queue_time: Histogram,
    prefill_time: Histogram,
    decode_time: Histogram,
    inference_time: Histogram,
    gauges: Gauges,
    totals: Totals,
    cache_config: prometheus::GaugeVec,
}

/// Set from a snapshot at each scrape.
struct Gauges {
    running: Gauge,
    waiting: Gauge,
    kv_cache_usage: Gauge,
    max_num_seqs: Gauge,
    max_num_batched_tokens: Gauge,
    max_num_seqs_ceiling: Gauge,
    max_num_batched_tokens_ceiling: Gauge,
    kv_capacity_tokens: Gauge,
    kv_tokens: Gauge,
    waiting_prompt_tokens: Gauge,
    law_base: Gauge,
    law_per_kv_token: Gauge,
    law_per_token: Gauge,
    law_per_sequence: Gauge,
    law_hidden: Gauge,
    law_confidence: Gauge,
}

/// Counters that the engine keeps itself; brought up to its totals at each scrape.
struct Totals {
    prompt_tokens: IntCounter,
    generation_tokens: IntCounter,
    preemptions: IntCounter,
    set_back: IntCounter,
    steps: IntCounter,
    step_seconds: GenericCounter<AtomicF64>,
}

impl EngineMetrics {
    pub(super) fn new(scaling: &Family, rest: &Family, max_model_len: u32) -> Result<Self> {
        let lengths = &one_two_five(max_model_len);
        let metrics = Self {
            requests_received: scaling
                .counter("stoker:requests_received_total", "Requests admitted.")?,
            received_prompt_tokens: scaling.counter(
                "stoker:received_prompt_tokens_total",
                "Prompt tokens of admitted requests.",
            )?,
            time_to_first_token: scaling.histogram(
                "vllm:time_to_first_token_seconds",
                "Histogram of time to first token in seconds.",
                TTFT_BUCKETS,
            )?,
            inter_token_latency: scaling.histogram(
                "vllm:inter_token_latency_seconds",
                "Histogram of inter-token latency in seconds.",
                ITL_BUCKETS,
            )?,
            iteration_tokens: rest.histogram(
                "vllm:iteration_tokens_total",
                "Histogram of number of tokens per engine_step.",
                ITERATION_BUCKETS,
            )?,
            objective_requests: scaling.counters(
                "stoker:objective_requests_total",
                "Requests that met or missed an objective; those turned away by a full queue \
                 have missed.",
                &["objective", "met"],
            )?,
            request_success: scaling.counters(
                "vllm:request_success_total",
                "Count of successfully processed requests.",
                &["finished_reason"],
            )?,
            request_prompt_tokens: scaling.histogram(
                "vllm:request_prompt_tokens",
                "Number of prefill tokens processed.",
                lengths,
            )?,
            request_generation_tokens: scaling.histogram(
                "vllm:request_generation_tokens",
                "Number of generation tokens processed.",
                lengths,
            )?,
            time_per_output_token: rest.histogram(
                "vllm:request_time_per_output_token_seconds",
                "Histogram of time_per_output_token_seconds per request.",
                ITL_BUCKETS,
            )?,
            e2e_latency: rest.histogram(
                "vllm:e2e_request_latency_seconds",
                "Histogram of e2e request latency in seconds.",
                LATENCY_BUCKETS,
            )?,
            queue_time: rest.histogram(
                "vllm:request_queue_time_seconds",
                "Histogram of time spent in WAITING phase for request.",
                LATENCY_BUCKETS,
            )?,
            prefill_time: rest.histogram(
                "vllm:request_prefill_time_seconds",
                "Histogram of time spent in PREFILL phase for request.",
                LATENCY_BUCKETS,
            )?,
            decode_time: rest.histogram(
                "vllm:request_decode_time_seconds",
                "Histogram of time spent in DECODE phase for request.",
                LATENCY_BUCKETS,
            )?,
            inference_time: rest.histogram(
                "vllm:request_inference_time_seconds",
                "Histogram of time spent in RUNNING phase for request.",
                LATENCY_BUCKETS,
            )?,
            gauges: Gauges::new(scaling)?,
            totals: Totals::new(scaling, rest)?,
            cache_config: rest.register(prometheus::GaugeVec::new(
                rest.opts(
                    "vllm:cache_config_info",
                    "Information of the LLMEngine CacheConfig",
                ),
                &["num_gpu_blocks", "block_size"],
            )?)?,
        };
        // Series that exist from the start have rates from the start.
        for objective in [Objective::Ttft, Objective::Itl, Objective::All] {
            for met in ["true", "false"] {
                metrics
                    .objective_requests
                    .with_label_values(&[objective.label(), met]);
            }
        }
        for reason in [
            FinishReason::Stop,
            FinishReason::Length,
            FinishReason::Abort,
        ] {
            metrics.request_success.with_label_values(&[label(reason)]);
        }
        Ok(metrics)
    }

    /// Counts a request as having met or missed an objective.
    pub fn objective(&self, objective: Objective, met: bool) {
        let met = if met { "true" } else { "false" };
        self.objective_requests
            .with_label_values(&[objective.label(), met])
            .inc();
    }

    pub fn finished(&self, reason: FinishReason) {
        self.request_success
            .with_label_values(&[label(reason)])
            .inc();
    }

    /// Records the times and lengths of a request that was answered in full at `at`.
    pub fn answered(&self, prompt_tokens: u32, generated_tokens: u32, timing: &Timing, at: f64) {
        self.request_prompt_tokens.observe(f64::from(prompt_tokens));
        self.request_generation_tokens
            .observe(f64::from(generated_tokens));
        self.e2e_latency.observe(at - timing.arrival);
        let (Some(scheduled), Some(first), Some(last)) = (
            timing.first_scheduled,
            timing.first_token,
            timing.last_token,
        ) else {
            return;
        };
        self.queue_time.observe(scheduled - timing.arrival);
        self.prefill_time.observe(first - scheduled);
        self.decode_time.observe(last - first);
        self.inference_time.observe(last - scheduled);
        if generated_tokens > 1 {
            self.time_per_output_token
                .observe((last - first) / f64::from(generated_tokens - 1));
        }
    }

    /// Brings gauges and totals up to a snapshot of the engine.
    pub(super) fn update(&self, snapshot: &Snapshot) {
        let stats = &snapshot.stats;
        let g = &self.gauges;
        let total = stats.kv_blocks_total;
        g.running.set(f64::from(stats.running));
        g.waiting.set(f64::from(stats.waiting));
        g.kv_cache_usage
            .set(f64::from(stats.kv_blocks_used) / f64::from(total.max(1)));
        g.max_num_seqs.set(f64::from(stats.limits.max_num_seqs));
        g.max_num_batched_tokens
            .set(f64::from(stats.limits.max_num_batched_tokens));
        g.max_num_seqs_ceiling
            .set(f64::from(stats.ceilings.max_num_seqs));
        g.max_num_batched_tokens_ceiling
            .set(f64::from(stats.ceilings.max_num_batched_tokens));
        g.kv_capacity_tokens
            .set(f64::from(total) * f64::from(stats.kv_block_size));
        g.kv_tokens.set(stats.kv_tokens as f64);
        g.waiting_prompt_tokens
            .set(stats.waiting_prompt_tokens as f64);
        g.law_base.set(stats.law.base);
        g.law_per_kv_token.set(stats.law.per_kv_token);
        g.law_per_token.set(stats.law.per_token);
        g.law_per_sequence.set(stats.law.per_sequence);
        g.law_hidden.set(stats.law.hidden);
        g.law_confidence.set(stats.law_confidence);

        let t = &self.totals;
        raise(&t.prompt_tokens, stats.prompt_tokens_total);
        raise(&t.generation_tokens, stats.generation_tokens_total);
        raise(&t.preemptions, stats.preemptions_total);
        raise(&t.set_back, stats.set_back_total);
        raise(&t.steps, stats.steps_total);
        t.step_seconds
            .inc_by((stats.step_seconds_total - t.step_seconds.get()).max(0.0));

        self.cache_config
            .with_label_values(&[&total.to_string(), &stats.kv_block_size.to_string()])
            .set(1.0);
    }
}

impl Gauges {
    fn new(scaling: &Family) -> Result<Self> {
        Ok(Self {
            running: scaling.gauge(
                "vllm:num_requests_running",
                "Number of requests in model execution batches.",
            )?,
            waiting: scaling.gauge(
                "vllm:num_requests_waiting",
                "Number of requests waiting to be processed.",
            )?,
            kv_cache_usage: scaling.gauge(
                "vllm:kv_cache_usage_perc",
                "KV-cache usage. 1 means 100 percent usage.",
            )?,
            max_num_seqs: scaling.gauge(
                "stoker:max_num_seqs",
                "Cap on sequences that run at once, as it is set now.",
            )?,
            max_num_batched_tokens: scaling.gauge(
                "stoker:max_num_batched_tokens",
                "Token budget of a step, as it is set now.",
            )?,
            max_num_seqs_ceiling: scaling.gauge(
                "stoker:max_num_seqs_ceiling",
                "The most that max_num_seqs can be set to.",
            )?,
            max_num_batched_tokens_ceiling: scaling.gauge(
                "stoker:max_num_batched_tokens_ceiling",
                "The most that max_num_batched_tokens can be set to.",
            )?,
            kv_capacity_tokens: scaling.gauge(
                "stoker:kv_capacity_tokens",
                "Tokens that the KV cache holds.",
            )?,
            kv_tokens: scaling.gauge("stoker:kv_tokens", "Tokens in the KV cache now.")?,
            waiting_prompt_tokens: scaling.gauge(
                "stoker:waiting_prompt_tokens",
                "Prompt tokens accepted and not yet computed.",
            )?,
            law_base: scaling.gauge(
                "stoker:law_base_seconds",
                "Step-time law: time to read the weights once.",
            )?,
            law_per_kv_token: scaling.gauge(
                "stoker:law_per_kv_token_seconds",
                "Step-time law: time a cached token.",
            )?,
            law_per_token: scaling.gauge(
                "stoker:law_per_token_seconds",
                "Step-time law: compute time a token of the step.",
            )?,
            law_per_sequence: scaling.gauge(
                "stoker:law_per_sequence_seconds",
                "Step-time law: time a sequence of the step.",
            )?,
            law_hidden: scaling.gauge(
                "stoker:law_hidden_ratio",
                "Step-time law: how far the smaller of memory and compute time hides behind \
                 the larger.",
            )?,
            law_confidence: scaling.gauge(
                "stoker:law_confidence_ratio",
                "How far the step-time law can be trusted.",
            )?,
        })
    }
}

impl Totals {
    fn new(scaling: &Family, rest: &Family) -> Result<Self> {
        Ok(Self {
            prompt_tokens: scaling.counter(
                "vllm:prompt_tokens_total",
                "Number of prefill tokens processed.",
            )?,
            generation_tokens: scaling.counter(
                "vllm:generation_tokens_total",
                "Number of generation tokens processed.",
            )?,
            preemptions: scaling.counter(
                "vllm:num_preemptions_total",
                "Cumulative number of preemption from the engine.",
            )?,
            set_back: rest.counter(
                "stoker:requests_set_back_total",
                "Requests that let others go first, since their first token could not be in time \
                 any more.",
            )?,
            steps: scaling.counter("stoker:engine_steps_total", "Steps run.")?,
            step_seconds: scaling.register(GenericCounter::with_opts(scaling.opts(
                "stoker:engine_step_seconds_total",
                "Device time of all steps.",
            ))?)?,
        })
    }
}

fn raise(counter: &IntCounter, total: u64) {
    counter.inc_by(total.saturating_sub(counter.get()));
}

fn label(reason: FinishReason) -> &'static str {
    match reason {
        FinishReason::Stop => "stop",
        FinishReason::Length => "length",
        FinishReason::Abort => "abort",
    }
}

/// 1, 2, 5, 10, 20, 50, ... up to `max`: vLLM's buckets for lengths.
fn one_two_five(max: u32) -> Vec<f64> {
    let mut buckets = Vec::new();
    let mut decade = 1u64;
    while decade <= u64::from(max) {
        buckets.extend(
            [1, 2, 5]
                .map(|m| m * decade)
                .into_iter()
                .filter(|b| *b <= u64::from(max))
                .map(|b| b as f64),
        );
        decade *= 10;
    }
    buckets
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn length_buckets_are_vllms() {
        assert_eq!(one_two_five(100), [1., 2., 5., 10., 20., 50., 100.]);
        assert_eq!(one_two_five(8192).last(), Some(&5000.0));
    }
}
