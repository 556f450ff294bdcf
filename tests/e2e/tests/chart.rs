//! The Helm chart: what it renders, what it refuses, and its life on a cluster.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::process::{Command, Output};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::{DynamicObject, Patch, PatchParams, ValidationDirective};
use kube::core::GroupVersionKind;
use kube::{Api, CustomResourceExt, ResourceExt, discovery};
use serde_json::{Value, json};
use stoker_api::InferenceService;
use stoker_e2e::{Cluster, Service, eventually, repository, router};

/// Where `make test` and `make demo` install it.
const RELEASE: &str = "stoker";
const NAMESPACE: &str = "stoker-system";

fn helm(arguments: &[&str]) -> Result<Output> {
    let ours: PathBuf = repository("target/cluster/bin/helm");
    let program = if ours.exists() { ours } else { "helm".into() };
    Command::new(&program)
        .args(arguments)
        .current_dir(repository("."))
        .output()
        .with_context(|| {
            format!(
                "{} can't be run: `make cluster-build` builds it",
                program.display()
            )
        })
}

/// Runs helm, which must succeed, and returns what it printed.
fn helm_ok(arguments: &[&str]) -> Result<String> {
    let output = helm(arguments)?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.success(),
        "helm {} failed: {text}{errors}",
        arguments.join(" ")
    );
    Ok(text)
}

fn render(values: &[&str]) -> Result<Vec<Value>> {
    let mut arguments = vec![
        "template",
        RELEASE,
        "charts/stoker",
        "--namespace",
        NAMESPACE,
    ];
    arguments.extend(values.iter().flat_map(|value| ["--set", value]));
    let documents: Vec<Value> = serde_saphyr::from_multiple(&helm_ok(&arguments)?)?;
    Ok(documents
        .into_iter()
        .filter(|document| !document.is_null())
        .collect())
}

fn of_kind<'a>(documents: &'a [Value], kind: &str) -> Vec<&'a Value> {
    documents
        .iter()
        .filter(|document| document["kind"] == kind)
        .collect()
}

#[test]
fn chart_lints_clean() -> Result<()> {
    let text = helm_ok(&["lint", "--strict", "charts/stoker"])?;
    ensure!(
        !text.contains("[WARNING]") && !text.contains("[INFO]"),
        "helm lint says: {text}"
    );
    Ok(())
}

#[test]
fn chart_refuses_bad_values() -> Result<()> {
    let bad = [
        ("replicas=-1", "replicas"),
        ("replicas=two", "replicas"),
        ("replica=2", "replica"),
        ("image.pullPolicy=Sometimes", "pullPolicy"),
        ("image.server=", "server"),
        ("image.tag=a b", "tag"),
        ("image.pullSecrets={registry}", "pullSecrets"),
        ("watchNamespaces={Team_A}", "watchNamespaces"),
        ("resources.requests.memory=lots", "memory"),
        ("resources.claims.gpu=1", "claims"),
        ("nodeSelector.gpu=1", "nodeSelector"),
        ("crds.install=maybe", "install"),
        ("hub.endpoint=hub.example", "endpoint"),
        ("modelCache.hostPath=var/cache", "hostPath"),
        ("serviceMonitor.interval=often", "interval"),
        ("dashboard.enabled=1", "enabled"),
    ];
    for (value, named) in bad {
        let output = helm(&["template", RELEASE, "charts/stoker", "--set", value])?;
        let errors = String::from_utf8_lossy(&output.stderr);
        ensure!(!output.status.success(), "--set {value} was accepted");
        ensure!(
            errors.contains("schema") && errors.contains(named),
            "--set {value} was refused by: {errors}"
        );
    }
    Ok(())
}

