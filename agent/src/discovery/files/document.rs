//! From the text of a file to its objects.

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::tree::Tree;
use crate::discovery::object::{Kind, Object, ObjectKey};
use crate::discovery::translate::{
    BACKEND_TRAFFIC_POLICY_API_VERSION, GATEWAY_GROUP, MESH_CONFIG_API_VERSION,
    TRAFFIC_POLICY_API_VERSION,
};

/// Group of Undermesh's own kinds.
const OWN_GROUP: &str = "undermesh.io";

/// What became of one document.
#[derive(Debug)]
pub(super) enum Document {
    /// An object, and where its fields stand.
    Object(Box<Object>, Tree),
    /// An object of a kind that is not read: `apiVersion` and `kind`.
    Ignored(String),
    /// Not an object.
    Bad(Bad),
}

/// Why a document is not an object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Bad {
    /// Which object it was to be, if it tells.
    pub(super) key: Option<ObjectKey>,
    pub(super) line: u64,
    pub(super) column: Option<u64>,
    pub(super) field: Option<String>,
    pub(super) reason: String,
}

/// All documents of a file, in their order; the items of a `List` are documents.
pub(super) fn parse(text: &str) -> Vec<Document> {
    let mut documents = Vec::new();
    for (first_line, chunk) in split(text) {
        match Tree::parse(&chunk, first_line) {
            Ok(None) => {}
            Ok(Some(tree)) => read(tree, Depth::Document, &mut documents),
            Err(error) => documents.push(Document::Bad(Bad {
                key: None,
                line: error.line,
                column: error.column,
                field: None,
                reason: error.reason,
            })),
        }
    }
    documents
}

/// Documents and their first lines. `---` or `...` at the start of a line ends a document wherever
/// it stands (YAML 1.2, 9.1.2), so one that cannot be parsed does not take the next with it.
fn split(text: &str) -> Vec<(u64, String)> {
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let mut chunks = Vec::new();
    let mut first = 1;
    let mut chunk = String::new();
    for (number, line) in (1..).zip(text.split_inclusive('\n')) {
        let starts = is_marker(line, "---");
        if starts || is_marker(line, "...") {
            chunks.push((first, std::mem::take(&mut chunk)));
            first = if starts { number } else { number + 1 };
        }
        if !is_marker(line, "...") {
            chunk.push_str(line);
        }
    }
    chunks.push((first, chunk));
    chunks.retain(|(_, chunk)| !is_prologue(chunk));
    chunks
}

fn is_marker(line: &str, marker: &str) -> bool {
    line.strip_prefix(marker)
        .is_some_and(|rest| rest.is_empty() || rest.starts_with([' ', '\t', '\r', '\n']))
}

/// Comments and directives before the first marker.
fn is_prologue(chunk: &str) -> bool {
    chunk.lines().all(|line| {
        line.trim().is_empty() || line.trim_start().starts_with('#') || line.starts_with('%')
    })
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Depth {
    Document,
    Item,
}

fn read(tree: Tree, depth: Depth, documents: &mut Vec<Document>) {
    let text = |field: &str| tree.get(field).and_then(Tree::as_str);
    let bad = |field: &str, reason: String| {
        let line = tree.line_of(field);
        bad_field(None, line, field, reason)
    };
    if !tree.is_mapping() {
        let line = tree.line;
        documents.push(Document::Bad(Bad {
            key: None,
            line,
            column: None,
            field: None,
            reason: "is not an object with apiVersion and kind".to_owned(),
        }));
        return;
    }
    let Some(version) = text("apiVersion") else {
        documents.push(bad("apiVersion", "is missing, or is not a text".to_owned()));
        return;
    };
    let Some(kind) = text("kind") else {
        documents.push(bad("kind", "is missing, or is not a text".to_owned()));
        return;
    };
    if version == "v1" && kind == "List" && depth == Depth::Document {
        let items = tree.get("items").and_then(Tree::items).unwrap_or_default();
        for item in items {
            read(item.clone(), Depth::Item, documents);
        }
        return;
    }
    match known(version, kind) {
        Known::Read(kind) => documents.push(object(kind, tree)),
        Known::OtherVersion(expected) => {
            let expected = expected.join(" or ");
            let reason = format!("{kind} is read as {expected}, not as {version}");
            documents.push(bad("apiVersion", reason));
        }
        Known::OwnUnknown => {
            let reason = format!("{version} {kind} is no kind of this version of Undermesh");
            documents.push(bad("kind", reason));
        }
        Known::Foreign => documents.push(Document::Ignored(format!("{version} {kind}"))),
    }
}

fn bad_field(key: Option<ObjectKey>, line: u64, field: &str, reason: String) -> Document {
    Document::Bad(Bad {
        key,
        line,
        column: None,
        field: Some(field.to_owned()),
        reason,
    })
}

enum Known {
    Read(Kind),
    OtherVersion(&'static [&'static str]),
    OwnUnknown,
    Foreign,
}

