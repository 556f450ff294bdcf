use k8s_openapi::api::core::v1::{Service, ServicePort, ServiceSpec};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use stoker_api::names;

use super::Blueprint;

/// What clients talk to. The control port is not part of it. Behind the router it selects nothing:
/// its EndpointSlice says where it leads.
pub fn build(blueprint: &Blueprint<'_>) -> Service {
    Service {
        metadata: blueprint.meta(blueprint.name),
        spec: Some(ServiceSpec {
            selector: match blueprint.routers {
                Some(_) => None,
                None => blueprint.selector().match_labels,
            },
            ports: Some(vec![ServicePort {
                name: Some(names::HTTP_PORT_NAME.to_owned()),
                port: names::SERVICE_PORT,
                protocol: Some("TCP".to_owned()),
                target_port: Some(IntOrString::String(names::HTTP_PORT_NAME.to_owned())),
                ..ServicePort::default()
            }]),
            ..ServiceSpec::default()
        }),
        ..Service::default()
    }
}
