//! What a person asks for: the root object, the model and what its pods may use.

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::access::Access;
use crate::embed;
use crate::engine::Engine;
use crate::pod::PodSettings;
use crate::scaling::{Objectives, Rollout, Scaling};
use crate::status::InferenceServiceStatus;

/// Wanted state of the service.
#[derive(CustomResource, KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[kube(
    group = "serving.stoker.dev",
    version = "v1alpha1",
    kind = "InferenceService",
    plural = "inferenceservices",
    shortname = "infsvc",
    category = "all",
    namespaced,
    derive = "PartialEq",
    status = "InferenceServiceStatus",
    doc = "A language model served as an OpenAI-style HTTP API by replicas whose number and dials follow the load, within stated objectives.",
    scale(
        spec_replicas_path = ".spec.replicas",
        status_replicas_path = ".status.replicas",
        label_selector_path = ".status.selector"
    ),
    printcolumn(
        name = "Ready",
        type_ = "string",
        json_path = ".status.conditions[?(@.type==\"Ready\")].status",
        description = "Whether the service answers requests."
    ),
    printcolumn(
        name = "Replicas",
        type_ = "integer",
        json_path = ".status.readyReplicas",
        description = "Replicas that answer requests."
    ),
    printcolumn(
        name = "Cap",
        type_ = "integer",
        json_path = ".status.dials.maxNumSeqs",
        description = "Sequences that one replica runs at once (max_num_seqs)."
    ),
    printcolumn(
        name = "Budget",
        type_ = "integer",
        json_path = ".status.dials.maxNumBatchedTokens",
        description = "Tokens that one step of a replica may compute (max_num_batched_tokens)."
    ),
    printcolumn(
        name = "Tok/s",
        type_ = "integer",
        json_path = ".status.load.tokensPerSecond",
        description = "Tokens generated a second, all replicas together."
    ),
    printcolumn(
        name = "Good",
        type_ = "integer",
        json_path = ".status.load.goodPercent",
        description = "Percent of requests that met all objectives."
    ),
    printcolumn(
        name = "Reason",
        type_ = "string",
        json_path = ".status.reason",
        description = "Why replicas and dials are as they are."
    ),
    printcolumn(
        name = "Age",
        type_ = "date",
        json_path = ".metadata.creationTimestamp"
    ),
    printcolumn(
        name = "Desired",
        type_ = "integer",
        json_path = ".status.desiredReplicas",
        description = "Replicas that are wanted.",
        priority = 1
    ),
    printcolumn(
        name = "Model",
        type_ = "string",
        json_path = ".spec.model.source",
        description = "Where the weights come from.",
        priority = 1
    ),
    printcolumn(
        name = "Endpoint",
        type_ = "string",
        json_path = ".status.endpoint",
        description = "Base URL inside the cluster.",
        priority = 1
    ),
    validation = Rule::new("self.metadata.name.size() <= 45 && self.metadata.name.matches('^[a-z]([-a-z0-9]*[a-z0-9])?$')")
        .message("metadata.name also names a Service and pods: use at most 45 lower-case letters, digits and '-', starting with a letter"),
)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("self.engine.device != 'cuda' || has(self.resources.accelerator)")
        .message("engine.device cuda needs resources.accelerator, such as {resource: nvidia.com/gpu, count: 1}; without a GPU set engine.device: cpu")
        .field_path(".engine.device"),
    validation = Rule::new("self.engine.device != 'cpu' || !has(self.resources.accelerator)")
        .message("engine.device cpu would leave the GPU of resources.accelerator idle: remove resources.accelerator, or set engine.device: cuda")
        .field_path(".engine.device"),
    validation = Rule::new("self.engine.device == 'simulated' || has(self.model.source)")
        .message("model.source is required: set it to hf://<org>/<name>, pvc://<claim>/<path> or another source, or set engine.device: simulated to run without a model")
        .field_path(".model"),
    validation = Rule::new("self.engine.device != 'simulated' || !has(self.model.source)")
        .message("engine.device simulated reads no model: remove model.source, or set engine.device to cpu or cuda")
        .field_path(".model"),
    validation = Rule::new("!(self.model.dtype in ['int8', 'int4']) || self.engine.device == 'cuda'")
        .message("model.dtype int8 and int4 are made on a GPU: set engine.device: cuda, or model.dtype: auto")
        .field_path(".model.dtype"),
    validation = Rule::new("self.scaling.mode != 'Auto' || self.replicas == 1")
        .message("scaling.mode Auto decides about replicas itself, between scaling.minReplicas and scaling.maxReplicas: set scaling.mode: Manual to change replicas by hand, or leave replicas at its default of 1")
        .field_path(".replicas"),
)]
pub struct InferenceServiceSpec {
    /// The model to serve.
    #[serde(default)]
    pub model: Model,

