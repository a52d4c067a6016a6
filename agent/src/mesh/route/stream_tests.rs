use super::super::testing::backend;
use super::*;
use crate::mesh::ObjectName;

fn rule(name: &str, hostnames: &[&str]) -> Arc<StreamRule> {
    Arc::new(StreamRule {
        name: name.into(),
        route: RouteId {
            kind: RouteKind::Tls,
            name: ObjectName::new("shop", name),
        },
        hostnames: hostnames.iter().map(|name| (*name).into()).collect(),
        backends: vec![backend("v1", 1)],
    })
}

#[test]
fn the_most_specific_host_name_is_chosen() {
    let routes = StreamRoutes::new(
        RouteKind::Tls,
        [
            rule("wide", &["*.example.com"]),
            rule("narrow", &["*.shop.example.com"]),
            rule("exact", &["a.shop.example.com"]),
        ],
    );
    for (sni, expected) in [
        (Some("a.shop.example.com"), Some("exact")),
        (Some("A.Shop.Example.com"), Some("exact")),
        (Some("b.shop.example.com"), Some("narrow")),
        (Some("x.b.shop.example.com"), Some("narrow")),
        (Some("shop.example.com"), Some("wide")),
        (Some("example.com"), None),
        (Some(".example.com"), None),
        (Some("evilexample.com"), None),
        (Some("example.org"), None),
        (None, None),
    ] {
        let chosen = routes.select(sni).map(|rule| &*rule.name);
        assert_eq!(chosen, expected, "{sni:?}");
    }
}

#[test]
fn a_rule_without_host_names_is_for_every_connection_and_the_first_of_equals_counts() {
    let routes = StreamRoutes::new(RouteKind::Tcp, [rule("first", &[]), rule("second", &[])]);
    assert_eq!(&*routes.select(None).unwrap().name, "first");
    assert_eq!(&*routes.select(Some("x")).unwrap().name, "first");
}
