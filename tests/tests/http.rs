//! HTTP of pods through their agents, with programs that are not ours on both ends.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use undermesh_lab::metrics::Metrics;
use undermesh_lab::process::Process;
use undermesh_lab::requests::traffic_policy;
use undermesh_lab::{Lab, LabBuilder, PodHandle, PodSpec, ServiceSpec, Side, machine, wait};

const PORT: u16 = 8080;
const START: Duration = Duration::from_secs(20);

/// A server of `http_server.py` in a pod.
struct Server {
    process: Process,
    dir: PathBuf,
}

impl Server {
    fn start(lab: &Lab, pod: &str) -> Result<Self> {
        machine::require(&[machine::CURL, machine::PYTHON])?;
        let pod = lab.pod(pod)?;
        let dir = pod.record().dir.join("http");
        fs::create_dir_all(&dir)?;
        let script = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/http_server.py");
        let (script, port) = (script.display().to_string(), PORT.to_string());
        let arguments = [&*script, pod.name(), &port, &dir.display().to_string()];
        let process = pod.spawn("http", "python3", &arguments)?;
        let url = format!("http://127.0.0.1:{PORT}/ready");
        wait::until_true("the server to listen", START, || {
            Ok(pod.run("curl", &["-sf", &url]).is_ok())
        })?;
        let server = Self { process, dir };
        server.forget()?;
        Ok(server)
    }

    /// Counts attempts anew from here.
    fn forget(&self) -> Result<()> {
        Ok(fs::write(self.dir.join("requests"), "")?)
    }

    /// Makes it answer in this way from the next request on.
    fn behave(&self, mode: &str) -> Result<()> {
        // Never half a word for a server that reads it meanwhile.
        let (new, mode_file) = (self.dir.join("mode.new"), self.dir.join("mode"));
        fs::write(&new, mode)?;
        Ok(fs::rename(new, mode_file)?)
    }

    /// The attempts that it saw, by the number that they bore.
    fn attempts(&self) -> Result<BTreeMap<String, usize>> {
        let mut attempts = BTreeMap::new();
        for line in fs::read_to_string(self.dir.join("requests"))?.lines() {
            let number = line.split(' ').nth(2).context("three words")?;
            *attempts.entry(number.to_owned()).or_default() += 1;
        }
        Ok(attempts)
    }
}

/// What curl saw of its transfers: status, reason of the mesh, and body of each.
struct Seen(Vec<(u16, String, String)>);

impl Seen {
    fn statuses(&self) -> BTreeMap<u16, usize> {
        self.by(|one| one.0)
    }

    fn reasons(&self) -> BTreeMap<String, usize> {
        self.by(|one| one.1.clone())
    }

    fn bodies(&self) -> BTreeMap<String, usize> {
        self.by(|one| one.2.trim().to_owned())
    }

    fn by<K: Ord>(&self, key: impl Fn(&(u16, String, String)) -> K) -> BTreeMap<K, usize> {
        let mut counts = BTreeMap::new();
        for one in &self.0 {
            *counts.entry(key(one)).or_default() += 1;
        }
        counts
    }
}

/// Fetches a URL so many times with one curl, which keeps its connection as long as it may.
fn fetch(pod: &PodHandle, url: &str, times: usize, options: &[&str]) -> Result<Seen> {
    let format = "\u{1}%{http_code}\u{1}%header{x-undermesh-reason}\u{2}";
    let mut arguments = vec!["-s", "--max-time", "30", "-w", format];
    arguments.extend(options);
    // A number that the server does not look at, so that it is one transfer each.
    let urls = format!("{url}?[1-{times}]");
    arguments.push(&urls);
    let output = pod.place().output("curl", &arguments)?;
    let text = String::from_utf8_lossy(&output.stdout);
    let parts = text.split('\u{2}').filter(|part| !part.is_empty());
    let seen = parts.map(|part| {
        let mut fields = part.split('\u{1}');
        let mut next = || fields.next().unwrap_or_default().to_owned();
        let (body, status, reason) = (next(), next(), next());
        Ok((status.parse().context(part.to_owned())?, reason, body))
    });
    let seen = Seen(seen.collect::<Result<_>>()?);
    ensure!(seen.0.len() == times, "{} of {times}: {text}", seen.0.len());
    Ok(seen)
}

