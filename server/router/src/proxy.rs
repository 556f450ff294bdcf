//! From a client's request to an admitted exchange.

use std::net::IpAddr;
use std::sync::Arc;

use bytes::Bytes;
use http_body_util::{BodyExt, LengthLimitError, Limited};
use hyper::body::Incoming;
use hyper::header::{self, HeaderMap, HeaderName, HeaderValue};
use hyper::http::request::Parts;
use hyper::{Method, Request, Response, StatusCode, Uri};

use crate::body::{Body, Learn};
use crate::clock;
use crate::error::ApiError;
use crate::forward::{Exchange, REQUEST_ID, answer, strip_connection_headers};
use crate::held::HeldBody;
use crate::keys::{Key, Usages};
use crate::local;
use crate::prefix::Prefix;
use crate::record::Record;
use crate::registry::{Found, Router, Routes};
use crate::scan::{Scan, scan};
use crate::service::Service;

const FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
/// Of a request whose service is told by its body only.
const MAX_BODY_WITHOUT_HOST: u64 = 4 << 20;
const MAX_REQUEST_ID: usize = 128;

/// Answers one request.
pub async fn serve(
    router: Arc<Router>,
    client: IpAddr,
    request: Request<Incoming>,
) -> Response<Body> {
    let mut record = Record::new(Arc::clone(&router.metrics), router.log.clone(), client);
    let (mut parts, body) = request.into_parts();
    let request_id = request_id(&parts.headers);
    record.line.request_id = request_id.to_str().unwrap_or_default().to_owned();
    parts.method.as_str().clone_into(&mut record.line.method);
    parts.uri.path().clone_into(&mut record.line.path);
    let admitted = admit(&router, &mut parts, body, &mut record).await;
    let (response, usages) = match admitted {
        Ok(Admitted::Answer(response)) => (response, Usages::default()),
        Ok(Admitted::Exchange(admitted)) => {
            let heartbeat = router.config.heartbeat;
            let exchange = Exchange {
                service: admitted.service,
                ticket: admitted.ticket,
                method: parts.method,
                uri: admitted.uri,
                headers: parts.headers,
                body: admitted.body,
                held: admitted.held,
                stream: admitted.stream,
                learn: admitted.learn,
                usages: admitted.usages,
                request_id,
                record,
                timeouts: router.config.timeouts,
                reading: admitted.reading,
            };
            return run(exchange, heartbeat).await;
        }
        Err((error, usages)) => (answer(&error), usages),
    };
    local_answer(response, &usages, request_id, record)
}

/// Runs the exchange; a stream that no replica can begin gets comments meanwhile.
async fn run(exchange: Exchange, heartbeat: std::time::Duration) -> Response<Body> {
    let stream = exchange.stream;
    let service = Arc::clone(&exchange.service);
    let request_id = exchange.request_id.clone();
    let since = exchange.ticket.arrived;
    let mut answer = Box::pin(exchange.run());
    if !stream {
        return answer.await;
    }
    loop {
        let response = tokio::time::timeout(heartbeat, answer.as_mut()).await;
        if let Ok(response) = response {
            return response;
        }
        if !service.is_usable() {
            break;
        }
    }
    let held = HeldBody::new(answer, since, heartbeat);
    let mut response = Response::new(Body::Held(Box::new(held)));
    let headers = response.headers_mut();
    let kind = HeaderValue::from_static("text/event-stream");
    headers.insert(header::CONTENT_TYPE, kind);
    let cache = HeaderValue::from_static("no-cache");
    headers.insert(header::CACHE_CONTROL, cache);
    headers.insert(REQUEST_ID, request_id);
    response
}

fn local_answer(
    mut response: Response<Body>,
    usages: &Usages,
    request_id: HeaderValue,
    mut record: Box<Record>,
) -> Response<Body> {
    let headers = response.headers_mut();
    headers.insert(REQUEST_ID, request_id);
    usages.write(headers);
    record.answered(response.status());
    if let Body::Full(_, place) = response.body_mut() {
        *place = Some(record);
    }
    response
}

enum Admitted {
    /// The router knows the answer.
    Answer(Response<Body>),
    Exchange(Box<Admission>),
}

struct Admission {
    service: Arc<Service>,
    ticket: crate::service::Ticket,
    uri: Uri,
    body: Bytes,
    held: crate::registry::HeldBytes,
    stream: bool,
    learn: Learn,
    usages: Usages,
    reading: f64,
}

type Rejection = (ApiError, Usages);

