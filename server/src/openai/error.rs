//! Errors in OpenAI's form: `{"error": {"message", "type", "param", "code"}}`.

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use utoipa::ToSchema;

/// The body of every answer that is not a success.
#[derive(Debug, Serialize, ToSchema)]
pub struct ErrorBody {
    pub error: ErrorDetail,
}

#[derive(Debug, Serialize, ToSchema)]
pub struct ErrorDetail {
    /// What was wrong and what to do.
    pub message: String,
    /// Class of the error, such as `invalid_request_error`.
    #[serde(rename = "type")]
    pub kind: &'static str,
    /// The request field at fault.
    pub param: Option<String>,
    /// A stable name, such as `context_length_exceeded`.
    pub code: Option<&'static str>,
}

/// An answer that is not a success.
#[derive(Debug)]
pub struct ApiError {
    pub status: StatusCode,
    pub detail: ErrorDetail,
    /// Seconds for the Retry-After header.
    pub retry_after: Option<u64>,
    /// Whether the connection must not be used again.
    pub close: bool,
}

impl ApiError {
    fn new(status: StatusCode, kind: &'static str, message: String) -> Self {
        Self {
            status,
            detail: ErrorDetail {
                message,
                kind,
                param: None,
                code: None,
            },
            retry_after: None,
            close: false,
        }
    }

    fn code(mut self, code: &'static str) -> Self {
        self.detail.code = Some(code);
        self
    }

    /// 400: a field has a value that can't be served.
    pub fn invalid(param: impl Into<String>, message: impl Into<String>) -> Self {
        let mut error = Self::bad_request(message);
        error.detail.param = Some(param.into());
        error
    }

    /// 400: the request as a whole can't be read.
    pub fn bad_request(message: impl Into<String>) -> Self {
        Self::new(
            StatusCode::BAD_REQUEST,
            "invalid_request_error",
            message.into(),
        )
    }

    /// 400: a field that this server does not implement and that would change the answer.
    pub fn unsupported(param: impl Into<String>, message: impl Into<String>) -> Self {
        Self::invalid(param, message).code("unsupported_parameter")
    }

    /// 400: prompt and answer don't fit into the context.
    pub fn context_length(param: impl Into<String>, message: impl Into<String>) -> Self {
        Self::invalid(param, message).code("context_length_exceeded")
    }

    pub fn model_not_found(asked: &str, served: &str) -> Self {
        let mut error = Self::new(
            StatusCode::NOT_FOUND,
            "invalid_request_error",
            format!("the model `{asked}` does not exist here; this server serves `{served}`"),
        )
        .code("model_not_found");
        error.detail.param = Some("model".into());
        error
    }

    pub fn unknown_route(method: &str, path: &str) -> Self {
        Self::new(
            StatusCode::NOT_FOUND,
            "invalid_request_error",
            format!("there is nothing at {method} {path}; GET /openapi.json lists what there is"),
        )
        .code("unknown_url")
    }

    pub fn method_not_allowed(method: &str, path: &str) -> Self {
        Self::new(
            StatusCode::METHOD_NOT_ALLOWED,
            "invalid_request_error",
            format!("{path} does not take {method}; the Allow header lists what it takes"),
        )
        .code("method_not_allowed")
    }

    pub fn body_too_large(limit: usize) -> Self {
        let mut error = Self::new(
            StatusCode::PAYLOAD_TOO_LARGE,
            "invalid_request_error",
            format!("the body is larger than {limit} bytes, the limit of this server"),
        )
        .code("request_too_large");
        // The rest of the body is still under way and nobody will read it.
        error.close = true;
        error
    }

    pub fn body_timeout(seconds: u64) -> Self {
        let mut error = Self::new(
            StatusCode::REQUEST_TIMEOUT,
            "invalid_request_error",
            format!("the body did not arrive within {seconds} s"),
        )
        .code("request_timeout");
        error.close = true;
        error
    }

    /// 429: the waiting queue is full.
    pub fn queue_full(waiting: usize, retry_after: u64) -> Self {
        let mut error = Self::new(
            StatusCode::TOO_MANY_REQUESTS,
            "rate_limit_error",
            format!("{waiting} requests wait already; try again in {retry_after} s"),
        )
        .code("queue_full");
        error.retry_after = Some(retry_after);
        error
    }

    /// 503: not serving now, another replica or a later try may.
    pub fn unavailable(code: &'static str, message: impl Into<String>, retry_after: u64) -> Self {
        let mut error = Self::new(
            StatusCode::SERVICE_UNAVAILABLE,
            "service_unavailable",
            message.into(),
        )
        .code(code);
        error.retry_after = Some(retry_after);
        error
    }

    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(
            StatusCode::INTERNAL_SERVER_ERROR,
            "server_error",
            message.into(),
        )
        .code("internal_error")
    }

    pub fn unauthorized(message: impl Into<String>) -> Self {
        Self::new(
            StatusCode::UNAUTHORIZED,
            "authentication_error",
            message.into(),
        )
        .code("invalid_token")
    }

    pub fn forbidden(message: impl Into<String>) -> Self {
        Self::new(StatusCode::FORBIDDEN, "permission_error", message.into()).code("token_refused")
    }

    pub fn closing(mut self) -> Self {
        self.close = true;
        self
    }

    pub fn body(self) -> ErrorBody {
        ErrorBody { error: self.detail }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let (status, retry_after, close) = (self.status, self.retry_after, self.close);
        let mut response = (status, Json(self.body())).into_response();
        let headers = response.headers_mut();
        if let Some(seconds) = retry_after {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        if close {
            headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
        }
        if status == StatusCode::UNAUTHORIZED {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}
