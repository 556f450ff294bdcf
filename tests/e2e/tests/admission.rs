//! What the API server accepts, refuses and fills in, by the CRD alone.
//!
//! All but the scale test are dry runs: nothing is created.

use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use k8s_openapi::api::autoscaling::v1::Scale;
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::{DynamicObject, Patch, PatchParams, PostParams, ValidationDirective};
use kube::core::GroupVersionKind;
use kube::{Api, Client, CustomResourceExt, discovery};
use serde_json::{Value, json};
use stoker_api::{InferenceService, InferenceServiceSpec};
use stoker_e2e::{Cluster, eventually, repository};

/// The cluster, with the CRD of this checkout, which is installed where there is none.
async fn cluster() -> Result<Cluster> {
    let cluster = Cluster::connect("default").await?;
    install_crd(&cluster).await?;
    Ok(cluster)
}

async fn install_crd(cluster: &Cluster) -> Result<()> {
    let crds: Api<CustomResourceDefinition> = Api::all(cluster.client.clone());
    let ours = stoker_api::crd();
    let crd_name = InferenceService::crd_name();
    if crds.get_opt(crd_name).await?.is_none() {
        crds.patch(
            crd_name,
            &PatchParams::apply("stoker-e2e"),
            &Patch::Apply(&ours),
        )
        .await?;
    }
    let established = eventually("the CRD is established", 30, || async {
        let crd = crds.get(crd_name).await?;
        let conditions = crd
            .status
            .iter()
            .flat_map(|s| s.conditions.iter().flatten());
        let mut established = conditions.filter(|c| c.type_ == "Established");
        Ok(established.any(|c| c.status == "True").then_some(crd))
    })
    .await?;
    // Another CRD would make these tests tell nothing about this checkout. What a replacement would
    // store is compared, for the API server writes some things in its own way.
    let mut replacement = ours;
    replacement.metadata.resource_version = established.metadata.resource_version.clone();
    let dry_run = PostParams {
        dry_run: true,
        ..PostParams::default()
    };
    let replaced = crds.replace(crd_name, &dry_run, &replacement).await?;
    ensure!(
        established.spec == replaced.spec,
        "the cluster has another version of the CRD: install this checkout's chart, \
         or `kubectl apply --server-side --force-conflicts -f crds/inferenceservices.yaml`"
    );
    Ok(())
}

/// Applies server-side as a dry run and returns what would be stored.
async fn dry_run(cluster: &Cluster, document: &Value) -> Result<Value, kube::Error> {
    let object: DynamicObject =
        serde_json::from_value(document.clone()).map_err(kube::Error::SerdeError)?;
    let name = object.metadata.name.clone().unwrap_or_default();
    let params = PatchParams {
        field_validation: Some(ValidationDirective::Strict),
        ..PatchParams::apply("stoker-e2e").dry_run().force()
    };
    let stored = api_of(&cluster.client, &cluster.namespace, &object)
        .await?
        .patch(&name, &params, &Patch::Apply(document))
        .await?;
    serde_json::to_value(stored).map_err(kube::Error::SerdeError)
}

async fn api_of(
    client: &Client,
    namespace: &str,
    object: &DynamicObject,
) -> Result<Api<DynamicObject>, kube::Error> {
    let types = object.types.clone().unwrap_or_default();
    let gvk = GroupVersionKind::try_from(&types)
        .map_err(|error| kube::Error::Service(format!("{types:?}: {error}").into()))?;
    let (resource, capabilities) = discovery::pinned_kind(client, &gvk).await?;
    Ok(match capabilities.scope {
        discovery::Scope::Cluster => Api::all_with(client.clone(), &resource),
        discovery::Scope::Namespaced => Api::namespaced_with(client.clone(), namespace, &resource),
    })
}

fn documents(text: &str) -> Result<Vec<Value>> {
    let documents: Vec<Value> = serde_saphyr::from_multiple(text).context("not YAML")?;
    Ok(documents
        .into_iter()
        .filter(|document| !document.is_null())
        .collect())
}

/// The manifests of a folder, by file name.
fn manifests(folder: &str) -> Result<Vec<(String, String)>> {
    let mut found = Vec::new();
    let folder = repository(folder);
    for entry in
        std::fs::read_dir(&folder).with_context(|| format!("reading {}", folder.display()))?
    {
        let path = entry?.path();
        if path
            .extension()
            .is_some_and(|extension| extension == "yaml")
        {
            let name = path
                .file_name()
                .map(Path::new)
                .map(|name| name.display().to_string());
            found.push((name.unwrap_or_default(), std::fs::read_to_string(&path)?));
        }
    }
    found.sort();
    Ok(found)
}

fn minimal() -> Value {
    json!({
        "apiVersion": "serving.stoker.dev/v1alpha1", "kind": "InferenceService", "metadata": {"name": "minimal"},
        "spec": {"engine": {"device": "simulated", "simulatedProfile": "t4"}},
    })
}