async fn admit(
    router: &Router,
    parts: &mut Parts,
    body: Incoming,
    record: &mut Record,
) -> Result<Admitted, Rejection> {
    let plain = |error| (error, Usages::default());
    let routes = router.routes();
    if routes.version.is_none() {
        let message = "The router has no routing table yet.";
        return Err(plain(
            ApiError::unavailable("no_table", message).retry_after(1.0),
        ));
    }
    let host = host(parts);
    let by_host = host.and_then(|host| routes.by_host(host)).cloned();
    if let Some(service) = &by_host {
        record.line.service = Some(Arc::clone(&service.key));
    }
    if let Some(response) = local::answer(&routes, by_host.as_ref(), parts) {
        return Ok(Admitted::Answer(response));
    }
    // Before the body is read: who may not call needn't send it.
    let mut key = match &by_host {
        Some(service) => authorise(service, &parts.headers).map_err(plain)?,
        None => None,
    };
    let limit = by_host.as_ref().map_or(MAX_BODY_WITHOUT_HOST, |service| {
        service.settings().entry.max_body_bytes
    });
    let began = clock::now();
    let body = read(router, parts, body, limit).await.map_err(plain)?;
    let reading = clock::now() - began;
    let held = router.hold(body.len()).ok_or_else(|| {
        let message = "The router holds as many request bodies as it may.";
        plain(ApiError::unavailable("router_full", message).retry_after(1.0))
    })?;
    let scanned = scan_body(parts, &body).map_err(plain)?;
    let service = match by_host {
        Some(service) => service,
        None => {
            let service = find_by_model(&routes, &scanned, host).map_err(plain)?;
            record.line.service = Some(Arc::clone(&service.key));
            key = authorise(&service, &parts.headers).map_err(plain)?;
            service
        }
    };
    let prompt = body.get(scanned.prompt.clone()).unwrap_or_default();
    let estimates = &service.estimates;
    let prompt_tokens = match scanned.token_ids {
        Some(count) => count as f64,
        None => estimates.prompt_tokens(prompt.len()),
    };
    record.line.prompt_tokens_estimated = prompt_tokens as u64;
    let mut usages = Usages::default();
    if let Some(key) = &key {
        record.line.key = Some(Arc::clone(&key.name));
        // What the request may use at most: the answer's length isn't known yet.
        let most = scanned
            .max_tokens
            .unwrap_or_else(|| estimates.output_tokens(None) as u64);
        usages = charge(key, (prompt_tokens as u64).saturating_add(most))?;
        // The key is the router's business; replicas never see it.
        parts.headers.remove(header::AUTHORIZATION);
    }
    let tokens = (
        prompt_tokens as u64,
        estimates.output_tokens(scanned.max_tokens) as u64,
    );
    let flow = key.map_or(0, |key| key.flow);
    let ticket = service.ticket(flow, scanned.priority, tokens, Prefix::of(prompt));
    let learn = Learn {
        service: Arc::clone(&service),
        // The number of token ids says nothing of text.
        prompt_bytes: if scanned.token_ids.is_none() {
            prompt.len()
        } else {
            0
        },
        max_tokens: scanned.max_tokens,
    };
    prepare_headers(parts, record.line.client, &record.line.request_id);
    Ok(Admitted::Exchange(Box::new(Admission {
        service,
        ticket,
        uri: origin_form(&parts.uri),
        body,
        held,
        stream: scanned.stream,
        learn,
        usages,
        reading,
    })))
}

async fn read(
    router: &Router,
    parts: &Parts,
    body: Incoming,
    limit: u64,
) -> Result<Bytes, ApiError> {
    let too_large = || {
        let message = format!("The request's body is larger than the {limit} bytes allowed.");
        ApiError::invalid(StatusCode::PAYLOAD_TOO_LARGE, "body_too_large", message)
    };
    let length = parts.headers.get(header::CONTENT_LENGTH);
    let length = length.and_then(|value| value.to_str().ok()?.parse::<u64>().ok());
    if length.is_some_and(|length| length > limit) {
        return Err(too_large());
    }
    let limited = Limited::new(body, usize::try_from(limit).unwrap_or(usize::MAX));
    let patience = router.config.timeouts.body_read;
    match tokio::time::timeout(patience, limited.collect()).await {
        Ok(Ok(body)) => Ok(body.to_bytes()),
        Ok(Err(error)) if error.is::<LengthLimitError>() => Err(too_large()),
        Ok(Err(error)) => {
            let message = format!("The request's body could not be read: {error}.");
            Err(ApiError::invalid(
                StatusCode::BAD_REQUEST,
                "bad_body",
                message,
            ))
        }
        Err(_) => {
            let message = format!("The body didn't arrive within {} s.", patience.as_secs());
            Err(ApiError::invalid(
                StatusCode::REQUEST_TIMEOUT,
                "slow_body",
                message,
            ))
        }
    }
}

