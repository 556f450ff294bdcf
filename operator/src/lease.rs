//! Leader election by a Lease, with client-go's algorithm.
//!
//! Every write carries the resourceVersion that it was decided on, so two candidates can't both
//! win. Another holder's time stamps are never compared with this machine's clock: a lease has
//! expired once it hasn't changed, seen from here, for its own duration. The holder in turn counts
//! its deadline from before it sent its last successful renewal, on its own monotonic clock, and
//! that deadline is shorter than the duration: it has stopped writing before anyone may follow.
//!
//! kube-lease-manager isn't used: its takeover is a forced patch without a resourceVersion (two
//! candidates can wipe each other's fresh lock), it compares renewTime with the wall clock, and it
//! hides leaseTransitions, which is the epoch of the control tokens.

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta};
use kube::api::PostParams;
use kube::{Api, ResourceExt};
use tokio::time::Instant;
use tracing::{info, warn};

use crate::fence::CallError;

/// How long a lease lasts that nobody renews, as written into the Lease.
const DURATION: Duration = Duration::from_secs(15);
/// How long the holder may write after it sent its last successful renewal.
const RENEW_DEADLINE: Duration = Duration::from_secs(10);
/// Between two renewals, and between two looks at another's lease.
const PERIOD: Duration = Duration::from_secs(2);
/// For one call to the API server.
const CALL_TIMEOUT: Duration = Duration::from_secs(4);
/// 2026-01-01T00:00:00Z.
const EPOCH_ORIGIN: i64 = 1_767_225_600;

#[derive(Debug, thiserror::Error)]
pub enum LeaseError {
    #[error("lease {name}: {source}")]
    Api { name: String, source: CallError },
    #[error("lease {name}: the API server did not answer within {} s", CALL_TIMEOUT.as_secs())]
    Timeout { name: String },
    #[error("lease {name} was taken by {holder:?}")]
    Taken { name: String, holder: String },
    #[error("lease {name} was not renewed for {} s", RENEW_DEADLINE.as_secs())]
    Expired { name: String },
}

/// Says whether this process may write, and under which epoch. Cheap to clone and to ask.
#[derive(Clone, Debug)]
pub struct Leadership(Arc<State>);

#[derive(Debug)]
struct State {
    origin: Instant,
    /// Milliseconds since `origin` until which this process leads; 0 while it doesn't.
    until: AtomicU64,
    epoch: AtomicU64,
}

impl Leadership {
    pub fn none() -> Self {
        Leadership(Arc::new(State {
            origin: Instant::now(),
            until: AtomicU64::new(0),
            epoch: AtomicU64::new(0),
        }))
    }

    /// The epoch of the lease while it is held: it rises with every acquisition.
    pub fn epoch(&self) -> Option<u64> {
        let now = self.0.origin.elapsed().as_millis() as u64;
        (now < self.0.until.load(Ordering::Acquire)).then(|| self.0.epoch.load(Ordering::Acquire))
    }

    fn extend(&self, sent: Instant, epoch: u64) {
        let until = sent.duration_since(self.0.origin) + RENEW_DEADLINE;
        self.0.epoch.store(epoch, Ordering::Release);
        self.0
            .until
            .store(until.as_millis() as u64, Ordering::Release);
    }

    fn end(&self) {
        self.0.until.store(0, Ordering::Release);
    }

    fn deadline(&self) -> Instant {
        self.0.origin + Duration::from_millis(self.0.until.load(Ordering::Acquire))
    }

    #[cfg(test)]
    pub(crate) fn held(epoch: u64) -> Self {
        let leadership = Leadership::none();
        leadership.extend(Instant::now(), epoch);
        leadership
    }
}

/// A candidate for the lease, then its holder.
pub struct Elector {
    api: Api<Lease>,
    name: String,
    identity: String,
    leadership: Leadership,
}

impl Elector {
    /// `api` needs a client that isn't fenced by `leadership` itself. `identity`: the pod's name, so
    /// that a restarted container of the same pod takes its own lease back at once.
    pub fn new(api: Api<Lease>, name: &str, identity: &str, leadership: Leadership) -> Self {
        Elector {
            api,
            name: name.to_owned(),
            identity: identity.to_owned(),
            leadership,
        }
    }

