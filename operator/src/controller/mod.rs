//! The reconciler: read -> validate -> build -> record -> apply -> status.

mod apply;
mod diagnosis;
mod endpoints;
mod events;
mod read;
mod status;
mod validate;
mod write;

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use futures::StreamExt;
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{ConfigMap, Pod, Service, ServiceAccount};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use kube::core::NamespaceResourceScope;
use kube::runtime::controller::{Action, Config, Controller};
use kube::runtime::events::Recorder;
use kube::runtime::reflector::ObjectRef;
use kube::runtime::utils::Backoff;
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Api, Client, Resource, ResourceExt};
use serde::de::DeserializeOwned;
use stoker_api::{InferenceService, names};
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use crate::fence::{CallError, chain};
use crate::resources::{self, Blueprint, Settings};
use crate::routing::{self, Routing};
use crate::scaling::{Board, Key};
use crate::stores::{Guarded, Scope, Stores, WatchRetry};
use apply::{AppliedBefore, ApplyError};
use read::ReadError;
use status::Facts;
pub use validate::Problem;
use validate::Refusal;
use write::{StatusError, Statuses, Written};

/// Reconciles at the same time; never two of one object.
const CONCURRENCY: u16 = 16;
/// Events that arrive together cause one reconcile.
const DEBOUNCE: Duration = Duration::from_millis(100);
/// Backstop against missed events, and the pace of status refreshes.
const RESYNC: Duration = Duration::from_secs(30);
/// While a service isn't as it should be.
const RESYNC_UNSETTLED: Duration = Duration::from_secs(5);
const FIRST_RETRY: Duration = Duration::from_millis(500);
const LAST_RETRY: Duration = Duration::from_secs(60);

/// Each watch has its own retry; one that fails must not hold up the others.
struct NoPause;

impl Iterator for NoPause {
    type Item = Duration;
    fn next(&mut self) -> Option<Duration> {
        Some(Duration::ZERO)
    }
}

impl Backoff for NoPause {
    fn reset(&mut self) {}
}

/// What every reconcile works with.
pub struct Context {
    pub client: Client,
    pub stores: Stores,
    pub board: Arc<Board>,
    pub settings: Settings,
    pub recorder: Recorder,
    /// `None`: this installation has no routers.
    pub routing: Option<Arc<Routing>>,
    led: endpoints::Led,
    statuses: Statuses,
    applied: AppliedBefore,
    /// What was said of objects that can't be read, by uid.
    unreadable: Mutex<HashMap<String, String>>,
    /// Failures in a row, by object.
    failures: Mutex<HashMap<ObjectRef<Guarded>, u32>>,
}

