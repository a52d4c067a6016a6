//! The pods and Services of `demo`, and of `lab up` where no manifests are given.

use anyhow::Result;
use undermesh_lab::apps::Server;
use undermesh_lab::traffic::{ServeOptions, ServerReport};
use undermesh_lab::{Lab, LabBuilder, PodSpec, ServiceSpec, Side, Traffic};

/// Port of nginx in the pods of `web`.
pub const WEB: u16 = 8080;
/// Port of redis in the pod of `cache`.
pub const CACHE: u16 = 6379;
/// Ports of `undermesh-traffic` in the pods of `web`: echo, exchange, server-first.
pub const ECHO: u16 = 7000;
const EXCHANGE: u16 = 7001;
const BANNER: u16 = 7002;
/// Size of the page that nginx serves, in bytes.
pub const PAGE: usize = 16 * 1024;

/// Four pods of the mesh, `client` and `web-a` on one node and `web-b` and `worker` on the other, and one
/// outside of it on each node.
pub fn builder() -> LabBuilder {
    let web = |name: &str, side: Side| {
        PodSpec::new(name)
            .on(side)
            .label("app", "web")
            .service_account("web")
            .port("http", WEB)
    };
    Lab::builder()
        .pod(PodSpec::new("client").on(Side::A))
        .pod(web("web-a", Side::A).label("role", "cache"))
        .pod(web("web-b", Side::B))
        .pod(PodSpec::new("worker").on(Side::B))
        .pod(PodSpec::new("outsider-a").on(Side::A).outside())
        .pod(PodSpec::new("outsider-b").on(Side::B).outside())
        .service(ServiceSpec::new("web").port(80, WEB))
        .service(
            ServiceSpec::new("echo")
                .select("app", "web")
                .port(ECHO, ECHO)
                .port(EXCHANGE, EXCHANGE)
                .port(BANNER, BANNER),
        )
        .service(
            ServiceSpec::new("cache")
                .select("role", "cache")
                .port(CACHE, CACHE),
        )
}

/// The servers of these pods.
pub struct Servers {
    /// nginx in `web-a` and `web-b`.
    pub web: Vec<Server>,
    /// redis in `web-a`.
    pub cache: Server,
    /// `undermesh-traffic` in `web-a` and `web-b`.
    pub echo: Vec<Traffic<ServerReport>>,
}

impl Servers {
    /// Starts them; `marker` stands in every page.
    pub fn start(lab: &Lab, marker: &str) -> Result<Self> {
        let page = format!("{marker}\n").repeat(PAGE / (marker.len() + 1));
        let (mut web, mut echo) = (Vec::new(), Vec::new());
        for name in ["web-a", "web-b"] {
            let pod = lab.pod(name)?;
            let pages = [("index.html", &*page), ("name", name)];
            web.push(Server::nginx(&pod, WEB, &pages)?);
            let options = ServeOptions::new()
                .echo(ECHO)
                .exchange(EXCHANGE)
                .banner(BANNER);
            echo.push(pod.serve(options)?);
        }
        let cache = Server::redis(&lab.pod("web-a")?, CACHE)?;
        Ok(Self { web, cache, echo })
    }

    /// Connections that all of them accepted, as they counted them.
    pub fn accepted(&self) -> Result<u64> {
        let mut accepted = self.cache.accepted()?;
        for server in &self.web {
            accepted += server.accepted()?;
        }
        for server in &self.echo {
            accepted += server.report()?.accepted;
        }
        Ok(accepted)
    }

    /// Lets them run on after this program.
    pub fn leave_running(self) {
        self.web.into_iter().for_each(Server::leave_running);
        self.cache.leave_running();
        self.echo.into_iter().for_each(Traffic::leave_running);
    }
}
