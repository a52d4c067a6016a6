use super::*;

fn summary(text: &str) -> Vec<String> {
    parse(text)
        .into_iter()
        .map(|document| match document {
            Document::Object(object, tree) => format!("{} at {}", object.key(), tree.line),
            Document::Ignored(kind) => format!("ignored {kind}"),
            Document::Bad(Bad {
                key,
                line,
                field,
                reason,
                ..
            }) => {
                let key = key.map(|key| format!("{key}: ")).unwrap_or_default();
                let field = field.map(|field| format!("{field}: ")).unwrap_or_default();
                format!("{line}: {key}{field}{reason}")
            }
        })
        .collect()
}

#[test]
fn every_kind_is_read() {
    let text = "\
apiVersion: v1
kind: Namespace
metadata: {name: shop}
---
apiVersion: v1
kind: Node
metadata: {name: node-a}
---
apiVersion: v1
kind: Pod
metadata: {name: web, namespace: shop}
---
apiVersion: v1
kind: Service
metadata: {name: web}
spec: {ports: [{port: 80}]}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: web-x}
addressType: IPv4
endpoints: []
---
apiVersion: undermesh.io/v1alpha1
kind: MeshConfig
metadata: {name: mesh}
spec: {mode: Strict}
";
    let expected = [
        "Namespace shop at 1",
        "Node node-a at 5",
        "Pod shop/web at 9",
        "Service default/web at 13",
        "EndpointSlice default/web-x at 18",
        "MeshConfig mesh at 24",
    ];
    assert_eq!(summary(text), expected);
}

#[test]
fn items_of_a_list_are_documents() {
    let text = "\
apiVersion: v1
kind: List
items:
- apiVersion: v1
  kind: Pod
  metadata: {name: a}
- apiVersion: v1
  kind: ConfigMap
  metadata: {name: b}
";
    assert_eq!(
        summary(text),
        ["Pod default/a at 4", "ignored v1 ConfigMap"]
    );
}

#[test]
fn comments_directives_and_empty_documents_are_none() {
    let text = "# head\n%YAML 1.2\n---\n# nothing\n---\napiVersion: v1\nkind: Node\nmetadata: {name: a}\n...\n---\n";
    assert_eq!(summary(text), ["Node a at 6"]);
    assert_eq!(summary(""), Vec::<String>::new());
    assert_eq!(summary("\u{feff}"), Vec::<String>::new());
}

#[test]
fn a_document_that_is_not_yaml_does_not_take_the_next_with_it() {
    let text = "a: [\n---\napiVersion: v1\nkind: Node\nmetadata: {name: a}\n";
    let found = summary(text);
    assert_eq!(found.len(), 2, "{found:?}");
    assert_eq!(found[1], "Node a at 3");
}

#[test]
fn faults_of_form_name_line_object_field_and_reason() {
    let pod = "apiVersion: v1\nkind: Pod\nmetadata:\n  name: web\n";
    let own =
        "apiVersion: undermesh.io/v1alpha1\nkind: MeshConfig\nmetadata:\n  name: mesh\nspec:\n";
    for (text, expected) in [
        (
            "just words\n",
            "1: is not an object with apiVersion and kind",
        ),
        ("kind: Pod\n", "1: apiVersion: is missing, or is not a text"),
        ("apiVersion: v1\n", "1: kind: is missing, or is not a text"),
        (
            "apiVersion: v1\nkind: Pod\nmetadata:\n  namespace: a\n",
            "3: metadata.name: is missing, or is not a text",
        ),
        (
            "kind: EndpointSlice\n\napiVersion: discovery.k8s.io/v1beta1\n",
            "3: apiVersion: EndpointSlice is read as discovery.k8s.io/v1, not as discovery.k8s.io/v1beta1",
        ),
        (
            "apiVersion: undermesh.io/v1alpha1\nkind: Budget\n",
            "2: kind: undermesh.io/v1alpha1 Budget is no kind of this version of Undermesh",
        ),
        (
            &format!("{pod}spec:\n  nodeName: 7\n"),
            "6: Pod default/web: spec.nodeName: invalid type: integer `7`, expected a string",
        ),
        (
            &format!("{pod}  labels:\n    a.b/c: 1.10\n"),
            "6: Pod default/web: metadata.labels[a.b/c]: invalid type: floating point `1.1`, expected a string",
        ),
        (
            &format!("{own}  mode: Strict\n  conectTimeout: 1s\n"),
            "7: MeshConfig mesh: spec.conectTimeout: unknown field `conectTimeout`, expected one of `trustDomain`, `mode`, `encryptSameNode`, `connectTimeout`, `lastConnectTimeout`, `detectionTimeout`, `drainTimeout`",
        ),
        (
            &format!("{own}  drainTimeout: 1 week\n"),
            "6: MeshConfig mesh: spec.drainTimeout: \"1 week\" is not a duration: numbers with units h, m, s, ms, like \"1s\" or \"1m30s\"",
        ),
    ] {
        assert_eq!(summary(text), [expected]);
    }
}

