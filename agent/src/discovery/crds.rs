//! The CustomResourceDefinitions of Undermesh's own kinds, made of the types that read them.

use schemars::generate::SchemaSettings;
use serde_json::{Map, Value, json};

use crate::mesh::policy::spec::TrafficPolicySpec;

/// The CustomResourceDefinition of `TrafficPolicy`.
#[must_use]
pub fn traffic_policy() -> Value {
    json!({
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {
            "name": "trafficpolicies.undermesh.io",
            "labels": { "gateway.networking.k8s.io/policy": "Inherited" },
        },
        "spec": {
            "group": "undermesh.io",
            "names": {
                "kind": "TrafficPolicy",
                "listKind": "TrafficPolicyList",
                "plural": "trafficpolicies",
                "singular": "trafficpolicy",
                "shortNames": ["tp"],
                "categories": ["undermesh", "gateway-api"],
            },
            "scope": "Namespaced",
            "versions": [{
                "name": "v1alpha1",
                "served": true,
                "storage": true,
                "subresources": { "status": {} },
                "additionalPrinterColumns": [
                    {
                        "name": "Targets",
                        "type": "string",
                        "jsonPath": ".spec.targetRefs[*].name",
                    },
                    { "name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp" },
                ],
                "schema": { "openAPIV3Schema": {
                    "type": "object",
                    "description": "What traffic to a Service, or over a route, gets.",
                    "required": ["spec"],
                    "properties": {
                        "apiVersion": { "type": "string" },
                        "kind": { "type": "string" },
                        "metadata": { "type": "object" },
                        "spec": schema_of_spec(),
                        "status": {
                            "type": "object",
                            "x-kubernetes-preserve-unknown-fields": true,
                        },
                    },
                } },
            }],
        },
    })
}

fn schema_of_spec() -> Value {
    let settings = SchemaSettings::openapi3().with(|settings| {
        settings.inline_subschemas = true;
        settings.meta_schema = None;
    });
    let schema = settings
        .into_generator()
        .into_root_schema_for::<TrafficPolicySpec>();
    structural(schema.to_value())
}

/// The same as a structural schema (Kubernetes, "Specifying a structural schema"), which knows
/// neither titles, nor formats of integers, nor `additionalProperties: false`: unknown fields are
/// pruned or refused by the API server itself.
fn structural(schema: Value) -> Value {
    let Value::Object(mut schema) = schema else {
        return schema;
    };
    for unknown in [
        "$schema",
        "title",
        "format",
        "additionalProperties",
        "default",
    ] {
        schema.remove(unknown);
    }
    if let Some(names) = names_of(&schema) {
        schema.remove("oneOf");
        schema.remove("anyOf");
        schema.insert("type".to_owned(), "string".into());
        schema.insert("enum".to_owned(), names.into());
    }
    if let Some(description) = schema.get_mut("description") {
        // Lines of a comment are no lines of a text.
        let text = description.as_str().unwrap_or_default().replace('\n', " ");
        *description = text.into();
    }
    if let Some(Value::Object(properties)) = schema.get_mut("properties") {
        for property in properties.values_mut() {
            *property = structural(property.take());
        }
    }
    if let Some(items) = schema.get_mut("items") {
        *items = structural(items.take());
    }
    schema.into()
}

