//! Names that the pieces of one service go by, and that pods and operator agree on.

/// Field manager of everything that the operator applies.
pub const FIELD_MANAGER: &str = "stoker-operator";

/// Field manager of the ConfigMaps that keep what scaling has learnt.
pub const MEMORY_FIELD_MANAGER: &str = "stoker-operator-memory";

/// Prefix of the labels and annotations that belong to Stoker.
pub const DOMAIN_PREFIX: &str = "serving.stoker.dev/";
/// Label on every owned object and pod; its value is the InferenceService's name.
pub const SERVICE_LABEL: &str = "serving.stoker.dev/service";

/// Tells what part of a service an owned object is, where its kind doesn't.
pub const COMPONENT_LABEL: &str = "app.kubernetes.io/component";
/// Value of [`COMPONENT_LABEL`] on ConfigMaps that keep what scaling has learnt.
pub const MEMORY_COMPONENT: &str = "scaling-memory";

/// The container that runs `stoker-server`.
pub const SERVER_CONTAINER: &str = "server";
/// Exit code of a server that can't use the GPU or its driver.
pub const DEVICE_EXIT_CODE: i32 = 3;
pub const HTTP_PORT_NAME: &str = "http";
pub const HTTP_PORT: i32 = 8000;
pub const CONTROL_PORT_NAME: &str = "control";
pub const CONTROL_PORT: i32 = 8001;
/// Port of the Service that clients talk to; it leads to [`HTTP_PORT`].
pub const SERVICE_PORT: i32 = 80;

/// Volume names with this prefix belong to Stoker; the CRD refuses them in `spec.pod.volumes`.
pub const VOLUME_PREFIX: &str = "stoker-";
/// The ConfigMap with the public half of the operator's key.
pub const CONTROL_VOLUME: &str = "stoker-control";
/// The claim of a `pvc://` source.
pub const MODEL_VOLUME: &str = "stoker-model";
/// Where [`CONTROL_VOLUME`] is mounted; the CRD refuses other mounts at or under /etc/stoker.
pub const CONTROL_MOUNT_PATH: &str = "/etc/stoker/control";
/// Where [`MODEL_VOLUME`] is mounted; the CRD refuses other mounts at or under /var/lib/stoker.
pub const MODEL_MOUNT_PATH: &str = "/var/lib/stoker/model";

/// Downloaded models: a directory of the node that its pods share, or the pod's own.
pub const CACHE_VOLUME: &str = "stoker-cache";
/// Where [`CACHE_VOLUME`] is mounted.
pub const CACHE_MOUNT_PATH: &str = "/var/lib/stoker/cache";
/// The container that makes a node's directory writable for the server.
pub const CACHE_CONTAINER: &str = "model-cache";

/// Secret in the operator's namespace that holds the key pair which signs control tokens.
pub const CONTROL_KEY_SECRET: &str = "stoker-control-key";
pub const PRIVATE_KEY: &str = "private.pem";
pub const PUBLIC_KEY: &str = "public.pem";
/// Port of a router that the operator talks to.
pub const ROUTER_CONTROL_PORT: i32 = 9001;
/// Lease that the leading operator holds.
pub const LEASE: &str = "stoker-operator";

/// Longest name of an InferenceService: a pod's name adds a hash and a suffix to it and should
/// stay within the 63 characters of a host name.
pub const MAX_NAME_LENGTH: usize = 45;

/// Name of the ConfigMap that carries the operator's public key to a service's pods.
pub fn control_config_map(service: &str) -> String {
    format!("{service}-control")
}

/// Name of the ConfigMap that keeps what scaling has learnt about a service.
pub fn memory_config_map(service: &str) -> String {
    format!("{service}-memory")
}

/// Name of the EndpointSlice that leads a Service to the routers.
pub fn router_endpoint_slice(service: &str) -> String {
    format!("{service}-router")
}