fn pods() -> LabBuilder {
    let shop = |name: &str| PodSpec::new(name).label("team", "shop").port("http", PORT);
    Lab::builder()
        .pod(PodSpec::new("client").on(Side::A))
        .pod(shop("near").on(Side::A).label("version", "v1"))
        .pod(shop("far").on(Side::B).label("version", "v2"))
        .service(ServiceSpec::new("near").http(80, PORT))
        .service(ServiceSpec::new("far").http(80, PORT))
        .service(
            ServiceSpec::new("shop")
                .select("team", "shop")
                .http(80, PORT),
        )
}

fn route(rule: &Value) -> Value {
    json!({
        "apiVersion": "gateway.networking.k8s.io/v1",
        "kind": "HTTPRoute",
        "metadata": {"name": "shop", "namespace": "default"},
        "spec": {
            "parentRefs": [{"group": "", "kind": "Service", "name": "shop", "port": 80}],
            "rules": [rule],
        },
    })
}

/// To all endpoints of the Service in turn: by default the faster one of two gets what comes one after the other, and one
/// that is new is passed over for a while.
fn in_turn() -> Value {
    let in_turn = json!({"balancing": {"algorithm": "RoundRobin"}, "slowStart": {"window": "0s"}});
    traffic_policy("shop", in_turn)
}

fn metrics(lab: &Lab) -> Result<Metrics> {
    Ok(Metrics::parse(&lab.node(Side::A)?.agent().metrics()?))
}

#[test]
fn requests_cross_nodes_and_stay_on_one_in_both_families_and_are_counted() -> Result<()> {
    let lab = pods().start()?;
    let client = lab.pod("client")?;
    let _servers = [Server::start(&lab, "near")?, Server::start(&lab, "far")?];
    wait::until_true("IPv6 between the nodes", START, || {
        let url = format!("http://{}/", lab.pod("far")?.v6(PORT)?);
        Ok(client
            .run("curl", &["-sf", "--max-time", "5", &url])
            .is_ok())
    })?;
    for name in ["near", "far"] {
        for to in [lab.service(name, 80)?, lab.service6(name, 80)?] {
            let seen = fetch(&client, &format!("http://{to}/"), 10, &[])?;
            assert_eq!(seen.bodies(), BTreeMap::from([(name.into(), 10)]), "{to}");
            assert_eq!(seen.statuses(), BTreeMap::from([(200, 10)]), "{to}");
        }
    }
    let to = lab.service("far", 80)?;
    let headers = client.run("curl", &["-sf", &format!("http://{to}/headers")])?;
    for expected in [
        format!("x-forwarded-for: {}", client.ip()),
        "x-undermesh-attempt: 1".to_owned(),
        format!("host: {to}").trim_end_matches(":80").to_owned(),
    ] {
        assert!(headers.contains(&expected), "{expected} in {headers}");
    }
    assert!(headers.contains("x-request-id: "), "{headers}");
    let counted = metrics(&lab)?;
    for (service, security) in [("near", "same_node"), ("far", "mutual_tls")] {
        let labels = [
            ("destination_service_name", service),
            ("connection_security_policy", security),
            ("status", "200"),
            ("reporter", "source"),
        ];
        let count = counted.count("undermesh_http_requests_total", &labels);
        assert!(count >= 20, "{service}: {count}");
    }
    Ok(())
}

