use serde_json::{Value, json};

use super::super::route::RouteRules;
use super::*;
use crate::mesh::ObjectName;
use crate::mesh::route::{Backend, BackendTarget, CookieLifetime, Filters, Rule, SessionCarrier};

fn facts(spec: Value) -> Result<RouteFacts, Fault> {
    let manifest = json!({"apiVersion": "gateway.networking.k8s.io/v1", "kind": "HTTPRoute",
        "metadata": {"name": "web", "namespace": "shop"}, "spec": spec});
    RouteFacts::of_http(&serde_json::from_value(manifest).unwrap())
}

/// Rules, each Service taken for one that is there.
fn rules(given: Value) -> Vec<Rule> {
    let facts = facts(json!({"rules": given})).unwrap();
    let RouteRules::Requests(rules) = &facts.rules else {
        panic!("an HTTPRoute has rules for requests");
    };
    let mut resolve = |reference: &super::super::BackendRef| match &reference.referent {
        super::super::Referent::Service { name, port } => BackendTarget::Service {
            name: name.clone(),
            port: *port,
        },
        super::super::Referent::Other(other) => panic!("{other}"),
    };
    rules
        .iter()
        .map(|rule| rule.resolve(&facts.id, &mut resolve))
        .collect()
}

fn rule(given: Value) -> Rule {
    rules(json!([given])).remove(0)
}

fn refused(rule: Value) -> String {
    let fault = facts(json!({"rules": [rule]})).unwrap_err();
    format!("{}: {}", fault.field, fault.reason)
}

fn backend(name: &str) -> BackendTarget {
    BackendTarget::Service {
        name: ObjectName::new("shop", name),
        port: 80,
    }
}

#[test]
fn what_is_left_out_has_the_apis_default() {
    let no_rules = facts(json!({})).unwrap();
    assert_eq!(no_rules.rules, facts(json!({"rules": [{}]})).unwrap().rules);
    let rule = rule(json!({"backendRefs": [{"name": "v1", "port": 80}]}));
    assert_eq!(rule.matches, [RequestMatch::any()]);
    assert_eq!(&*rule.name, "HTTPRoute/shop/web/0");
    let expected = Backend::new(backend("v1"), 1, Filters::default());
    assert_eq!(rule.backends, [expected]);
    assert_eq!(
        (rule.timeouts, rule.retry, rule.session),
        (None, None, None)
    );
    let nothing = facts(json!({"rules": []})).unwrap();
    assert_eq!(nothing.rules, RouteRules::Requests(Vec::new()));
}

#[test]
fn every_part_of_a_match_is_taken() {
    let rule = rule(json!({"name": "by-all", "matches": [{
        "path": {"type": "Exact", "value": "/cart"},
        "method": "PATCH",
        "headers": [
            {"name": "Version", "value": "two"},
            {"name": "version", "value": "ignored: the first of equal names counts"},
            {"name": "x-id", "type": "RegularExpression", "value": "[0-9]+"}],
        "queryParams": [
            {"name": "page", "value": "1"},
            {"name": "page", "value": "2"},
            {"name": "q", "type": "RegularExpression", "value": "a.*"}]
    }, {"path": {"value": "/v2/"}}, {"path": {"type": "RegularExpression", "value": "/x+"}}]}));
    assert_eq!(&*rule.name, "HTTPRoute/shop/web/by-all");
    let written: Vec<String> = rule.matches.iter().map(ToString::to_string).collect();
    assert_eq!(
        written,
        [
            "PATCH /cart version=two x-id=~\"[0-9]+\" ?page=1 ?q=~\"a.*\"",
            "/v2/…",
            "~\"/x+\""
        ]
    );
}

#[test]
fn timeouts_retry_and_persistence_are_taken() {
    let rule = rule(json!({
        "timeouts": {"request": "0s", "backendRequest": "1m30s"},
        "retry": {"codes": [500, 503], "attempts": 3, "backoff": "100ms"},
        "sessionPersistence": {"sessionName": "s", "absoluteTimeout": "1h", "idleTimeout": "10m",
            "cookieConfig": {"lifetimeType": "Permanent"}}}));
    assert_eq!(
        rule.timeouts,
        Some(RouteTimeouts {
            request: Some(None),
            backend_request: Some(Some(Duration::from_secs(90))),
        })
    );
    assert_eq!(
        rule.retry,
        Some(RouteRetry {
            codes: vec![500, 503],
            attempts: Some(3),
            backoff: Some(Duration::from_millis(100)),
        })
    );
    let session = rule.session.unwrap();
    assert_eq!(
        session.carrier,
        SessionCarrier::Cookie {
            name: "s".into(),
            lifetime: CookieLifetime::Permanent,
        }
    );
    assert_eq!(session.absolute_timeout, Some(Duration::from_secs(3600)));
    assert_eq!(session.idle_timeout, Some(Duration::from_secs(600)));
}

