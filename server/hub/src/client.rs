//! HTTP as a hub needs it: redirects to other hosts that don't get the token, errors told apart by
//! whether to try again, and no wait without an end.

use std::{fmt, sync::Arc, time::Duration};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, Request, StatusCode, header};
use http_body_util::{BodyExt, Empty};
use hyper::body::Incoming;
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::{
    client::legacy::{Client as HttpClient, connect::HttpConnector},
    rt::TokioExecutor,
};
use url::Url;

use crate::{error::HubError, refusal};

const USER_AGENT: &str = concat!("stoker/", env!("CARGO_PKG_VERSION"));
const MAX_REDIRECTS: usize = 8;
/// The largest answer that is read as a whole.
const MAX_TEXT: usize = 32 << 20;
/// The longest wait that a server may ask for.
const MAX_RETRY_AFTER: Duration = Duration::from_secs(300);

/// An access token, which is never printed.
#[derive(Clone)]
pub struct Token(HeaderValue);

impl Token {
    pub fn new(token: &str) -> Result<Self, HubError> {
        let mut value = HeaderValue::from_str(&format!("Bearer {}", token.trim()))
            .map_err(|_| HubError::Token)?;
        value.set_sensitive(true);
        Ok(Self(value))
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(...)")
    }
}

/// How long to wait for what.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    pub connect: Duration,
    /// Without a single byte; then the connection counts as cut.
    pub stall: Duration,
    /// Tries in a row that bring nothing new.
    pub attempts: u32,
    /// Pause after the first of them; it doubles from one to the next.
    pub first_pause: Duration,
    pub longest_pause: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(10),
            stall: Duration::from_secs(30),
            attempts: 8,
            first_pause: Duration::from_secs(1),
            longest_pause: Duration::from_secs(30),
        }
    }
}

impl Patience {
    /// The pause after `attempts` tries in vain.
    fn pause(&self, attempts: u32) -> Duration {
        let doubled = 2u32.saturating_pow(attempts.saturating_sub(1).min(16));
        self.first_pause
            .saturating_mul(doubled)
            .min(self.longest_pause)
    }
}

/// Why a try failed.
pub(crate) enum Failure {
    /// May be better next time, not before `after` if the server said so.
    Passing {
        reason: String,
        after: Option<Duration>,
    },
    Final(HubError),
}

impl Failure {
    pub(crate) fn passing(reason: impl Into<String>) -> Self {
        Self::Passing {
            reason: reason.into(),
            after: None,
        }
    }
}

impl From<HubError> for Failure {
    fn from(error: HubError) -> Self {
        Self::Final(error)
    }
}

/// Tries in a row that brought nothing.
pub(crate) struct Retries<'a> {
    patience: &'a Patience,
    what: &'a str,
    attempts: u32,
}

impl<'a> Retries<'a> {
    pub(crate) fn new(patience: &'a Patience, what: &'a str) -> Self {
        Self {
            patience,
            what,
            attempts: 0,
        }
    }

    /// Something came of the last try.
    pub(crate) fn progress(&mut self) {
        self.attempts = 0;
    }

    /// Waits before the next try, or gives up.
    pub(crate) async fn after(&mut self, failure: Failure) -> Result<(), HubError> {
        let (reason, after) = match failure {
            Failure::Final(error) => return Err(error),
            Failure::Passing { reason, after } => (reason, after),
        };
        self.attempts += 1;
        if self.attempts >= self.patience.attempts {
            return Err(HubError::Unreachable {
                what: self.what.to_owned(),
                reason,
                attempts: self.attempts,
            });
        }
        let pause = self.patience.pause(self.attempts);
        let pause = after.map_or(pause, |after| after.max(pause));
        tracing::warn!(
            what = self.what,
            reason,
            attempt = self.attempts,
            pause_seconds = pause.as_secs_f64(),
            "trying again"
        );
        tokio::time::sleep(pause).await;
        Ok(())
    }
}

/// An answer whose body is still to come.
pub(crate) struct Response {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    body: Incoming,
    stall: Duration,
}

