//! `stoker-operator run`: wires the parts together, leads, and leaves in order.

use std::fmt::Debug;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail};
use futures::stream::{self, BoxStream, StreamExt};
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{Pod, Secret, Service};
use kube::runtime::events::{Recorder, Reporter};
use kube::runtime::reflector::Store;
use kube::runtime::{WatchStreamExt, reflector, watcher};
use kube::{Api, Client, Config, Resource, ResourceExt};
use serde::de::DeserializeOwned;
use stoker_api::names;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::actuate::{ControlKey, DeletionCost, Pusher, Signer};
use crate::args::RunArgs;
use crate::controller::{self, Context};
use crate::fence;
use crate::lease::{Elector, Leadership};
use crate::probes;
use crate::resources::Settings;
use crate::routing::{self, Caller, Routing};
use crate::scaling::{self, Board, Keeper, Key, Tools};
use crate::scrape::Fetcher;
use crate::stores::{Guarded, Scope, Stores, WatchRetry};

/// For running reconciles to end after SIGTERM.
const LAST_RECONCILES: Duration = Duration::from_secs(10);
/// For the first list of the routers' pods.
const FIRST_LIST: Duration = Duration::from_secs(30);

pub async fn run(args: RunArgs) -> anyhow::Result<()> {
    let stop = stop_on_signal()?;
    let metrics = probes::install_metrics()?;
    probes::serve(args.metrics_port, metrics).await?;

    let config = Config::infer().await.context(
        "found no Kubernetes API: neither the service account of a pod nor a kubeconfig (KUBECONFIG)",
    )?;
    let leadership = Leadership::none();
    let election = fence::client(config.clone(), None)?;
    let client = fence::client(config, Some(leadership.clone()))?;

    let leases: Api<Lease> = Api::namespaced(election, &args.place.namespace);
    let elector = Elector::new(
        leases,
        names::LEASE,
        &args.place.pod_name,
        leadership.clone(),
    );
    let lease = tokio::select! {
        lease = elector.acquire() => lease,
        () = stop.cancelled() => return Ok(()),
    };
    metrics::gauge!("stoker_operator_leader").set(1.0);

    let mut tasks = JoinSet::new();
    let started = tokio::select! {
        started = start(&args, client, leadership, &mut tasks, &stop) => started,
        lost = elector.hold(lease.clone()) => bail!("leadership was lost: {lost}"),
        () = stop.cancelled() => Ok(()),
    };
    started?;
    tokio::select! {
        () = stop.cancelled() => {}
        // Everything has been fenced already; the next process takes up from the API server.
        lost = elector.hold(lease) => bail!("leadership was lost: {lost}"),
        Some(ended) = tasks.join_next() => {
            if !stop.is_cancelled() {
                bail!("a task ended that should run for ever: {ended:?}");
            }
        }
    }
    info!("stopping");
    let ending = async { while tasks.join_next().await.is_some() {} };
    if tokio::time::timeout(LAST_RECONCILES, ending).await.is_err() {
        warn!("reconciles were still running and are cut off");
    }
    elector
        .release()
        .await
        .context("could not release the lease")
}

async fn start(
    args: &RunArgs,
    client: Client,
    leadership: Leadership,
    tasks: &mut JoinSet<()>,
    stop: &CancellationToken,
) -> anyhow::Result<()> {
    let secrets: Api<Secret> = Api::namespaced(client.clone(), &args.place.namespace);
    let key = ControlKey::load_or_create(&secrets).await?;
    let routing = match &args.router_selector {
        Some(selector) => Some(watch_routers(&client, args, selector, tasks, stop).await?),
        None => None,
    };
    let caller = Caller::new(
        port(names::ROUTER_CONTROL_PORT)?,
        Signer::new(&key, leadership.clone())?,
    )?;
    let reporter = Reporter {
        controller: names::FIELD_MANAGER.to_owned(),
        instance: Some(args.place.pod_name.clone()),
    };
    let recorder = Recorder::new(client.clone(), reporter);
    let tools = Tools {
        fetcher: Fetcher::new(port(names::HTTP_PORT)?)?,
        pusher: Pusher::new(port(names::CONTROL_PORT)?, Signer::new(&key, leadership)?)?,
        deletion_cost: DeletionCost::new(client.clone()),
        keeper: Keeper::new(client.clone(), recorder.clone()),
        routing: routing.clone(),
    };
    let (board, mut woken) = Board::new();
    let board = Arc::new(board);
    let watched: Vec<Watched> = args
        .place
        .scopes()
        .into_iter()
        .map(|namespace| watch(&client, namespace))
        .collect();
    let stores = Stores::new(watched.iter().map(|w| w.scope.clone()).collect());
    let context = Arc::new(Context::new(
        client.clone(),
        stores.clone(),
        Arc::clone(&board),
        Settings {
            server_image: args.server_image.clone(),
            image_pull_policy: args.image_pull_policy.as_str().to_owned(),
            control_public_pem: key.public_pem().to_owned(),
            hub_endpoint: given(&args.hub_endpoint),
            model_cache_host_path: given(&args.model_cache_host_path),
        },
        recorder,
        routing.clone(),
    ));

    let mut routes = Vec::new();
    for Watched {
        scope,
        services,
        pods,
    } in watched
    {
        let (route, mut news) = mpsc::unbounded_channel::<Key>();
        routes.push((scope.namespace.clone(), route));
        let news = stream::poll_fn(move |cx| news.poll_recv(cx));
        let stop = stop.clone();
        tasks.spawn(controller::run(
            Arc::clone(&context),
            scope,
            services,
            pods,
            news,
            stop,
        ));
    }
    let stopped = stop.clone();
    tasks.spawn(async move {
        let deliver = async {
            while let Some(key) = woken.recv().await {
                let covers = |namespace: &Option<String>| {
                    namespace.as_ref().is_none_or(|n| *n == key.namespace)
                };
                if let Some((_, route)) = routes.iter().find(|(namespace, _)| covers(namespace)) {
                    // Closed only while the process ends.
                    let _ = route.send(key);
                }
            }
        };
        stopped.run_until_cancelled(deliver).await;
    });
    if let Some(routing) = routing {
        let addresses = args.place.scopes().into_iter().map(|namespace| {
            let api = controller::api::<Service>(&client, namespace.as_deref());
            let labelled = watcher::Config::default().labels(names::SERVICE_LABEL);
            cached(api, labelled, tasks, stop)
        });
        let addresses = addresses.collect();
        let (stores, board) = (stores.clone(), Arc::clone(&board));
        let stopped = stop.clone();
        tasks.spawn(async move {
            let routing = routing::run(routing, stores, addresses, board, Arc::new(caller));
            stopped.run_until_cancelled(routing).await;
        });
    }
    let stopped = stop.clone();
    tasks.spawn(async move {
        let scaling = scaling::run(stores, board, Arc::new(tools));
        stopped.run_until_cancelled(scaling).await;
    });
    Ok(())
}