#[test]
fn a_session_without_a_name_is_called_ours_and_its_default_is_a_session_cookie() {
    let session = |given: Value| {
        let rule = rule(json!({"sessionPersistence": given}));
        rule.session.unwrap().carrier
    };
    assert_eq!(
        session(json!({})),
        SessionCarrier::Cookie {
            name: "undermesh-session".into(),
            lifetime: CookieLifetime::Session,
        }
    );
    assert_eq!(
        session(json!({"type": "Header", "sessionName": "X-Session"})),
        SessionCarrier::Header(http::HeaderName::from_static("x-session"))
    );
}

#[test]
fn filters_of_rules_and_backends_are_taken() {
    let rule = rule(json!({
        "filters": [
            {"type": "RequestHeaderModifier", "requestHeaderModifier": {
                "set": [{"name": "a", "value": "1"}], "remove": ["b"]}},
            {"type": "URLRewrite", "urlRewrite": {"hostname": "other.example",
                "path": {"type": "ReplacePrefixMatch", "replacePrefixMatch": "/new"}}},
            {"type": "CORS", "cors": {"allowOrigins": ["https://*.example.com"],
                "allowMethods": ["GET", "PUT"], "allowCredentials": true}},
            {"type": "RequestMirror", "requestMirror": {
                "backendRef": {"name": "copy", "port": 80}, "percent": 5}},
            {"type": "RequestMirror", "requestMirror": {
                "backendRef": {"name": "copy2", "port": 80},
                "fraction": {"numerator": 1, "denominator": 3}}}],
        "backendRefs": [{"name": "v1", "port": 80, "weight": 9, "filters": [
            {"type": "ResponseHeaderModifier",
                "responseHeaderModifier": {"add": [{"name": "x-backend", "value": "v1"}]}}]}]}));
    let mirrors: Vec<_> = rule
        .filters
        .mirrors()
        .iter()
        .map(|one| &one.target)
        .collect();
    assert_eq!(mirrors, [&backend("copy"), &backend("copy2")]);
    let mut head = http::Request::get("/old")
        .header("host", "web")
        .header("b", "gone")
        .body(())
        .unwrap()
        .into_parts()
        .0;
    let frontend = crate::mesh::route::Frontend {
        scheme: crate::mesh::route::Scheme::Http,
        port: 80,
    };
    rule.filters
        .on_request(&mut head, &rule.matches[0], frontend);
    assert_eq!(head.uri, "/new/old");
    assert_eq!(head.headers["host"], "other.example");
    assert_eq!(head.headers["a"], "1");
    assert!(!head.headers.contains_key("b"));
    let mut response = http::Response::new(()).into_parts().0;
    rule.backends[0].filters.on_response(None, &mut response);
    assert_eq!(response.headers["x-backend"], "v1");
    assert_eq!(rule.backends[0].weight, 9);
}

#[test]
fn a_redirect_is_taken_and_its_default_is_302() {
    let redirect = |given: Value| {
        let rule =
            rule(json!({"filters": [{"type": "RequestRedirect", "requestRedirect": given}]}));
        assert!(rule.filters.answers());
        rule
    };
    redirect(json!({}));
    redirect(
        json!({"scheme": "https", "hostname": "a.example", "port": 8443, "statusCode": 308,
        "path": {"type": "ReplaceFullPath", "replaceFullPath": "/x"}}),
    );
}