    /// Waits until the lease is free and takes it. Errors are logged and tried again.
    pub async fn acquire(&self) -> Lease {
        let mut observed: Option<(Option<String>, Instant)> = None;
        let mut reported: Option<String> = None;
        loop {
            match self.try_acquire(&mut observed).await {
                Ok(Attempt::Won(lease)) => return *lease,
                Ok(Attempt::Lost) => continue,
                Ok(Attempt::HeldBy(holder)) => {
                    if reported.as_ref() != Some(&holder) {
                        info!(lease = self.name, holder, "waiting for the lease");
                        reported = Some(holder);
                    }
                }
                Err(error) => warn!(%error, "could not take the lease"),
            }
            tokio::time::sleep(PERIOD).await;
        }
    }

    /// Renews the lease until it is lost; the error says how. The process must end then.
    pub async fn hold(&self, mut lease: Lease) -> LeaseError {
        loop {
            let renewal = async {
                loop {
                    tokio::time::sleep(PERIOD).await;
                    match self.renew(&lease).await {
                        Ok(renewed) => return Ok(renewed),
                        Err(error @ LeaseError::Taken { .. }) => return Err(error),
                        Err(error) => warn!(%error, "could not renew the lease"),
                    }
                }
            };
            match tokio::time::timeout_at(self.leadership.deadline(), renewal).await {
                Ok(Ok(renewed)) => lease = renewed,
                Ok(Err(error)) => {
                    self.leadership.end();
                    return error;
                }
                Err(_) => {
                    self.leadership.end();
                    return LeaseError::Expired {
                        name: self.name.clone(),
                    };
                }
            }
        }
    }

    /// Gives the lease up, so that another candidate need not wait for it to expire.
    pub async fn release(&self) -> Result<(), LeaseError> {
        let epoch = self.leadership.epoch();
        self.leadership.end();
        let lease = self.call(self.api.get(&self.name)).await?;
        if epoch.is_none() || !self.holds(&lease, epoch) {
            return Ok(());
        }
        let mut free = lease;
        if let Some(spec) = &mut free.spec {
            spec.holder_identity = None;
            spec.lease_duration_seconds = Some(1);
        }
        self.call(self.api.replace(&self.name, &PostParams::default(), &free))
            .await?;
        info!(lease = self.name, "released the lease");
        Ok(())
    }

    async fn try_acquire(
        &self,
        observed: &mut Option<(Option<String>, Instant)>,
    ) -> Result<Attempt, LeaseError> {
        let sent = Instant::now();
        let result = match self.call(self.api.get_opt(&self.name)).await? {
            None => {
                let fresh = self.fresh();
                self.call(self.api.create(&PostParams::default(), &fresh))
                    .await
            }
            Some(lease) => {
                let version = lease.resource_version();
                if observed.as_ref().is_none_or(|(seen, _)| *seen != version) {
                    *observed = Some((version, Instant::now()));
                }
                let unchanged = observed.as_ref().map_or(Duration::ZERO, |o| o.1.elapsed());
                if let Some(holder) = self.other_holder(&lease)
                    && unchanged < duration_of(&lease)
                {
                    return Ok(Attempt::HeldBy(holder.to_owned()));
                }
                let mine = self.taken(lease);
                self.call(self.api.replace(&self.name, &PostParams::default(), &mine))
                    .await
            }
        };
        match result {
            Ok(lease) => {
                let epoch = epoch_of(&lease);
                self.leadership.extend(sent, epoch);
                info!(
                    lease = self.name,
                    identity = self.identity,
                    epoch,
                    "leading"
                );
                Ok(Attempt::Won(Box::new(lease)))
            }
            Err(LeaseError::Api { source, .. }) if is_conflict(&source) => Ok(Attempt::Lost),
            Err(error) => Err(error),
        }
    }

