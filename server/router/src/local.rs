//! What the router answers itself on the public port, waking nothing.

use std::sync::Arc;

use hyper::header::{self, HeaderMap, HeaderValue};
use hyper::http::request::Parts;
use hyper::{Method, Response, StatusCode};
use serde_json::{Value, json};

use crate::body::Body;
use crate::error::ApiError;
use crate::forward;
use crate::proxy::authorise;
use crate::registry::Routes;
use crate::service::Service;

/// The answer, when the request is for the router.
pub fn answer(
    routes: &Routes,
    service: Option<&Arc<Service>>,
    parts: &Parts,
) -> Option<Response<Body>> {
    let path = parts.uri.path();
    let read = parts.method == Method::GET || parts.method == Method::HEAD;
    match path {
        // Replicas' metrics are for the operator and Prometheus, which ask the pods.
        "/metrics" => Some(forward::answer(&ApiError::not_found(
            "Metrics are not served here: ask the router's metrics port, or the pods.",
        ))),
        "/health" | "/live" if read => Some(json(StatusCode::OK, &json!({"status": "ok"}))),
        "/ready" if read => Some(ready(service)),
        "/v1/models" if read => Some(models(routes, service, &parts.headers)),
        _ => None,
    }
}

/// Of the service, when the host names one; of the router else.
fn ready(service: Option<&Arc<Service>>) -> Response<Body> {
    match service {
        Some(service) if !service.is_usable() => {
            let status = json!({"status": "no replica is ready"});
            json(StatusCode::SERVICE_UNAVAILABLE, &status)
        }
        _ => json(StatusCode::OK, &json!({"status": "ready"})),
    }
}

/// Models of the service, or of all services that the caller may use.
fn models(routes: &Routes, service: Option<&Arc<Service>>, headers: &HeaderMap) -> Response<Body> {
    let services = match service {
        Some(service) => {
            if let Err(error) = authorise(service, headers) {
                return forward::answer(&error);
            }
            std::slice::from_ref(service)
        }
        None => &routes.services,
    };
    let allowed = services
        .iter()
        .filter(|service| authorise(service, headers).is_ok());
    let data: Vec<Value> = allowed
        .flat_map(|service| {
            let settings = service.settings();
            let models = settings.entry.models.clone();
            models.into_iter().map(
                |model| json!({"id": model, "object": "model", "created": 0, "owned_by": "stoker"}),
            )
        })
        .collect();
    json(StatusCode::OK, &json!({"object": "list", "data": data}))
}

/// An answer in JSON.
#[must_use]
pub fn json(status: StatusCode, value: &Value) -> Response<Body> {
    let mut response = Response::new(Body::full(value.to_string()));
    *response.status_mut() = status;
    let json = HeaderValue::from_static("application/json");
    response.headers_mut().insert(header::CONTENT_TYPE, json);
    response
}
