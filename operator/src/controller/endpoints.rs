//! Where a Service leads: to the routers by a slice of ours, or to its pods by its selector.

use std::collections::HashSet;
use std::net::IpAddr;
use std::sync::Mutex;

use k8s_openapi::api::core::v1::Endpoints;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::api::{DeleteParams, ListParams};
use kube::{Api, ResourceExt};

use super::apply::{ApplyError, one};
use super::read::Observed;
use super::{Context, lock};
use crate::fence::CallError;
use crate::resources::{Owned, endpoint_slice as slices};

/// By uid: services that lead nowhere but to the routers.
pub type Led = Mutex<HashSet<String>>;

/// The routers that a service's slice should name: those that are ready. While none is, the slice
/// stays as it is, since a router that restarts comes back at the same address.
pub fn routers(context: &Context, observed: &Observed) -> Option<Vec<IpAddr>> {
    let ready = context.routing.as_ref()?.addresses();
    if !ready.is_empty() {
        return Some(ready);
    }
    let slice = observed.endpoint_slice.iter();
    let addresses = slice
        .flat_map(|slice| &slice.endpoints)
        .flat_map(|e| &e.addresses);
    Some(addresses.filter_map(|ip| ip.parse().ok()).collect())
}

/// Applies the slice that leads to the routers, and removes what leads elsewhere.
pub async fn lead(
    context: &Context,
    uid: &str,
    owned: &Owned,
    observed: &Observed,
) -> Result<(), ApplyError> {
    let Some(slice) = &owned.endpoint_slice else {
        lock(&context.led).remove(uid);
        return match &observed.endpoint_slice {
            Some(slice) => delete::<EndpointSlice>(context, slice).await,
            None => Ok(()),
        };
    };
    one(context, uid, slice, observed.endpoint_slice.as_ref()).await?;
    let spec = observed.service.as_ref().and_then(|s| s.spec.as_ref());
    let selects = spec.is_some_and(|spec| spec.selector.is_some());
    if selects {
        lock(&context.led).remove(uid);
    } else if lock(&context.led).contains(uid) {
        return Ok(());
    }
    // The Service had a selector once: what Kubernetes made of it stays when the selector goes.
    let service = &owned.service;
    let namespace = service.namespace().unwrap_or_default();
    let api: Api<EndpointSlice> = Api::namespaced(context.client.clone(), &namespace);
    let label = format!("{}={}", slices::SERVICE_NAME, service.name_any());
    let failed = |error: kube::Error| ApplyError::new("EndpointSlices of", service, error.into());
    let found = api.list(&ListParams::default().labels(&label)).await;
    let mut others = found.map_err(failed)?.items;
    others.retain(|slice| !ours(slice));
    for slice in &others {
        delete::<EndpointSlice>(context, slice).await?;
    }
    let endpoints: Api<Endpoints> = Api::namespaced(context.client.clone(), &namespace);
    let found = endpoints
        .get_opt(&service.name_any())
        .await
        .map_err(failed)?;
    if let Some(endpoints) = &found {
        delete::<Endpoints>(context, endpoints).await?;
    }
    if !selects && others.is_empty() && found.is_none() {
        lock(&context.led).insert(uid.to_owned());
    }
    Ok(())
}

fn ours(slice: &EndpointSlice) -> bool {
    let by = slice.labels().get(slices::MANAGED_BY);
    by.is_some_and(|by| by == stoker_api::names::FIELD_MANAGER)
}

async fn delete<K>(context: &Context, object: &K) -> Result<(), ApplyError>
where
    K: kube::Resource<Scope = kube::core::NamespaceResourceScope, DynamicType = ()>
        + Clone
        + std::fmt::Debug
        + serde::de::DeserializeOwned,
{
    let namespace = object.namespace().unwrap_or_default();
    let api: Api<K> = Api::namespaced(context.client.clone(), &namespace);
    match api
        .delete(&object.name_any(), &DeleteParams::default())
        .await
    {
        Ok(_) => Ok(()),
        Err(kube::Error::Api(status)) if status.code == 404 => Ok(()),
        Err(error) => Err(ApplyError::new(
            &K::kind(&()),
            object,
            CallError::from(error),
        )),
    }
}
