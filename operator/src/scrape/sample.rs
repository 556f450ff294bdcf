//! A replica's series, by name, as the policy's sample.

use stoker_autoscaler::{Counters, Dials, Sample};
use stoker_law::Law;

use super::Exposition;

/// What one scrape of a replica said.
#[derive(Clone, Debug, PartialEq)]
pub struct Reading {
    /// Model loading: 0 to 1, and the seconds that are left by the replica's own estimate.
    pub loading_progress: Option<f64>,
    pub loading_eta_seconds: Option<f64>,
    /// Told to go: finishes what it runs and takes nothing new.
    pub draining: bool,
    /// An error while the replica has no engine to speak of yet.
    pub sample: Result<Sample, MissingSeries>,
}

/// The replica answered, but without a series that nothing can be decided without.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the replica's metrics lack {0}: the model is still loading, or the image is no stoker-server of this version"
)]
pub struct MissingSeries(pub &'static str);

impl Reading {
    /// `at`: when the text was received, in seconds since the Unix epoch.
    pub fn new(exposition: &Exposition<'_>, at: f64) -> Self {
        let gauge = |name| exposition.sum(name, &[]);
        Reading {
            loading_progress: gauge("stoker:loading_progress_ratio"),
            loading_eta_seconds: gauge("stoker:loading_eta_seconds"),
            draining: gauge("stoker:draining").is_some_and(|value| value > 0.0),
            sample: sample(exposition, at),
        }
    }

    /// Whether the engine takes requests, as far as loading goes.
    pub fn loaded(&self) -> bool {
        self.loading_progress.is_none_or(|ratio| ratio >= 1.0)
    }
}

fn sample(exposition: &Exposition<'_>, at: f64) -> Result<Sample, MissingSeries> {
    let needed = |name| exposition.sum(name, &[]).ok_or(MissingSeries(name));
    let counter = |name| exposition.sum(name, &[]).unwrap_or(0.0).max(0.0);
    let histogram = |name| exposition.histogram(name).unwrap_or_default();
    let dials = |seqs: f64, tokens: f64| Dials {
        max_num_seqs: to_u32(seqs),
        max_num_batched_tokens: to_u32(tokens),
    };
    Ok(Sample {
        at,
        running: to_u32(needed("vllm:num_requests_running")?),
        waiting: to_u32(needed("vllm:num_requests_waiting")?),
        waiting_prompt_tokens: needed("stoker:waiting_prompt_tokens")? as u64,
        kv_tokens: needed("stoker:kv_tokens")? as u64,
        kv_capacity_tokens: needed("stoker:kv_capacity_tokens")? as u64,
        dials: dials(
            needed("stoker:max_num_seqs")?,
            needed("stoker:max_num_batched_tokens")?,
        ),
        ceilings: dials(
            needed("stoker:max_num_seqs_ceiling")?,
            needed("stoker:max_num_batched_tokens_ceiling")?,
        ),
        law: Law {
            base: needed("stoker:law_base_seconds")?,
            per_kv_token: needed("stoker:law_per_kv_token_seconds")?,
            per_token: needed("stoker:law_per_token_seconds")?,
            per_sequence: needed("stoker:law_per_sequence_seconds")?,
            hidden: needed("stoker:law_hidden_ratio")?,
        },
        law_confidence: needed("stoker:law_confidence_ratio")?,
        counters: Counters {
            requests_received: counter("stoker:requests_received_total"),
            prompt_tokens_received: counter("stoker:received_prompt_tokens_total"),
            prompt_tokens: counter("vllm:prompt_tokens_total"),
            generation_tokens: counter("vllm:generation_tokens_total"),
            requests_finished: counter("vllm:request_success_total"),
            preemptions: counter("vllm:num_preemptions_total"),
            all_met: objective(exposition, "all", "true"),
            all_missed: objective(exposition, "all", "false"),
            ttft_met: objective(exposition, "ttft", "true"),
            ttft_missed: objective(exposition, "ttft", "false"),
            itl_met: objective(exposition, "itl", "true"),
            itl_missed: objective(exposition, "itl", "false"),
            ttft: histogram("vllm:time_to_first_token_seconds"),
            itl: histogram("vllm:inter_token_latency_seconds"),
            prompt_length: histogram("vllm:request_prompt_tokens"),
            generation_length: histogram("vllm:request_generation_tokens"),
        },
    })
}

fn objective(exposition: &Exposition<'_>, objective: &str, met: &str) -> f64 {
    exposition
        .sum(
            "stoker:objective_requests_total",
            &[("objective", objective), ("met", met)],
        )
        .unwrap_or(0.0)
}

/// Out-of-range values saturate: `as` on floats does.
fn to_u32(value: f64) -> u32 {
    value as u32
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use stoker_autoscaler::Histogram;

    /// The scaling series of a replica with two running requests.
    pub(crate) const SCALING: &str = include_str!("../../tests/data/scaling_metrics.txt");

    #[test]
    fn reads_every_field_of_a_replica() {
        let exposition = Exposition::parse(SCALING);
        assert_eq!(exposition.skipped, 0);
        let reading = Reading::new(&exposition, 12.5);
        assert!(reading.loaded());
        assert!(!reading.draining);
        let sample = reading.sample.unwrap();
        assert_eq!(sample.at, 12.5);
        assert_eq!((sample.running, sample.waiting), (2, 1));
        assert_eq!(sample.waiting_prompt_tokens, 512);
        assert_eq!((sample.kv_tokens, sample.kv_capacity_tokens), (900, 60_000));
        assert_eq!(
            sample.dials,
            Dials {
                max_num_seqs: 8,
                max_num_batched_tokens: 512
            }
        );
        assert_eq!(
            sample.ceilings,
            Dials {
                max_num_seqs: 256,
                max_num_batched_tokens: 8192
            }
        );
        assert_eq!(sample.law.base, 0.0275);
        assert_eq!(sample.law.hidden, 1.0);
        assert_eq!(sample.law_confidence, 0.75);
        assert_eq!(sample.counters.requests_received, 40.0);
        assert_eq!(sample.counters.requests_finished, 37.0);
        assert_eq!(
            (sample.counters.all_met, sample.counters.all_missed),
            (35.0, 2.0)
        );
        assert_eq!(
            (sample.counters.ttft_met, sample.counters.itl_missed),
            (36.0, 1.0)
        );
        assert_eq!(sample.counters.ttft.count, 38.0);
        assert_eq!(sample.counters.itl.buckets.len(), 3);
        assert_eq!(
            sample.counters.generation_length,
            Histogram {
                buckets: vec![(100.0, 37.0), (f64::INFINITY, 37.0)],
                sum: 3700.0,
                count: 37.0
            }
        );
    }

    #[test]
    fn a_loading_replica_has_progress_and_no_sample() {
        let text =
            "stoker:loading_progress_ratio{model_name=\"m\"} 0.42\nstoker:loading_eta_seconds 31\n";
        let reading = Reading::new(&Exposition::parse(text), 0.0);
        assert_eq!(reading.loading_progress, Some(0.42));
        assert_eq!(reading.loading_eta_seconds, Some(31.0));
        assert!(!reading.loaded());
        assert_eq!(
            reading.sample,
            Err(MissingSeries("vllm:num_requests_running"))
        );
    }
}