/// Returns once it is known which routers there are, so that services are not led to none.
async fn watch_routers(
    client: &Client,
    args: &RunArgs,
    selector: &str,
    tasks: &mut JoinSet<()>,
    stop: &CancellationToken,
) -> anyhow::Result<Arc<Routing>> {
    let api: Api<Pod> = Api::namespaced(client.clone(), &args.place.namespace);
    let pods = cached(
        api,
        watcher::Config::default().labels(selector),
        tasks,
        stop,
    );
    let ready = pods.wait_until_ready();
    tokio::time::timeout(FIRST_LIST, ready)
        .await
        .context("listing the routers' pods took too long")??;
    Ok(Arc::new(Routing::new(pods)))
}

/// A cache that is kept up until `stop`.
fn cached<K>(
    api: Api<K>,
    config: watcher::Config,
    tasks: &mut JoinSet<()>,
    stop: &CancellationToken,
) -> Store<K>
where
    K: Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned + Send + Sync + 'static,
{
    let (store, writer) = reflector::store::<K>();
    let changes = watcher(api, config)
        .modify(slim)
        .backoff(WatchRetry::default())
        .reflect(writer);
    let stopped = stop.clone();
    tasks.spawn(async move {
        let kept = changes.for_each(|_| std::future::ready(()));
        stopped.run_until_cancelled(kept).await;
    });
    store
}

struct Watched {
    scope: Scope,
    services: BoxStream<'static, Result<Guarded, watcher::Error>>,
    pods: BoxStream<'static, Result<Pod, watcher::Error>>,
}

/// Caches and triggers of one namespace, or of all.
fn watch(client: &Client, namespace: Option<String>) -> Watched {
    let (services, services_writer) = reflector::store::<Guarded>();
    let (pods, pods_writer) = reflector::store::<Pod>();
    let (all_listed, listed) = tokio::sync::watch::channel(false);
    let service_api = controller::api::<Guarded>(client, namespace.as_deref());
    let pod_api = controller::api::<Pod>(client, namespace.as_deref());
    let labelled = watcher::Config::default().labels(names::SERVICE_LABEL);
    Watched {
        services: watcher(service_api, watcher::Config::default())
            .modify(slim)
            .backoff(WatchRetry::default())
            .reflect(services_writer)
            .inspect(move |event| {
                if matches!(event, Ok(watcher::Event::InitDone)) {
                    all_listed.send_replace(true);
                }
            })
            .applied_objects()
            .boxed(),
        pods: watcher(pod_api, labelled)
            .modify(slim)
            .backoff(WatchRetry::default())
            .reflect(pods_writer)
            .touched_objects()
            .boxed(),
        scope: Scope {
            namespace,
            services,
            listed,
            pods,
        },
    }
}

/// Managed fields are half of an object, and nobody here reads them.
fn slim<K: Resource>(object: &mut K) {
    object.managed_fields_mut().clear();
}

/// An empty environment variable is none.
fn given(text: &Option<String>) -> Option<String> {
    text.clone().filter(|text| !text.is_empty())
}

fn port(number: i32) -> anyhow::Result<u16> {
    u16::try_from(number).with_context(|| format!("{number} is no port"))
}

fn stop_on_signal() -> anyhow::Result<CancellationToken> {
    let stop = CancellationToken::new();
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let token = stop.clone();
    tokio::spawn(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        token.cancel();
    });
    Ok(stop)
}