#[test]
fn http_2_with_prior_knowledge_reaches_a_server_that_speaks_it() -> Result<()> {
    machine::require(&[machine::CURL, machine::NGINX, machine::H2LOAD])?;
    let lab = pods().start()?;
    let (client, far) = (lab.pod("client")?, lab.pod("far")?);
    let dir = far.record().dir.join("nginx");
    fs::create_dir_all(&dir)?;
    let here = dir.display();
    let configuration = format!(
        "daemon off; user root; pid {here}/pid; error_log stderr; events {{}}
http {{
  access_log off; client_body_temp_path {here}/body; proxy_temp_path {here}/proxy;
  fastcgi_temp_path {here}/fastcgi; uwsgi_temp_path {here}/uwsgi; scgi_temp_path {here}/scgi;
  server {{ listen {PORT} http2; location / {{ return 200 \"$server_protocol\\n\"; }} }}
}}
"
    );
    let file = dir.join("nginx.conf");
    fs::write(&file, configuration)?;
    let arguments = ["-e", "stderr", "-c", &file.display().to_string()];
    let _nginx = far.spawn("nginx", "nginx", &arguments)?;
    let url = format!("http://{}/", lab.service("far", 80)?);
    let options = ["--http2-prior-knowledge"];
    wait::until_true("nginx to listen", START, || {
        Ok(fetch(&client, &url, 1, &options).is_ok_and(|seen| seen.statuses().contains_key(&200)))
    })?;
    let seen = fetch(&client, &url, 1, &options)?;
    assert_eq!(seen.bodies(), BTreeMap::from([("HTTP/2.0".into(), 1)]));
    // curl of Debian 12 makes one request for each HTTP/2 connection; this makes ten at a time.
    let many = ["-n", "500", "-c", "2", "-m", "10", &url];
    let said = client.run("h2load", &many)?;
    assert!(said.contains("500 succeeded, 0 failed"), "{said}");
    Ok(())
}

#[test]
fn requests_of_one_connection_go_to_all_endpoints() -> Result<()> {
    let lab = pods().start()?;
    let client = lab.pod("client")?;
    let _servers = [Server::start(&lab, "near")?, Server::start(&lab, "far")?];
    let url = format!("http://{}/", lab.service("shop", 80)?);
    lab.put(in_turn())?;
    wait::until_true("the policy", START, || {
        Ok(fetch(&client, &url, 20, &[])?.bodies().len() == 2)
    })?;
    let before = metrics(&lab)?;
    let seen = fetch(&client, &url, 200, &[])?;
    assert_eq!(seen.statuses(), BTreeMap::from([(200, 200)]));
    let bodies = seen.bodies();
    assert!(
        bodies.len() == 2 && bodies.values().all(|count| *count >= 60),
        "{bodies:?}"
    );
    let opened = |metrics: &Metrics| {
        let labels = [("reporter", "source"), ("destination_service_name", "shop")];
        metrics.count("undermesh_tcp_connections_opened_total", &labels)
    };
    assert_eq!(opened(&metrics(&lab)?) - opened(&before), 1);
    Ok(())
}

#[test]
fn a_server_that_resets_is_tried_elsewhere_and_the_client_sees_nothing() -> Result<()> {
    let lab = pods().start()?;
    let client = lab.pod("client")?;
    let (near, far) = (Server::start(&lab, "near")?, Server::start(&lab, "far")?);
    lab.put(route(&json!({
        "backendRefs": [{"name": "shop", "port": 80}],
        "retry": {"codes": [503], "attempts": 2},
    })))?;
    lab.put(in_turn())?;
    let url = format!("http://{}/", lab.service("shop", 80)?);
    wait::until_true("the policy", START, || {
        Ok(fetch(&client, &url, 20, &[])?.bodies().len() == 2)
    })?;
    near.forget()?;
    far.forget()?;
    near.behave("reset")?;
    let seen = fetch(&client, &url, 200, &[])?;
    assert_eq!(
        seen.statuses(),
        BTreeMap::from([(200, 200)]),
        "{:?}",
        seen.reasons()
    );
    assert_eq!(seen.bodies(), BTreeMap::from([("far".into(), 200)]));
    let (failed, served) = (near.attempts()?, far.attempts()?);
    let retried: usize = failed.values().sum();
    // Ejected after a few, and tried again now and then.
    assert!((1..=40).contains(&retried), "{failed:?}");
    assert_eq!(served.get("2"), Some(&retried), "{served:?} {failed:?}");
    Ok(())
}

#[test]
fn a_destination_that_fails_is_rejected_at_once_until_it_recovers() -> Result<()> {
    let lab = pods().start()?;
    let client = lab.pod("client")?;
    let far = Server::start(&lab, "far")?;
    // Whatever the rate is at which this machine sends.
    let breaker =
        json!({"minimumRequests": 10, "window": "1m", "openTime": {"base": "2s", "cap": "2s"}});
    lab.put(traffic_policy("far", json!({"breaker": breaker})))?;
    let url = format!("http://{}/", lab.service("far", 80)?);
    assert_eq!(
        fetch(&client, &url, 10, &[])?.statuses(),
        BTreeMap::from([(200, 10)])
    );
    far.behave("fail")?;
    let opened = || -> Result<bool> {
        let seen = fetch(&client, &url, 20, &[])?;
        Ok(seen.reasons().contains_key("circuit_open"))
    };
    wait::until_true("the breaker to open", START, opened)?;
    far.forget()?;
    let reasons = fetch(&client, &url, 300, &[])?.reasons();
    let rejected = reasons.get("circuit_open").copied().unwrap_or_default();
    assert!(rejected > 200, "{reasons:?}");
    let reached: usize = far.attempts()?.values().sum();
    assert!(
        reached < 100,
        "{reached} of 300 requests reached a server that fails"
    );
    far.behave("ok")?;
    wait::until_true("the breaker to close", START, || {
        Ok(fetch(&client, &url, 5, &[])?.statuses() == BTreeMap::from([(200, 5)]))
    })?;
    assert_eq!(
        fetch(&client, &url, 50, &[])?.statuses(),
        BTreeMap::from([(200, 50)])
    );
    let moves = metrics(&lab)?.by("undermesh_circuit_breaker_transitions_total", "to");
    for state in ["open", "half_open", "closed"] {
        assert!(
            moves.get(state).is_some_and(|count| *count >= 1.0),
            "{moves:?}"
        );
    }
    let shown = lab.node(Side::A)?.agent().admin("/breakers")?;
    assert_eq!(shown[0]["destination"], "default/far:80", "{shown}");
    assert_eq!(shown[0]["state"], "closed", "{shown}");
    Ok(())
}

#[test]
fn a_canary_gets_its_share_and_a_change_of_weights_is_in_force_at_once() -> Result<()> {
    let lab = pods().start()?;
    let client = lab.pod("client")?;
    let _servers = [Server::start(&lab, "near")?, Server::start(&lab, "far")?];
    let url = format!("http://{}/", lab.service("shop", 80)?);
    let weights = |near: u32, far: u32| {
        lab.put(route(&json!({"backendRefs": [
            {"name": "near", "port": 80, "weight": near},
            {"name": "far", "port": 80, "weight": far},
        ]})))
    };
    // One that matches nothing tells when it is there, and so when the next has come.
    let none = json!({"matches": [{"path": {"type": "Exact", "value": "/only"}}],
        "backendRefs": [{"name": "far", "port": 80}]});
    let unmatched = || -> Result<bool> {
        let seen = fetch(&client, &url, 1, &[])?;
        Ok(seen.0[0].0 == 404 && seen.0[0].1 == "no_route")
    };
    lab.put(route(&none))?;
    wait::until_true("no rule to match", START, unmatched)?;
    weights(80, 20)?;
    wait::until_true("the route", START, || Ok(!unmatched()?))?;
    let bodies = fetch(&client, &url, 500, &[])?.bodies();
    let canary = bodies.get("far").copied().unwrap_or_default();
    // Five standard deviations around 100.
    assert!((55..=145).contains(&canary), "{bodies:?}");
    weights(0, 100)?;
    wait::until_true("the change", START, || {
        Ok(fetch(&client, &url, 20, &[])?.bodies() == BTreeMap::from([("far".into(), 20)]))
    })?;
    let invalid = json!({"backendRefs": [{"name": "nobody", "port": 80}]});
    lab.put(route(&invalid))?;
    wait::until_true("an invalid backend", START, || {
        let seen = fetch(&client, &url, 1, &[])?;
        Ok(seen.0[0].0 == 500 && seen.0[0].1 == "invalid_backend")
    })?;
    Ok(())
}

#[test]
fn a_server_that_was_killed_is_told_of_and_serves_again_when_it_is_back() -> Result<()> {
    let lab = pods().start()?;
    let client = lab.pod("client")?;
    let mut server = Server::start(&lab, "far")?;
    let url = format!("http://{}/", lab.service("far", 80)?);
    assert_eq!(
        fetch(&client, &url, 5, &[])?.statuses(),
        BTreeMap::from([(200, 5)])
    );
    server.process.stop(Signal::SIGKILL, START)?;
    let seen = fetch(&client, &url, 5, &[])?;
    assert_eq!(seen.statuses(), BTreeMap::from([(503, 5)]));
    assert!(
        seen.reasons()
            .keys()
            .all(|reason| reason == "connect_failed" || reason == "circuit_open"),
        "{:?}",
        seen.reasons()
    );
    let _again = Server::start(&lab, "far")?;
    wait::until_true("the server to be reached again", START, || {
        Ok(fetch(&client, &url, 5, &[])?.statuses() == BTreeMap::from([(200, 5)]))
    })
}

#[test]
fn an_answer_that_breaks_off_never_looks_whole() -> Result<()> {
    let lab = pods().start()?;
    let client = lab.pod("client")?;
    let _servers = [Server::start(&lab, "near")?, Server::start(&lab, "far")?];
    for name in ["near", "far"] {
        let url = format!("http://{}/half", lab.service(name, 80)?);
        let options = ["-sf", "--max-time", "20", &url];
        let output = client.place().output("curl", &options)?;
        // 18: a part only; 56: the connection was reset. Where it broke before the client saw any of
        // it, it is told so: 22.
        let code = output.status.code();
        assert!(matches!(code, Some(18 | 22 | 56)), "{name}: {output:?}");
    }
    Ok(())
}

#[test]
fn a_gibibyte_up_and_down_costs_no_memory() -> Result<()> {
    const SIZE: u64 = 1 << 30;
    let lab = pods().start()?;
    let client = lab.pod("client")?;
    let _server = Server::start(&lab, "far")?;
    let to = lab.service("far", 80)?;
    let agents = [lab.node(Side::A)?.agent(), lab.node(Side::B)?.agent()];
    let resident = || {
        let both = agents.iter().map(|agent| agent.resident_bytes());
        both.sum::<Result<u64>>()
    };
    let warm = format!("curl -sf -o /dev/null http://{to}/bytes/16777216");
    client.run("sh", &["-c", &warm])?;
    let before = resident()?;
    let up = format!("head -c {SIZE} /dev/zero | curl -sf -T - -H 'Expect:' http://{to}/sink");
    let down = format!("curl -sf http://{to}/bytes/{SIZE} | wc -c");
    let mut most = before;
    for (what, command) in [("up", &up), ("down", &down)] {
        let mut process = client.spawn(what, "sh", &["-c", command])?;
        wait::until(what, Duration::from_secs(300), || {
            most = most.max(resident()?);
            process.ended()
        })?;
        let said = process.output();
        assert!(said.contains(&SIZE.to_string()), "{what}: {said}");
    }
    let grown = most.saturating_sub(before) >> 20;
    assert!(grown < 64, "{grown} MiB more at the most");
    Ok(())
}
