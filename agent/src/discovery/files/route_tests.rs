//! Routes from the text of a manifest to the rule that a request is for.

use std::fs;

use http::Request;
use rand::SeedableRng;
use rand::rngs::SmallRng;

use super::*;
use crate::mesh::ObjectName;
use crate::mesh::route::{FilterVerdict, Frontend, Scheme};

const MANIFEST: &str = r#"
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec: {clusterIP: 10.96.0.1, ports: [{name: http, port: 80}]}
---
apiVersion: v1
kind: Service
metadata: {name: web-v1, namespace: shop}
spec: {clusterIP: 10.96.0.2, ports: [{port: 8080}]}
---
apiVersion: v1
kind: Service
metadata: {name: web-v2, namespace: shop}
spec: {clusterIP: 10.96.0.3, ports: [{port: 8080}]}
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: canary, namespace: shop}
spec:
  parentRefs:
  - {group: "", kind: Service, name: web, port: 80}
  rules:
  - name: testers
    matches:
    - headers: [{name: cookie, type: RegularExpression, value: "(.*; )?canary=yes(;.*)?"}]
    - queryParams: [{name: canary, value: "yes"}]
    filters:
    - type: RequestHeaderModifier
      requestHeaderModifier:
        set: [{name: x-canary, value: "1"}]
    backendRefs: [{name: web-v2, port: 8080}]
  - matches:
    - path: {type: PathPrefix, value: /old}
    filters:
    - type: RequestRedirect
      requestRedirect:
        path: {type: ReplacePrefixMatch, replacePrefixMatch: /new}
        statusCode: 301
  - matches:
    - path: {type: PathPrefix, value: /}
    backendRefs:
    - {name: web-v1, port: 8080, weight: 90}
    - {name: web-v2, port: 8080, weight: 10}
    timeouts: {request: 3s, backendRequest: 1s}
    retry: {codes: [503], attempts: 2, backoff: 25ms}
"#;

fn load(manifest: &str) -> (tempfile::TempDir, Directory) {
    let directory = tempfile::tempdir().unwrap();
    fs::write(directory.path().join("web.yaml"), manifest).unwrap();
    let mut loaded = Directory::new(directory.path().to_owned(), "node-a", Limits::default());
    loaded.look(&BTreeSet::new(), &BTreeSet::new());
    (directory, loaded)
}

fn errors(directory: &Directory) -> Vec<String> {
    let errors = directory.status().errors;
    errors.iter().map(ToString::to_string).collect()
}

#[test]
fn a_canary_is_routed_as_its_manifest_says() {
    let (_files, loaded) = load(MANIFEST);
    assert_eq!(errors(&loaded), [] as [&str; 0]);
    let snapshot = loaded.cluster().snapshot();
    let web = ObjectName::new("shop", "web");
    let table = snapshot.routes(&web, 80, "elsewhere").unwrap();
    let ask = |target: &str, cookie: &str| {
        let request = Request::get(target).header("cookie", cookie);
        let head = request
            .header("host", "web.shop")
            .body(())
            .unwrap()
            .into_parts()
            .0;
        (table.select(&head).unwrap(), head)
    };
    for (target, cookie) in [("/", "a=b; canary=yes"), ("/x?canary=yes", "a=b")] {
        let (selected, mut head) = ask(target, cookie);
        assert_eq!(&*selected.rule.name, "HTTPRoute/shop/canary/testers");
        let frontend = Frontend {
            scheme: Scheme::Http,
            port: 80,
        };
        let filters = &selected.rule.filters;
        let verdict = filters.on_request(&mut head, selected.matched, frontend);
        assert!(matches!(verdict, FilterVerdict::Continue));
        assert_eq!(head.headers["x-canary"], "1");
    }
    let (selected, mut head) = ask("/old/shoes?size=9", "a=b");
    let frontend = Frontend {
        scheme: Scheme::Http,
        port: 80,
    };
    let filters = &selected.rule.filters;
    let FilterVerdict::Respond(answer) = filters.on_request(&mut head, selected.matched, frontend)
    else {
        panic!("was not redirected");
    };
    assert_eq!(
        answer.headers()["location"],
        "http://web.shop/new/shoes?size=9"
    );
    let (selected, _) = ask("/", "a=b");
    assert_eq!(&*selected.rule.name, "HTTPRoute/shop/canary/2");
    let mut rng = SmallRng::seed_from_u64(11);
    let canaries = (0..10_000)
        .filter(|_| {
            let target = &selected.rule.choose(None, &mut rng).unwrap().target;
            target.to_string() == "shop/web-v2:8080"
        })
        .count();
    assert!((900..1_100).contains(&canaries), "{canaries}");
}

