//! Schemas of Kubernetes' own types inside the CRD.
//!
//! They come from k8s-openapi, with two changes: descriptions are cut to their first sentence,
//! or the CRD would be several times as large; and strings, lists and maps get a longest length,
//! without which the API server counts CEL rules over them as too expensive.

use k8s_openapi::api::core::v1::{
    Affinity, EnvVar, Toleration, TopologySpreadConstraint, Volume, VolumeMount,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde_json::{Map, Value, json};

const MAX_STRING: u64 = 4096;
const MAX_ITEMS: u64 = 64;
const MAX_PROPERTIES: u64 = 64;
const MAX_DESCRIPTION: usize = 160;

/// The sources of a volume that are not deprecated in Kubernetes.
const VOLUME_SOURCES: [&str; 13] = [
    "configMap",
    "csi",
    "downwardAPI",
    "emptyDir",
    "ephemeral",
    "fc",
    "hostPath",
    "image",
    "iscsi",
    "nfs",
    "persistentVolumeClaim",
    "projected",
    "secret",
];

pub(crate) fn quantities(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "object",
        "maxProperties": 16,
        "x-kubernetes-validations": [qualified_keys()],
        "additionalProperties": quantity(),
    })
}

fn qualified_keys() -> Value {
    json!({
        "rule": "self.all(key, !format.qualifiedName().validate(key).hasValue())",
        "message": "a key must be a qualified name: at most 63 letters, digits and '-', '_', '.', with an optional prefix such as example.com/",
    })
}

pub(crate) fn count_or_percent(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "x-kubernetes-int-or-string": true,
        "minimum": 0,
        "maximum": 1000,
        "maxLength": 4,
        "pattern": "^(100|[1-9]?[0-9])%$",
    })
}

pub(crate) fn labels(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "object",
        "maxProperties": 32,
        "x-kubernetes-validations": [qualified_keys()],
        "additionalProperties": {
            "type": "string",
            "maxLength": 63,
            "pattern": "^([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?$",
        },
    })
}

pub(crate) fn annotations(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "object",
        "maxProperties": 32,
        "x-kubernetes-validations": [qualified_keys()],
        "additionalProperties": {"type": "string", "maxLength": MAX_STRING},
    })
}

pub(crate) fn image_pull_secrets(_: &mut SchemaGenerator) -> Schema {
    let item = json!({
        "type": "object",
        "required": ["name"],
        "properties": {
            "name": {"type": "string", "minLength": 1, "maxLength": 253, "description": "Name of a Secret in the same namespace."},
        },
    });
    list(item, 8, &["name"])
}

pub(crate) fn env(generator: &mut SchemaGenerator) -> Schema {
    let mut item = schema_of::<EnvVar>(generator);
    bound(&mut item, "name", 1, 253);
    item["properties"]["name"]["pattern"] = json!("^[-._A-Za-z][-._A-Za-z0-9]*$");
    list(item, 64, &["name"])
}

pub(crate) fn tolerations(generator: &mut SchemaGenerator) -> Schema {
    list(schema_of::<Toleration>(generator), 32, &[])
}

pub(crate) fn affinity(generator: &mut SchemaGenerator) -> Schema {
    into_schema(schema_of::<Affinity>(generator))
}

pub(crate) fn topology_spread_constraints(generator: &mut SchemaGenerator) -> Schema {
    let item = schema_of::<TopologySpreadConstraint>(generator);
    list(item, 8, &["topologyKey", "whenUnsatisfiable"])
}

pub(crate) fn volumes(generator: &mut SchemaGenerator) -> Schema {
    let mut item = schema_of::<Volume>(generator);
    if let Some(properties) = item["properties"].as_object_mut() {
        properties.retain(|name, _| name == "name" || VOLUME_SOURCES.contains(&name.as_str()));
    }
    bound(&mut item, "name", 1, 63);
    item["properties"]["name"]["pattern"] = json!("^[a-z0-9]([-a-z0-9]*[a-z0-9])?$");
    let given = VOLUME_SOURCES.map(|source| format!("has(self.{source})"));
    item["x-kubernetes-validations"] = json!([{
        "rule": format!("[{}].filter(given, given).size() == 1", given.join(", ")),
        "message": "each of pod.volumes needs exactly one source, such as persistentVolumeClaim, configMap or emptyDir",
    }]);
    list(item, 16, &["name"])
}

