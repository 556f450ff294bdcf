//! The CustomResourceDefinition.

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::{
    CustomResourceDefinition, JSON, JSONSchemaProps, JSONSchemaPropsOrArray, JSONSchemaPropsOrBool,
};
use kube::CustomResourceExt;

use crate::spec::InferenceService;

/// The CustomResourceDefinition of `InferenceService`, as it is installed.
pub fn crd() -> CustomResourceDefinition {
    let mut crd = InferenceService::crd();
    for version in &mut crd.spec.versions {
        if let Some(schema) = &mut version.schema
            && let Some(root) = &mut schema.open_api_v3_schema
        {
            root.title = None;
            simplify(root);
        }
    }
    crd
}

/// [`crd`] as YAML.
///
/// # Errors
/// When the definition can't be written as YAML, which would be a defect of this crate.
pub fn crd_yaml() -> Result<String, serde_saphyr::ser::Error> {
    serde_saphyr::to_string(&crd())
}

/// Makes a derived schema what a person would have written:
/// - A null is dropped and defaulted like a left out field, instead of being kept.
/// - Line breaks of the source are none of the description.
fn simplify(schema: &mut JSONSchemaProps) {
    schema.nullable = None;
    if let Some(values) = &mut schema.enum_ {
        values.retain(|JSON(value)| !value.is_null());
    }
    if let Some(text) = &mut schema.description {
        *text = text.replace('\n', " ");
    }
    for property in schema.properties.iter_mut().flat_map(|p| p.values_mut()) {
        simplify(property);
    }
    if let Some(JSONSchemaPropsOrBool::Schema(inner)) = &mut schema.additional_properties {
        simplify(inner);
    }
    if let Some(JSONSchemaPropsOrArray::Schema(inner)) = &mut schema.items {
        simplify(inner);
    }
}