#[test]
fn what_is_shown_of_a_route_is_what_is_in_force() {
    let (_files, loaded) = load(MANIFEST);
    let views = serde_json::to_value(loaded.cluster().snapshot().route_views()).unwrap();
    let view = &views[0];
    assert_eq!(view["route"], "HTTPRoute/shop/canary");
    assert_eq!(view["parent"], "shop/web:80");
    assert_eq!(view["accepted"], "True");
    assert_eq!(view["resolved_refs"], "True");
    assert_eq!(view["controller"], "undermesh.io/mesh-controller");
    let rules: Vec<&str> = view["rules"]
        .as_array()
        .unwrap()
        .iter()
        .map(|rule| rule["name"].as_str().unwrap())
        .collect();
    // In the order in which they are asked.
    assert_eq!(
        rules,
        [
            "HTTPRoute/shop/canary/1",
            "HTTPRoute/shop/canary/testers",
            "HTTPRoute/shop/canary/2"
        ]
    );
    let last = &view["rules"][2];
    assert_eq!(last["matches"], serde_json::json!(["/…"]));
    assert_eq!(last["backends"][0]["target"], "shop/web-v1:8080");
    assert_eq!(last["backends"][0]["weight"], 90);
}

#[test]
fn a_bad_edit_is_refused_with_its_line_and_the_former_rules_stay() {
    let (files, mut loaded) = load(MANIFEST);
    let web = ObjectName::new("shop", "web");
    let before = loaded
        .cluster()
        .snapshot()
        .routes(&web, 80, "shop")
        .unwrap();
    for (good, bad, reason) in [
        (
            "canary=yes(;.*)?",
            "canary=yes(;.*",
            "spec.rules[0].matches[0].headers[0].value: \"(.*; )?canary=yes(;.*\" is not a regular \
             expression: unclosed group",
        ),
        (
            "request: 3s",
            "request: 3",
            "spec.rules[2].timeouts.request: invalid type: integer `3`, expected a string",
        ),
        (
            "request: 3s",
            "request: \"3\"",
            "spec.rules[2].timeouts.request: \"3\" is not a duration: numbers with units h, m, s, \
             ms, like \"1s\" or \"1m30s\"",
        ),
        (
            "weight: 90",
            "wieght: 90",
            "spec.rules[2].backendRefs[0].wieght: there is no such field",
        ),
    ] {
        let edited = MANIFEST.replace(good, bad);
        let line = 1 + edited.lines().position(|line| line.contains(bad)).unwrap();
        fs::write(files.path().join("web.yaml"), edited).unwrap();
        loaded.look(&BTreeSet::from(["web.yaml".to_owned()]), &BTreeSet::new());
        let expected = format!("web.yaml:{line}: HTTPRoute shop/canary: {reason}");
        assert_eq!(errors(&loaded), [expected]);
        let snapshot = loaded.cluster().snapshot();
        let now = snapshot.routes(&web, 80, "shop").unwrap();
        assert!(Arc::ptr_eq(&before, &now), "the former rules are in force");
        let view = serde_json::to_value(&snapshot.route_views()[0]).unwrap();
        assert_eq!(view["accepted"], "True");
        assert_eq!(view["conditions"][2]["type"], "PartiallyInvalid");
        assert_eq!(
            view["message"],
            format!("Fall Back to the former version: {reason}")
        );
    }
    fs::write(files.path().join("web.yaml"), MANIFEST).unwrap();
    loaded.look(&BTreeSet::from(["web.yaml".to_owned()]), &BTreeSet::new());
    assert_eq!(errors(&loaded), [] as [&str; 0]);
    let view = &loaded.cluster().snapshot().route_views()[0];
    assert_eq!(view.conditions.len(), 2);
}
