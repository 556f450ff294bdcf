//! The reconciler against an API server that answers what a test wants it to.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use axum::http::{Method, Request};
use futures::StreamExt;
use kube::client::Body;
use kube::core::DeserializeGuard;
use kube::runtime::{WatchStreamExt, reflector, watcher};
use serde_json::{Value, json};
use tokio::sync::mpsc;

use super::*;
use crate::testing::{Server, answer, body_of, mock_client, recorder, refusal};

const DEPLOYMENT: &str = "/apis/apps/v1/namespaces/ns/deployments/chat";
const STATUS: &str =
    "/apis/serving.stoker.dev/v1alpha1/namespaces/ns/inferenceservices/chat/status";

/// Keeps what is applied, as an API server does: an apply that changes nothing changes nothing.
#[derive(Default)]
struct Fake {
    objects: BTreeMap<String, Value>,
    version: u64,
    /// Method and path of every write.
    writes: Vec<(Method, String, Value)>,
    /// Refuses writes to this path.
    refuse: Option<(&'static str, u16, &'static str)>,
}

impl Fake {
    fn get(&self, path: &str) -> axum::http::Response<Body> {
        match self.objects.get(path) {
            Some(object) => answer(200, object),
            None => refusal(404, "NotFound", "there is no such object"),
        }
    }

    fn write(&mut self, method: Method, path: &str, body: Value) -> axum::http::Response<Body> {
        self.writes.push((method, path.to_owned(), body.clone()));
        if let Some((refused, code, reason)) = self.refuse
            && refused == path
        {
            return refusal(code, reason, "as the test wants it");
        }
        let old = self.objects.get(path);
        let version = match old {
            Some(old) if same(old, &body) => old["metadata"]["resourceVersion"].clone(),
            _ => {
                self.version += 1;
                json!(self.version.to_string())
            }
        };
        let mut stored = body;
        stored["metadata"]["resourceVersion"] = version;
        stored["metadata"]["generation"] = json!(1);
        self.objects.insert(path.to_owned(), stored.clone());
        answer(200, &stored)
    }

    fn paths(&self) -> Vec<&str> {
        self.writes
            .iter()
            .map(|(_, path, _)| path.as_str())
            .collect()
    }

    fn status(&self) -> &Value {
        let (.., body) = self
            .writes
            .iter()
            .rfind(|(_, path, _)| path == STATUS)
            .unwrap();
        &body["status"]
    }
}

fn same(stored: &Value, applied: &Value) -> bool {
    let mut stored = stored.clone();
    if let Some(meta) = stored["metadata"].as_object_mut() {
        meta.remove("resourceVersion");
        meta.remove("generation");
    }
    stored == *applied
}

fn serve(mut server: Server, fake: Arc<Mutex<Fake>>) {
    tokio::spawn(async move {
        while let Some((request, respond)) = server.next_request().await {
            respond.send_response(handle(&fake, request).await);
        }
    });
}

async fn handle(fake: &Mutex<Fake>, request: Request<Body>) -> axum::http::Response<Body> {
    let method = request.method().clone();
    let path = request.uri().path().to_owned();
    let body = body_of(request).await;
    let mut fake = fake.lock().unwrap();
    match method {
        Method::GET => fake.get(&path),
        _ => fake.write(method, &path, body),
    }
}

fn service(name: &str) -> Value {
    json!({
        "apiVersion": "serving.stoker.dev/v1alpha1", "kind": "InferenceService",
        "metadata": {"name": name, "namespace": "ns", "uid": format!("uid-{name}"), "generation": 1},
        "spec": {"engine": {"device": "simulated", "simulatedProfile": "t4"}},
    })
}

