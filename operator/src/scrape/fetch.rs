//! One GET of a replica's metrics.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use super::{Exposition, Reading};
use crate::http::{self, PodError};

/// A replica that hasn't answered by then counts as silent for this tick.
const DEADLINE: Duration = Duration::from_secs(1);
/// Far above what a replica sends (some 10 KB); guards the operator's memory.
const MAX_BODY_BYTES: usize = 1 << 20;

#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    #[error(transparent)]
    Pod(#[from] PodError),
    #[error("the metrics are longer than {MAX_BODY_BYTES} bytes")]
    TooLarge,
    #[error("the metrics are no UTF-8 text")]
    NotText,
}

/// Fetches the scaling series of replicas.
#[derive(Clone)]
pub struct Fetcher {
    http: reqwest::Client,
    port: u16,
}

impl Fetcher {
    /// `port`: of the replica's public HTTP listener.
    pub fn new(port: u16) -> Result<Self, reqwest::Error> {
        let http = http::client(DEADLINE).timeout(DEADLINE).build()?;
        Ok(Fetcher { http, port })
    }

    pub async fn fetch(&self, address: IpAddr) -> Result<Reading, FetchError> {
        let at = SocketAddr::new(address, self.port);
        let url = format!("http://{at}/metrics?include=scaling");
        let mut response = http::accepted(self.http.get(url).send().await).await?;
        let mut body = Vec::new();
        while let Some(chunk) = response.chunk().await.map_err(PodError::from)? {
            if body.len() + chunk.len() > MAX_BODY_BYTES {
                return Err(FetchError::TooLarge);
            }
            body.extend_from_slice(&chunk);
        }
        let text = std::str::from_utf8(&body).map_err(|_| FetchError::NotText)?;
        let now = jiff::Timestamp::now().as_duration().as_secs_f64();
        Ok(Reading::new(&Exposition::parse(text), now))
    }
}

#[cfg(test)]
mod tests {
    use axum::{Router, http::StatusCode, routing::get};
    use tokio::net::TcpListener;

    use super::*;
    use crate::scrape::sample::tests::SCALING;

    async fn serve(router: Router) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move { axum::serve(listener, router).await });
        address
    }

    async fn fetch(router: Router) -> Result<Reading, FetchError> {
        let at = serve(router).await;
        Fetcher::new(at.port()).unwrap().fetch(at.ip()).await
    }

    #[tokio::test]
    async fn asks_for_the_scaling_series_only() {
        let router = Router::new().route(
            "/metrics",
            get(|uri: axum::http::Uri| async move {
                match uri.query() {
                    Some("include=scaling") => Ok(SCALING),
                    _ => Err(StatusCode::NOT_FOUND),
                }
            }),
        );
        let reading = fetch(router).await.unwrap();
        assert_eq!(reading.sample.unwrap().running, 2);
    }

    #[tokio::test]
    async fn says_what_went_wrong() {
        let refuse = Router::new();
        assert!(matches!(
            fetch(refuse).await,
            Err(FetchError::Pod(PodError::Refused { status: 404, .. }))
        ));
        let huge = Router::new().route("/metrics", get(|| async { "x".repeat(2 << 20) }));
        assert!(matches!(fetch(huge).await, Err(FetchError::TooLarge)));
        let binary = Router::new().route("/metrics", get(|| async { vec![0xff_u8, 0xfe] }));
        assert!(matches!(fetch(binary).await, Err(FetchError::NotText)));
        let nobody = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr();
        let at = nobody.unwrap();
        let error = Fetcher::new(at.port()).unwrap().fetch(at.ip()).await;
        let message = error.unwrap_err().to_string();
        assert!(message.contains("refused"), "{message}");
    }
}
