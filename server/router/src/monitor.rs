//! Watches one replica: what it reports of its load, and whether it lives.

use std::sync::{Arc, Weak};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::header::{HOST, HeaderValue};
use hyper::{Request, StatusCode, Uri};
use rand::Rng;

use crate::clock;
use crate::config::Config;
use crate::replica::{Ejection, Replica, Report};
use crate::service::Service;

/// Polls without an answer after which a replica counts as unresponsive.
const SILENT_POLLS: u32 = 3;
const MAX_METRICS_BYTES: usize = 1 << 20;
/// Between two probes of a replica that starts: somebody may wait for it.
const STARTING_PROBE: Duration = Duration::from_millis(150);
/// Longest time between two probes of a replica that is out.
const MAX_PROBE_INTERVAL: Duration = Duration::from_secs(2);

/// Runs until the replica has left the table.
pub async fn watch(config: Config, service: Weak<Service>, replica: Arc<Replica>) {
    let mut silent = 0;
    let mut probe_interval = config.poll / 2;
    loop {
        // Several routers shouldn't ask at the same moment for ever.
        let jitter = rand::rng().random_range(0.8..1.2);
        let interval = if replica.is_starting() {
            STARTING_PROBE
        } else if replica.is_ejected() {
            probe_interval = (probe_interval * 3 / 2).min(MAX_PROBE_INTERVAL);
            probe_interval
        } else {
            probe_interval = config.poll / 2;
            config.poll
        };
        tokio::time::sleep(interval.mul_f64(jitter)).await;
        let Some(service) = service.upgrade() else {
            return;
        };
        if replica.is_removed() {
            return;
        }
        replica.pool.prune();
        if replica.is_ejected() {
            if is_ready(&replica, &config).await && replica.restore() {
                tracing::info!(service = %service.key, replica = %replica.id, "replica is back");
                silent = 0;
                service.refresh();
            }
            continue;
        }
        let before = replica.in_flight();
        match get(&replica, &config, "/metrics?include=scaling").await {
            Some((status, text)) => {
                silent = 0;
                if status == StatusCode::OK {
                    let own = before.max(replica.in_flight());
                    let mean = service.estimates.mean_output();
                    replica.report(&parse(&text), own, mean, clock::now());
                    service.refresh();
                }
            }
            None => {
                silent += 1;
                if silent >= SILENT_POLLS && replica.eject(Ejection::Unresponsive) {
                    service.metrics.ejections[2].inc();
                    tracing::warn!(service = %service.key, replica = %replica.id,
                                   "replica doesn't answer: ejected");
                }
            }
        }
    }
}

/// /ready, or /health for servers that have only that.
async fn is_ready(replica: &Replica, config: &Config) -> bool {
    match get(replica, config, "/ready").await {
        Some((StatusCode::NOT_FOUND, _)) => {
            let health = get(replica, config, "/health").await;
            health.is_some_and(|(status, _)| status == StatusCode::OK)
        }
        Some((status, _)) => status == StatusCode::OK,
        None => false,
    }
}

/// None when no answer came in time.
async fn get(
    replica: &Replica,
    config: &Config,
    path: &'static str,
) -> Option<(StatusCode, Bytes)> {
    let limit = config.timeouts.probe;
    let exchange = async {
        let mut request = Request::new(Full::new(Bytes::new()));
        *request.uri_mut() = Uri::from_static(path);
        let host = HeaderValue::from_str(&replica.address.to_string()).ok()?;
        request.headers_mut().insert(HOST, host);
        // A connection of its own: an idle one may be just closing, and says little.
        let mut connection = replica.pool.open(limit).await.ok()?;
        let response = connection.send(request).await.ok()?;
        let status = response.status();
        let body = response.into_body();
        let text = connection.collect(body, MAX_METRICS_BYTES).await?;
        Some((status, text))
    };
    tokio::time::timeout(limit, exchange).await.ok().flatten()
}

/// Reads the few series that routing needs; whatever else there is is skipped.
fn parse(text: &[u8]) -> Report {
    let mut report = Report::default();
    let text = String::from_utf8_lossy(text);
    for line in text.lines() {
        let end = line.find(['{', ' ']).unwrap_or(line.len());
        let Some((name, rest)) = line.split_at_checked(end) else {
            continue;
        };
        let values = rest.rsplit_once('}').map_or(rest, |(_, after)| after);
        let number = || values.split_ascii_whitespace().next()?.parse::<f64>().ok();
        let whole = || number().map(|number| number.clamp(0.0, 4e9) as u32);
        match name {
            "vllm:num_requests_running" | "vllm:num_requests_waiting" => {
                report.requests += whole().unwrap_or(0);
            }
            "stoker:max_num_seqs" => report.max_num_seqs = whole(),
            "stoker:waiting_prompt_tokens" => {
                report.waiting_prompt_tokens = number().unwrap_or(0.0);
            }
            _ => {}
        }
    }
    report
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn reads_what_a_replica_reports() {
        let text = b"# HELP vllm:num_requests_running x\n\
            vllm:num_requests_running{model_name=\"a } b\",engine=\"0\"} 3\n\
            vllm:num_requests_waiting{engine=\"0\"} 2.0 1700000000\n\
            stoker:max_num_seqs 24\nstoker:max_num_seqs_ceiling 64\n\
            stoker:waiting_prompt_tokens{engine=\"0\"} 512\nnonsense\n";
        let report = parse(text);
        let expected = Report {
            max_num_seqs: Some(24),
            requests: 5,
            waiting_prompt_tokens: 512.0,
        };
        assert_eq!(report, expected);
    }

    proptest! {
        #[test]
        fn any_text_is_survived(text in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = parse(&text);
            let _ = parse(&[b"vllm:num_requests_running", &text[..]].concat());
        }
    }
}