/// The names of an enum, each of which may have a description of its own.
fn names_of(schema: &Map<String, Value>) -> Option<Vec<Value>> {
    let branches = schema.get("oneOf").or(schema.get("anyOf"))?.as_array()?;
    let mut names = Vec::new();
    for branch in branches {
        match (branch.get("enum"), branch.get("const")) {
            (Some(Value::Array(several)), _) => names.extend(several.iter().cloned()),
            (None, Some(one)) => names.push(one.clone()),
            // An enum that may be left out is a branch of its own beside null.
            _ => names.extend(names_of(branch.as_object()?)?),
        }
    }
    // What `nullable` is for.
    names.retain(|name| !name.is_null());
    Some(names)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mesh::policy::spec::TrafficPolicySpec;

    /// Where the CRD is kept. `UNDERMESH_WRITE_CRDS=1` writes it there.
    const COMMITTED: &str = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../deploy/crds/trafficpolicies.undermesh.io.yaml"
    );

    fn yaml() -> String {
        let text = serde_saphyr::to_string(&traffic_policy()).unwrap();
        format!(
            "# Made of the types in agent/src/mesh/policy/spec by `cargo xtask crds`. Do not edit.\n{text}"
        )
    }

    #[test]
    fn the_committed_definition_is_that_of_the_types() {
        if std::env::var_os("UNDERMESH_WRITE_CRDS").is_some() {
            std::fs::write(COMMITTED, yaml()).unwrap();
        }
        let committed = std::fs::read_to_string(COMMITTED).unwrap();
        assert!(committed == yaml(), "run `cargo xtask crds`");
        let read: Value = serde_saphyr::from_str(&committed).unwrap();
        assert_eq!(read, traffic_policy());
    }

    fn spec_schema() -> Value {
        let crd = traffic_policy();
        crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"].clone()
    }

    /// Every schema below this one, with its path.
    fn walk(schema: &Value, path: &str, visit: &mut impl FnMut(&str, &Value)) {
        visit(path, schema);
        if let Some(properties) = schema["properties"].as_object() {
            for (name, property) in properties {
                walk(property, &format!("{path}/{name}"), visit);
            }
        }
        if schema.get("items").is_some() {
            walk(&schema["items"], &format!("{path}/0"), visit);
        }
    }

    #[test]
    fn the_schema_is_structural_and_describes_every_field() {
        let known = [
            "type",
            "description",
            "nullable",
            "properties",
            "required",
            "items",
            "enum",
            "minimum",
            "maximum",
            "minItems",
            "maxItems",
            "minLength",
            "maxLength",
            "pattern",
        ];
        walk(&spec_schema(), "", &mut |path, schema| {
            assert!(schema["type"].is_string(), "{path}: {schema}");
            for keyword in schema.as_object().unwrap().keys() {
                assert!(known.contains(&keyword.as_str()), "{path}: {keyword}");
            }
            if !path.ends_with("/0") {
                assert!(schema["description"].is_string(), "{path}");
            }
        });
    }

    /// A policy in which only the field at this path, and what it needs beside it, is given.
    fn with(path: &str, value: Value) -> Value {
        let mut spec = json!({ "targetRefs": [{ "kind": "Service", "name": "cart" }] });
        let mut place = &mut spec;
        let mut parts = path.trim_start_matches('/').split('/').peekable();
        while let Some(part) = parts.next() {
            let needed = match part {
                "abort" => json!({ "percentage": 1 }),
                "delay" => json!({ "percentage": 1, "time": "1s" }),
                "perSource" | "perRoute" | "total" => json!({ "requestsPerSecond": 1 }),
                "backend" => json!({ "name": "cart", "port": 80 }),
                "response" => json!({ "status": 503 }),
                _ => json!({}),
            };
            let list = parts.peek() == Some(&"0");
            if place[part].is_null() {
                place[part] = if list { json!([null]) } else { needed };
            }
            place = &mut place[part];
            if list {
                parts.next();
                place = &mut place[0];
            }
        }
        *place = value;
        if path.starts_with("/fault/abort/percentage") {
            spec["fault"]["abort"]["httpStatus"] = 503.into();
        }
        spec
    }

    fn is_taken(spec: Value) -> bool {
        serde_json::from_value::<TrafficPolicySpec>(spec).is_ok_and(|spec| spec.faults().is_empty())
    }

    #[test]
    fn what_the_schema_allows_is_taken_and_what_it_forbids_is_refused() {
        let mut bounds = 0;
        walk(&spec_schema(), "", &mut |path, schema| {
            let integer = schema["type"] == "integer";
            for (bound, beyond) in [("minimum", -1.0), ("maximum", 1.0)] {
                let Some(value) = schema[bound].as_f64() else {
                    continue;
                };
                let step = if integer {
                    1.0
                } else {
                    value.abs().max(0.01) * 0.01
                };
                let number = |value: f64| match integer {
                    true => json!(value as i64),
                    false => json!(value),
                };
                // Bounds that depend on another field of the same part.
                let related = ["/limits/adaptive/"]
                    .iter()
                    .any(|part| path.starts_with(part));
                if !related {
                    assert!(is_taken(with(path, number(value))), "{path}: {value}");
                }
                let outside = value + beyond * step;
                assert!(!is_taken(with(path, number(outside))), "{path}: {outside}");
                bounds += 1;
            }
        });
        assert!(bounds > 80, "only {bounds} bounds were tried");
    }
}
