//! Kubernetes objects in YAML files, as untyped documents.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};
use serde_json::{Map, Value};

/// Reads every `*.yaml`, `*.yml` and `*.json` file of a directory, in the order of their names.
pub fn read_dir(dir: &Path) -> Result<Vec<Value>> {
    let mut files: Vec<PathBuf> = fs::read_dir(dir)
        .with_context(|| dir.display().to_string())?
        .map(|entry| entry.map(|entry| entry.path()))
        .collect::<Result<_, _>>()?;
    files.retain(|file| {
        let extension = file.extension().and_then(|extension| extension.to_str());
        matches!(extension, Some("yaml" | "yml" | "json"))
    });
    files.sort();
    let mut documents = Vec::new();
    for file in &files {
        let text = fs::read_to_string(file).with_context(|| file.display().to_string())?;
        documents.extend(parse(&text).with_context(|| file.display().to_string())?);
    }
    if documents.is_empty() {
        bail!("{} holds no manifests", dir.display());
    }
    Ok(documents)
}

/// Parses a multi-document text. `List` objects are taken apart.
pub fn parse(text: &str) -> Result<Vec<Value>> {
    let parsed: Vec<Value> =
        serde_saphyr::from_multiple(text).map_err(|error| anyhow!("{error}"))?;
    let mut documents = Vec::new();
    for document in parsed {
        match document {
            Value::Null => {}
            Value::Object(ref object) if object.get("kind") == Some(&"List".into()) => {
                documents.extend(items(&document, "/items").iter().cloned());
            }
            Value::Object(_) => documents.push(document),
            other => bail!("not an object: {other}"),
        }
    }
    Ok(documents)
}

/// One document as YAML.
pub fn to_yaml(document: &Value) -> Result<String> {
    serde_saphyr::to_string(document).map_err(|error| anyhow!("{error}"))
}

/// Writes `text` to `dir/name` in one step, by way of `scratch` on the same file system, so that a watcher
/// never sees half a file.
pub fn write(dir: &Path, name: &str, scratch: &Path, text: &str) -> Result<()> {
    let target = dir.join(name);
    let temporary = scratch.join(name);
    fs::write(&temporary, text).with_context(|| temporary.display().to_string())?;
    fs::rename(&temporary, &target).with_context(|| target.display().to_string())
}

/// `kind`.
#[must_use]
pub fn kind(document: &Value) -> &str {
    text(document, "/kind")
}

/// `metadata.namespace`, or `default`.
#[must_use]
pub fn namespace(document: &Value) -> &str {
    match text(document, "/metadata/namespace") {
        "" => "default",
        namespace => namespace,
    }
}

/// `metadata.name`.
#[must_use]
pub fn name(document: &Value) -> &str {
    text(document, "/metadata/name")
}

/// The text at a JSON pointer, or nothing.
#[must_use]
pub fn text<'a>(document: &'a Value, pointer: &str) -> &'a str {
    document
        .pointer(pointer)
        .and_then(Value::as_str)
        .unwrap_or("")
}

/// The list at a JSON pointer, or nothing.
#[must_use]
pub fn items<'a>(document: &'a Value, pointer: &str) -> &'a [Value] {
    document
        .pointer(pointer)
        .and_then(Value::as_array)
        .map_or(&[], Vec::as_slice)
}

/// The object below `path`, made where it is missing.
pub fn object<'a>(document: &'a mut Value, path: &[&str]) -> Result<&'a mut Map<String, Value>> {
    let mut here = document;
    for key in path {
        let map = here
            .as_object_mut()
            .ok_or_else(|| anyhow!("{key}: its parent is not an object"))?;
        here = map
            .entry(*key)
            .and_modify(|value| {
                if value.is_null() {
                    *value = Value::Object(Map::new());
                }
            })
            .or_insert_with(|| Value::Object(Map::new()));
    }
    here.as_object_mut()
        .ok_or_else(|| anyhow!("{} is not an object", path.join(".")))
}

/// The file that holds a document.
#[must_use]
pub fn file_name(document: &Value) -> String {
    format!(
        "{}-{}-{}.yaml",
        kind(document).to_lowercase(),
        namespace(document),
        name(document)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn documents_survive_being_written_and_read() {
        let text = "\
apiVersion: v1
kind: Pod
metadata:
  name: a
  labels: {version: \"1.0\", yes: \"true\", empty: \"\"}
  annotations:
    undermesh.io/netns: /run/x/y
spec:
  containers:
  - name: app
    command: [sh, -c, \"echo 'a: b'; sleep 1 # no comment\"]
    ports:
    - {containerPort: 80, name: http}
---
# nothing here
---
kind: List
items:
- {kind: Node, metadata: {name: n}}
";
        let documents = parse(text).unwrap();
        assert_eq!(documents.len(), 2);
        assert_eq!(kind(&documents[1]), "Node");
        assert_eq!(text_of(&documents[0], "/metadata/labels/version"), "1.0");
        let again = parse(&to_yaml(&documents[0]).unwrap()).unwrap();
        assert_eq!(again, documents[..1]);
    }

    fn text_of<'a>(document: &'a Value, pointer: &str) -> &'a str {
        text(document, pointer)
    }

    #[test]
    fn missing_objects_are_made_on_the_way() {
        let mut document = serde_json::json!({"metadata": null});
        object(&mut document, &["metadata", "labels"])
            .unwrap()
            .insert("a".into(), "b".into());
        assert_eq!(text(&document, "/metadata/labels/a"), "b");
        assert!(object(&mut document, &["metadata", "labels", "a"]).is_err());
    }
}