fn context() -> (Context, Arc<Mutex<Fake>>, mpsc::UnboundedReceiver<Key>) {
    let (client, server) = mock_client();
    let fake = Arc::new(Mutex::new(Fake::default()));
    serve(server, Arc::clone(&fake));
    let (services, mut writer) = reflector::store();
    let (pods, _) = reflector::store();
    let seen = Guarded::clone(&guarded(service("chat")));
    writer.apply_watcher_event(&watcher::Event::Apply(seen));
    let scope = Scope {
        namespace: None,
        services,
        listed: tokio::sync::watch::channel(true).1,
        pods,
    };
    let (context, woken) = context_of(client, Stores::new(vec![scope]));
    (context, fake, woken)
}

fn context_of(client: Client, stores: Stores) -> (Context, mpsc::UnboundedReceiver<Key>) {
    let (board, woken) = Board::new();
    let settings = Settings {
        server_image: "server:1".to_owned(),
        image_pull_policy: "IfNotPresent".to_owned(),
        control_public_pem: "key".to_owned(),
        hub_endpoint: None,
        model_cache_host_path: None,
    };
    let recorder = recorder(client.clone());
    (
        Context::new(client, stores, Arc::new(board), settings, recorder, None),
        woken,
    )
}

fn guarded(value: Value) -> Arc<Guarded> {
    Arc::new(serde_json::from_value::<DeserializeGuard<InferenceService>>(value).unwrap())
}

#[tokio::test]
async fn a_second_reconcile_of_an_unchanged_object_writes_nothing() {
    let (context, fake, _woken) = context();
    let context = Arc::new(context);
    let object = guarded(service("chat"));
    reconcile(Arc::clone(&object), Arc::clone(&context))
        .await
        .unwrap();
    {
        let fake = fake.lock().unwrap();
        let paths = fake.paths();
        assert_eq!(
            paths.iter().filter(|path| **path == STATUS).count(),
            2,
            "{paths:?}"
        );
        let desired = paths.iter().position(|path| *path == STATUS).unwrap();
        let deployed = paths.iter().position(|path| *path == DEPLOYMENT).unwrap();
        assert!(
            desired < deployed,
            "replicas are recorded before they are applied"
        );
        assert_eq!(deployed, paths.len() - 2, "pods come after what they need");
        let status = fake.status();
        assert_eq!(status["desiredReplicas"], 1);
        assert_eq!(status["conditions"][0]["type"], "Ready");
        assert_eq!(status["conditions"][0]["status"], "False");
    }
    let before = fake.lock().unwrap().writes.len();
    for _ in 0..3 {
        reconcile(Arc::clone(&object), Arc::clone(&context))
            .await
            .unwrap();
    }
    let fake = fake.lock().unwrap();
    assert_eq!(fake.writes.len(), before, "{:?}", &fake.paths()[before..]);
}

#[tokio::test]
async fn drift_is_applied_away() {
    let (context, fake, _woken) = context();
    let context = Arc::new(context);
    let object = guarded(service("chat"));
    reconcile(Arc::clone(&object), Arc::clone(&context))
        .await
        .unwrap();
    {
        let mut fake = fake.lock().unwrap();
        let deployment = fake.objects.get_mut(DEPLOYMENT).unwrap();
        deployment["spec"]["replicas"] = json!(7);
        deployment["metadata"]["resourceVersion"] = json!("999");
    }
    reconcile(object, context).await.unwrap();
    let fake = fake.lock().unwrap();
    assert_eq!(fake.objects[DEPLOYMENT]["spec"]["replicas"], 1);
}

/// `kubectl edit svc` on the port: an apply alone would make two ports of one name.
#[tokio::test]
async fn a_changed_port_is_put_back() {
    let (context, fake, _woken) = context();
    let context = Arc::new(context);
    let object = guarded(service("chat"));
    let path = "/api/v1/namespaces/ns/services/chat";
    reconcile(Arc::clone(&object), Arc::clone(&context))
        .await
        .unwrap();
    let before = {
        let mut fake = fake.lock().unwrap();
        fake.objects.get_mut(path).unwrap()["metadata"]["resourceVersion"] = json!("edited");
        fake.refuse = Some((path, 422, "Invalid"));
        fake.writes.len()
    };
    // The fake refuses whatever is written: what matters is what is tried.
    reconcile(object, context).await.unwrap_err();
    let fake = fake.lock().unwrap();
    let tried: Vec<&Value> = fake.writes[before..]
        .iter()
        .filter(|(_, written, _)| written == path)
        .map(|(.., body)| body)
        .collect();
    assert_eq!(tried.len(), 2);
    assert_eq!(
        tried[1]["spec"]["ports"],
        json!([{"$patch": "replace"},
            {"name": "http", "port": 80, "protocol": "TCP", "targetPort": "http"}])
    );
}

