//! Simulated nodes: a small cluster out of network namespaces, cgroups and veths.
//!
//! ```no_run
//! use undermesh_lab::traffic::{ClientOptions, ServeOptions};
//! use undermesh_lab::{Lab, PodSpec, Side};
//!
//! # fn main() -> anyhow::Result<()> {
//! let lab = Lab::builder()
//!     .pod(PodSpec::new("client").on(Side::A))
//!     .pod(PodSpec::new("server").on(Side::B))
//!     .start()?;
//! let server = lab.pod("server")?.serve(ServeOptions::new().echo(7000))?;
//! let to = lab.pod("server")?.v4(7000);
//! let report = lab.pod("client")?.traffic(&ClientOptions::echo(to).connections(100))?;
//! assert_eq!(report.ok, server.report()?.accepted);
//! # Ok(())
//! # }
//! ```
//!
//! Everything that a lab makes lies below `/run/undermesh-lab/<id>` and in one cgroup2 directory, and
//! goes away when the [`Lab`] is dropped. Nothing is made in the machine's own network namespace.

pub mod apps;
pub mod cells;
pub mod cgroup;
pub mod connects;
pub mod curl;
pub mod envoy;
pub mod figures;
pub mod hostile;
pub mod http;
pub mod interrupt;
pub mod load;
pub mod machine;
pub mod manifests;
pub mod metrics;
pub mod netns;
pub mod process;
pub mod requests;
pub mod stage;
pub mod tls;
pub mod traffic;
pub mod wait;
pub mod web;
pub mod wire;

mod kube_proxy;
mod lab;

pub use lab::{
    Agent, Authority, Binaries, Lab, LabBuilder, LabState, NodeHandle, NodeRecord, PodHandle,
    PodRecord, PodSpec, ServiceRecord, ServiceSpec, Side, Traffic, random_hex, remove_stale,
};
