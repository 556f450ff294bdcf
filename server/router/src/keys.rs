//! API keys and what each may use a minute.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::Duration;

use governor::clock::{Clock, DefaultClock};
use governor::middleware::{StateInformationMiddleware, StateSnapshot};
use governor::state::{InMemoryState, NotKeyed};
use governor::{Quota, RateLimiter};
use hyper::HeaderMap;
use hyper::header::{AUTHORIZATION, HeaderName, HeaderValue};
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

use crate::queue::FlowId;
use crate::table::{ApiKeyEntry, parse_sha256};

type Bucket = RateLimiter<NotKeyed, InMemoryState, DefaultClock, StateInformationMiddleware>;

/// Keys that may call one service.
#[derive(Debug)]
pub struct Keys(Vec<Key>);

#[derive(Clone, Debug)]
pub struct Key {
    pub name: Arc<str>,
    /// Its flow in the queue; never 0.
    pub flow: FlowId,
    digest: [u8; 32],
    limits: Arc<Limits>,
}

#[derive(Debug)]
struct Limits {
    configured: [Option<u32>; 2],
    routers: u32,
    requests: Option<Limit>,
    tokens: Option<Limit>,
}

#[derive(Debug)]
struct Limit {
    per_minute: NonZeroU32,
    /// That may be used at once.
    burst: NonZeroU32,
    bucket: Bucket,
}

/// What a limit says about one request.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Usage {
    limit: u32,
    burst: u32,
    remaining: u32,
}

/// Usage of both limits, for the x-ratelimit headers.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Usages {
    requests: Option<Usage>,
    tokens: Option<Usage>,
}

#[derive(Debug, PartialEq)]
pub struct Exceeded {
    pub of: &'static str,
    pub limit: u32,
    /// None: the request alone asks for more than a minute's worth.
    pub retry_after: Option<Duration>,
    pub usages: Usages,
}

impl Keys {
    /// Keys of the table. A key whose limits are as before keeps what it has used.
    #[must_use]
    pub fn new(entries: &[ApiKeyEntry], routers: u32, before: Option<&Keys>) -> Self {
        let keys = entries.iter().filter_map(|entry| {
            let configured = [entry.requests_per_minute, entry.tokens_per_minute];
            let known = before
                .and_then(|keys| keys.0.iter().find(|key| *key.name == *entry.name))
                .filter(|key| key.limits.configured == configured)
                .filter(|key| key.limits.routers == routers);
            let limits = match known {
                Some(key) => Arc::clone(&key.limits),
                None => Arc::new(Limits {
                    configured,
                    routers,
                    requests: Limit::new(configured[0], routers, request_burst),
                    tokens: Limit::new(configured[1], routers, |tokens| tokens),
                }),
            };
            let mut hasher = DefaultHasher::new();
            entry.name.hash(&mut hasher);
            Some(Key {
                name: entry.name.as_str().into(),
                flow: hasher.finish().max(1),
                digest: parse_sha256(&entry.sha256)?,
                limits,
            })
        });
        Self(keys.collect())
    }

    /// The key that a request presents. Takes as long whichever key it is, or none.
    #[must_use]
    pub fn find(&self, headers: &HeaderMap) -> Option<Key> {
        let presented = bearer(headers)?;
        let digest: [u8; 32] = Sha256::digest(presented).into();
        let mut found = None;
        for key in &self.0 {
            if bool::from(key.digest.ct_eq(&digest)) {
                found = Some(key);
            }
        }
        found.cloned()
    }
}

fn bearer(headers: &HeaderMap) -> Option<&[u8]> {
    let value = headers.get(AUTHORIZATION)?.as_bytes();
    let (scheme, token) = value.split_at_checked(7)?;
    let token = token.trim_ascii();
    (scheme.eq_ignore_ascii_case(b"bearer ") && !token.is_empty()).then_some(token)
}

impl Key {
    /// Charges one request of so many tokens.
    ///
    /// # Errors
    /// Which limit is used up, and when to try again.
    pub fn charge(&self, tokens: u64) -> Result<Usages, Box<Exceeded>> {
        let mut usages = Usages::default();
        if let Some(limit) = &self.limits.requests {
            usages.requests = Some(limit.charge("requests", NonZeroU32::MIN, usages)?);
        }
        if let Some(limit) = &self.limits.tokens {
            let tokens = u32::try_from(tokens).unwrap_or(u32::MAX);
            let tokens = NonZeroU32::new(tokens).unwrap_or(NonZeroU32::MIN);
            usages.tokens = Some(limit.charge("tokens", tokens, usages)?);
        }
        Ok(usages)
    }
}

/// Ten seconds' worth at once: a minute's worth would fill all replicas for others. Small
/// limits allow a handful.
fn request_burst(per_minute: NonZeroU32) -> NonZeroU32 {
    let burst = (per_minute.get() / 6).max(per_minute.get().min(5));
    NonZeroU32::new(burst).unwrap_or(per_minute)
}

impl Limit {
    fn new(
        per_minute: Option<u32>,
        routers: u32,
        burst: fn(NonZeroU32) -> NonZeroU32,
    ) -> Option<Self> {
        let per_minute = NonZeroU32::new(per_minute?.div_ceil(routers.max(1)))?;
        let burst = burst(per_minute);
        let bucket = RateLimiter::direct(Quota::per_minute(per_minute).allow_burst(burst));
        Some(Self {
            per_minute,
            burst,
            bucket: bucket.with_middleware(),
        })
    }