    /// What each replica asks the scheduler for.
    #[serde(default)]
    pub resources: Resources,

    /// Settings of the pods. What Stoker needs itself (ports, probes, security) is not among them.
    #[serde(default)]
    pub pod: PodSettings,

    /// How the engine runs, and how far its dials may move.
    pub engine: Engine,

    /// What a request may expect; dials and replicas are set so that these hold.
    #[serde(default)]
    pub objectives: Objectives,

    /// How the number of replicas is decided.
    #[serde(default)]
    pub scaling: Scaling,

    /// Who may use the service; left out, everyone who reaches it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub access: Option<Access>,

    /// Replicas in scaling.mode Manual; `kubectl scale` sets it. In mode Auto it stays at 1 and isn't read.
    #[serde(default = "one")]
    #[schemars(range(min = 0, max = 1000))]
    pub replicas: i32,

    /// How pods are replaced when their template changes.
    #[serde(default)]
    pub rollout: Rollout,
}

/// The model to serve.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("!has(self.source) || self.source.matches('^(pvc://[a-z0-9]([-a-z0-9.]*[a-z0-9])?|file://)/[A-Za-z0-9._/@+=:-]+$') || self.source.matches('^hf://[A-Za-z0-9_-][A-Za-z0-9._-]*/[A-Za-z0-9_-][A-Za-z0-9._-]*(/[A-Za-z0-9._/-]+[.]gguf)?(@[A-Za-z0-9_-][A-Za-z0-9._/-]*)?$') || self.source.matches('^https://[A-Za-z0-9.-]+(:[0-9]+)?/[A-Za-z0-9._/@+=:~%-]+[.]gguf$')")
        .message("model.source must be pvc://<claim>/<path>, file:///<absolute path>, hf://<org>/<name>[/<file>.gguf][@<revision>] or https://<host>/<path>.gguf, with letters, digits and ._/@+=:- in the path; oci:// is not supported in this version")
        .field_path(".source"),
    validation = Rule::new("!has(self.source) || !self.source.matches('/[.][.]?(/|$)')")
        .message("model.source must not hold . or .. as a part of its path: write the path out")
        .field_path(".source"),
    validation = Rule::new("!has(self.secretRef) || (has(self.source) && self.source.startsWith('hf://'))")
        .message("model.secretRef is the token for a hub: remove it, or set model.source to hf://<org>/<name>")
        .field_path(".secretRef"),
)]
pub struct Model {
    /// Where the weights are: `hf://org/name@revision` (a repository of the hub that the chart's hub.endpoint names; `hf://org/name/file.gguf` takes one file of it), `https://host/path/model.gguf`, `pvc://claim/path` (a PersistentVolumeClaim in the same namespace, mounted read-only) or `file:///path` (in the image or on a volume of spec.pod). Paths lead to a GGUF file or to the folder of a Hugging Face checkpoint. Left out when engine.device is simulated.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 512))]
    pub source: Option<String>,