#[test]
fn routes_and_grants_are_read_in_every_version_that_means_the_same() {
    let manifest = |version: &str, kind: &str, spec: &str| {
        format!(
            "apiVersion: gateway.networking.k8s.io/{version}\nkind: {kind}\n\
             metadata: {{name: x, namespace: shop}}\nspec: {spec}\n"
        )
    };
    for (kind, spec, versions) in [
        ("HTTPRoute", "{rules: []}", ["v1", "v1beta1"].as_slice()),
        ("GRPCRoute", "{rules: []}", &["v1"]),
        (
            "TLSRoute",
            "{hostnames: [a.b], rules: []}",
            &["v1", "v1alpha3", "v1alpha2"],
        ),
        ("TCPRoute", "{rules: []}", &["v1", "v1alpha2"]),
        ("ReferenceGrant", "{from: [], to: []}", &["v1", "v1beta1"]),
    ] {
        for version in versions {
            let text = manifest(version, kind, spec);
            assert_eq!(summary(&text), [format!("{kind} shop/x at 1")], "{version}");
        }
    }
    assert_eq!(
        summary(&manifest("v1alpha2", "HTTPRoute", "{}")),
        [
            "1: apiVersion: HTTPRoute is read as gateway.networking.k8s.io/v1 or \
          gateway.networking.k8s.io/v1beta1, not as gateway.networking.k8s.io/v1alpha2"
        ]
    );
    assert_eq!(
        summary(&manifest("v1", "Gateway", "{}")),
        ["ignored gateway.networking.k8s.io/v1 Gateway"]
    );
}

#[test]
fn a_misspelt_field_of_a_route_is_an_error_and_not_silence() {
    let text = "\
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: x, namespace: shop, anything: else}
spec:
  rules:
  - backendRefs:
    - name: v1
      port: 80
      wieght: 0
    timeouts:
    hostnames:
";
    assert_eq!(
        summary(text),
        ["9: HTTPRoute shop/x: spec.rules[0].backendRefs[0].wieght: there is no such field"]
    );
    let unknown = text
        .replace("wieght", "weight")
        .replace("timeouts:", "timeouts: {requst: 1s}");
    assert_eq!(
        summary(&unknown),
        ["10: HTTPRoute shop/x: spec.rules[0].timeouts.requst: there is no such field"]
    );
    let fine = text.replace("wieght", "weight");
    assert_eq!(
        summary(&fine),
        ["HTTPRoute shop/x at 1"],
        "null is as if it were left out"
    );
}

#[test]
fn a_value_that_the_api_does_not_have_is_refused_at_its_field() {
    let text = "\
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: x, namespace: shop}
spec:
  rules:
  - matches:
    - path: {type: Suffix, value: /x}
";
    let found = summary(text);
    assert!(
        found[0].starts_with(
            "7: HTTPRoute shop/x: spec.rules[0].matches[0].path.type: unknown variant `Suffix`"
        ),
        "{found:?}"
    );
}
