//! The three listeners.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use thiserror::Error;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use super::listener::Listener;
use super::{AdminState, host, routes};
use crate::telemetry::Labelled;

/// Who can reach the admin endpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Exposure {
    /// Only this node: binding anything but loopback is an error.
    #[default]
    Loopback,
    /// Whoever can reach the address. It tells who talks to whom on this node.
    Anywhere,
}

/// Where to listen.
#[derive(Debug, Clone)]
pub struct AdminOptions {
    /// The admin endpoint. Default 127.0.0.1:15000.
    pub admin: SocketAddr,
    /// Who may reach it. Default [`Exposure::Loopback`].
    pub exposure: Exposure,
    /// Metrics. Default 0.0.0.0:15020.
    pub metrics: SocketAddr,
    /// Readiness. Default 0.0.0.0:15021.
    pub readiness: SocketAddr,
}

impl Default for AdminOptions {
    fn default() -> Self {
        Self {
            admin: ([127, 0, 0, 1], 15_000).into(),
            exposure: Exposure::default(),
            metrics: ([0, 0, 0, 0], 15_020).into(),
            readiness: ([0, 0, 0, 0], 15_021).into(),
        }
    }
}

/// Why it cannot be served.
#[derive(Debug, Error)]
pub enum AdminError {
    /// The admin endpoint was to be bound to more than loopback, and nobody asked for that.
    #[error("the admin endpoint tells who talks to whom; {0} is not a loopback address")]
    NotLoopback(SocketAddr),
    /// An address cannot be bound.
    #[error("cannot listen on {address} for {purpose}")]
    Bind {
        /// What the listener is for.
        purpose: &'static str,
        /// The address.
        address: SocketAddr,
        /// Why.
        source: io::Error,
    },
}

/// The listeners, bound and not served yet.
pub struct Admin {
    admin: Listener,
    metrics: Listener,
    readiness: Listener,
    addresses: Addresses,
    exposure: Exposure,
    state: Arc<AdminState>,
}

/// Where the listeners are bound.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Addresses {
    /// The admin endpoint.
    pub admin: SocketAddr,
    /// Metrics.
    pub metrics: SocketAddr,
    /// Readiness.
    pub readiness: SocketAddr,
}

impl Admin {
    /// Binds all three, or none.
    pub async fn bind(options: &AdminOptions, state: Arc<AdminState>) -> Result<Self, AdminError> {
        if !host::may_bind(options.admin, options.exposure) {
            return Err(AdminError::NotLoopback(options.admin));
        }
        let (admin, admin_address) = bind("the admin endpoint", options.admin).await?;
        let (metrics, metrics_address) = bind("metrics", options.metrics).await?;
        let (readiness, readiness_address) = bind("readiness", options.readiness).await?;
        let refused = [
            ("admin", admin.refused()),
            ("metrics", metrics.refused()),
            ("readiness", readiness.refused()),
        ];
        state.telemetry().register_counter(
            "undermesh_admin_connections_refused",
            "Connections to the agent's own HTTP listeners that were over their limit",
            move || {
                let sample =
                    |(name, refused): &(&str, Arc<std::sync::atomic::AtomicU64>)| Labelled {
                        labels: vec![("listener", (*name).to_owned())],
                        value: refused.load(Ordering::Relaxed),
                    };
                refused.iter().map(sample).collect()
            },
        );
        Ok(Self {
            admin,
            metrics,
            readiness,
            addresses: Addresses {
                admin: admin_address,
                metrics: metrics_address,
                readiness: readiness_address,
            },
            exposure: options.exposure,
            state,
        })
    }

    /// Where they are bound: with port 0 the kernel chose.
    #[must_use]
    pub fn addresses(&self) -> Addresses {
        self.addresses
    }

    /// Serves until stopped.
    pub async fn run(self, stop: CancellationToken) {
        let admin = routes::admin(self.state.clone(), self.exposure);
        let metrics = routes::metrics(self.state.clone());
        let readiness = routes::readiness(self.state);
        tokio::join!(
            self.admin.serve(admin, stop.clone()),
            self.metrics.serve(metrics, stop.clone()),
            self.readiness.serve(readiness, stop),
        );
    }
}

/// Binds the listeners and serves until stopped.
pub async fn serve(
    options: AdminOptions,
    state: Arc<AdminState>,
    stop: CancellationToken,
) -> Result<(), AdminError> {
    Admin::bind(&options, state).await?.run(stop).await;
    Ok(())
}

async fn bind(
    purpose: &'static str,
    address: SocketAddr,
) -> Result<(Listener, SocketAddr), AdminError> {
    let failed = |source| AdminError::Bind {
        purpose,
        address,
        source,
    };
    let listener = Listener::new(TcpListener::bind(address).await.map_err(failed)?);
    let bound = listener.address().map_err(failed)?;
    Ok((listener, bound))
}