#[test]
fn each_wrong_match_is_refused_with_its_field_and_reason() {
    let path =
        |kind: &str, value: &str| json!({"matches": [{"path": {"type": kind, "value": value}}]});
    let at = "spec.rules[0].matches[0].path.value: ";
    for (value, reason) in [
        ("", "\"\" does not start with \"/\""),
        ("x", "\"x\" does not start with \"/\""),
        ("/a//b", "\"/a//b\" has \"//\""),
        ("/a/../b", "\"/a/../b\" has \"/../\""),
        ("/a/./b", "\"/a/./b\" has \"/./\""),
        ("/a/..", "\"/a/..\" has \"/..\""),
        ("/a%2fb", "\"/a%2fb\" has \"%2f\""),
        ("/a%2Fb", "\"/a%2Fb\" has \"%2F\""),
        ("/a#b", "\"/a#b\" has '#', which no path has"),
        ("/a?b", "\"/a?b\" has '?', which no path has"),
        ("/ä", "\"/ä\" has 'ä', which no path has"),
        (
            "/a%zz",
            "\"/a%zz\" has a \"%\" without two hexadecimal digits",
        ),
        (
            "/a%2",
            "\"/a%2\" has a \"%\" without two hexadecimal digits",
        ),
    ] {
        for kind in ["Exact", "PathPrefix"] {
            assert_eq!(refused(path(kind, value)), format!("{at}{reason}"));
        }
    }
    let long = format!("/{}", "a".repeat(1024));
    assert_eq!(
        refused(path("Exact", &long)),
        format!("{at}has 1025 characters: at most 1024")
    );
    assert_eq!(
        refused(path("RegularExpression", "/[")),
        format!("{at}\"/[\" is not a regular expression: unclosed character class")
    );
    assert_eq!(
        refused(path("RegularExpression", "(.{1000}){1000}")),
        format!(
            "{at}\"(.{{1000}}){{1000}}\" is not a regular expression: \
            compiled it is larger than 65536 bytes"
        )
    );
    for (given, expected) in [
        (
            json!({"headers": [{"name": "a b", "value": "1"}]}),
            "headers[0].name: \"a b\" is not a header name",
        ),
        (
            json!({"headers": [{"name": "a", "value": ""}]}),
            "headers[0].value: is empty",
        ),
        (
            json!({"headers": [{"name": "a", "type": "RegularExpression", "value": "*"}]}),
            "headers[0].value: \"*\" is not a regular expression: repetition operator missing expression",
        ),
        (
            json!({"queryParams": [{"name": "", "value": "1"}]}),
            "queryParams[0].name: is empty",
        ),
    ] {
        let expected = format!("spec.rules[0].matches[0].{expected}");
        assert_eq!(refused(json!({"matches": [given]})), expected);
    }
}

#[test]
fn each_wrong_part_of_a_rule_is_refused_with_its_field_and_reason() {
    for (rule, expected) in [
        (
            json!({"backendRefs": [{"name": "v1"}]}),
            "backendRefs[0].port: is missing: a Service's port is meant",
        ),
        (
            json!({"backendRefs": [{"name": "v1", "port": 0}]}),
            "backendRefs[0].port: 0 is not a port: 1 to 65535",
        ),
        (
            json!({"backendRefs": [{"name": "V1", "port": 80}]}),
            "backendRefs[0].name: \"V1\" is not a name: 1 to 253 of a-z, 0-9, '-', '.'",
        ),
        (
            json!({"backendRefs": [{"name": "v1", "port": 80, "weight": -1}]}),
            "backendRefs[0].weight: -1 is not a weight: 0 to 1000000",
        ),
        (
            json!({"backendRefs": [{"name": "v1", "port": 80, "weight": 1_000_001}]}),
            "backendRefs[0].weight: 1000001 is not a weight: 0 to 1000000",
        ),
        (
            json!({"timeouts": {"request": "10"}}),
            "timeouts.request: \"10\" is not a duration: \
             numbers with units h, m, s, ms, like \"1s\" or \"1m30s\"",
        ),
        (
            json!({"timeouts": {"request": "1s", "backendRequest": "2s"}}),
            "timeouts.backendRequest: is longer than request, of which it is a part",
        ),
        (
            json!({"timeouts": {"request": "1s", "backendRequest": "0s"}}),
            "timeouts.backendRequest: is longer than request, of which it is a part",
        ),
        (
            json!({"retry": {"codes": [500, 200]}}),
            "retry.codes[1]: 200 is not a status of an error: 400 to 599",
        ),
        (
            json!({"retry": {"attempts": 11}}),
            "retry.attempts: 11 is not a number of retries: 0 to 10",
        ),
        (
            json!({"retry": {"attempts": -1}}),
            "retry.attempts: -1 is not a number of retries: 0 to 10",
        ),
        (
            json!({"sessionPersistence": {"cookieConfig": {"lifetimeType": "Permanent"}}}),
            "sessionPersistence.absoluteTimeout: is missing: a Permanent cookie lasts for this time",
        ),
        (
            json!({"sessionPersistence": {"sessionName": "a=b"}}),
            "sessionPersistence.sessionName: \"a=b\" is not a header name",
        ),
        (
            json!({"sessionPersistence": {"idleTimeout": "500ms"}}),
            "sessionPersistence.idleTimeout: a session lasts at least 1s",
        ),
        (
            json!({"name": "A b"}),
            "name: \"A b\" is not a name: 1 to 253 of a-z, 0-9, '-', '.'",
        ),
    ] {
        assert_eq!(refused(rule), format!("spec.rules[0].{expected}"));
    }
    let twice = facts(json!({"rules": [{"name": "a"}, {"name": "a"}]})).unwrap_err();
    assert_eq!(
        twice,
        Fault::new("spec.rules[1].name", "another rule is named a")
    );
}