    /// Name that clients put into `model` of a request; without it the object's name.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(
        length(min = 1, max = 128),
        regex(pattern = "^[A-Za-z0-9]([A-Za-z0-9._:/-]*[A-Za-z0-9])?$")
    )]
    pub served_name: Option<String>,

    /// What weights are kept as: `float16`; `int8` or `int4`, which the server makes of the file's weights while it loads them, for less memory and faster steps at a small loss (engine.device cuda only); `auto`: on a GPU as a GGUF file has them (Q8_0, Q4_0, Q4_1, Q4_K, Q6_K), else float16. A change replaces the pods.
    #[serde(default)]
    pub dtype: Dtype,

    /// Key of a Secret with the hub's token, for gated and private models.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub secret_ref: Option<TokenSecret>,
}

/// What weights are kept as.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Dtype {
    #[default]
    Auto,
    Float16,
    Int8,
    Int4,
}

impl Dtype {
    /// As `--dtype` of the server spells it.
    pub fn as_str(self) -> &'static str {
        match self {
            Dtype::Auto => "auto",
            Dtype::Float16 => "float16",
            Dtype::Int8 => "int8",
            Dtype::Int4 => "int4",
        }
    }
}

/// A token in a Secret of the same namespace.
#[derive(KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct TokenSecret {
    /// Name of the Secret.
    #[schemars(
        length(min = 1, max = 253),
        regex(pattern = "^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$")
    )]
    pub name: String,

    /// Key of the token in the Secret.
    #[serde(default = "token")]
    #[schemars(length(min = 1, max = 253), regex(pattern = "^[-._a-zA-Z0-9]+$"))]
    pub key: String,
}

/// What each replica asks the scheduler for.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("!has(self.accelerator) || ((!has(self.requests) || !(self.accelerator.resource in self.requests)) && (!has(self.limits) || !(self.accelerator.resource in self.limits)))")
        .message("state the accelerator once: remove it from resources.requests and resources.limits, or remove resources.accelerator"),
    validation = Rule::new("!has(self.requests) || !has(self.limits) || self.requests.all(k, !(k in self.limits) || !isQuantity(string(self.requests[k])) || !isQuantity(string(self.limits[k])) || !quantity(string(self.requests[k])).isGreaterThan(quantity(string(self.limits[k]))))")
        .message("a resource in resources.requests must not exceed the same resource in resources.limits: lower the request or raise the limit"),
)]
pub struct Resources {
    /// GPUs of each replica; the taint of that name is tolerated by itself.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub accelerator: Option<Accelerator>,

    /// Requests of the server container, by resource name, such as `cpu: 500m`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(schema_with = "embed::quantities")]
    pub requests: BTreeMap<String, Quantity>,

    /// Limits of the server container, by resource name, such as `memory: 2Gi`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(schema_with = "embed::quantities")]
    pub limits: BTreeMap<String, Quantity>,
}

/// A kind and number of devices.
#[derive(KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("self.resource.matches('^[a-z0-9]([-a-z0-9.]*[a-z0-9])?/[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?$')")
        .message("resources.accelerator.resource must be a resource that a device plugin offers, with its domain, such as nvidia.com/gpu")
        .field_path(".resource"),
)]
pub struct Accelerator {
    /// Resource that the nodes' device plugin offers, with its domain.
    #[serde(default = "nvidia_gpu")]
    #[schemars(length(min = 3, max = 253))]
    pub resource: String,

    /// Devices of each replica.
    #[serde(default = "one")]
    #[schemars(range(min = 1, max = 64))]
    pub count: i32,
}

fn one() -> i32 {
    1
}

fn token() -> String {
    "token".to_owned()
}

fn nvidia_gpu() -> String {
    "nvidia.com/gpu".to_owned()
}

/// A parsed `spec.model.source`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ModelSource {
    /// A file on a PersistentVolumeClaim; `path` is relative to the volume's root.
    Claim { claim: String, path: String },
    /// A file that the server's container sees at this absolute path.
    File { path: String },
    /// A model of a hub, as `hf://…`: the server downloads it.
    Hub { reference: String },
    /// A file of a web server, which the server downloads.
    Url { url: String },
}