/// Each file's first line says, after `# expect: `, a part of the message it must be refused with.
#[tokio::test]
async fn admission_refuses_bad_manifests_and_says_what_to_change() -> Result<()> {
    let cluster = cluster().await?;
    let manifests = manifests("tests/e2e/manifests/bad")?;
    ensure!(
        manifests.len() >= 20,
        "only {} bad manifests were found",
        manifests.len()
    );
    let mut wrong = Vec::new();
    for (file, text) in &manifests {
        let expected = text
            .lines()
            .next()
            .and_then(|line| line.strip_prefix("# expect: "))
            .with_context(|| format!("{file} has no line `# expect: …` at its top"))?;
        let [document] = &documents(text)?[..] else {
            bail!("{file} must hold one object");
        };
        match dry_run(&cluster, document).await {
            Ok(_) => wrong.push(format!("{file} was accepted; expected: {expected}")),
            Err(error) if error.to_string().contains(expected) => {}
            Err(error) => wrong.push(format!("{file}: expected: {expected}\n  but got: {error}")),
        }
    }
    ensure!(
        wrong.is_empty(),
        "of {} bad manifests:\n{}",
        manifests.len(),
        wrong.join("\n")
    );
    println!(
        "{} bad manifests refused with their messages",
        manifests.len()
    );
    Ok(())
}

#[tokio::test]
async fn admission_accepts_examples() -> Result<()> {
    let cluster = cluster().await?;
    let examples = manifests("examples")?;
    ensure!(
        examples.len() >= 3,
        "only {} examples were found",
        examples.len()
    );
    for (file, text) in &examples {
        for document in documents(text)? {
            let stored = dry_run(&cluster, &document)
                .await
                .with_context(|| file.clone())?;
            if stored["kind"] == "InferenceService" {
                typed(&stored).with_context(|| file.clone())?;
            }
        }
    }
    Ok(())
}

fn typed(stored: &Value) -> Result<InferenceServiceSpec> {
    let object: InferenceService = serde_json::from_value(stored.clone())?;
    object
        .spec
        .model
        .parse_source()
        .map_err(anyhow::Error::msg)?;
    Ok(object.spec)
}

/// docs/crd-reference.md says the same: it is generated from the schema.
#[tokio::test]
async fn admission_fills_in_the_documented_defaults() -> Result<()> {
    let cluster = cluster().await?;
    let stored = dry_run(&cluster, &minimal()).await?;
    let expected = json!({
        "model": {"dtype": "auto"},
        "resources": {},
        "pod": {},
        "engine": {
            "device": "simulated", "simulatedProfile": "t4", "memoryUtilization": 0.9,
            "maxNumSeqs": {"min": 1, "initial": 8, "max": 256},
            "maxNumBatchedTokens": {"min": 64, "initial": 512, "max": 8192},
        },
        "objectives": {
            "goodPercent": 99,
            "timeToFirstToken": {"milliseconds": 2000, "freePromptTokens": 1000, "millisecondsPerPromptToken": 1},
            "interTokenLatency": {"milliseconds": 100, "of": "mean"},
        },
        "scaling": {"mode": "Auto", "minReplicas": 1, "maxReplicas": 4, "idleSeconds": 600, "scaleDownStabilizationSeconds": 75},
        "replicas": 1,
        "rollout": {"maxSurge": 0, "maxUnavailable": 1},
    });
    ensure!(stored["spec"] == expected, "stored: {:#}", stored["spec"]);

    // The types' own defaults are the schema's.
    let by_the_types: InferenceServiceSpec = serde_json::from_value(minimal()["spec"].clone())?;
    ensure!(
        typed(&stored)? == by_the_types,
        "types and schema differ: {by_the_types:#?}"
    );

    // A part that is given is filled up, and a null is as good as nothing.
    let mut partly = minimal();
    partly["spec"]["scaling"] = json!({"maxReplicas": 9, "mode": null});
    partly["spec"]["resources"] = json!({"accelerator": {}});
    let stored = dry_run(&cluster, &partly).await?;
    let scaling = json!({"mode": "Auto", "minReplicas": 1, "maxReplicas": 9, "idleSeconds": 600, "scaleDownStabilizationSeconds": 75});
    ensure!(
        stored["spec"]["scaling"] == scaling,
        "stored: {:#}",
        stored["spec"]["scaling"]
    );
    let accelerator = json!({"resource": "nvidia.com/gpu", "count": 1});
    ensure!(
        stored["spec"]["resources"]["accelerator"] == accelerator,
        "stored: {:#}",
        stored["spec"]["resources"]
    );
    Ok(())
}

