//! Routes of every kind, as clients and servers see them.

use std::collections::BTreeMap;
use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde_json::{Value, json};
use undermesh_lab::curl::{ask, ask_often};
use undermesh_lab::requests::traffic_policy;
use undermesh_lab::stage::{PORT, STREAM, TARGET, serve_versions, versions};
use undermesh_lab::traffic::{ClientOptions, Kind, ServeOptions, ServerReport};
use undermesh_lab::web::{Behaviour, LoadOptions, WebOptions};
use undermesh_lab::{Lab, PodSpec, ServiceSpec, Side, Traffic, apps, machine, wait};

const LIMIT: Duration = Duration::from_secs(30);
const GATEWAY: &str = "gateway.networking.k8s.io/v1";

fn object(api: &str, kind: &str, namespace: &str, name: &str, spec: &Value) -> Value {
    json!({
        "apiVersion": api, "kind": kind,
        "metadata": {"name": name, "namespace": namespace}, "spec": spec,
    })
}

/// A route of Service `web` on one of its ports.
fn route(kind: &str, port: u16, mut spec: Value) -> Value {
    spec["parentRefs"] = json!([{"group": "", "kind": "Service", "name": "web", "port": port}]);
    object(GATEWAY, kind, "default", "web", &spec)
}

fn http_route(rules: &Value) -> Value {
    route("HTTPRoute", PORT, json!({"rules": rules}))
}

fn to(name: &str, port: u16, weight: u32) -> Value {
    json!({"name": name, "port": port, "weight": weight})
}

fn url(lab: &Lab, path: &str) -> Result<String> {
    Ok(format!("http://{}{path}", lab.service("web", PORT)?))
}

#[test]
fn grpc_calls_go_by_service_method_and_metadata_and_by_weight() -> Result<()> {
    machine::require_module("grpc", "python3-grpcio")?;
    let lab = versions().start()?;
    let client = lab.pod("client")?;
    let port = TARGET.to_string();
    let serve = |name: &str| apps::python_server(&lab.pod(name)?, "grpc_server", &[&port, name]);
    let _servers = [serve("v1")?, serve("v2")?];
    let unary = json!({"method": {"service": "lab.Echo", "method": "Unary"}});
    let canary = json!({
        "method": {"service": "lab.Echo", "method": "Unary"},
        "headers": [{"name": "env", "value": "canary"}],
    });
    lab.put(route(
        "GRPCRoute",
        PORT,
        json!({"rules": [
            {"matches": [unary], "backendRefs": [to("v1", PORT, 80), to("v2", PORT, 20)]},
            {
                "matches": [canary],
                "filters": [{"type": "RequestHeaderModifier",
                    "requestHeaderModifier": {"set": [{"name": "x-route", "value": "canary"}]}}],
                "backendRefs": [to("v2", PORT, 1)],
            },
        ]}),
    ))?;
    let to = lab.service("web", PORT)?.to_string();
    let call = |calls: &Value| -> Result<Value> {
        let seen = apps::python_client(&client, "grpc_route_client", &[&to, &calls.to_string()])?;
        Ok(seen["calls"].clone())
    };
    let fail = json!({"method": "Fail"});
    wait::until_true("the route", LIMIT, || {
        Ok(call(&json!([fail]))?[0]["codes"]["UNIMPLEMENTED"] == 1)
    })?;
    let seen = call(&json!([
        {"method": "Unary", "times": 300},
        {"method": "Unary", "times": 20, "metadata": {"env": "canary"}},
        {"method": "Fail", "times": 3},
        {"method": "other.Service/Unary", "times": 3},
    ]))?;
    assert_eq!(seen[0]["codes"], json!({"OK": 300}), "{seen}");
    let second = seen[0]["servers"]["v2"].as_u64().context("v2")?;
    // Five standard deviations around 60.
    assert!((25..=95).contains(&second), "{seen}");
    assert_eq!(seen[0]["saw"], json!({"": 300}), "{seen}");
    assert_eq!(seen[1]["servers"], json!({"v2": 20}), "{seen}");
    assert_eq!(seen[1]["saw"], json!({"canary": 20}), "{seen}");
    for unmatched in [&seen[2], &seen[3]] {
        assert_eq!(unmatched["codes"], json!({"UNIMPLEMENTED": 3}), "{seen}");
        assert_eq!(unmatched["details"], "no_route", "{seen}");
    }
    Ok(())
}

