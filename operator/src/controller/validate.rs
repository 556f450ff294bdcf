//! Step 2: what the CRD's rules can't check: whose the names are that the service needs, and
//! whether there is a hub.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::{Resource, ResourceExt};
use stoker_api::conditions::reasons;
use stoker_api::{InferenceService, ModelSource, ScalingMode, names};

use super::read::Observed;
use crate::resources::{HUB_ENDPOINT_ENV, MANAGED_BY, Settings};

/// Why nothing is applied, for the conditions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    pub reason: &'static str,
    pub message: String,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// Passes by itself.
    NotYet(String),
    Problem(Problem),
}

pub fn validate(
    service: &InferenceService,
    observed: &Observed,
    settings: &Settings,
    routed: bool,
) -> Result<Option<ModelSource>, Refusal> {
    if !routed {
        needs_no_router(service)?;
    }
    check(service, observed.service_account.as_ref())?;
    check(service, observed.config_map.as_ref())?;
    check(service, observed.service.as_ref())?;
    check(service, observed.endpoint_slice.as_ref())?;
    check(service, observed.disruption_budget.as_ref())?;
    check(service, observed.deployment.as_ref())?;
    let source = service.spec.model.parse_source().map_err(|message| {
        Refusal::Problem(Problem {
            reason: reasons::INVALID_SPEC,
            message,
        })
    })?;
    let mut env = service.spec.pod.env.iter();
    if let Some(ModelSource::Hub { reference }) = &source
        && settings.hub_endpoint.is_none()
        && !env.any(|variable| variable.name == HUB_ENDPOINT_ENV)
    {
        return Err(Refusal::Problem(Problem {
            reason: reasons::HUB_NOT_CONFIGURED,
            message: format!(
                "model.source {reference} needs a hub, and the operator knows none: set the \
                 chart's value hub.endpoint to the hub's URL, or {HUB_ENDPOINT_ENV} in \
                 spec.pod.env"
            ),
        }));
    }
    Ok(source)
}

/// What only the router can do must not be promised without one.
fn needs_no_router(service: &InferenceService) -> Result<(), Refusal> {
    let scaling = &service.spec.scaling;
    let field = if service.spec.access.is_some() {
        "access"
    } else if scaling.mode == ScalingMode::Auto && scaling.min_replicas == 0 {
        "scaling.minReplicas 0"
    } else {
        return Ok(());
    };
    Err(Refusal::Problem(Problem {
        reason: reasons::INVALID_SPEC,
        message: format!(
            "{field} needs the router, which this installation runs without: install the chart with \
             router.enabled=true, or leave it out"
        ),
    }))
}

/// An object of a name that we need must be ours, or one of ours that lost its owner.
fn check<K: Resource<DynamicType = ()>>(
    service: &InferenceService,
    existing: Option<&K>,
) -> Result<(), Refusal> {
    let Some(existing) = existing else {
        return Ok(());
    };
    let (kind, name) = (K::kind(&()), existing.name_any());
    let controller = existing.owner_references().iter();
    let belongs_to = match controller.clone().find(|o| o.controller == Some(true)) {
        Some(owner) if Some(&owner.uid) == service.uid().as_ref() => return Ok(()),
        Some(owner)
            if owner.kind == InferenceService::kind(&()) && owner.name == service.name_any() =>
        {
            return Err(Refusal::NotYet(format!(
                "{kind} {name} still belongs to a deleted InferenceService of the same name and will \
                 be collected"
            )));
        }
        Some(owner) => format!("belongs to {} {}", owner.kind, owner.name),
        None if was_ours(existing.meta(), &service.name_any()) => return Ok(()),
        None => "was made by someone else".to_owned(),
    };
    Err(Refusal::Problem(Problem {
        reason: reasons::NAME_TAKEN,
        message: format!(
            "{kind} {name} exists already and {belongs_to}: delete it, or give the InferenceService \
             another name"
        ),
    }))
}

/// Left over from a deletion with --cascade=orphan.
fn was_ours(meta: &ObjectMeta, name: &str) -> bool {
    let label = |key: &str| meta.labels.as_ref().and_then(|labels| labels.get(key));
    label(MANAGED_BY).is_some_and(|by| by == names::FIELD_MANAGER)
        && label(names::SERVICE_LABEL).is_some_and(|service| service == name)
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1::Service;
    use serde_json::{Value, json};

    use super::*;
    use crate::resources::tests::settings;

    fn refusal(metadata: Value) -> Result<(), Refusal> {
        let service: InferenceService = serde_json::from_value(json!({
            "metadata": {"name": "chat", "namespace": "ns", "uid": "u"},
            "spec": {"engine": {"device": "cpu"}},
        }))
        .unwrap();
        let existing: Service = serde_json::from_value(json!({"metadata": metadata})).unwrap();
        let observed = Observed {
            service: Some(existing),
            ..Observed::default()
        };
        validate(&service, &observed, &settings(), false).map(|_| ())
    }

    #[test]
    fn a_model_of_a_hub_needs_a_hub() {
        let service = |env: Value| -> InferenceService {
            serde_json::from_value(json!({
                "metadata": {"name": "chat", "namespace": "ns", "uid": "u"},
                "spec": {"model": {"source": "hf://org/name"}, "engine": {"device": "cpu"},
                    "pod": {"env": env}},
            }))
            .unwrap()
        };
        let validate = |service: &InferenceService, settings: &Settings| {
            validate(service, &Observed::default(), settings, false)
        };
        let Err(Refusal::Problem(problem)) = validate(&service(json!([])), &settings()) else {
            panic!("accepted without a hub");
        };
        assert_eq!(problem.reason, "HubNotConfigured");
        assert!(
            problem.message.contains("hub.endpoint"),
            "{}",
            problem.message
        );
        let own = json!([{"name": "HF_ENDPOINT", "value": "https://hub.example"}]);
        assert!(validate(&service(own), &settings()).is_ok());
        let with_hub = Settings {
            hub_endpoint: Some("https://hub.example".to_owned()),
            ..settings()
        };
        assert!(validate(&service(json!([])), &with_hub).is_ok());
    }

    fn owner(kind: &str, name: &str, uid: &str) -> Value {
        json!({"name": "chat", "ownerReferences": [
            {"apiVersion": "v1", "kind": kind, "name": name, "uid": uid, "controller": true}]})
    }

    #[test]
    fn only_our_own_or_an_orphan_of_ours_is_touched() {
        assert_eq!(refusal(owner("InferenceService", "chat", "u")), Ok(()));
        let orphan = json!({"name": "chat", "labels": {
            "app.kubernetes.io/managed-by": "stoker-operator", "serving.stoker.dev/service": "chat"}});
        assert_eq!(refusal(orphan), Ok(()));
        let old = refusal(owner("InferenceService", "chat", "older"));
        assert!(matches!(old, Err(Refusal::NotYet(_))));
        for taken in [json!({"name": "chat"}), owner("Gateway", "g", "x")] {
            let Err(Refusal::Problem(problem)) = refusal(taken) else {
                panic!("taken over");
            };
            assert_eq!(problem.reason, "NameTaken");
            assert!(
                problem.message.contains("Service chat exists"),
                "{}",
                problem.message
            );
        }
    }
}
