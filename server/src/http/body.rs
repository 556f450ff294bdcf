//! Request bodies, bounded in size and time.

use std::time::Duration;

use axum::body::{Body, Bytes};
use http_body_util::BodyExt;

use crate::openai::error::ApiError;

/// Seconds in which a body must arrive.
const BODY_SECONDS: u64 = 60;

/// Bytes of an oversized body that are read and dropped, so that the client, which sends before it
/// reads, gets to see the refusal instead of a reset connection.
const DISCARD_LIMIT: usize = 64 << 20;

/// Reads a whole body of at most `limit` bytes.
pub async fn read(body: Body, limit: usize) -> Result<Bytes, ApiError> {
    let deadline = Duration::from_secs(BODY_SECONDS);
    match tokio::time::timeout(deadline, collect(body, limit)).await {
        Ok(result) => result,
        Err(_) => Err(ApiError::body_timeout(BODY_SECONDS)),
    }
}

async fn collect(mut body: Body, limit: usize) -> Result<Bytes, ApiError> {
    let mut whole = Vec::new();
    let mut size = 0usize;
    while let Some(frame) = body.frame().await {
        let frame = frame
            .map_err(|e| ApiError::bad_request(format!("the body broke off: {e}")).closing())?;
        let Ok(data) = frame.into_data() else {
            continue;
        };
        size = size.saturating_add(data.len());
        if size <= limit {
            whole.extend_from_slice(&data);
        } else if size > limit.saturating_add(DISCARD_LIMIT) {
            break;
        } else {
            whole = Vec::new();
        }
    }
    if size > limit {
        return Err(ApiError::body_too_large(limit));
    }
    Ok(whole.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_limit_is_exact() {
        let body = || Body::from("12345");
        assert_eq!(&read(body(), 5).await.unwrap()[..], b"12345");
        assert_eq!(read(body(), 4).await.unwrap_err().status.as_u16(), 413);
    }
}
