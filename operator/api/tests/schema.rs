//! What must hold for every field of the schema, also for those that come later.

// Helpers of tests are tests too; clippy.toml lets only #[test] functions off.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::{
    JSON, JSONSchemaProps, JSONSchemaPropsOrArray, JSONSchemaPropsOrBool,
};

fn root() -> JSONSchemaProps {
    let version = stoker_api::crd().spec.versions.remove(0);
    version.schema.unwrap().open_api_v3_schema.unwrap()
}

/// Calls `visit` with the path and schema of every field.
fn walk(path: &str, schema: &JSONSchemaProps, visit: &mut impl FnMut(&str, &JSONSchemaProps)) {
    visit(path, schema);
    for (name, property) in schema.properties.iter().flatten() {
        walk(&format!("{path}.{name}"), property, visit);
    }
    if let Some(JSONSchemaPropsOrArray::Schema(inner)) = &schema.items {
        walk(&format!("{path}[]"), inner, visit);
    }
    if let Some(JSONSchemaPropsOrBool::Schema(inner)) = &schema.additional_properties {
        walk(&format!("{path}{{}}"), inner, visit);
    }
}

/// The API server counts a rule over an unbounded string, list or map as too expensive.
#[test]
fn everything_has_a_longest_length() {
    walk("", &root(), &mut |path, schema| {
        let bounded = match schema.type_.as_deref() {
            Some("string") => {
                schema.max_length.is_some()
                    || schema.enum_.is_some()
                    || schema.format.as_deref() == Some("date-time")
            }
            Some("array") => schema.max_items.is_some(),
            Some("object") => {
                schema.additional_properties.is_none() || schema.max_properties.is_some()
            }
            _ => schema.x_kubernetes_int_or_string != Some(true) || schema.max_length.is_some(),
        };
        assert!(bounded, "{path} has no longest length");
    });
}

/// Our own numbers have ranges, and no field holds a null.
#[test]
fn numbers_have_ranges_and_nothing_is_nullable() {
    walk("", &root(), &mut |path, schema| {
        assert_ne!(schema.nullable, Some(true), "{path} is nullable");
        let null = schema
            .enum_
            .iter()
            .flatten()
            .any(|JSON(value)| value.is_null());
        assert!(!null, "{path} offers null");
        let kubernetes_own = [
            "affinity",
            "env",
            "volumes",
            "tolerations",
            "topology",
            "conditions",
        ]
        .iter()
        .any(|part| path.contains(part));
        if !kubernetes_own && matches!(schema.type_.as_deref(), Some("integer" | "number")) {
            assert!(schema.minimum.is_some(), "{path} has no minimum");
            let in_spec = path.starts_with(".spec");
            assert!(
                !in_spec || schema.maximum.is_some(),
                "{path} has no maximum"
            );
            assert!(
                !schema
                    .format
                    .as_deref()
                    .unwrap_or_default()
                    .starts_with('u'),
                "{path} is unsigned"
            );
        }
    });
}

#[test]
fn our_own_fields_are_described() {
    for part in ["spec", "status"] {
        let root = root();
        let schema = &root.properties.unwrap()[part];
        walk(part, schema, &mut |path, schema| {
            let depth = path.matches(['.', '[', '{']).count();
            assert!(
                depth > 2 || path.ends_with(['}', ']']) || schema.description.is_some(),
                "{path} has no description"
            );
        });
    }
}

#[test]
fn every_rule_says_what_to_change() {
    let mut rules = 0;
    walk("", &root(), &mut |path, schema| {
        for rule in schema.x_kubernetes_validations.iter().flatten() {
            rules += 1;
            let message = rule.message.as_deref().unwrap_or_default();
            assert!(
                message.len() > 40,
                "{path}: {:?} says only {message:?}",
                rule.rule
            );
        }
    });
    assert!(rules > 25, "only {rules} rules were found");
}