#[test]
fn connections_go_by_the_weights_of_a_tcp_route() -> Result<()> {
    let lab = versions().start()?;
    let client = lab.pod("client")?;
    let serve = |name: &str| lab.pod(name)?.serve(ServeOptions::new().echo(STREAM));
    let servers = [serve("v1")?, serve("v2")?];
    let weigh = |v1: u32, v2: u32| {
        let backends = [to("v1", STREAM, v1), to("v2", STREAM, v2)];
        lab.put(route(
            "TCPRoute",
            STREAM,
            json!({"rules": [{"backendRefs": backends}]}),
        ))
    };
    let address = lab.service("web", STREAM)?;
    let accepted =
        |server: &Traffic<ServerReport>| Ok::<_, anyhow::Error>(server.report()?.accepted);
    let connect = |count: u64| -> Result<[u64; 2]> {
        let before = [accepted(&servers[0])?, accepted(&servers[1])?];
        let options = ClientOptions::echo(address)
            .connections(count)
            .concurrency(4);
        let report = client.traffic(&options)?;
        assert_eq!((report.ok, report.failed), (count, 0), "{report:?}");
        Ok([
            accepted(&servers[0])? - before[0],
            accepted(&servers[1])? - before[1],
        ])
    };
    weigh(0, 1)?;
    wait::until_true("the route", LIMIT, || Ok(connect(20)? == [0, 20]))?;
    weigh(75, 25)?;
    wait::until_true("both to get some", LIMIT, || Ok(connect(20)?[0] > 0))?;
    let [first, second] = connect(400)?;
    assert_eq!(first + second, 400);
    // Five standard deviations around 100.
    assert!((56..=144).contains(&second), "{first} and {second}");
    Ok(())
}