/// Another operator with another key, say: both would write as fast as they can.
#[tokio::test]
async fn a_fight_over_a_field_is_not_fought_at_full_speed() {
    let (context, fake, _woken) = context();
    let context = Arc::new(context);
    let object = guarded(service("chat"));
    let path = "/api/v1/namespaces/ns/configmaps/chat-control";
    for round in 0..20 {
        reconcile(Arc::clone(&object), Arc::clone(&context))
            .await
            .unwrap();
        let mut fake = fake.lock().unwrap();
        let theirs = fake.objects.get_mut(path).unwrap();
        theirs["data"]["public.pem"] = json!("theirs");
        theirs["metadata"]["resourceVersion"] = json!(format!("t{round}"));
    }
    let fake = fake.lock().unwrap();
    let written = fake.paths().iter().filter(|p| **p == path).count();
    assert_eq!(written, 6, "the first apply and five corrections");
}

#[tokio::test]
async fn what_passes_by_itself_is_tried_again_and_not_blamed_on_the_object() {
    for (code, reason) in [
        (409, "Conflict"),
        (429, "TooManyRequests"),
        (500, "InternalError"),
        (503, "ServiceUnavailable"),
    ] {
        let (context, fake, _woken) = context();
        let context = Arc::new(context);
        fake.lock().unwrap().refuse = Some((DEPLOYMENT, code, reason));
        let object = guarded(service("chat"));
        let error = reconcile(Arc::clone(&object), Arc::clone(&context)).await;
        let error = error.unwrap_err();
        let first = retry(Arc::clone(&object), &error, Arc::clone(&context));
        let second = retry(Arc::clone(&object), &error, Arc::clone(&context));
        assert_eq!(first, Action::requeue(FIRST_RETRY));
        assert_eq!(second, Action::requeue(FIRST_RETRY * 2));
        // Only the wanted number of replicas was written.
        assert!(
            fake.lock().unwrap().status().get("conditions").is_none(),
            "{code}"
        );

        fake.lock().unwrap().refuse = None;
        reconcile(object, context).await.unwrap();
        assert!(fake.lock().unwrap().objects.contains_key(DEPLOYMENT));
    }
}

#[tokio::test]
async fn a_refusal_for_good_is_told_with_the_servers_words() {
    let (context, fake, _woken) = context();
    let context = Arc::new(context);
    fake.lock().unwrap().refuse = Some((DEPLOYMENT, 422, "Invalid"));
    let error = reconcile(guarded(service("chat")), context)
        .await
        .unwrap_err();
    assert!(matches!(error, ReconcileError::Apply(_)));
    let fake = fake.lock().unwrap();
    let ready = &fake.status()["conditions"][0];
    assert_eq!(ready["reason"], "ApplyFailed");
    let message = ready["message"].as_str().unwrap();
    assert!(
        message.contains("Deployment chat: as the test wants it"),
        "{message}"
    );
    assert_eq!(fake.status()["reason"], "ApplyFailed");
}