/// Scans bodies that are JSON, by their type or for want of one.
fn scan_body(parts: &Parts, body: &[u8]) -> Result<Scan, ApiError> {
    let other = parts.headers.get(header::CONTENT_TYPE).is_some_and(|kind| {
        let kind = kind.as_bytes();
        kind.starts_with(b"multipart/") || kind.starts_with(b"audio/")
    });
    if body.is_empty() || other {
        return Ok(Scan::default());
    }
    scan(body).map_err(|error| {
        ApiError::invalid(StatusCode::BAD_REQUEST, "invalid_json", error.to_string())
    })
}

fn find_by_model(
    routes: &Routes,
    scanned: &Scan,
    host: Option<&str>,
) -> Result<Arc<Service>, ApiError> {
    let host = host.unwrap_or("");
    let Some(model) = &scanned.model else {
        let message = format!(
            "No service has the host {host:?}, and the request names no model. Known models: {}.",
            routes.models().join(", ")
        );
        return Err(ApiError::not_found(message));
    };
    match routes.by_model(model) {
        Found::One(service) => Ok(service),
        Found::Several(services) => {
            let hosts: Vec<String> = services
                .iter()
                .map(|service| {
                    let settings = service.settings();
                    let hosts = settings.entry.hosts.iter();
                    let names = hosts.filter(|host| host.parse::<IpAddr>().is_err());
                    let host = names.max_by_key(|host| host.len());
                    host.cloned().unwrap_or_else(|| service.key.to_string())
                })
                .collect();
            let message = format!(
                "The model {model:?} is served by several services; use the host of one of them: \
                 {}.",
                hosts.join(", ")
            );
            Err(ApiError::not_found(message))
        }
        Found::None => {
            let message = format!(
                "No service has the host {host:?} or serves the model {model:?}. Known models: {}.",
                routes.models().join(", ")
            );
            Err(ApiError::not_found(message))
        }
    }
}

/// The key that the request presents; None when the service asks for none.
pub fn authorise(service: &Service, headers: &HeaderMap) -> Result<Option<Key>, ApiError> {
    let settings = service.settings();
    let Some(keys) = &settings.keys else {
        return Ok(None);
    };
    keys.find(headers).map(Some).ok_or_else(|| {
        let message = "No valid API key. Send one as \"Authorization: Bearer KEY\".";
        ApiError::invalid(StatusCode::UNAUTHORIZED, "invalid_api_key", message)
    })
}

fn charge(key: &Key, tokens: u64) -> Result<Usages, Rejection> {
    key.charge(tokens).map_err(|exceeded| {
        let of = exceeded.of;
        let limit = exceeded.limit;
        let status = StatusCode::TOO_MANY_REQUESTS;
        let kind = if of == "tokens" { "tokens" } else { "requests" };
        let error = match exceeded.retry_after {
            Some(after) => {
                let seconds = after.as_secs_f64();
                let message = format!(
                    "The key {:?} has used its {limit} {of} a minute; try again in {seconds:.1} s.",
                    key.name
                );
                ApiError::new(status, kind, "rate_limit_exceeded", message).retry_after(seconds)
            }
            None => {
                let message = format!(
                    "The request may use up to {tokens} tokens, more than the {limit} a minute \
                     of the key {:?}; ask for less.",
                    key.name
                );
                ApiError::new(status, kind, "rate_limit_exceeded", message)
            }
        };
        (error, exceeded.usages)
    })
}

fn host(parts: &Parts) -> Option<&str> {
    let authority = parts.uri.authority().map(|authority| authority.as_str());
    authority.or_else(|| parts.headers.get(header::HOST)?.to_str().ok())
}

fn origin_form(uri: &Uri) -> Uri {
    let path = uri.path_and_query().cloned();
    path.map_or_else(|| Uri::from_static("/"), Uri::from)
}

fn prepare_headers(parts: &mut Parts, client: IpAddr, request_id: &str) {
    let headers = &mut parts.headers;
    strip_connection_headers(headers);
    let client = match headers
        .get(FORWARDED_FOR)
        .and_then(|value| value.to_str().ok())
    {
        Some(earlier) => format!("{earlier}, {client}"),
        None => client.to_string(),
    };
    if let Ok(value) = HeaderValue::try_from(client) {
        headers.insert(FORWARDED_FOR, value);
    }
    if let Ok(value) = HeaderValue::from_str(request_id) {
        headers.insert(REQUEST_ID, value);
    }
    if parts.method == Method::GET || parts.method == Method::HEAD {
        headers.remove(header::CONTENT_LENGTH);
    }
}

fn request_id(headers: &HeaderMap) -> HeaderValue {
    let given = headers.get(REQUEST_ID).filter(|id| {
        id.len() <= MAX_REQUEST_ID
            && !id.is_empty()
            && id.as_bytes().iter().all(u8::is_ascii_graphic)
    });
    if let Some(id) = given {
        return id.clone();
    }
    let id = format!("req-{:016x}", rand::random::<u64>());
    HeaderValue::try_from(id).unwrap_or_else(|_| HeaderValue::from_static("req"))
}
