//! Errors in OpenAI's form.

use bytes::Bytes;
use hyper::StatusCode;
use serde_json::json;

/// An answer of the router's own that says why a request failed.
#[derive(Clone, Debug)]
pub struct ApiError {
    pub status: StatusCode,
    pub kind: &'static str,
    pub code: &'static str,
    pub message: String,
    /// Seconds.
    pub retry_after: Option<u64>,
}

impl ApiError {
    #[must_use]
    pub fn new(
        status: StatusCode,
        kind: &'static str,
        code: &'static str,
        message: impl Into<String>,
    ) -> Self {
        Self {
            status,
            kind,
            code,
            message: message.into(),
            retry_after: None,
        }
    }

    #[must_use]
    pub fn invalid(status: StatusCode, code: &'static str, message: impl Into<String>) -> Self {
        Self::new(status, "invalid_request_error", code, message)
    }

    #[must_use]
    pub fn not_found(message: impl Into<String>) -> Self {
        Self::invalid(StatusCode::NOT_FOUND, "service_not_found", message)
    }

    #[must_use]
    pub fn unavailable(code: &'static str, message: impl Into<String>) -> Self {
        Self::new(
            StatusCode::SERVICE_UNAVAILABLE,
            "service_unavailable_error",
            code,
            message,
        )
    }

    #[must_use]
    pub fn bad_gateway(message: impl Into<String>) -> Self {
        Self::new(
            StatusCode::BAD_GATEWAY,
            "api_error",
            "replica_failed",
            message,
        )
    }

    #[must_use]
    pub fn retry_after(mut self, seconds: f64) -> Self {
        self.retry_after = Some(seconds.clamp(1.0, 3600.0).ceil() as u64);
        self
    }

    #[must_use]
    pub fn json(&self) -> Bytes {
        let error = json!({"error": {
            "message": self.message, "type": self.kind, "param": null, "code": self.code,
        }});
        error.to_string().into()
    }
}

/// An event that ends a stream which was begun: what a client library reads as an error.
#[must_use]
pub fn event(error: &[u8]) -> Bytes {
    let mut event = Vec::with_capacity(error.len() + 8);
    event.extend_from_slice(b"data: ");
    // One line: an event's data ends with it.
    event.extend(error.iter().map(|byte| match byte {
        b'\n' | b'\r' => b' ',
        other => *other,
    }));
    event.extend_from_slice(b"\n\n");
    event.into()
}