impl Response {
    /// A header's text.
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name)?.to_str().ok()
    }

    pub(crate) fn length(&self) -> Option<u64> {
        self.header("content-length")?.parse().ok()
    }

    /// The next bytes of the body; `None` at its end.
    pub(crate) async fn chunk(&mut self) -> Result<Option<Bytes>, Failure> {
        loop {
            let frame = tokio::time::timeout(self.stall, self.body.frame())
                .await
                .map_err(|_| {
                    let seconds = self.stall.as_secs_f64();
                    Failure::passing(format!("nothing came for {seconds} s"))
                })?;
            match frame {
                None => return Ok(None),
                Some(Err(error)) => {
                    return Err(Failure::passing(format!(
                        "the connection was cut: {}",
                        causes(&error)
                    )));
                }
                // Trailers have no data.
                Some(Ok(frame)) => {
                    if let Ok(data) = frame.into_data() {
                        return Ok(Some(data));
                    }
                }
            }
        }
    }
}

pub(crate) struct Client {
    http: HttpClient<HttpsConnector<HttpConnector>, Empty<Bytes>>,
    /// Where the token may go: the hub itself.
    hub: Option<Url>,
    token: Option<Token>,
    pub(crate) patience: Patience,
}

/// Which answers end the way of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Follow {
    /// Redirects are followed to the end.
    All,
    /// A redirect that says what it leads to is enough.
    UntilDescribed,
}

impl Client {
    pub(crate) fn new(
        hub: Option<Url>,
        token: Option<Token>,
        patience: Patience,
    ) -> Result<Self, HubError> {
        let mut tcp = HttpConnector::new();
        tcp.enforce_http(false);
        tcp.set_nodelay(true);
        tcp.set_connect_timeout(Some(patience.connect));
        let https = HttpsConnectorBuilder::new()
            .with_tls_config(tls()?)
            .https_or_http()
            .enable_http1()
            .wrap_connector(tcp);
        Ok(Self {
            http: HttpClient::builder(TokioExecutor::new()).build(https),
            hub,
            token,
            patience,
        })
    }

    /// One try at a request, from byte `from` on. What the server refuses is a failure.
    pub(crate) async fn request(
        &self,
        method: Method,
        url: &Url,
        from: u64,
        follow: Follow,
        what: &str,
    ) -> Result<Response, Failure> {
        let mut url = url.clone();
        for _ in 0..MAX_REDIRECTS {
            let response = self.send(method.clone(), &url, from).await?;
            if !response.status.is_redirection() {
                return self.check(response, what);
            }
            if follow == Follow::UntilDescribed && response.header("x-linked-etag").is_some() {
                return Ok(response);
            }
            let target = response
                .header("location")
                .and_then(|location| url.join(location).ok());
            let Some(target) = target else {
                return Err(Failure::Final(HubError::Protocol {
                    what: what.to_owned(),
                    problem: format!("a redirect ({}) leads nowhere", response.status),
                }));
            };
            if url.scheme() == "https" && target.scheme() != "https" {
                return Err(Failure::Final(HubError::Protocol {
                    what: what.to_owned(),
                    problem: "a redirect leads from https to an unprotected connection".to_owned(),
                }));
            }
            url = target;
        }
        Err(Failure::Final(HubError::Protocol {
            what: what.to_owned(),
            problem: format!("more than {MAX_REDIRECTS} redirects"),
        }))
    }

