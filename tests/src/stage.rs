//! The pods that most tests of requests play on: a client on one node, and a server on either.

use std::time::Duration;

use anyhow::Result;

use crate::web::{LoadOptions, LoadReport, WebOptions, WebReport};
use crate::{Lab, LabBuilder, PodSpec, ServiceSpec, Side, Traffic};

/// Port of the Services, for HTTP.
pub const PORT: u16 = 80;
/// Port of the servers, for HTTP.
pub const TARGET: u16 = 8080;
/// Port of the Services of [`versions`] and of their servers, for opaque streams.
pub const STREAM: u16 = 7000;

/// Servers `v1` and `v2`, each a Service of its name, and Service `web` of both.
#[must_use]
pub fn versions() -> LabBuilder {
    let server = |name: &str, side: Side| {
        let pod = PodSpec::new(name).on(side).label("group", "web");
        pod.service_account("web").port("http", TARGET)
    };
    let service = |name: &str| {
        let service = ServiceSpec::new(name).http(PORT, TARGET);
        service.port(STREAM, STREAM)
    };
    Lab::builder()
        .pod(PodSpec::new("client").on(Side::A))
        .pod(server("v1", Side::A))
        .pod(server("v2", Side::B))
        .service(service("v1"))
        .service(service("v2"))
        .service(service("web").select("group", "web"))
}

/// Starts the servers of [`versions`].
pub fn serve_versions(lab: &Lab) -> Result<[Traffic<WebReport>; 2]> {
    let one = |name: &str| lab.pod(name)?.serve_web(&WebOptions::new(name, TARGET));
    Ok([one("v1")?, one("v2")?])
}

/// Has the client of [`versions`] ask Service `web` 20 times a second over HTTP/1.1, and as often over HTTP/2.
pub fn ask_steadily(lab: &Lab, during: Duration) -> Result<[Traffic<LoadReport>; 2]> {
    let client = lab.pod("client")?;
    let options = LoadOptions::new(lab.service("web", PORT)?)
        .rate(20)
        .connections(64)
        .during(during);
    let http1 = client.start_load(&options)?;
    Ok([http1, client.start_load(&options.http2())?])
}

/// Servers `near` and `far`, as the client sees them, each a Service of its name, and Service `both`.
#[must_use]
pub fn near_and_far() -> LabBuilder {
    let server = |name: &str, side: Side| {
        let pod = PodSpec::new(name).on(side).label("group", "both");
        pod.port("http", TARGET)
    };
    let service = |name: &str| ServiceSpec::new(name).http(PORT, TARGET);
    Lab::builder()
        .pod(PodSpec::new("client").on(Side::A))
        .pod(server("near", Side::A))
        .pod(server("far", Side::B))
        .service(service("near"))
        .service(service("far"))
        .service(service("both").select("group", "both"))
}