/// No field is dropped on the way in, nor by the types that the operator reads it with.
#[tokio::test]
async fn admission_keeps_every_field() -> Result<()> {
    let cluster = cluster().await?;
    let text = std::fs::read_to_string(repository("tests/e2e/manifests/every-field.yaml"))?;
    let [document] = &documents(&text)?[..] else {
        bail!("every-field.yaml must hold one object");
    };
    let stored = dry_run(&cluster, document).await?;
    ensure!(
        stored["spec"] == document["spec"],
        "stored: {:#}",
        stored["spec"]
    );
    let mut back = serde_json::to_value(typed(&stored)?)?;
    // Quantities are strings in the types, whatever they were written as.
    ensure!(
        back["resources"]["requests"]["cpu"] == "2",
        "cpu came back as {}",
        back["resources"]["requests"]["cpu"]
    );
    back["resources"]["requests"]["cpu"] = json!(2);
    ensure!(back == document["spec"], "came back as: {back:#}");

    let schema = serde_json::to_value(stoker_api::crd())?;
    let properties = &schema["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]
        ["properties"];
    for (part, schema) in properties.as_object().context("the schema has no spec")? {
        let given = &document["spec"][part];
        for field in schema["properties"]
            .as_object()
            .into_iter()
            .flat_map(|fields| fields.keys())
        {
            // Says what device simulated does, which goes with no model and no GPU.
            let elsewhere = field == "simulatedProfile";
            ensure!(
                elsewhere || !given[field].is_null(),
                "every-field.yaml lacks {part}.{field}"
            );
        }
    }
    Ok(())
}

/// `kubectl scale` and an HPA come through the scale subresource, and the rules hold there too.
#[tokio::test]
async fn admission_guards_the_scale_subresource() -> Result<()> {
    let cluster = Cluster::with_namespace("scale-subresource").await?;
    install_crd(&cluster).await?;
    let service = cluster.service("minimal");
    let mut manifest = minimal();
    // Its pods fit no node, so that an operator that runs has nothing to do for it.
    manifest["spec"]["pod"] = json!({"nodeSelector": {"stoker-e2e/nowhere": "true"}});
    cluster.apply_object(&manifest).await?;

    let scale = async |replicas: i32| {
        let wanted = json!({"spec": {"replicas": replicas}});
        service
            .api()
            .patch_scale("minimal", &PatchParams::default(), &Patch::Merge(wanted))
            .await
    };
    let refused = scale(3)
        .await
        .err()
        .context("kubectl scale was accepted in mode Auto")?;
    ensure!(
        refused
            .to_string()
            .contains("set scaling.mode: Manual to change replicas by hand"),
        "it says: {refused}"
    );

    let merge = async |spec: Value| {
        let patch = json!({"spec": spec});
        service
            .api()
            .patch("minimal", &PatchParams::default(), &Patch::Merge(patch))
            .await
    };
    merge(json!({"scaling": {"mode": "Manual"}})).await?;
    let scaled: Scale = scale(3).await?;
    ensure!(
        scaled.spec.and_then(|spec| spec.replicas) == Some(3),
        "scale to 3 didn't take"
    );
    ensure!(
        service.object().await?["spec"]["replicas"] == 3,
        "spec.replicas didn't follow"
    );

    let refused = merge(json!({"scaling": {"mode": "Auto"}})).await.err();
    let refused = refused.context("mode Auto was accepted with replicas set by hand")?;
    ensure!(
        refused
            .to_string()
            .contains("leave replicas at its default of 1"),
        "it says: {refused}"
    );
    merge(json!({"scaling": {"mode": "Auto"}, "replicas": null})).await?;
    ensure!(
        service.object().await?["spec"]["replicas"] == 1,
        "a removed replicas didn't go back to its default"
    );
    cluster.remove_namespace().await
}

/// What `kubectl get infsvc` prints.
#[tokio::test]
async fn admission_offers_columns_and_names() -> Result<()> {
    let cluster = cluster().await?;
    let mut table = kube::core::Request::new(format!(
        "/apis/serving.stoker.dev/v1alpha1/namespaces/{}/inferenceservices",
        cluster.namespace
    ))
    .list(&Default::default())?;
    table.headers_mut().insert(
        "Accept",
        "application/json;as=Table;v=v1;g=meta.k8s.io".parse()?,
    );
    let table: Value = cluster.client.request(table).await?;
    let columns: Vec<(&str, i64)> = table["columnDefinitions"]
        .as_array()
        .into_iter()
        .flatten()
        .map(|column| {
            (
                column["name"].as_str().unwrap_or_default(),
                column["priority"].as_i64().unwrap_or_default(),
            )
        })
        .collect();
    let narrow: Vec<&str> = columns
        .iter()
        .filter(|(_, priority)| *priority == 0)
        .map(|(name, _)| *name)
        .collect();
    ensure!(
        narrow
            == [
                "Name", "Ready", "Replicas", "Cap", "Budget", "Tok/s", "Good", "Reason", "Age"
            ],
        "the columns are {columns:?}"
    );

    let group = discovery::pinned_group(
        &cluster.client,
        &kube::core::GroupVersion::gv("serving.stoker.dev", "v1alpha1"),
    )
    .await?;
    let (_, capabilities) = group
        .recommended_kind("InferenceService")
        .context("the kind isn't served")?;
    let subresources: Vec<&str> = capabilities
        .subresources
        .iter()
        .map(|(resource, _)| resource.plural.as_str())
        .collect();
    ensure!(
        ["status", "scale"]
            .iter()
            .all(|wanted| subresources.contains(wanted)),
        "the subresources are {subresources:?}"
    );
    Ok(())
}
