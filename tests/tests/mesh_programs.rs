//! Real programs, unchanged, on both ends.

use std::time::Duration;

use anyhow::Result;
use undermesh_lab::figures::Witness;
use undermesh_lab::{Lab, PodSpec, ServiceSpec, Side, apps, machine};

fn pods(port: u16) -> Result<Lab> {
    Lab::builder()
        .pod(PodSpec::new("client").on(Side::A))
        .pod(PodSpec::new("server").on(Side::B))
        .service(ServiceSpec::new("server").port(port, port))
        .start()
}

#[test]
fn curl_fetches_from_nginx() -> Result<()> {
    let lab = pods(8080)?;
    let client = lab.pod("client")?;
    let page = "a line of a page\n".repeat(100_000);
    let server = apps::Server::nginx(&lab.pod("server")?, 8080, &[("page", &page)])?;
    let witness = Witness::start(&lab)?;
    for to in [lab.service("server", 8080)?, lab.service6("server", 8080)?] {
        for _ in 0..10 {
            let fetched = apps::curl(&client, &format!("http://{to}/page"), "m")?;
            let right = (fetched.status, fetched.bytes, fetched.exit);
            assert_eq!(right, (200, page.len() as u64, 0), "{to}: {fetched:?}");
            assert_eq!(fetched.connections, 1);
        }
    }
    witness.expect(20, 0)?;
    assert_eq!(server.accepted()?, 20);
    Ok(())
}

#[test]
fn redis_benchmark_runs_against_redis_server() -> Result<()> {
    let lab = pods(6379)?;
    let server = apps::Server::redis(&lab.pod("server")?, 6379)?;
    let witness = Witness::start(&lab)?;
    let to = lab.service("server", 6379)?;
    apps::redis_benchmark(&lab.pod("client")?, to, 20, 5_000, "value")?;
    let accepted = server.accepted()?;
    assert!(accepted >= 20, "{accepted}");
    witness.expect(accepted, 0)?;
    Ok(())
}

#[test]
fn pgbench_runs_against_postgresql() -> Result<()> {
    let lab = pods(5432)?;
    let (client, pod) = (lab.pod("client")?, lab.pod("server")?);
    let server = apps::postgres(&pod, 5432)?;
    let to = lab.service("server", 5432)?;
    let (host, port) = (to.ip().to_string(), to.port().to_string());
    let target = ["-h", &host, "-p", &port, "-U", "postgres"];
    let witness = Witness::start(&lab)?;
    let with = |more: &[&'static str]| -> Vec<String> {
        let words = target.iter().copied().chain(more.iter().copied());
        words.map(str::to_owned).collect()
    };
    client.run("pgbench", &with(&["--initialize", "--quiet", "postgres"]))?;
    let run = [
        "--client=8",
        "--jobs=2",
        "--transactions=50",
        "--connect",
        "postgres",
    ];
    let output = client.run("pgbench", &with(&run))?;
    let all = "number of transactions actually processed: 400/400";
    assert!(output.contains(all), "{output}");
    assert!(
        output.contains("number of failed transactions: 0"),
        "{output}"
    );
    // As PostgreSQL logs them; whether it is ready was asked over a unix socket.
    let log = server.output();
    let received = log
        .lines()
        .filter(|line| line.contains("connection received:") && !line.contains("host=[local]"));
    let received = received.count() as u64;
    assert!(received > 400, "{received}");
    witness.expect(received, 0)?;
    Ok(())
}

#[test]
fn iperf3_measures_through_the_mesh() -> Result<()> {
    machine::require(&[machine::IPERF3])?;
    let lab = pods(5201)?;
    let server = lab.pod("server")?;
    let mut serving = server.spawn("iperf3", "iperf3", &["--server", "--forceflush"])?;
    serving.until("iperf3 to listen", Duration::from_secs(10), |serving| {
        Ok(serving.output().contains("Server listening"))
    })?;
    let witness = Witness::start(&lab)?;
    let host = lab.service("server", 5201)?.ip().to_string();
    let args = [
        "--client",
        &host,
        "--time",
        "2",
        "--parallel",
        "2",
        "--json",
    ];
    let output = lab.pod("client")?.run("iperf3", &args)?;
    let result: serde_json::Value = serde_json::from_str(&output)?;
    let received = result["end"]["sum_received"]["bytes"].as_u64().unwrap_or(0);
    assert!(received > 10_000_000, "{output}");
    // One to control the test, two to fill.
    witness.expect(3, 0)?;
    Ok(())
}