/// Roles name what they allow, and the key is out of reach in other namespaces.
#[test]
fn chart_asks_for_few_rights() -> Result<()> {
    let documents = render(&[])?;
    for role in of_kind(&documents, "ClusterRole")
        .into_iter()
        .chain(of_kind(&documents, "Role"))
    {
        for rule in role["rules"].as_array().context("a role without rules")? {
            ensure!(!rule.to_string().contains('*'), "a wildcard: {rule}");
            let secrets = rule["resources"].to_string().contains("secrets");
            ensure!(
                !secrets || role["kind"] == "Role",
                "secrets of the whole cluster: {rule}"
            );
            let reads = rule["verbs"].to_string().contains("get");
            ensure!(
                !secrets || !reads || rule["resourceNames"] == json!(["stoker-control-key"]),
                "all secrets: {rule}"
            );
        }
    }
    let mut programs = of_kind(&documents, "Deployment");
    programs.extend(of_kind(&documents, "Job"));
    ensure!(
        programs.len() == 3,
        "operator, router and release: {}",
        programs.len()
    );
    for program in programs {
        let pod = &program["spec"]["template"]["spec"];
        let security = &pod["securityContext"];
        ensure!(
            security["runAsNonRoot"] == true
                && security["seccompProfile"]["type"] == "RuntimeDefault",
            "{security}"
        );
        let security = &pod["containers"][0]["securityContext"];
        ensure!(
            security["readOnlyRootFilesystem"] == true
                && security["allowPrivilegeEscalation"] == false
                && security["capabilities"] == json!({"drop": ["ALL"]}),
            "{security}"
        );
    }
    // API keys of services are out of reach unless they are asked for.
    let with_keys = render(&["router.apiKeys=true"])?;
    let reads_secrets = |documents: &[Value]| {
        let roles = of_kind(documents, "ClusterRole");
        roles
            .iter()
            .any(|role| role["rules"].to_string().contains("secrets"))
    };
    ensure!(!reads_secrets(&documents) && reads_secrets(&with_keys));

    // With a list of namespaces it gets nothing beyond them.
    let documents = render(&["watchNamespaces={team-a,team-b}"])?;
    ensure!(
        of_kind(&documents, "ClusterRole").is_empty(),
        "a ClusterRole in spite of watchNamespaces"
    );
    let namespaces: BTreeSet<&str> = of_kind(&documents, "Role")
        .iter()
        .filter_map(|role| role["metadata"]["namespace"].as_str())
        .collect();
    ensure!(
        namespaces == BTreeSet::from(["team-a", "team-b", NAMESPACE]),
        "Roles are in {namespaces:?}"
    );
    Ok(())
}

