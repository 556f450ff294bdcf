use std::net::IpAddr;

use k8s_openapi::api::discovery::v1::{Endpoint, EndpointConditions, EndpointPort, EndpointSlice};
use stoker_api::names;

use super::Blueprint;

/// Says which Service a slice belongs to, and who looks after it.
pub const SERVICE_NAME: &str = "kubernetes.io/service-name";
pub const MANAGED_BY: &str = "endpointslice.kubernetes.io/managed-by";

/// The routers that are ready, as the endpoints of the Service. A slice holds addresses of one
/// family: that of the first router.
pub fn build(blueprint: &Blueprint<'_>) -> Option<EndpointSlice> {
    let routers = blueprint.routers.as_ref()?;
    let v6 = routers.first().is_some_and(IpAddr::is_ipv6);
    let endpoint = |ip: &IpAddr| Endpoint {
        addresses: vec![ip.to_string()],
        conditions: Some(EndpointConditions {
            ready: Some(true),
            ..EndpointConditions::default()
        }),
        ..Endpoint::default()
    };
    let mut metadata = blueprint.meta(&names::router_endpoint_slice(blueprint.name));
    let labels = metadata.labels.get_or_insert_default();
    labels.insert(SERVICE_NAME.to_owned(), blueprint.name.to_owned());
    labels.insert(MANAGED_BY.to_owned(), names::FIELD_MANAGER.to_owned());
    Some(EndpointSlice {
        metadata,
        address_type: if v6 { "IPv6" } else { "IPv4" }.to_owned(),
        endpoints: routers
            .iter()
            .filter(|ip| ip.is_ipv6() == v6)
            .map(endpoint)
            .collect(),
        ports: Some(vec![EndpointPort {
            name: Some(names::HTTP_PORT_NAME.to_owned()),
            port: Some(names::HTTP_PORT),
            protocol: Some("TCP".to_owned()),
            ..EndpointPort::default()
        }]),
    })
}