    async fn renew(&self, lease: &Lease) -> Result<Lease, LeaseError> {
        let mut renewed = lease.clone();
        if let Some(spec) = &mut renewed.spec {
            spec.renew_time = Some(MicroTime(Timestamp::now()));
        }
        let sent = Instant::now();
        let epoch = epoch_of(lease);
        let result = self
            .call(
                self.api
                    .replace(&self.name, &PostParams::default(), &renewed),
            )
            .await;
        let current = match result {
            Ok(current) => {
                self.leadership.extend(sent, epoch);
                return Ok(current);
            }
            // Someone wrote in between: another holder, or a label by hand, or ourselves in a call
            // whose answer was lost. The next renewal builds on what is there now.
            Err(LeaseError::Api { source, .. }) if is_conflict(&source) => {
                self.call(self.api.get(&self.name)).await?
            }
            Err(error) => return Err(error),
        };
        if !self.holds(&current, Some(epoch)) {
            let holder = current.spec.and_then(|spec| spec.holder_identity);
            return Err(LeaseError::Taken {
                name: self.name.clone(),
                holder: holder.unwrap_or_default(),
            });
        }
        Ok(current)
    }

    /// Whether this very process holds the lease: a second one with the same identity has another
    /// epoch.
    fn holds(&self, lease: &Lease, epoch: Option<u64>) -> bool {
        lease.spec.as_ref().and_then(|s| s.holder_identity.as_ref()) == Some(&self.identity)
            && epoch == Some(epoch_of(lease))
    }

    fn other_holder<'a>(&self, lease: &'a Lease) -> Option<&'a str> {
        let holder = lease.spec.as_ref()?.holder_identity.as_deref()?;
        (!holder.is_empty() && holder != self.identity).then_some(holder)
    }

    fn taken(&self, mut lease: Lease) -> Lease {
        let transitions = lease.spec.as_ref().and_then(|s| s.lease_transitions);
        lease.spec = Some(self.spec(transitions.unwrap_or(0).saturating_add(1)));
        lease
    }

    /// A lease that was deleted must not begin again at epoch 0: the pods have seen higher ones and
    /// would refuse every token. Seconds since 2026 have outrun any count of acquisitions.
    fn fresh(&self) -> Lease {
        let seconds = Timestamp::now().as_second().saturating_sub(EPOCH_ORIGIN);
        Lease {
            metadata: ObjectMeta {
                name: Some(self.name.clone()),
                ..ObjectMeta::default()
            },
            spec: Some(self.spec(seconds.clamp(1, i64::from(i32::MAX)) as i32)),
        }
    }

    fn spec(&self, transitions: i32) -> LeaseSpec {
        let now = Timestamp::now();
        LeaseSpec {
            holder_identity: Some(self.identity.clone()),
            lease_duration_seconds: Some(DURATION.as_secs() as i32),
            acquire_time: Some(MicroTime(now)),
            renew_time: Some(MicroTime(now)),
            lease_transitions: Some(transitions),
            ..LeaseSpec::default()
        }
    }

    async fn call<T>(
        &self,
        call: impl Future<Output = Result<T, kube::Error>>,
    ) -> Result<T, LeaseError> {
        let name = || self.name.clone();
        match tokio::time::timeout(CALL_TIMEOUT, call).await {
            Ok(Ok(value)) => Ok(value),
            Ok(Err(source)) => Err(LeaseError::Api {
                name: name(),
                source: source.into(),
            }),
            Err(_) => Err(LeaseError::Timeout { name: name() }),
        }
    }
}

enum Attempt {
    Won(Box<Lease>),
    /// Another candidate wrote first.
    Lost,
    HeldBy(String),
}

fn epoch_of(lease: &Lease) -> u64 {
    let transitions = lease.spec.as_ref().and_then(|s| s.lease_transitions);
    u64::try_from(transitions.unwrap_or(0)).unwrap_or(0)
}

fn duration_of(lease: &Lease) -> Duration {
    let seconds = lease.spec.as_ref().and_then(|s| s.lease_duration_seconds);
    seconds
        .and_then(|s| u64::try_from(s).ok())
        .map_or(DURATION, Duration::from_secs)
}

fn is_conflict(error: &CallError) -> bool {
    error.refusal().is_some_and(|status| status.code == 409)
}

#[cfg(test)]
#[path = "lease_tests.rs"]
mod tests;