#[test]
fn chart_names_images_as_told() -> Result<()> {
    let images = |values: &[&str]| -> Result<(String, String)> {
        let documents = render(values)?;
        let deployments = of_kind(&documents, "Deployment");
        let mut deployments = deployments.into_iter().filter(|deployment| {
            deployment["metadata"]["labels"]["app.kubernetes.io/name"] == "stoker-operator"
        });
        let deployment = deployments.next().cloned().context("no operator")?;
        let container = &deployment["spec"]["template"]["spec"]["containers"][0];
        let server = container["args"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(Value::as_str);
        let server = server
            .filter_map(|flag| flag.strip_prefix("--server-image="))
            .collect();
        Ok((
            container["image"].as_str().unwrap_or_default().to_owned(),
            server,
        ))
    };
    let version = env!("CARGO_PKG_VERSION");
    let default = (
        format!("stoker/operator:{version}"),
        format!("stoker/server:{version}"),
    );
    ensure!(images(&[])? == default, "by default: {:?}", images(&[])?);
    let mirror = images(&[
        "image.registry=registry.example.com/mirror/",
        "image.tag=1.2.3",
    ])?;
    let expected = (
        "registry.example.com/mirror/stoker/operator:1.2.3",
        "registry.example.com/mirror/stoker/server:1.2.3",
    );
    ensure!(
        (mirror.0.as_str(), mirror.1.as_str()) == expected,
        "with a mirror: {mirror:?}"
    );
    Ok(())
}

/// Every object that the chart can render is one that the API server takes, field by field.
#[tokio::test]
async fn chart_renders_valid_objects() -> Result<()> {
    // Objects are checked in a namespace that surely is there.
    let cluster = Cluster::connect("default").await?;
    let mut checked = 0;
    for values in [
        &[
            "dashboard.enabled=true",
            "serviceAccount.annotations.example\\.com/role=a",
            "podLabels.team=red",
        ][..],
        &[
            "watchNamespaces={default}",
            "priorityClassName=system-cluster-critical",
            "image.pullSecrets[0].name=r",
        ],
    ] {
        for mut document in render(values)? {
            let what = format!("{} {}", document["kind"], document["metadata"]["name"]);
            if !document["metadata"]["namespace"].is_null() {
                document["metadata"]["namespace"] = json!(cluster.namespace);
            }
            let object: DynamicObject = serde_json::from_value(document.clone())?;
            let types = object
                .types
                .clone()
                .with_context(|| format!("{what} has no kind"))?;
            let (resource, capabilities) =
                discovery::pinned_kind(&cluster.client, &GroupVersionKind::try_from(&types)?)
                    .await?;
            let api: Api<DynamicObject> = match capabilities.scope {
                discovery::Scope::Cluster => Api::all_with(cluster.client.clone(), &resource),
                discovery::Scope::Namespaced => {
                    Api::namespaced_with(cluster.client.clone(), &cluster.namespace, &resource)
                }
            };
            let params = PatchParams {
                field_validation: Some(ValidationDirective::Strict),
                ..PatchParams::apply("stoker-e2e").dry_run().force()
            };
            api.patch(&object.name_any(), &params, &Patch::Apply(&document))
                .await
                .context(what)?;
            checked += 1;
        }
    }
    ensure!(checked > 12, "only {checked} objects were rendered");
    Ok(())
}

/// Sends a request every 200 ms until it is told to stop, and counts.
struct Client {
    stop: Arc<AtomicBool>,
    sent: Arc<AtomicU64>,
    task: tokio::task::JoinHandle<Vec<String>>,
}

impl Client {
    fn start(url: String, model: String) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let sent = Arc::new(AtomicU64::new(0));
        let (stopped, counter) = (stop.clone(), sent.clone());
        let task = tokio::spawn(async move {
            let client = reqwest::Client::new();
            let body = json!({"model": model, "prompt": "Once upon a time", "max_tokens": 4});
            let mut failures = Vec::new();
            while !stopped.load(Ordering::Relaxed) {
                let request = client
                    .post(format!("{url}/v1/completions"))
                    .json(&body)
                    .timeout(Duration::from_secs(30));
                match request
                    .send()
                    .await
                    .and_then(|answer| answer.error_for_status())
                {
                    Ok(_) => {}
                    Err(error) => failures.push(error.to_string()),
                }
                counter.fetch_add(1, Ordering::Relaxed);
                tokio::time::sleep(Duration::from_millis(200)).await;
            }
            failures
        });
        Self { stop, sent, task }
    }

    async fn finish(self) -> Result<(u64, Vec<String>)> {
        self.stop.store(true, Ordering::Relaxed);
        let failures = self.task.await?;
        Ok((self.sent.load(Ordering::Relaxed), failures))
    }
}

async fn pod_uids(service: &Service) -> Result<Vec<String>> {
    Ok(service
        .pods()
        .await?
        .iter()
        .filter_map(ResourceExt::uid)
        .collect())
}

/// Changes the spec and waits until the operator has seen it.
async fn operator_follows(service: &Service, good_percent: i32) -> Result<()> {
    let patch = json!({"spec": {"objectives": {"goodPercent": good_percent}}});
    let changed = service
        .api()
        .patch(&service.name, &PatchParams::default(), &Patch::Merge(patch))
        .await?;
    let generation = changed.metadata.generation;
    eventually("the operator has seen the change", 90, || async {
        Ok((service.status().await?["observedGeneration"].as_i64() == generation).then_some(()))
    })
    .await
}