impl Model {
    /// The parsed source; `None` when there is none.
    ///
    /// # Errors
    /// Says what is wrong with a source that the CRD's rules would have refused.
    pub fn parse_source(&self) -> Result<Option<ModelSource>, String> {
        let Some(source) = self.source.as_deref() else {
            return Ok(None);
        };
        if let Some(rest) = source.strip_prefix("pvc://")
            && let Some((claim, path)) = rest.split_once('/')
            && !claim.is_empty()
            && !path.is_empty()
        {
            return Ok(Some(ModelSource::Claim {
                claim: claim.to_owned(),
                path: path.to_owned(),
            }));
        }
        if let Some(rest) = source.strip_prefix("hf://")
            && rest
                .split_once('/')
                .is_some_and(|(org, name)| !org.is_empty() && !name.is_empty())
        {
            return Ok(Some(ModelSource::Hub {
                reference: source.to_owned(),
            }));
        }
        if source.starts_with("https://") && source.ends_with(".gguf") {
            return Ok(Some(ModelSource::Url {
                url: source.to_owned(),
            }));
        }
        match source.strip_prefix("file://") {
            Some(path) if path.starts_with('/') && path.len() > 1 => Ok(Some(ModelSource::File {
                path: path.to_owned(),
            })),
            _ => Err(format!(
                "model.source is {source:?}, but must be pvc://<claim>/<path>, file:///<absolute path>, \
                 hf://<org>/<name>[@<revision>] or https://<host>/<path>.gguf"
            )),
        }
    }
}

impl InferenceServiceSpec {
    /// The name that clients put into `model` of a request.
    pub fn served_name<'a>(&'a self, object_name: &'a str) -> &'a str {
        self.model.served_name.as_deref().unwrap_or(object_name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(source: &str) -> Result<Option<ModelSource>, String> {
        let source = Some(source.to_owned());
        Model {
            source,
            ..Model::default()
        }
        .parse_source()
    }

    #[test]
    fn sources_are_parsed() {
        let claim = ModelSource::Claim {
            claim: "models".to_owned(),
            path: "llama/3b.gguf".to_owned(),
        };
        assert_eq!(parse("pvc://models/llama/3b.gguf"), Ok(Some(claim)));
        let file = ModelSource::File {
            path: "/models/3b.gguf".to_owned(),
        };
        assert_eq!(parse("file:///models/3b.gguf"), Ok(Some(file)));
        let hub = "hf://org/name@refs/pr/1";
        let expected = ModelSource::Hub {
            reference: hub.to_owned(),
        };
        assert_eq!(parse(hub), Ok(Some(expected)));
        let url = "https://files.example/m.gguf";
        let expected = ModelSource::Url {
            url: url.to_owned(),
        };
        assert_eq!(parse(url), Ok(Some(expected)));
        assert_eq!(Model::default().parse_source(), Ok(None));
    }

    #[test]
    fn other_sources_are_refused_by_name() {
        for source in [
            "",
            "pvc://",
            "pvc://models",
            "pvc://models/",
            "pvc:///3b.gguf",
            "file://3b.gguf",
            "file:///",
            "hf://org",
            "hf:///name",
            "https://files.example/m.bin",
            "http://files.example/m.gguf",
            "oci://registry/model",
            "/models/3b.gguf",
        ] {
            let error = parse(source).unwrap_err();
            assert!(error.contains(&format!("{source:?}")), "{error}");
        }
    }

    #[test]
    fn the_object_is_named_when_no_other_name_is_served() {
        let minimal = serde_json::json!({"engine": {"device": "cpu"}});
        let mut spec: InferenceServiceSpec = serde_json::from_value(minimal).unwrap();
        assert_eq!(spec.served_name("smollm2"), "smollm2");
        spec.model.served_name = Some("org/other".to_owned());
        assert_eq!(spec.served_name("smollm2"), "org/other");
    }
}
