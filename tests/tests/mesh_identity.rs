//! Who is let in: by certificate, and never without one where the pod is STRICT.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Context, Result};
use undermesh_lab::figures::Witness;
use undermesh_lab::metrics::Metrics;
use undermesh_lab::tls::{Issuer, certificate, handshake, is_session};
use undermesh_lab::traffic::{ClientOptions, Failure, ServeOptions};
use undermesh_lab::{Lab, PodSpec, ServiceSpec, Side, machine, wait};

const ECHO: u16 = 7000;
const HBONE: u16 = 15008;

#[test]
fn plaintext_is_refused_by_a_strict_pod_and_passed_by_a_permissive_one() -> Result<()> {
    let lab = Lab::builder()
        .pod(PodSpec::new("client").on(Side::A))
        .pod(PodSpec::new("strict").on(Side::B).strict())
        .pod(PodSpec::new("permissive").on(Side::B).permissive())
        .pod(PodSpec::new("outside-a").on(Side::A).outside())
        .pod(PodSpec::new("outside-b").on(Side::B).outside())
        .service(ServiceSpec::new("strict").port(80, ECHO))
        .start()?;
    let (strict, permissive) = (lab.pod("strict")?, lab.pod("permissive")?);
    let guarded = strict.serve(ServeOptions::new().echo(ECHO))?;
    let open = permissive.serve(ServeOptions::new().echo(ECHO))?;
    for (index, name) in ["outside-a", "outside-b"].into_iter().enumerate() {
        let stranger = lab.pod(name)?;
        for to in [
            strict.v4(ECHO),
            strict.v6(ECHO)?,
            lab.service("strict", 80)?,
        ] {
            let report = stranger.traffic(&ClientOptions::echo(to).connections(5))?;
            let told = report.failed_by(Failure::Refused) + report.failed_by(Failure::Reset);
            assert_eq!((report.ok, told), (0, 5), "{name} to {to}: {report:?}");
        }
        let witness = Witness::start(&lab)?;
        let report = stranger.traffic(&ClientOptions::echo(permissive.v4(ECHO)).connections(5))?;
        assert_eq!((report.ok, report.failed), (5, 0), "{name}: {report:?}");
        witness.until("plaintext to be counted", |seen| {
            seen.inbound_plaintext == 5
        })?;
        let report = open.report()?;
        assert_eq!(report.accepted, 5 * (index as u64 + 1));
        assert_eq!(report.accepted_from(stranger.ip()), 5, "{report:?}");
    }
    assert_eq!(
        guarded.report()?.accepted,
        0,
        "plaintext reached the application"
    );
    // The same pod, for one of the mesh.
    let witness = Witness::start(&lab)?;
    let report = lab
        .pod("client")?
        .traffic(&ClientOptions::echo(strict.v4(ECHO)).connections(5))?;
    assert_eq!((report.ok, report.failed), (5, 0), "{report:?}");
    witness.expect(5, 0)?;
    assert_eq!(guarded.report()?.accepted, 5);
    Ok(())
}

#[test]
fn only_a_certificate_of_the_own_trust_domain_opens_the_tunnel_port() -> Result<()> {
    machine::require(&[machine::OPENSSL])?;
    let lab = Lab::builder()
        .pod(PodSpec::new("server").on(Side::B))
        .pod(PodSpec::new("stranger").on(Side::A).outside())
        .start()?;
    let stranger = lab.pod("stranger")?;
    let port = lab.pod("server")?.v4(HBONE);
    let dir = stranger.record().dir.clone();
    let root = lab.authority().root_file();
    let key = root.with_file_name("ca-key.pem");
    let ours = Issuer::Authority(&root, &key);
    let own = "spiffe://cluster.local/ns/default/sa/x";
    certificate(&dir, "control", own, ours)?;
    certificate(
        &dir,
        "other-domain",
        "spiffe://elsewhere/ns/default/sa/x",
        ours,
    )?;
    certificate(&dir, "other-root", own, Issuer::Itself)?;

    let admitted = handshake(&stranger, port, Some(&dir.join("control.pem")), 2)?;
    assert!(
        is_session(&admitted),
        "a good certificate was refused: {admitted}"
    );
    for name in ["other-domain", "other-root"] {
        let said = handshake(&stranger, port, Some(&dir.join(format!("{name}.pem"))), 2)?;
        assert!(said.contains("alert"), "{name} was let in: {said}");
    }
    let said = handshake(&stranger, port, None, 2)?;
    assert!(
        said.contains("certificate required"),
        "no certificate: {said}"
    );
    // Each of them is seen, with its reason.
    let agent = lab.node(Side::B)?.agent();
    wait::until_true(
        "refused tunnels to be counted",
        Duration::from_secs(10),
        || {
            let metrics = Metrics::parse(&agent.metrics()?);
            let name = "undermesh_tcp_connections_failed_total";
            Ok(metrics.count(name, &[("direction", "inbound"), ("reason", "tls")]) == 3)
        },
    )
}

/// Serial numbers of the certificates that both agents hold.
fn serials(lab: &Lab) -> Result<BTreeSet<String>> {
    let mut serials = BTreeSet::new();
    for side in Side::ALL {
        let shown = lab.node(side)?.agent().admin("/certificates")?;
        let shown = shown.as_array().context("/certificates is no list")?;
        serials.extend(
            shown
                .iter()
                .filter_map(|one| one["serial"].as_str().map(str::to_owned)),
        );
    }
    Ok(serials)
}

#[test]
fn certificates_of_five_seconds_rotate_under_load_without_one_failed_connection() -> Result<()> {
    let lab = Lab::builder()
        .pod(PodSpec::new("client").on(Side::A))
        .pod(PodSpec::new("server").on(Side::B))
        .service(ServiceSpec::new("server").port(80, ECHO))
        .certificate_lifetime("5s")
        .start()?;
    let server = lab.pod("server")?.serve(ServeOptions::new().echo(ECHO))?;
    let client = lab.pod("client")?;
    let witness = Witness::start(&lab)?;
    let to = lab.service("server", 80)?;
    let short = ClientOptions::echo(to)
        .during(Duration::from_secs(20))
        .concurrency(4)
        .pause(Duration::from_millis(10));
    let long = ClientOptions::echo(to)
        .connections(4)
        .concurrency(4)
        .requests(200)
        .think(Duration::from_millis(100))
        .timeout(Duration::from_secs(60));
    let short = client.start_traffic(&short)?;
    let long = client.start_traffic(&long)?;
    let mut seen = serials(&lab)?;
    let first = seen.len();
    wait::until_true(
        "each certificate to rotate three times",
        Duration::from_secs(30),
        || {
            std::thread::sleep(Duration::from_millis(200));
            seen.extend(serials(&lab)?);
            Ok(seen.len() >= first * 4)
        },
    )?;
    let (short, long) = (
        short.finish(Duration::from_secs(60))?,
        long.finish(Duration::from_secs(60))?,
    );
    assert_eq!(short.failed + long.failed, 0, "{short:?}\n{long:?}");
    assert!(short.ok > 200, "{short:?}");
    let all = short.ok + long.ok;
    assert_eq!(server.report()?.accepted, all);
    witness.expect(all, 0)?;
    Ok(())
}