pub(crate) fn volume_mounts(generator: &mut SchemaGenerator) -> Schema {
    let mut item = schema_of::<VolumeMount>(generator);
    bound(&mut item, "name", 1, 63);
    bound(&mut item, "mountPath", 1, 512);
    item["properties"]["mountPath"]["pattern"] = json!("^/[^:]*$");
    list(item, 16, &["mountPath"])
}

pub(crate) fn conditions(generator: &mut SchemaGenerator) -> Schema {
    let mut item = schema_of::<Condition>(generator);
    bound(&mut item, "type", 1, 316);
    bound(&mut item, "reason", 1, 1024);
    bound(&mut item, "message", 0, 32_768);
    item["properties"]["status"]["enum"] = json!(["True", "False", "Unknown"]);
    list(item, 16, &["type"])
}

fn quantity() -> Value {
    json!({
        "x-kubernetes-int-or-string": true,
        "minimum": 0,
        "maxLength": 32,
        "pattern": r"^\+?([0-9]+|[0-9]+\.[0-9]*|[0-9]*\.[0-9]+)(([KMGTPE]i)|[numkMGTPE]|([eE][+-]?[0-9]+))?$",
    })
}

fn schema_of<T: JsonSchema>(generator: &mut SchemaGenerator) -> Value {
    let mut schema = generator.subschema_for::<T>().to_value();
    tidy(&mut schema);
    schema
}

fn list(item: Value, max_items: u64, keys: &[&str]) -> Schema {
    let mut schema = json!({"type": "array", "maxItems": max_items, "items": item});
    if keys.is_empty() {
        schema["x-kubernetes-list-type"] = json!("atomic");
    } else {
        schema["x-kubernetes-list-type"] = json!("map");
        schema["x-kubernetes-list-map-keys"] = json!(keys);
    }
    into_schema(schema)
}

fn into_schema(value: Value) -> Schema {
    match value {
        Value::Object(object) => object.into(),
        _ => Schema::default(),
    }
}

fn bound(item: &mut Value, property: &str, min: u64, max: u64) {
    let schema = &mut item["properties"][property];
    schema["minLength"] = json!(min);
    schema["maxLength"] = json!(max);
}

/// Shortens descriptions and adds the missing bounds, all the way down.
fn tidy(schema: &mut Value) {
    let Some(object) = schema.as_object_mut() else {
        return;
    };
    if object.get("x-kubernetes-int-or-string") == Some(&Value::Bool(true)) {
        let whole = std::mem::take(object);
        let quantity_like = whole
            .get("description")
            .and_then(Value::as_str)
            .is_some_and(|text| text.starts_with("Quantity is"));
        *object = int_or_string(quantity_like, whole);
        return;
    }
    if let Some(Value::String(text)) = object.get_mut("description") {
        *text = first_sentence(text);
    }
    let unlimited = match object.get("type").and_then(Value::as_str) {
        Some("string") if !object.contains_key("enum") => Some(("maxLength", MAX_STRING)),
        Some("array") => Some(("maxItems", MAX_ITEMS)),
        Some("object") if object.contains_key("additionalProperties") => {
            Some(("maxProperties", MAX_PROPERTIES))
        }
        _ => None,
    };
    if let Some((keyword, limit)) = unlimited {
        object.entry(keyword).or_insert(json!(limit));
    }
    for keyword in ["items", "additionalProperties"] {
        if let Some(inner) = object.get_mut(keyword) {
            tidy(inner);
        }
    }
    if let Some(Value::Object(properties)) = object.get_mut("properties") {
        properties.values_mut().for_each(tidy);
    }
}

fn int_or_string(is_quantity: bool, original: Map<String, Value>) -> Map<String, Value> {
    let mut schema = if is_quantity {
        quantity()
    } else {
        json!({
            "x-kubernetes-int-or-string": true,
            "maxLength": 253,
        })
    };
    if let Some(Value::String(text)) = original.get("description")
        && !is_quantity
    {
        schema["description"] = json!(first_sentence(text));
    }
    match schema {
        Value::Object(object) => object,
        _ => original,
    }
}

fn first_sentence(text: &str) -> String {
    let line = text.split('\n').next().unwrap_or_default();
    let end = line.find(". ").map_or(line.len(), |at| at + 1);
    let sentence = &line[..end];
    match sentence.char_indices().nth(MAX_DESCRIPTION) {
        None => sentence.to_owned(),
        Some((at, _)) => {
            let head = &sentence[..at];
            format!(
                "{}…",
                head.rsplit_once(' ').map_or(head, |(start, _)| start)
            )
        }
    }
}