    fn charge(
        &self,
        of: &'static str,
        amount: NonZeroU32,
        mut usages: Usages,
    ) -> Result<Usage, Box<Exceeded>> {
        let (limit, burst) = (self.per_minute.get(), self.burst.get());
        let usage = |remaining| Usage {
            limit,
            burst,
            remaining,
        };
        let retry_after = match self.bucket.check_n(amount) {
            Ok(Ok(snapshot)) => return Ok(usage(remaining(&snapshot))),
            Ok(Err(until)) => Some(until.wait_time_from(DefaultClock::default().now())),
            Err(_) => None,
        };
        let place = match of {
            "requests" => &mut usages.requests,
            _ => &mut usages.tokens,
        };
        *place = Some(usage(0));
        Err(Box::new(Exceeded {
            of,
            limit,
            retry_after,
            usages,
        }))
    }
}

fn remaining(snapshot: &StateSnapshot) -> u32 {
    snapshot.remaining_burst_capacity()
}

impl Usages {
    /// Adds the x-ratelimit headers as OpenAI names them.
    pub fn write(&self, headers: &mut HeaderMap) {
        const NAMES: [[&str; 3]; 2] = [
            [
                "x-ratelimit-limit-requests",
                "x-ratelimit-remaining-requests",
                "x-ratelimit-reset-requests",
            ],
            [
                "x-ratelimit-limit-tokens",
                "x-ratelimit-remaining-tokens",
                "x-ratelimit-reset-tokens",
            ],
        ];
        for (usage, [limit, remaining, reset]) in [self.requests, self.tokens].iter().zip(NAMES) {
            let Some(usage) = usage else { continue };
            let used = f64::from(usage.burst - usage.remaining.min(usage.burst));
            let seconds = used * 60.0 / f64::from(usage.limit);
            headers.insert(HeaderName::from_static(limit), usage.limit.into());
            headers.insert(HeaderName::from_static(remaining), usage.remaining.into());
            if let Ok(value) = HeaderValue::try_from(format!("{seconds:.3}s")) {
                headers.insert(HeaderName::from_static(reset), value);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(name: &str, secret: &str, limits: [Option<u32>; 2]) -> ApiKeyEntry {
        let digest = Sha256::digest(secret);
        ApiKeyEntry {
            name: name.into(),
            sha256: digest.iter().map(|byte| format!("{byte:02x}")).collect(),
            requests_per_minute: limits[0],
            tokens_per_minute: limits[1],
        }
    }

    fn headers(value: &str) -> HeaderMap {
        HeaderMap::from_iter([(AUTHORIZATION, HeaderValue::from_str(value).unwrap())])
    }

    #[test]
    fn finds_the_key_that_was_presented() {
        let entries = [entry("a", "one", [None; 2]), entry("b", "two", [None; 2])];
        let keys = Keys::new(&entries, 1, None);
        assert_eq!(&*keys.find(&headers("Bearer two")).unwrap().name, "b");
        assert_eq!(&*keys.find(&headers("bearer one")).unwrap().name, "a");
        for wrong in ["Bearer three", "Bearer ", "Basic one", "one", "Bearer on"] {
            assert!(keys.find(&headers(wrong)).is_none(), "{wrong}");
        }
        assert!(keys.find(&HeaderMap::new()).is_none());
    }

    #[test]
    fn limits_are_never_exceeded_and_say_when_to_come_back() {
        let keys = Keys::new(&[entry("a", "one", [Some(10), Some(1000)])], 2, None);
        let key = keys.find(&headers("Bearer one")).unwrap();
        for _ in 0..5 {
            key.charge(100).unwrap();
        }
        let exceeded = key.charge(1).unwrap_err();
        assert_eq!((exceeded.of, exceeded.limit), ("requests", 5));
        assert!(exceeded.retry_after.unwrap() <= Duration::from_secs(12));
        let mut headers = HeaderMap::new();
        exceeded.usages.write(&mut headers);
        assert_eq!(headers["x-ratelimit-limit-requests"], "5");
        assert_eq!(headers["x-ratelimit-remaining-requests"], "0");
    }

    #[test]
    fn a_minute_is_not_used_at_once() {
        for (limit, burst) in [(1, 1), (5, 5), (12, 5), (60, 10), (6000, 1000)] {
            let keys = Keys::new(&[entry("a", "one", [Some(limit), None])], 1, None);
            let key = keys.find(&headers("Bearer one")).unwrap();
            let passed = (0..limit).filter(|_| key.charge(1).is_ok()).count();
            assert!(
                passed >= burst && passed <= burst + burst / 50 + 1,
                "{limit}: {passed}"
            );
        }
    }

    #[test]
    fn a_request_over_the_whole_limit_can_never_pass() {
        let keys = Keys::new(&[entry("a", "one", [None, Some(1000)])], 1, None);
        let key = keys.find(&headers("Bearer one")).unwrap();
        assert_eq!(key.charge(1001).unwrap_err().retry_after, None);
        key.charge(1000).unwrap();
        assert!(key.charge(100).unwrap_err().retry_after.is_some());
    }

    #[test]
    fn a_new_table_forgives_nothing() {
        let entries = [entry("a", "one", [Some(1), None])];
        let before = Keys::new(&entries, 1, None);
        let first = before.find(&headers("Bearer one")).unwrap();
        first.charge(1).unwrap();
        let rotated = [entry("a", "new", [Some(1), None])];
        let after = Keys::new(&rotated, 1, Some(&before));
        assert!(after.find(&headers("Bearer one")).is_none());
        let key = after.find(&headers("Bearer new")).unwrap();
        assert!(key.charge(1).is_err());
        let raised = [entry("a", "new", [Some(2), None])];
        let after = Keys::new(&raised, 1, Some(&after));
        assert!(
            after
                .find(&headers("Bearer new"))
                .unwrap()
                .charge(1)
                .is_ok()
        );
    }
}