/// Every series that the dashboard asks for is one that a replica exposes after a request.
async fn dashboard_shows_what_there_is(service: &Service) -> Result<()> {
    let dashboard = std::fs::read_to_string(repository("charts/stoker/dashboards/stoker.json"))?;
    let is_of_name = |c: char| c.is_ascii_alphanumeric() || matches!(c, ':' | '_');
    let wanted: BTreeSet<&str> = dashboard
        .split(|c| !is_of_name(c))
        .filter(|word| word.starts_with("vllm:") || word.starts_with("stoker:"))
        .collect();
    ensure!(wanted.len() > 12, "the dashboard asks for {wanted:?} only");
    let pod = service.pods().await?.pop().context("no pod")?;
    eventually("all series of the dashboard are there", 30, || async {
        let text = router::metrics(&pod, 8000).await?;
        let exposed = |name: &&&str| {
            text.lines()
                .any(|line| line.split(['{', ' ']).next() == Some(**name))
        };
        let missing: Vec<_> = wanted.iter().filter(|name| !exposed(name)).collect();
        ensure!(missing.is_empty(), "a replica exposes no {missing:?}");
        Ok(Some(()))
    })
    .await
}

/// Installed, upgraded, uninstalled and installed again, all under load: no request fails, no pod is
/// replaced, no InferenceService is lost.
#[tokio::test]
async fn chart_lives_and_leaves_services_alone() -> Result<()> {
    let cluster = Cluster::with_namespace("chart").await?;
    let install = |values: &[&str]| -> Result<String> {
        let mut arguments = vec![
            "upgrade",
            "--install",
            RELEASE,
            "charts/stoker",
            "--namespace",
            NAMESPACE,
        ];
        arguments.extend(["--create-namespace", "--wait", "--timeout", "3m"]);
        arguments.extend(values.iter().flat_map(|value| ["--set", value]));
        helm_ok(&arguments)
    };
    let notes = install(&[])?;
    ensure!(
        notes.contains("kubectl get infsvc"),
        "the notes don't say what to do next: {notes}"
    );

    cluster
        .apply_object(&json!({
            "apiVersion": "serving.stoker.dev/v1alpha1", "kind": "InferenceService", "metadata": {"name": "stays"},
            "spec": {"engine": {"device": "simulated", "simulatedProfile": "t4"},
                     "resources": {"requests": {"cpu": "20m", "memory": "64Mi"}}},
        }))
        .await?;
    let service = cluster.service("stays");
    service.wait_for("Ready", "True", None, 120).await?;
    let pods = pod_uids(&service).await?;
    ensure!(!pods.is_empty(), "a ready service has no pod");
    let client = Client::start(service.url().await?, "stays".to_owned());

    dashboard_shows_what_there_is(&service).await?;

    install(&["resources.requests.cpu=60m"])?;
    operator_follows(&service, 98).await?;

    helm_ok(&[
        "uninstall",
        RELEASE,
        "--namespace",
        NAMESPACE,
        "--wait",
        "--timeout",
        "2m",
    ])?;
    let crds: Api<CustomResourceDefinition> = Api::all(cluster.client.clone());
    crds.get(InferenceService::crd_name())
        .await
        .context("the CRD went with the release")?;
    service
        .object()
        .await
        .context("the InferenceService went with the release")?;
    tokio::time::sleep(Duration::from_secs(3)).await;
    ensure!(
        pod_uids(&service).await? == pods,
        "pods changed while no operator ran"
    );

    install(&[])?;
    operator_follows(&service, 97).await?;
    service.wait_for("Ready", "True", None, 60).await?;

    let (sent, failures) = client.finish().await?;
    ensure!(
        failures.is_empty(),
        "of {sent} requests {} failed, the first with: {}",
        failures.len(),
        failures[0]
    );
    ensure!(sent > 10, "only {sent} requests were sent");
    ensure!(pod_uids(&service).await? == pods, "pods were replaced");
    println!("{sent} requests through install, upgrade, uninstall and reinstall, none failed");
    cluster.remove_namespace().await
}