fn known(version: &str, kind: &str) -> Known {
    let group = version.split_once('/').map_or("", |(group, _)| group);
    let (expected, kind): (&'static [&'static str], Kind) = match (group, kind) {
        ("", "Namespace") => (&["v1"], Kind::Namespace),
        ("", "Node") => (&["v1"], Kind::Node),
        ("", "Pod") => (&["v1"], Kind::Pod),
        ("", "Service") => (&["v1"], Kind::Service),
        ("discovery.k8s.io", "EndpointSlice") => (&["discovery.k8s.io/v1"], Kind::EndpointSlice),
        (GATEWAY_GROUP, "GRPCRoute") => (&["gateway.networking.k8s.io/v1"], Kind::GrpcRoute),
        (GATEWAY_GROUP, "HTTPRoute") => (GATEWAY_V1_AND_BETA, Kind::HttpRoute),
        (GATEWAY_GROUP, "TLSRoute") => (GATEWAY_V1_AND_ALPHA, Kind::TlsRoute),
        (GATEWAY_GROUP, "TCPRoute") => (GATEWAY_V1_AND_ALPHA, Kind::TcpRoute),
        (GATEWAY_GROUP, "ReferenceGrant") => (GATEWAY_V1_AND_BETA, Kind::ReferenceGrant),
        (OWN_GROUP, "MeshConfig") => (&[MESH_CONFIG_API_VERSION], Kind::MeshConfig),
        (OWN_GROUP, "TrafficPolicy") => (&[TRAFFIC_POLICY_API_VERSION], Kind::TrafficPolicy),
        ("gateway.networking.x-k8s.io", "XBackendTrafficPolicy") => (
            &[BACKEND_TRAFFIC_POLICY_API_VERSION],
            Kind::XBackendTrafficPolicy,
        ),
        (OWN_GROUP, _) => return Known::OwnUnknown,
        _ => return Known::Foreign,
    };
    if expected.contains(&version) {
        Known::Read(kind)
    } else {
        Known::OtherVersion(expected)
    }
}

/// Versions that differ in nothing that is read here.
const GATEWAY_V1_AND_BETA: &[&str] = &[
    "gateway.networking.k8s.io/v1",
    "gateway.networking.k8s.io/v1beta1",
];
const GATEWAY_V1_AND_ALPHA: &[&str] = &[
    "gateway.networking.k8s.io/v1",
    "gateway.networking.k8s.io/v1alpha3",
    "gateway.networking.k8s.io/v1alpha2",
];

fn object(kind: Kind, tree: Tree) -> Document {
    let metadata = |field: &str| {
        let value = tree.get("metadata")?.get(field)?;
        value.as_str().filter(|text| !text.is_empty())
    };
    let key = metadata("name").map(|name| ObjectKey::new(kind, metadata("namespace"), name));
    if key.is_none() {
        let line = tree.line_of("metadata.name");
        return bad_field(
            None,
            line,
            "metadata.name",
            "is missing, or is not a text".to_owned(),
        );
    }
    let json = tree.to_json();
    let read = match kind {
        Kind::MeshConfig => typed(json).map(Object::MeshConfig),
        Kind::Namespace => typed(json).map(Object::Namespace),
        Kind::Node => typed(json).map(Object::Node),
        Kind::Pod => typed(json).map(Object::Pod),
        Kind::EndpointSlice => typed(json).map(Object::EndpointSlice),
        Kind::Service => typed(json).map(Object::Service),
        Kind::GrpcRoute => strictly_typed(json).map(Object::GrpcRoute),
        Kind::HttpRoute => strictly_typed(json).map(Object::HttpRoute),
        Kind::TlsRoute => strictly_typed(json).map(Object::TlsRoute),
        Kind::TcpRoute => strictly_typed(json).map(Object::TcpRoute),
        Kind::ReferenceGrant => strictly_typed(json).map(Object::ReferenceGrant),
        Kind::TrafficPolicy => typed(json).map(Object::TrafficPolicy),
        Kind::XBackendTrafficPolicy => strictly_typed(json).map(Object::XBackendTrafficPolicy),
    };
    match read {
        Ok(object) => Document::Object(Box::new(object), tree),
        Err((field, reason)) => bad_field(key, tree.line_of(&field), &field, reason),
    }
}

fn typed<T: DeserializeOwned>(json: Value) -> Result<T, (String, String)> {
    serde_path_to_error::deserialize(json).map_err(|error| {
        let mut path = String::new();
        for segment in error.path() {
            use serde_path_to_error::Segment;
            match segment {
                Segment::Seq { index } => path += &format!("[{index}]"),
                Segment::Map { key } if key.contains(['.', '[']) => path += &format!("[{key}]"),
                Segment::Map { key } => {
                    if !path.is_empty() {
                        path.push('.');
                    }
                    path += key;
                }
                Segment::Enum { .. } | Segment::Unknown => {}
            }
        }
        (path, error.inner().to_string())
    })
}

/// The same, but a field of `spec` that the type does not know is an error: one that is misspelt
/// would change where traffic goes. The API server is as strict.
fn strictly_typed<T: DeserializeOwned + Serialize>(json: Value) -> Result<T, (String, String)> {
    let given = json.get("spec").cloned().unwrap_or_default();
    let object: T = typed(json)?;
    let known = serde_json::to_value(&object).unwrap_or_default();
    match unknown_field(&given, known.get("spec").unwrap_or(&Value::Null)) {
        Some(path) => Err((format!("spec{path}"), "there is no such field".to_owned())),
        None => Ok(object),
    }
}

/// Path of a field that is given, but not known.
fn unknown_field(given: &Value, known: &Value) -> Option<String> {
    match (given, known) {
        (Value::Object(given), Value::Object(known)) => given
            .iter()
            .filter(|(_, value)| !value.is_null())
            .find_map(|(name, value)| match known.get(name) {
                Some(known) => Some(format!(".{name}{}", unknown_field(value, known)?)),
                None => Some(format!(".{name}")),
            }),
        (Value::Array(given), Value::Array(known)) => {
            given
                .iter()
                .zip(known)
                .enumerate()
                .find_map(|(index, (given, known))| {
                    Some(format!("[{index}]{}", unknown_field(given, known)?))
                })
        }
        _ => None,
    }
}

#[cfg(test)]
#[path = "document_tests.rs"]
mod tests;