#[test]
fn each_wrong_filter_is_refused_with_its_field_and_reason() {
    let headers =
        |given: Value| json!({"type": "RequestHeaderModifier", "requestHeaderModifier": given});
    let mirror = |given: Value| {
        let mut mirror = json!({"backendRef": {"name": "v2", "port": 80}});
        mirror
            .as_object_mut()
            .unwrap()
            .extend(given.as_object().unwrap().clone());
        json!({"type": "RequestMirror", "requestMirror": mirror})
    };
    let redirect = |given: Value| json!({"type": "RequestRedirect", "requestRedirect": given});
    let cors = |given: Value| json!({"type": "CORS", "cors": given});
    let rewrite = |given: Value| json!({"type": "URLRewrite", "urlRewrite": given});
    for (filter, expected) in [
        (json!({"type": "URLRewrite"}), "urlRewrite: is missing"),
        (
            json!({"type": "ExtensionRef", "extensionRef": {"group": "a", "kind": "B", "name": "c"}}),
            "type: ExtensionRef is not supported",
        ),
        (
            headers(json!({"set": [{"name": "Host", "value": "x"}]})),
            "requestHeaderModifier.set[0].name: host is not for filters to change",
        ),
        (
            headers(json!({"remove": ["Transfer-Encoding"]})),
            "requestHeaderModifier.remove[0]: transfer-encoding is not for filters to change",
        ),
        (
            headers(json!({"add": [{"name": "a", "value": "x\r\ny: z"}]})),
            "requestHeaderModifier.add[0].value: \"x\\r\\ny: z\" is not a header value",
        ),
        (
            mirror(json!({"percent": 200})),
            "requestMirror.percent: 200 of 100 is not between nothing and all",
        ),
        (
            mirror(json!({"percent": -1})),
            "requestMirror.percent: -1 of 100 is not between nothing and all",
        ),
        (
            mirror(json!({"fraction": {"numerator": 3, "denominator": 2}})),
            "requestMirror.fraction: 3 of 2 is not between nothing and all",
        ),
        (
            mirror(json!({"percent": 1, "fraction": {"numerator": 1}})),
            "requestMirror.fraction: percent is there already: one of them",
        ),
        (
            redirect(json!({"statusCode": 304})),
            "requestRedirect.statusCode: 304 is none of 301, 302, 303, 307, 308",
        ),
        (
            redirect(json!({"hostname": "*.example"})),
            "requestRedirect.hostname: \"*.example\" is not a host name",
        ),
        (
            redirect(json!({"path": {"type": "ReplaceFullPath", "replaceFullPath": "/a?b"}})),
            "requestRedirect.path.replaceFullPath: \"/a?b\" has '?', which no path has",
        ),
        (
            rewrite(json!({"path": {"type": "ReplaceFullPath"}})),
            "urlRewrite.path.replaceFullPath: is missing",
        ),
        (
            rewrite(json!({"hostname": "10.0.0.1"})),
            "urlRewrite.hostname: \"10.0.0.1\" is not a host name",
        ),
        (
            cors(json!({"allowOrigins": ["foo.com"]})),
            "cors.allowOrigins[0]: \"foo.com\" is not an origin: \"*\", or http or https, \"://\", \
             a host that may start with \"*\", and maybe a port",
        ),
        (
            cors(json!({"allowOrigins": ["*", "https://foo.com"]})),
            "cors.allowOrigins: \"*\" leaves nothing for others to add",
        ),
        (
            cors(json!({"maxAge": 0})),
            "cors.maxAge: 0 is not a number of seconds: at least 1",
        ),
    ] {
        let at = "spec.rules[0].filters[0].";
        assert_eq!(
            refused(json!({"filters": [filter]})),
            format!("{at}{expected}")
        );
    }
}