#[tokio::test]
async fn a_service_that_is_not_ours_is_left_alone() {
    let (context, fake, _woken) = context();
    let foreign = json!({"apiVersion": "v1", "kind": "Service",
        "metadata": {"name": "chat", "namespace": "ns", "resourceVersion": "5"}});
    let path = "/api/v1/namespaces/ns/services/chat";
    fake.lock()
        .unwrap()
        .objects
        .insert(path.to_owned(), foreign.clone());
    reconcile(guarded(service("chat")), Arc::new(context))
        .await
        .unwrap();
    let fake = fake.lock().unwrap();
    assert_eq!(fake.objects[path], foreign);
    assert!(
        !fake.objects.contains_key(DEPLOYMENT),
        "nothing half is built"
    );
    assert_eq!(fake.status()["reason"], "NameTaken");
    let events: Vec<_> = fake
        .writes
        .iter()
        .filter(|(_, p, _)| p.ends_with("/events"))
        .collect();
    assert_eq!(events.len(), 1);
    assert_eq!(events[0].2["reason"], "NameTaken");
    assert_eq!(events[0].2["type"], "Warning");
}

/// The whole controller: one object that can't be read, one that can, and a watch that is told that
/// its version is too old and must list again.
#[tokio::test]
async fn neither_a_bad_object_nor_a_stale_watch_stops_the_others() {
    let (client, mut server) = mock_client();
    let fake = Arc::new(Mutex::new(Fake::default()));
    let applied = Arc::clone(&fake);
    let mut bad = service("bad");
    bad["spec"]["engine"]["device"] = json!("tpu");
    let lists = Arc::new(Mutex::new(0));
    let listed = Arc::clone(&lists);
    tokio::spawn(async move {
        let mut open_watches = Vec::new();
        while let Some((request, respond)) = server.next_request().await {
            let path = request.uri().path().to_owned();
            let query = request.uri().query().unwrap_or_default().to_owned();
            let services = path.ends_with("/inferenceservices");
            let collection =
                request.method() == Method::GET && (services || query.contains("labelSelector"));
            if query.contains("watch=true") && services && *listed.lock().unwrap() < 2 {
                let gone = json!({"type": "ERROR", "object": {"kind": "Status", "apiVersion": "v1",
                    "status": "Failure", "code": 410, "reason": "Expired", "message": "too old"}});
                respond.send_response(answer(200, &gone));
            } else if query.contains("watch=true") {
                open_watches.push(respond);
            } else if collection {
                let mut items = vec![];
                if services {
                    let mut count = listed.lock().unwrap();
                    *count += 1;
                    items.push(bad.clone());
                    // The good one appears while the watch is deaf.
                    if *count >= 2 {
                        items.push(service("chat"));
                    }
                }
                let list = json!({"kind": "List", "apiVersion": "v1",
                    "metadata": {"resourceVersion": "1"}, "items": items});
                respond.send_response(answer(200, &list));
            } else {
                respond.send_response(handle(&applied, request).await);
            }
        }
    });

    let (services, writer) = reflector::store();
    let (pods, _pods_writer) = reflector::store();
    let scope = Scope {
        namespace: None,
        services,
        listed: tokio::sync::watch::channel(true).1,
        pods,
    };
    let (context, _woken) = context_of(client.clone(), Stores::new(vec![scope.clone()]));
    let watched = watcher(api::<Guarded>(&client, None), watcher::Config::default())
        .backoff(crate::stores::WatchRetry::default())
        .reflect(writer)
        .applied_objects();
    let stop = CancellationToken::new();
    let running = tokio::spawn(run(
        Arc::new(context),
        scope,
        watched,
        futures::stream::pending().boxed(),
        futures::stream::pending().boxed(),
        stop.clone(),
    ));
    let bad_status = "/apis/serving.stoker.dev/v1alpha1/namespaces/ns/inferenceservices/bad/status";
    let both = async {
        loop {
            tokio::time::sleep(Duration::from_millis(20)).await;
            let fake = fake.lock().unwrap();
            if fake.objects.contains_key(DEPLOYMENT)
                && let Some(bad) = fake.objects.get(bad_status)
            {
                assert_eq!(bad["status"]["conditions"][0]["reason"], "InvalidSpec");
                break;
            }
        }
    };
    let guard = Duration::from_secs(120);
    tokio::time::timeout(guard, both)
        .await
        .expect("a test that hangs");
    assert!(*lists.lock().unwrap() >= 2);
    stop.cancel();
    running.await.unwrap();
}