#[test]
fn tls_goes_by_server_name_and_weight_and_is_not_opened() -> Result<()> {
    machine::require(&[machine::CURL, machine::NGINX, machine::OPENSSL])?;
    // A port that is TLS by its name: of one that is TCP nothing is looked at.
    let secure = json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": {"name": "secure", "namespace": "default"},
        "spec": {"selector": {"group": "web"}, "ports": [
            {"name": "tls", "port": STREAM, "targetPort": STREAM, "protocol": "TCP"},
        ]},
    });
    let lab = versions().document(secure).start()?;
    let client = lab.pod("client")?;
    let mut servers = Vec::new();
    for name in ["v1", "v2"] {
        let pod = lab.pod(name)?;
        let dir = pod.record().dir.join("tls");
        fs::create_dir_all(&dir)?;
        let here = dir.display().to_string();
        #[rustfmt::skip]
        pod.run("openssl", &[
            "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "1",
            "-subj", "/CN=shop", "-keyout", &format!("{here}/key"), "-out", &format!("{here}/pem"),
        ])?;
        let configuration = format!(
            "daemon off; user root; pid {here}/pid; error_log stderr; events {{}}
http {{
  access_log off; client_body_temp_path {here}/body; proxy_temp_path {here}/proxy;
  fastcgi_temp_path {here}/fastcgi; uwsgi_temp_path {here}/uwsgi; scgi_temp_path {here}/scgi;
  server {{ listen {STREAM} ssl; ssl_certificate {here}/pem; ssl_certificate_key {here}/key;
    location / {{ add_header x-served-by {name}; return 200 \"$ssl_server_name\"; }} }}
}}
"
        );
        let file = dir.join("nginx.conf");
        fs::write(&file, configuration)?;
        let file = file.display().to_string();
        servers.push(pod.spawn("nginx", "nginx", &["-e", "stderr", "-c", &file])?);
    }
    let tls_route = |name: &str, hostname: &str, backends: &[Value]| {
        let spec = json!({
            "parentRefs": [{"group": "", "kind": "Service", "name": "secure", "port": STREAM}],
            "hostnames": [hostname], "rules": [{"backendRefs": backends}],
        });
        lab.put(object(GATEWAY, "TLSRoute", "default", name, &spec))
    };
    tls_route("one", "one.example", &[to("v1", STREAM, 1)])?;
    tls_route(
        "any",
        "*.example",
        &[to("v1", STREAM, 30), to("v2", STREAM, 70)],
    )?;
    let address = lab.service("secure", STREAM)?;
    let hello = |host: &str| {
        let resolve = format!("{host}:{STREAM}:{}", address.ip());
        let url = format!("https://{host}:{STREAM}/");
        ask(&client, &url, &["--insecure", "--resolve", &resolve])
    };
    wait::until_true("the routes", LIMIT, || {
        // curl's 35: no TLS came about.
        Ok(hello("one.example")?.server() == "v1" && hello("other.test")?.exit == 35)
    })?;
    let mut by_server = BTreeMap::new();
    for _ in 0..60 {
        let answer = hello("two.example")?;
        assert_eq!(answer.body, "two.example", "{answer:?}");
        *by_server.entry(answer.server().to_owned()).or_insert(0) += 1;
    }
    // Five standard deviations around 42.
    let second = by_server.get("v2").copied().unwrap_or(0);
    assert!((24..60).contains(&second), "{by_server:?}");
    for _ in 0..10 {
        let answer = hello("one.example")?;
        assert_eq!((answer.server(), answer.status), ("v1", 200), "{answer:?}");
    }
    Ok(())
}

#[test]
fn a_session_stays_with_its_server_and_others_are_spread() -> Result<()> {
    let lab = versions().start()?;
    let client = lab.pod("client")?;
    let _servers = serve_versions(&lab)?;
    lab.put(http_route(&json!([{
        "sessionPersistence": {"type": "Cookie", "sessionName": "at"},
        "backendRefs": [to("web", PORT, 1)],
    }])))?;
    lab.put(traffic_policy(
        "web",
        json!({"balancing": {"algorithm": "RoundRobin"}}),
    ))?;
    let url = url(&lab, "/")?;
    wait::until_true("the route", LIMIT, || {
        Ok(ask(&client, &url, &[])?.header("set-cookie").is_some())
    })?;
    // One that has just come may be passed over for a while: slow start.
    let mut seen = BTreeMap::new();
    wait::until_true("both servers to begin sessions", LIMIT, || {
        for answer in ask_often(&client, &url, 8, &[])? {
            assert_eq!(answer.status, 200, "{answer:?}");
            let cookie = answer.header("set-cookie").context("no session")?;
            assert!(cookie.starts_with("at="), "{cookie}");
            let cookie = cookie.split(';').next().unwrap_or_default().to_owned();
            seen.insert(answer.server().to_owned(), cookie);
        }
        Ok(seen.len() == 2)
    })?;
    for (server, cookie) in seen {
        let cookie = format!("cookie: {cookie}");
        for answer in ask_often(&client, &url, 10, &["--header", &cookie])? {
            assert_eq!(
                (answer.status, answer.server()),
                (200, &*server),
                "{answer:?}"
            );
        }
    }
    Ok(())
}

#[test]
fn a_backend_of_another_namespace_needs_a_grant() -> Result<()> {
    let namespace = json!({
        "apiVersion": "v1", "kind": "Namespace",
        "metadata": {"name": "other", "labels": {"undermesh.io/mesh": "enabled"}},
    });
    let lab = versions()
        .document(namespace)
        .pod(
            PodSpec::new("foreign")
                .namespace("other")
                .on(Side::B)
                .port("http", TARGET),
        )
        .service(
            ServiceSpec::new("foreign")
                .namespace("other")
                .http(PORT, TARGET),
        )
        .start()?;
    let client = lab.pod("client")?;
    let foreign = lab.pod("other/foreign")?;
    let _server = foreign.serve_web(&WebOptions::new("foreign", TARGET))?;
    let backend = json!({"name": "foreign", "namespace": "other", "port": PORT});
    lab.put(http_route(&json!([{"backendRefs": [backend]}])))?;
    let url = url(&lab, "/")?;
    wait::until_true("the route", LIMIT, || {
        let answer = ask(&client, &url, &[])?;
        Ok((answer.status, answer.reason()) == (500, "invalid_backend"))
    })?;
    let grant = |from: &str| {
        object(
            "gateway.networking.k8s.io/v1beta1",
            "ReferenceGrant",
            "other",
            "grant",
            &json!({
                "from": [{"group": "gateway.networking.k8s.io", "kind": "HTTPRoute", "namespace": from}],
                "to": [{"group": "", "kind": "Service"}],
            }),
        )
    };
    lab.put(grant("elsewhere"))?;
    let routes = || lab.node(Side::A)?.agent().admin_text("/routes");
    assert!(routes()?.contains("RefNotPermitted"), "{}", routes()?);
    lab.put(grant("default"))?;
    wait::until_true("the grant", LIMIT, || {
        Ok(ask(&client, &url, &[])?.server() == "foreign")
    })?;
    assert!(!routes()?.contains("RefNotPermitted"), "{}", routes()?);
    // And it can be taken back.
    lab.put(grant("elsewhere"))?;
    wait::until_true("the grant to be gone", LIMIT, || {
        Ok(ask(&client, &url, &[])?.status == 500)
    })
}

/// Of each of two clients: no more of its requests are ever under way.
const CONNECTIONS: u32 = 32;

#[test]
fn a_change_of_route_under_load_is_used_at_once_and_cuts_nothing() -> Result<()> {
    let lab = versions().start()?;
    let client = lab.pod("client")?;
    let servers = serve_versions(&lab)?;
    for server in &servers {
        server.behave(&Behaviour {
            // Every change finds requests in flight.
            delay_ms: 150,
            ..Behaviour::default()
        })?;
    }
    let send_to = |name: &str| lab.put(http_route(&json!([{"backendRefs": [to(name, PORT, 1)]}])));
    send_to("v1")?;
    let load = |http2: bool| {
        let options = LoadOptions::new(lab.service("web", PORT)?)
            .rate(100)
            .connections(CONNECTIONS);
        let options = options.during(4 * LIMIT);
        client.start_load(&if http2 { options.http2() } else { options })
    };
    let loads = [load(false)?, load(true)?];
    let received = || -> Result<[u64; 2]> {
        Ok([servers[0].report()?.received, servers[1].report()?.received])
    };
    for round in 0..6 {
        let (new, name) = [(1, "v2"), (0, "v1")][round % 2];
        let before = received()?;
        send_to(name)?;
        wait::until_true("the new one to be used", LIMIT, || {
            Ok(received()?[new] > before[new] + 20)
        })?;
        // What was on its way to the old one comes still, and nothing else.
        let settled = received()?;
        wait::until_true("nothing to go to the old one", LIMIT, || {
            let before = received()?;
            wait::until_true("more to be sent", LIMIT, || {
                Ok(received()?[new] > before[new] + 40)
            })?;
            Ok(received()?[1 - new] == before[1 - new])
        })?;
        let late = received()?[1 - new] - settled[1 - new];
        assert!(
            late <= 2 * u64::from(CONNECTIONS),
            "round {round}: {late} came later"
        );
    }
    for load in loads {
        let report = load.stop(LIMIT)?;
        assert_eq!(report.failed(), 0, "{report:?}");
        // Six rounds of over 40 requests, by two clients.
        assert!(report.ok > 60 && report.by_server.len() == 2, "{report:?}");
    }
    Ok(())
}

#[test]
fn filters_redirect_rewrite_mirror_and_answer_preflights() -> Result<()> {
    let lab = versions().start()?;
    let client = lab.pod("client")?;
    let [first, second] = serve_versions(&lab)?;
    let path = |value: &str| json!([{"path": {"type": "PathPrefix", "value": value}}]);
    lab.put(http_route(&json!([
        {
            "matches": path("/old"),
            "filters": [{"type": "RequestRedirect", "requestRedirect": {
                "hostname": "new.example", "statusCode": 301,
                "path": {"type": "ReplacePrefixMatch", "replacePrefixMatch": "/new"},
            }}],
        },
        {
            "matches": path("/status"),
            "filters": [
                {"type": "URLRewrite", "urlRewrite": {"path": {"type": "ReplaceFullPath", "replaceFullPath": "/ready"}}},
                {"type": "ResponseHeaderModifier", "responseHeaderModifier": {
                    "add": [{"name": "x-rewritten", "value": "yes"}], "remove": ["x-served-by"],
                }},
            ],
            "backendRefs": [to("v1", PORT, 1)],
        },
        {
            "matches": path("/mirror"),
            "filters": [{"type": "RequestMirror", "requestMirror": {"backendRef": {"name": "v2", "port": PORT}}}],
            "backendRefs": [to("v1", PORT, 1)],
        },
        {
            "matches": path("/cors"),
            "filters": [{"type": "CORS", "cors": {
                "allowOrigins": ["https://*.example.com"], "allowMethods": ["GET", "PUT"],
                "allowHeaders": ["x-mine"], "maxAge": 60,
            }}],
            "backendRefs": [to("v1", PORT, 1)],
        },
    ])))?;
    let fetch = |path: &str, more: &[&str]| ask(&client, &url(&lab, path)?, more);
    wait::until_true("the route", LIMIT, || {
        Ok(fetch("/none", &[])?.reason() == "no_route")
    })?;

    let answer = fetch("/old/shoes?size=8", &[])?;
    assert_eq!(answer.status, 301, "{answer:?}");
    assert_eq!(
        answer.header("location"),
        Some("http://new.example/new/shoes?size=8")
    );
    assert_eq!(answer.reason(), "direct_response", "{answer:?}");

    let answer = fetch("/status/deep", &[])?;
    assert_eq!((answer.status, answer.server()), (200, ""), "{answer:?}");
    assert_eq!(answer.header("x-rewritten"), Some("yes"), "{answer:?}");
    assert_eq!(answer.header("x-asked-for"), Some("/ready"), "{answer:?}");

    let before = [first.report()?.received, second.report()?.received];
    for _ in 0..10 {
        let answer = fetch("/mirror", &["--data", "body"])?;
        assert_eq!((answer.status, answer.server()), (200, "v1"), "{answer:?}");
    }
    assert_eq!(first.report()?.received - before[0], 10);
    wait::until_true("the copies", LIMIT, || {
        Ok(second.report()?.received - before[1] == 10)
    })?;
    wait::until_true("each copy to have the whole body", LIMIT, || {
        Ok(second.report()?.body_bytes == 40)
    })?;

    let before = first.report()?.received;
    let preflight = |origin: &str| {
        fetch(
            "/cors",
            &[
                "--request",
                "OPTIONS",
                "--header",
                &format!("origin: {origin}"),
                "--header",
                "access-control-request-method: PUT",
            ],
        )
    };
    let answer = preflight("https://shop.example.com")?;
    assert_eq!(answer.status, 204, "{answer:?}");
    assert_eq!(
        answer.header("access-control-allow-origin"),
        Some("https://shop.example.com")
    );
    assert_eq!(answer.header("access-control-max-age"), Some("60"));
    let answer = preflight("https://example.org")?;
    assert_eq!(
        answer.header("access-control-allow-origin"),
        None,
        "{answer:?}"
    );
    assert_eq!(
        first.report()?.received,
        before,
        "preflights are answered on the way"
    );
    let answer = fetch("/cors", &["--header", "origin: https://shop.example.com"])?;
    assert_eq!((answer.status, answer.server()), (200, "v1"), "{answer:?}");
    assert_eq!(
        answer.header("access-control-allow-origin"),
        Some("https://shop.example.com")
    );
    Ok(())
}

/// What a client sees that waits for its server to speak first.
#[test]
fn a_silent_client_waits_no_longer_than_the_mesh_says_and_loses_nothing() -> Result<()> {
    const SILENT: u16 = 9000;
    let service = |name: &str, port_name: &str| {
        json!({
            "apiVersion": "v1", "kind": "Service",
            "metadata": {"name": name, "namespace": "default"},
            "spec": {"selector": {"app": "v2"}, "ports": [
                {"name": port_name, "port": SILENT, "targetPort": SILENT, "protocol": "TCP"},
            ]},
        })
    };
    let lab = versions()
        .document(service("told", "tcp-banner"))
        .document(service("untold", "banner"))
        .start()?;
    let server = lab.pod("v2")?.serve(ServeOptions::new().banner(SILENT))?;
    let client = lab.pod("client")?;
    // How long the quickest of ten connections takes: the others waited for the machine too.
    let each = |name: &str| -> Result<Duration> {
        let mut options = ClientOptions::new(Kind::Banner, lab.service(name, SILENT)?);
        options = options.connections(1).bytes(100_000).requests(3);
        let mut quickest = Duration::MAX;
        for _ in 0..10 {
            let start = Instant::now();
            let report = client.traffic(&options)?;
            assert_eq!((report.ok, report.failed), (1, 0), "{name}: {report:?}");
            quickest = quickest.min(start.elapsed());
        }
        Ok(quickest)
    };
    let wait = Duration::from_millis(400);
    lab.put(json!({
        "apiVersion": "undermesh.io/v1alpha1", "kind": "MeshConfig",
        "metadata": {"name": "mesh"}, "spec": {"detectionTimeout": "400ms"},
    }))?;
    wait::until_true("the setting", LIMIT, || Ok(each("untold")? >= wait))?;
    let untold = each("untold")?;
    assert!(untold >= wait && untold < wait * 2, "{untold:?}");
    let told = each("told")?;
    assert!(told < wait / 2, "a hint spares the wait: {told:?}");
    assert!(server.report()?.completed >= 30);
    Ok(())
}