    async fn send(&self, method: Method, url: &Url, from: u64) -> Result<Response, Failure> {
        let mut request = Request::builder()
            .method(method)
            .uri(url.as_str())
            .header(header::USER_AGENT, USER_AGENT)
            // Lengths and ranges are those of the file itself.
            .header(header::ACCEPT_ENCODING, "identity");
        if from > 0 {
            request = request.header(header::RANGE, format!("bytes={from}-"));
        }
        if let (Some(token), Some(hub)) = (&self.token, &self.hub)
            && hub.origin() == url.origin()
        {
            request = request.header(header::AUTHORIZATION, token.0.clone());
        }
        let host = url.host_str().unwrap_or_default();
        let request = request
            .body(Empty::new())
            .map_err(|e| Failure::passing(format!("a request to {host} can't be made: {e}")))?;
        let response = tokio::time::timeout(self.patience.stall, self.http.request(request))
            .await
            .map_err(|_| {
                let seconds = self.patience.stall.as_secs_f64();
                Failure::passing(format!("{host} didn't answer for {seconds} s"))
            })?
            .map_err(|e| Failure::passing(format!("{host} can't be reached: {}", causes(&e))))?;
        let (parts, body) = response.into_parts();
        Ok(Response {
            status: parts.status,
            headers: parts.headers,
            body,
            stall: self.patience.stall,
        })
    }

    fn check(&self, response: Response, what: &str) -> Result<Response, Failure> {
        let status = response.status;
        if status.is_success() {
            return Ok(response);
        }
        if status.is_server_error()
            || matches!(
                status,
                StatusCode::TOO_MANY_REQUESTS | StatusCode::REQUEST_TIMEOUT | StatusCode::TOO_EARLY
            )
        {
            let after = response.header("retry-after").and_then(|s| s.parse().ok());
            return Err(Failure::Passing {
                reason: format!("the server answered {status}"),
                after: after.map(|s| Duration::from_secs(s).min(MAX_RETRY_AFTER)),
            });
        }
        Err(Failure::Final(HubError::Refused {
            what: what.to_owned(),
            reason: refusal::describe(&response, self.token.is_some()),
        }))
    }

    /// A text as a whole, with retries.
    pub(crate) async fn text(&self, url: &Url, what: &str) -> Result<Vec<u8>, HubError> {
        let mut retries = Retries::new(&self.patience, what);
        loop {
            match self.try_text(url, what).await {
                Ok(text) => return Ok(text),
                Err(failure) => retries.after(failure).await?,
            }
        }
    }

    async fn try_text(&self, url: &Url, what: &str) -> Result<Vec<u8>, Failure> {
        let mut response = self.request(Method::GET, url, 0, Follow::All, what).await?;
        let mut text = Vec::new();
        while let Some(chunk) = response.chunk().await? {
            text.extend_from_slice(&chunk);
            if text.len() > MAX_TEXT {
                return Err(Failure::Final(HubError::Protocol {
                    what: what.to_owned(),
                    problem: "the answer is too long".to_owned(),
                }));
            }
        }
        Ok(text)
    }
}

/// TLS with the system's certificates, or with Mozilla's where the image has none. `SSL_CERT_FILE`
/// names others.
fn tls() -> Result<rustls::ClientConfig, HubError> {
    let mut roots = rustls::RootCertStore::empty();
    let system = rustls_native_certs::load_native_certs();
    for error in &system.errors {
        tracing::warn!(%error, "a certificate of the system can't be read");
    }
    roots.add_parsable_certificates(system.certs);
    if roots.is_empty() {
        roots.add_parsable_certificates(webpki_root_certs::TLS_SERVER_ROOT_CERTS.iter().cloned());
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|e| HubError::Tls(e.to_string()))?;
    Ok(config.with_root_certificates(roots).with_no_client_auth())
}

/// An error with all that lies behind it, on one line. None of these name a URL, whose query may
/// be a signature.
fn causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        let cause = error.to_string();
        if !text.contains(&cause) {
            text += ": ";
            text += &cause;
        }
        source = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_isnt_printed() {
        let token = Token::new(" hf_secret\n").unwrap();
        assert!(!format!("{token:?}").contains("hf_secret"));
        assert!(Token::new("a\nb").is_err());
    }

    #[test]
    fn pauses_double_up_to_the_longest() {
        let patience = Patience::default();
        let pauses: Vec<u64> = (1..8).map(|n| patience.pause(n).as_secs()).collect();
        assert_eq!(pauses, [1, 2, 4, 8, 16, 30, 30]);
        assert_eq!(patience.pause(u32::MAX), patience.longest_pause);
    }
}
