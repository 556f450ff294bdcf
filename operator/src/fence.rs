//! The Kubernetes client that everything but the election uses.
//!
//! One layer under it gives every call a deadline (the client has none by itself) and lets writes
//! through only while this process leads: whoever was paused past the lease's deadline wakes up
//! unable to write, whatever it was about to do.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::http::{Method, Request, Response};
use kube::client::{Body, ClientBuilder};
use kube::core::Status;
use kube::{Client, Config};
use tower::{BoxError, Layer, Service};

use crate::lease::Leadership;

/// Longer than any single get, list page or write takes on a busy API server.
const CALL_TIMEOUT: Duration = Duration::from_secs(15);

#[derive(Debug, thiserror::Error)]
pub enum FenceError {
    #[error("not the leader (any more): the write was not sent")]
    NotLeading,
    #[error("the API server did not answer within {} s", CALL_TIMEOUT.as_secs())]
    Timeout,
}

/// A failed call in the API server's own words; the client's message repeats the whole answer.
#[derive(Debug)]
pub struct CallError(Box<kube::Error>);

impl CallError {
    /// The API server's refusal, where it is one.
    pub fn refusal(&self) -> Option<&Status> {
        match self.0.as_ref() {
            kube::Error::Api(status) => Some(status),
            _ => None,
        }
    }
}

impl From<kube::Error> for CallError {
    fn from(error: kube::Error) -> Self {
        CallError(Box::new(error))
    }
}

impl std::error::Error for CallError {}

impl fmt::Display for CallError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.refusal() {
            Some(status) => write!(f, "{} ({} {})", status.message, status.code, status.reason),
            None => f.write_str(&chain(self.0.as_ref())),
        }
    }
}

/// An error and its causes in one line, without repeating what the outer message already holds.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        let message = inner.to_string();
        if !text.contains(&message) {
            text = format!("{text}: {message}");
        }
        cause = inner.source();
    }
    text
}

/// A client for `config`. `leadership`: `None` for the election's own client.
pub fn client(mut config: Config, leadership: Option<Leadership>) -> Result<Client, kube::Error> {
    // The reconciler and the election retry by themselves, at their own pace.
    config.default_retry = false;
    Ok(ClientBuilder::try_from(config)?
        .with_layer(&FenceLayer { leadership })
        .build())
}

#[derive(Clone)]
pub struct FenceLayer {
    pub leadership: Option<Leadership>,
}

impl<S> Layer<S> for FenceLayer {
    type Service = Fence<S>;
    fn layer(&self, inner: S) -> Fence<S> {
        Fence {
            inner,
            leadership: self.leadership.clone(),
        }
    }
}

pub struct Fence<S> {
    inner: S,
    leadership: Option<Leadership>,
}

impl<S, B> Service<Request<Body>> for Fence<S>
where
    S: Service<Request<Body>, Response = Response<B>>,
    S::Error: Into<BoxError>,
    S::Future: Send + 'static,
    B: 'static,
{
    type Response = Response<B>;
    type Error = BoxError;
    type Future = Pin<Box<dyn Future<Output = Result<Response<B>, BoxError>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.inner.poll_ready(cx).map_err(Into::into)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let reads = matches!(*request.method(), Method::GET | Method::HEAD);
        let leads = |l: &Leadership| l.epoch().is_some();
        if !reads && !self.leadership.as_ref().is_none_or(leads) {
            return Box::pin(async { Err(FenceError::NotLeading.into()) });
        }
        let call = self.inner.call(request);
        // A watch answers with its headers at once, so the deadline suits it too; its body is
        // guarded by the watcher's own idle timeout.
        Box::pin(async move {
            match tokio::time::timeout(CALL_TIMEOUT, call).await {
                Ok(result) => result.map_err(Into::into),
                Err(_) => Err(FenceError::Timeout.into()),
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1::ConfigMap;
    use kube::Api;
    use kube::api::{Patch, PatchParams};
    use serde_json::json;

    use super::*;
    use crate::testing::{answer, mock_client_with};

    #[tokio::test]
    async fn reads_pass_and_writes_wait_for_leadership() {
        let leadership = Leadership::none();
        let layer = FenceLayer {
            leadership: Some(leadership),
        };
        let (client, mut handle) = mock_client_with(layer);
        let api: Api<ConfigMap> = Api::namespaced(client, "ns");
        let server = tokio::spawn(async move {
            let (request, respond) = handle.next_request().await.unwrap();
            assert_eq!(request.method(), Method::GET);
            respond.send_response(answer(200, &json!({"metadata": {"name": "a"}})));
            assert!(
                handle.next_request().await.is_none(),
                "the write reached the server"
            );
        });
        api.get("a").await.unwrap();
        let patch = Patch::Merge(json!({"data": {"k": "v"}}));
        let error = api.patch("a", &PatchParams::default(), &patch).await;
        let message = format!("{:?}", error.unwrap_err());
        assert!(message.contains("NotLeading"), "{message}");
        drop(api);
        server.await.unwrap();
    }

    #[tokio::test]
    async fn the_leader_writes() {
        let layer = FenceLayer {
            leadership: Some(Leadership::held(3)),
        };
        let (client, mut handle) = mock_client_with(layer);
        let api: Api<ConfigMap> = Api::namespaced(client, "ns");
        tokio::spawn(async move {
            let (request, respond) = handle.next_request().await.unwrap();
            assert_eq!(request.method(), Method::PATCH);
            respond.send_response(answer(200, &json!({"metadata": {"name": "a"}})));
        });
        let patch = Patch::Merge(json!({"data": {"k": "v"}}));
        api.patch("a", &PatchParams::default(), &patch)
            .await
            .unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn a_silent_server_costs_a_deadline_not_a_hang() {
        let (client, _handle) = mock_client_with(FenceLayer { leadership: None });
        let api: Api<ConfigMap> = Api::namespaced(client, "ns");
        let message = format!("{:?}", api.get("a").await.unwrap_err());
        assert!(message.contains("Timeout"), "{message}");
    }
}
