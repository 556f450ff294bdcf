//! Writes docs/crd-reference.md from the CRD's schema.

use std::fmt::Write;

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::{
    CustomResourceDefinition, JSON, JSONSchemaProps, JSONSchemaPropsOrArray, JSONSchemaPropsOrBool,
};

/// Kubernetes' own types, which its documentation describes.
const KUBERNETES_OWN: [&str; 7] = [
    ".spec.pod.affinity",
    ".spec.pod.env",
    ".spec.pod.tolerations",
    ".spec.pod.topologySpreadConstraints",
    ".spec.pod.volumeMounts",
    ".spec.pod.volumes",
    ".status.conditions",
];

pub fn markdown(crd: &CustomResourceDefinition) -> String {
    let version = &crd.spec.versions[0];
    let schema = version
        .schema
        .as_ref()
        .and_then(|s| s.open_api_v3_schema.as_ref())
        .expect("the version has a schema");
    let names = &crd.spec.names;
    let mut out = String::new();
    let _ = write!(
        out,
        "# {kind}\n\n\
         <!-- Generated from operator/api: UPDATE=1 cargo test --release -p stoker-api -->\n\n\
         {description}\n\n\
         `apiVersion: {group}/{version}`, `kind: {kind}`; `kubectl get {short}`. \
         `kubectl explain {short}.spec` shows the same on a cluster.\n\n\
         A field without default may be left out unless it is marked **required**. \
         Unknown fields are refused by kubectl.\n",
        kind = names.kind,
        description = schema.description.as_deref().unwrap_or_default(),
        group = crd.spec.group,
        version = version.name,
        short = names.short_names.as_ref().map_or("", |s| s[0].as_str()),
    );
    for part in ["spec", "status"] {
        if let Some(schema) = schema.properties.as_ref().and_then(|p| p.get(part)) {
            section(&mut out, &format!(".{part}"), schema);
        }
    }
    rules(&mut out, schema);
    columns(&mut out, crd);
    out
}

fn section(out: &mut String, path: &str, schema: &JSONSchemaProps) {
    let Some(properties) = &schema.properties else {
        return;
    };
    let depth = "#".repeat(path.matches('.').count() + 1);
    let _ = write!(
        out,
        "\n{depth} {}\n\n{}\n\n| field | type | default | description |\n|---|---|---|---|\n",
        path.trim_start_matches('.'),
        schema.description.as_deref().unwrap_or_default(),
    );
    let required = schema.required.clone().unwrap_or_default();
    for (name, property) in properties {
        let default = match &property.default {
            // The fields of the object tell theirs.
            Some(JSON(value)) if value.is_object() => String::new(),
            Some(JSON(value)) => format!("`{}`", value.to_string().trim_matches('"')),
            None if required.contains(name) => "**required**".to_owned(),
            None => String::new(),
        };
        let _ = writeln!(
            out,
            "| `{name}` | {} | {default} | {} |",
            type_of(&format!("{path}.{name}"), property),
            cell(property.description.as_deref().unwrap_or_default()),
        );
    }
    for (name, property) in properties {
        let path = format!("{path}.{name}");
        if !KUBERNETES_OWN.contains(&path.as_str()) {
            section(out, &path, property);
        }
    }
}

fn type_of(path: &str, schema: &JSONSchemaProps) -> String {
    if KUBERNETES_OWN.contains(&path) {
        let list = if schema.items.is_some() { "list, " } else { "" };
        return format!("{list}as in Kubernetes{}", bounds(schema));
    }
    if let Some(values) = &schema.enum_ {
        let values: Vec<String> = values
            .iter()
            .map(|JSON(value)| format!("`{}`", value.to_string().trim_matches('"')))
            .collect();
        return values.join(", ");
    }
    if schema.x_kubernetes_int_or_string == Some(true) {
        return "integer or string".to_owned();
    }
    let name = match (&schema.additional_properties, &schema.items) {
        (Some(JSONSchemaPropsOrBool::Schema(inner)), _) => {
            format!("map of {}", type_of(path, inner))
        }
        (_, Some(JSONSchemaPropsOrArray::Schema(inner))) => {
            format!("list of {}", type_of(path, inner))
        }
        _ => schema.type_.clone().unwrap_or_default(),
    };
    format!("{name}{}", bounds(schema))
}

fn bounds(schema: &JSONSchemaProps) -> String {
    let range = match (schema.minimum, schema.maximum) {
        (Some(min), Some(max)) => Some(format!("{min} to {max}")),
        (Some(min), None) => Some(format!("{min} or more")),
        (None, Some(max)) => Some(format!("{max} or less")),
        (None, None) => None,
    };
    let range = range
        .or(schema.max_items.map(|n| format!("at most {n}")))
        .or(schema.max_properties.map(|n| format!("at most {n}")))
        .or(schema.max_length.map(|n| format!("at most {n} characters")));
    range.map_or(String::new(), |range| format!(", {range}"))
}

fn rules(out: &mut String, schema: &JSONSchemaProps) {
    out.push_str("\n## Rules\n\nThe API server refuses an object that breaks one of these, with this text:\n\n");
    let mut found = Vec::new();
    collect_rules(schema, &mut found);
    for message in found {
        let _ = writeln!(out, "- {message}");
    }
}

fn collect_rules(schema: &JSONSchemaProps, found: &mut Vec<String>) {
    for rule in schema.x_kubernetes_validations.iter().flatten() {
        if let Some(message) = rule.message.clone()
            && !found.contains(&message)
        {
            found.push(message);
        }
    }
    for property in schema.properties.iter().flat_map(|p| p.values()) {
        collect_rules(property, found);
    }
    if let Some(JSONSchemaPropsOrArray::Schema(inner)) = &schema.items {
        collect_rules(inner, found);
    }
}

fn columns(out: &mut String, crd: &CustomResourceDefinition) {
    out.push_str("\n## Columns of `kubectl get`\n\n| column | shows | |\n|---|---|---|\n");
    for column in crd.spec.versions[0]
        .additional_printer_columns
        .iter()
        .flatten()
    {
        let wide = column.priority.is_some_and(|p| p > 0);
        let _ = writeln!(
            out,
            "| {} | `{}` | {}{} |",
            column.name.to_uppercase(),
            column.json_path.trim_start_matches('.').replace('|', "\\|"),
            column.description.as_deref().unwrap_or_default(),
            if wide { " With `-o wide`." } else { "" },
        );
    }
}

/// A table's cell can't hold a line break or a bare bar.
fn cell(text: &str) -> String {
    text.replace('\n', " ").replace('|', "\\|")
}