#[derive(Debug, thiserror::Error)]
pub enum ReconcileError {
    #[error(transparent)]
    Read(#[from] ReadError),
    #[error("could not read the Secret of access.apiKeySecret: {0}")]
    Keys(CallError),
    #[error(transparent)]
    Apply(#[from] ApplyError),
    #[error(transparent)]
    Status(#[from] StatusError),
}

impl ReconcileError {
    fn step(&self) -> &'static str {
        match self {
            ReconcileError::Read(_) | ReconcileError::Keys(_) => "read",
            ReconcileError::Apply(_) => "apply",
            ReconcileError::Status(_) => "status",
        }
    }
}

impl Context {
    pub fn new(
        client: Client,
        stores: Stores,
        board: Arc<Board>,
        settings: Settings,
        recorder: Recorder,
        routing: Option<Arc<Routing>>,
    ) -> Self {
        Context {
            client,
            stores,
            board,
            settings,
            recorder,
            routing,
            led: endpoints::Led::default(),
            statuses: Statuses::default(),
            applied: AppliedBefore::default(),
            unreadable: Mutex::default(),
            failures: Mutex::default(),
        }
    }

    /// Drops what is remembered of objects that are gone.
    fn forget_gone(&self, statuses: &mut HashMap<String, Written>) {
        let alive: HashSet<String> = self
            .stores
            .services()
            .iter()
            .filter_map(|s| s.uid())
            .collect();
        statuses.retain(|uid, _| alive.contains(uid));
        lock(&self.applied).retain(|(uid, _), _| alive.contains(uid));
        lock(&self.led).retain(|uid| alive.contains(uid));
        if let Some(routing) = &self.routing {
            routing.keyring.retain(&alive);
        }
    }
}

/// The controller of one scope. Ends when `stop` is cancelled and running reconciles are done.
pub async fn run(
    context: Arc<Context>,
    scope: Scope,
    services: impl futures::Stream<Item = Result<Guarded, watcher::Error>> + Send + 'static,
    pods: impl futures::Stream<Item = Result<Pod, watcher::Error>> + Send + 'static,
    news: impl futures::Stream<Item = Key> + Send + 'static,
    stop: CancellationToken,
) {
    let client = &context.client;
    let namespace = scope.namespace.as_deref();
    let to_ref = |key: Key| ObjectRef::<Guarded>::new(&key.name).within(&key.namespace);
    Controller::for_stream(services, scope.services.clone())
        .trigger_backoff(NoPause)
        .with_config(
            Config::default()
                .concurrency(CONCURRENCY)
                .debounce(DEBOUNCE),
        )
        .owns_stream(owned::<Deployment>(client, namespace))
        .owns_stream(owned::<Service>(client, namespace))
        .owns_stream(owned::<EndpointSlice>(client, namespace))
        .owns_stream(owned::<ConfigMap>(client, namespace))
        .owns_stream(owned::<PodDisruptionBudget>(client, namespace))
        .owns_stream(owned::<ServiceAccount>(client, namespace))
        .watches_stream(pods, service_of)
        .reconcile_on(news.map(to_ref))
        .graceful_shutdown_on(stop.cancelled_owned())
        .run(reconcile, retry, context)
        .for_each(|result| async move {
            use kube::runtime::controller::Error;
            match result {
                Ok((object, _)) => debug!(%object, "reconciled"),
                // Told by `retry`, with the object.
                Err(Error::ReconcilerFailed(..) | Error::ObjectNotFound(_)) => {}
                Err(error) => warn!(error = %chain(&error), "watch failed; it will be restarted"),
            }
        })
        .await;
}

/// Changes of owned objects, each kind with its own retry. What scaling remembers is nothing to
/// reconcile.
fn owned<K>(
    client: &Client,
    namespace: Option<&str>,
) -> impl futures::Stream<Item = Result<K, watcher::Error>> + Send + 'static
where
    K: Resource<Scope = NamespaceResourceScope, DynamicType = ()>
        + Clone
        + std::fmt::Debug
        + DeserializeOwned
        + Send
        + 'static,
{
    let selector = format!(
        "{},{}!={}",
        names::SERVICE_LABEL,
        names::COMPONENT_LABEL,
        names::MEMORY_COMPONENT
    );
    let labelled = watcher::Config::default().labels(&selector);
    watcher(api::<K>(client, namespace), labelled)
        .backoff(WatchRetry::default())
        .touched_objects()
}

pub fn api<K>(client: &Client, namespace: Option<&str>) -> Api<K>
where
    K: Resource<Scope = NamespaceResourceScope, DynamicType = ()> + DeserializeOwned,
{
    match namespace {
        Some(namespace) => Api::namespaced(client.clone(), namespace),
        None => Api::all(client.clone()),
    }
}

fn service_of(pod: Pod) -> Option<ObjectRef<Guarded>> {
    let name = pod.labels().get(names::SERVICE_LABEL)?;
    let namespace = pod.metadata.namespace.as_deref()?;
    Some(ObjectRef::new(name).within(namespace))
}

async fn reconcile(object: Arc<Guarded>, context: Arc<Context>) -> Result<Action, ReconcileError> {
    let began = Instant::now();
    let result = match &object.0 {
        Ok(service) if service.metadata.deletion_timestamp.is_some() => {
            // Its objects go with it, by their owner references.
            Ok(Action::await_change())
        }
        Ok(service) => {
            lock(&context.unreadable).remove(&service.uid().unwrap_or_default());
            reconcile_service(service, &context).await
        }
        Err(invalid) => reconcile_unreadable(&object, &invalid.error, &context).await,
    };
    let outcome = if result.is_ok() { "ok" } else { "error" };
    metrics::counter!("stoker_operator_reconciles_total", "result" => outcome).increment(1);
    metrics::histogram!("stoker_operator_reconcile_seconds").record(began.elapsed().as_secs_f64());
    if result.is_ok() {
        let object = ObjectRef::from_obj(&*object);
        lock(&context.failures).remove(&object);
    }
    result
}

async fn reconcile_service(
    service: &InferenceService,
    context: &Context,
) -> Result<Action, ReconcileError> {
    // 1. Read what there is.
    let observed = read::read(service, context).await?;
    let desired = context.board.desired(service, observed.deployment.as_ref());

    // 2. Validate what no single object can state.
    let routed = context.routing.is_some();
    let source = match validate::validate(service, &observed, &context.settings, routed) {
        Ok(source) => source,
        Err(Refusal::NotYet(message)) => {
            debug!(name = service.name_any(), message, "waiting");
            return Ok(Action::requeue(Duration::from_secs(1)));
        }
        Err(Refusal::Problem(problem)) => {
            let facts = Facts::new(service, &observed, context, desired).with(problem);
            write::status(context, service, &facts).await?;
            return Ok(Action::requeue(RESYNC_UNSETTLED));
        }
    };

    // 3. Pass on who may use the service.
    let locked = keys(service, context).await.map_err(ReconcileError::Keys)?;

    // 4. Build what there should be.
    let name = service.name_any();
    let namespace = service.namespace().unwrap_or_default();
    let uid = service.uid().unwrap_or_default();
    let owned = resources::build(&Blueprint {
        name: &name,
        namespace: &namespace,
        uid: &uid,
        spec: &service.spec,
        source,
        settings: &context.settings,
        replicas: desired,
        routers: endpoints::routers(context, &observed),
    });

    // 5. Record the wanted replicas before they are applied: an operator that dies in between is
    //    followed by one that asks for the same.
    write::desired(context, service, desired).await?;

    // 6. Apply.
    let key = Key { namespace, name };
    let (deployment, result) = apply::apply(context, &uid, &owned, &observed).await;
    let mut facts = Facts::new(service, &observed, context, desired);
    if let Some(deployment) = &deployment {
        context.board.deployed(&key, deployment);
        facts = facts.applied(deployment);
    }
    if let Err(error) = result {
        if let Some(problem) = error.problem() {
            write::status(context, service, &facts.with(problem)).await?;
        }
        return Err(error.into());
    }

    // 7. Status from what was applied and seen.
    if let Some(problem) = locked {
        facts = facts.with(problem);
    }
    let settled = write::status(context, service, &facts).await?;
    Ok(Action::requeue(match settled {
        true => RESYNC,
        false => RESYNC_UNSETTLED,
    }))
}

/// Hands the service's API keys to the routers. Without the Secret nobody may use it.
async fn keys(service: &InferenceService, context: &Context) -> Result<Option<Problem>, CallError> {
    let Some(routing) = &context.routing else {
        return Ok(None);
    };
    let uid = service.uid().unwrap_or_default();
    match routing::read_keys(&context.client, service).await? {
        Ok(keys) => {
            routing.keyring.set(uid, keys);
            Ok(None)
        }
        Err(problem) => {
            routing.keyring.set(uid, Some(Vec::new()));
            Ok(Some(problem))
        }
    }
}

/// An object that was stored under another schema. It keeps what it has; only its condition says
/// that nothing is done about it.
async fn reconcile_unreadable(
    object: &Guarded,
    error: &str,
    context: &Context,
) -> Result<Action, ReconcileError> {
    write::unreadable(context, object, error).await?;
    Ok(Action::await_change())
}

fn retry(object: Arc<Guarded>, error: &ReconcileError, context: Arc<Context>) -> Action {
    let object = ObjectRef::from_obj(&*object);
    let mut failures = lock(&context.failures);
    let count = failures.entry(object).or_insert(0);
    let delay = FIRST_RETRY
        .saturating_mul(1 << (*count).min(10))
        .min(LAST_RETRY);
    *count += 1;
    metrics::counter!("stoker_operator_reconcile_errors_total", "step" => error.step())
        .increment(1);
    // The span around names the object.
    warn!(error = %chain(error), retry_in = ?delay, "reconcile failed");
    Action::requeue(delay)
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
