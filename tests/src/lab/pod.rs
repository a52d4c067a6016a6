//! A pod, and the traffic programs in it.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::sys::signal::Signal;
use serde::de::DeserializeOwned;

use super::state::{Binaries, LabState, PodRecord};
use crate::cgroup::Cgroup;
use crate::netns::Netns;
use crate::process::{Place, Process, tail};
use crate::traffic::{self, ClientOptions, ClientReport, ServeOptions, ServerReport};
use crate::wait;
use crate::web::{
    Behaviour, HttpAttackOptions, HttpAttackReport, LoadOptions, LoadReport, WebOptions, WebReport,
    behave,
};

const START: Duration = Duration::from_secs(20);

/// A pod.
#[derive(Debug, Clone)]
pub struct PodHandle {
    record: PodRecord,
    binaries: Binaries,
}

impl PodHandle {
    /// The pod of that name, or `namespace/name`, in a lab that is up.
    pub fn open(state: &LabState, name: &str) -> Result<Self> {
        Ok(Self::new(state.pod(name)?.clone(), state.binaries.clone()))
    }

    pub(super) fn new(record: PodRecord, binaries: Binaries) -> Self {
        Self { record, binaries }
    }

    /// What is known of it.
    #[must_use]
    pub fn record(&self) -> &PodRecord {
        &self.record
    }

    /// `metadata.name`.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.record.name
    }

    /// `namespace/name`.
    #[must_use]
    pub fn full_name(&self) -> String {
        format!("{}/{}", self.record.namespace, self.record.name)
    }

    /// Its IPv4 address.
    #[must_use]
    pub fn ip(&self) -> IpAddr {
        self.record.ips[0]
    }

    /// Its IPv6 address.
    pub fn ip6(&self) -> Result<IpAddr> {
        let mut ips = self.record.ips.iter();
        ips.find(|ip| ip.is_ipv6())
            .copied()
            .with_context(|| format!("{} has no IPv6", self.record.name))
    }

    /// A port at its IPv4 address.
    #[must_use]
    pub fn v4(&self, port: u16) -> SocketAddr {
        (self.ip(), port).into()
    }

    /// A port at its IPv6 address.
    pub fn v6(&self, port: u16) -> Result<SocketAddr> {
        Ok((self.ip6()?, port).into())
    }

    /// Where its programs run.
    #[must_use]
    pub fn place(&self) -> Place {
        Place {
            netns: Netns::at(&self.record.netns),
            cgroup: Cgroup::at(&self.record.cgroup),
            dir: self.record.dir.clone(),
        }
    }

    /// Starts a program in it, with its output in `<pod's dir>/<name>.log`.
    pub fn spawn<S: AsRef<str>>(&self, name: &str, program: &str, args: &[S]) -> Result<Process> {
        self.place().spawn(name, program, args)
    }

    /// Runs a program in it to its end; gives back its output, or an error that holds it.
    pub fn run<S: AsRef<str>>(&self, program: &str, args: &[S]) -> Result<String> {
        self.place().run(program, args)
    }

    /// Starts a traffic server and waits until it listens.
    pub fn serve(&self, options: ServeOptions) -> Result<Traffic<ServerReport>> {
        let control = self.socket();
        let options = ServeOptions {
            control: Some(control.clone()),
            ..options
        };
        self.start(&options.to_args(), control)
    }

    /// Runs a traffic client to its end. Failed connections are no error: they are in the report.
    pub fn traffic(&self, options: &ClientOptions) -> Result<ClientReport> {
        let program = self.binaries.traffic.display().to_string();
        let output = self.place().output(&program, &options.to_args())?;
        let text = String::from_utf8_lossy(&output.stdout);
        serde_json::from_str(&text).with_context(|| {
            format!(
                "undermesh-traffic in {}: {}: {}",
                self.record.name,
                output.status,
                String::from_utf8_lossy(&output.stderr)
            )
        })
    }

    /// Starts a traffic client that runs beside the caller.
    pub fn start_traffic(&self, options: &ClientOptions) -> Result<Traffic<ClientReport>> {
        let control = self.socket();
        let mut options = options.clone();
        options.control = Some(control.clone());
        self.start(&options.to_args(), control)
    }

    /// Starts an HTTP server and waits until it listens.
    pub fn serve_web(&self, options: &WebOptions) -> Result<Traffic<WebReport>> {
        let control = self.socket();
        let mut options = options.clone();
        options.control = Some(control.clone());
        self.start(&options.to_args(), control)
    }

    /// Starts an HTTP client that runs beside the caller.
    pub fn start_load(&self, options: &LoadOptions) -> Result<Traffic<LoadReport>> {
        let control = self.socket();
        let mut options = options.clone();
        options.control = Some(control.clone());
        self.start(&options.to_args(), control)
    }

    /// Starts an attack on an HTTP server that runs beside the caller.
    pub fn start_http_attack(
        &self,
        options: &HttpAttackOptions,
    ) -> Result<Traffic<HttpAttackReport>> {
        let control = self.socket();
        let mut options = options.clone();
        options.control = Some(control.clone());
        self.start(&options.to_args(), control)
    }

    fn start<R: DeserializeOwned>(&self, args: &[String], control: PathBuf) -> Result<Traffic<R>> {
        let program = self.binaries.traffic.display().to_string();
        let name = control.file_stem().unwrap_or_default().to_string_lossy();
        let mut traffic = Traffic {
            process: self.spawn(&name, &program, args)?,
            control,
            report: std::marker::PhantomData,
        };
        wait::until_true("undermesh-traffic to start", START, || {
            // A short client may be over before it was ever asked.
            Ok(traffic.control.exists() || traffic.process.ended()?.is_some())
        })?;
        if !traffic.control.exists() {
            traffic.process.check_alive()?;
        }
        Ok(traffic)
    }

    fn socket(&self) -> PathBuf {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        self.record
            .dir
            .join(format!("traffic-{}-{number}.sock", std::process::id()))
    }
}

/// A traffic program that runs in a pod; dropping it kills it. `R` is its report.
#[derive(Debug)]
pub struct Traffic<R> {
    process: Process,
    control: PathBuf,
    report: std::marker::PhantomData<fn() -> R>,
}

impl Traffic<WebReport> {
    /// Makes it behave so from now on.
    pub fn behave(&self, behaviour: &Behaviour) -> Result<()> {
        behave(&self.control, behaviour)
    }
}

impl<R: DeserializeOwned> Traffic<R> {
    /// Its process.
    #[must_use]
    pub fn process(&self) -> &Process {
        &self.process
    }

    /// What it counted so far, or in all if it has ended.
    pub fn report(&self) -> Result<R> {
        traffic::query(&self.control).or_else(|_| self.last_line())
    }

    /// Ends it with SIGTERM: a server at once, a client when its open connections are done.
    pub fn stop(mut self, limit: Duration) -> Result<R> {
        if self.process.ended()?.is_none() {
            self.process.signal(Signal::SIGTERM)?;
        }
        self.process.wait(limit)?;
        self.last_line()
    }

    /// Waits for its own end.
    pub fn finish(mut self, limit: Duration) -> Result<R> {
        self.process.wait(limit)?;
        self.last_line()
    }

    /// Lets it run on after this program.
    pub fn leave_running(self) {
        self.process.leave_running();
    }

    fn last_line(&self) -> Result<R> {
        let output = self.process.output();
        let Some(line) = output.lines().rev().find(|line| line.starts_with('{')) else {
            bail!(
                "no report of {}: {}",
                self.process.name(),
                tail(self.process.log(), 10)
            );
        };
        Ok(serde_json::from_str(line)?)
    }
}