#[test]
fn filters_that_exclude_each_other_or_come_twice_are_refused() {
    let redirect = json!({"type": "RequestRedirect", "requestRedirect": {}});
    let rewrite = json!({"type": "URLRewrite", "urlRewrite": {}});
    for (rule, expected) in [
        (
            json!({"filters": [rewrite, redirect]}),
            "filters[1].type: RequestRedirect and URLRewrite exclude each other",
        ),
        (
            json!({"filters": [rewrite, rewrite]}),
            "filters[1].type: there is a UrlRewrite already",
        ),
        (
            json!({"filters": [redirect], "backendRefs": [{"name": "v1", "port": 80}]}),
            "backendRefs: a rule with a RequestRedirect has no backends",
        ),
        (
            json!({"matches": [{"path": {"type": "Exact", "value": "/a"}}], "filters": [
                {"type": "URLRewrite", "urlRewrite": {
                    "path": {"type": "ReplacePrefixMatch", "replacePrefixMatch": "/b"}}}]}),
            "filters[0].urlRewrite.path.replacePrefixMatch: every match of the rule must be of a \
             PathPrefix, or there is no prefix to replace",
        ),
    ] {
        assert_eq!(refused(rule), format!("spec.rules[0].{expected}"));
    }
}

#[test]
fn lists_are_bounded() {
    let many = |count: usize, one: Value| Value::Array(vec![one; count]);
    let too_many_rules = facts(json!({"rules": many(17, json!({}))})).unwrap_err();
    assert_eq!(
        too_many_rules,
        Fault::new("spec.rules", "has 17 entries: at most 16")
    );
    for (rule, field, most) in [
        (json!({"matches": many(65, json!({}))}), "matches", 64),
        (
            json!({"backendRefs": many(17, json!({"name": "a", "port": 80}))}),
            "backendRefs",
            16,
        ),
        (
            json!({"filters": many(17, json!({"type": "RequestMirror"}))}),
            "filters",
            16,
        ),
        (
            json!({"matches": [{"headers": many(17, json!({"name": "a", "value": "b"}))}]}),
            "matches[0].headers",
            16,
        ),
    ] {
        let expected = format!(
            "spec.rules[0].{field}: has {} entries: at most {most}",
            most + 1
        );
        assert_eq!(refused(rule), expected);
    }
}

#[test]
fn matches_and_expressions_of_all_rules_together_are_bounded() {
    let matches = Value::Array(vec![json!({}); 64]);
    let rules = |count: usize| json!({"rules": vec![json!({"matches": matches}); count]});
    assert!(facts(rules(2)).is_ok());
    assert_eq!(
        facts(rules(3)).unwrap_err(),
        Fault::new("spec.rules", "have 192 matches together: at most 128")
    );
    let header = |index: usize| json!({"name": format!("h{index}"), "type": "RegularExpression", "value": "a+"});
    let headers: Vec<Value> = (0..16).map(header).collect();
    let matches = |count: usize| vec![json!({"headers": headers}); count];
    assert!(facts(json!({"rules": [{"matches": matches(8)}]})).is_ok());
    assert_eq!(
        facts(json!({"rules": [{"matches": matches(9)}]})).unwrap_err(),
        Fault::new(
            "spec.rules",
            "have 144 regular expressions together: at most 128"
        )
    );
}

#[test]
fn a_wrong_parent_is_refused_with_its_field() {
    let parent = json!({"group": "", "kind": "Service", "name": "web", "port": 70_000});
    let fault = facts(json!({"parentRefs": [parent]})).unwrap_err();
    assert_eq!(
        fault,
        Fault::new("spec.parentRefs[0].port", "70000 is not a port: 1 to 65535")
    );
}
