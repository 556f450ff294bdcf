//! An API server that answers what a test tells it to.

use axum::http::{Request, Response};
use kube::Client;
use kube::client::Body;
use kube::runtime::events::{Recorder, Reporter};
use serde_json::{Value, json};
use tower::Layer;
use tower_test::mock::{self, Handle};

use crate::fence::FenceLayer;

pub type Server = Handle<Request<Body>, Response<Body>>;

/// A client whose requests come out of the handle.
pub fn mock_client() -> (Client, Server) {
    mock_client_with(FenceLayer { leadership: None })
}

pub fn mock_client_with(layer: FenceLayer) -> (Client, Server) {
    let (service, handle) = mock::pair::<Request<Body>, Response<Body>>();
    (Client::new(layer.layer(service), "default"), handle)
}

/// Publishes events through the client.
pub fn recorder(client: Client) -> Recorder {
    let reporter = Reporter {
        controller: "stoker-operator".to_owned(),
        instance: Some("op".to_owned()),
    };
    Recorder::new(client, reporter)
}

pub fn answer(status: u16, body: &Value) -> Response<Body> {
    Response::builder()
        .status(status)
        .header("content-type", "application/json")
        .body(Body::from(body.to_string().into_bytes()))
        .unwrap()
}

/// A refusal in the API server's form.
pub fn refusal(status: u16, reason: &str, message: &str) -> Response<Body> {
    answer(
        status,
        &json!({"kind": "Status", "apiVersion": "v1", "status": "Failure",
                "code": status, "reason": reason, "message": message}),
    )
}

pub async fn body_of(request: Request<Body>) -> Value {
    let bytes = request.into_body().collect_bytes().await.unwrap();
    serde_json::from_slice(&bytes).unwrap_or(Value::Null)
}
