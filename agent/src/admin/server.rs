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

/// Listeners that another agent bound and handed over. Default: none.
#[derive(Debug, Default)]
pub struct AdminListeners {
    /// The admin endpoint's.
    pub admin: Option<std::net::TcpListener>,
    /// That of metrics.
    pub metrics: Option<std::net::TcpListener>,
    /// That of readiness.
    pub readiness: Option<std::net::TcpListener>,
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
        Self::bind_with(options, state, AdminListeners::default()).await
    }

    /// Takes those that were handed over and are bound where they should be, and binds the rest.
    pub async fn bind_with(
        options: &AdminOptions,
        state: Arc<AdminState>,
        handed: AdminListeners,
    ) -> Result<Self, AdminError> {
        if !host::may_bind(options.admin, options.exposure) {
            return Err(AdminError::NotLoopback(options.admin));
        }
        let (admin, admin_address) =
            bind("the admin endpoint", options.admin, handed.admin).await?;
        let (metrics, metrics_address) = bind("metrics", options.metrics, handed.metrics).await?;
        let (readiness, readiness_address) =
            bind("readiness", options.readiness, handed.readiness).await?;
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

    /// Copies of the listeners, to be handed over.
    pub fn copies(&self) -> io::Result<AdminListeners> {
        Ok(AdminListeners {
            admin: Some(self.admin.copy()?),
            metrics: Some(self.metrics.copy()?),
            readiness: Some(self.readiness.copy()?),
        })
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
    handed: Option<std::net::TcpListener>,
) -> Result<(Listener, SocketAddr), AdminError> {
    let failed = |source| AdminError::Bind {
        purpose,
        address,
        source,
    };
    let handed = handed.filter(|handed| handed.local_addr().is_ok_and(|at| at == address));
    let socket = match handed {
        Some(handed) => {
            handed.set_nonblocking(true).map_err(failed)?;
            TcpListener::from_std(handed).map_err(failed)?
        }
        None => TcpListener::bind(address).await.map_err(failed)?,
    };
    let listener = Listener::new(socket);
    let bound = listener.address().map_err(failed)?;
    Ok((listener, bound))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use serde_json::{Value, json};
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpStream;
    use tokio::task::JoinHandle;

    use super::super::{Column, Condition};
    use super::*;
    use crate::telemetry::testing::{info, info_from, total};
    use crate::telemetry::{End, Telemetry};

    struct Running {
        addresses: Addresses,
        stop: CancellationToken,
        task: JoinHandle<()>,
    }

    impl Running {
        async fn start(state: AdminState) -> Self {
            let any = SocketAddr::from(([127, 0, 0, 1], 0));
            let options = AdminOptions {
                admin: any,
                metrics: any,
                readiness: any,
                exposure: Exposure::Loopback,
            };
            let admin = Admin::bind(&options, Arc::new(state)).await.unwrap();
            let addresses = admin.addresses();
            let stop = CancellationToken::new();
            let task = tokio::spawn(admin.run(stop.clone()));
            Self {
                addresses,
                stop,
                task,
            }
        }

        async fn stop(self) {
            self.stop.cancel();
            self.task.await.unwrap();
        }
    }

    /// Sends these lines as the head of a request; gives the status, the head and the body.
    async fn ask(address: SocketAddr, lines: &[&str]) -> (u16, String, String) {
        let mut stream = TcpStream::connect(address).await.unwrap();
        let request = format!("{}\r\nConnection: close\r\n\r\n", lines.join("\r\n"));
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        (status, head.to_ascii_lowercase(), body.to_owned())
    }

    async fn get(address: SocketAddr, path: &str) -> (u16, String) {
        let line = format!("GET {path} HTTP/1.1");
        let (status, _, body) = ask(address, &[&line, "Host: localhost"]).await;
        (status, body)
    }

    async fn get_json(address: SocketAddr, path: &str) -> Value {
        serde_json::from_str(&get(address, path).await.1).unwrap()
    }

    async fn get_text(address: SocketAddr, path: &str) -> String {
        let line = format!("GET {path} HTTP/1.1");
        ask(address, &[&line, "Host: localhost", "Accept: text/plain"])
            .await
            .2
    }

    fn state() -> AdminState {
        AdminState::new("node-a", Telemetry::new())
    }

    #[tokio::test]
    async fn readiness_is_503_with_reasons_until_every_condition_holds() {
        let synced = CancellationToken::new();
        let seen = synced.clone();
        let running = Running::start(state().condition("capture", move || {
            if seen.is_cancelled() {
                Condition::Ready("4 of 4 pods tried".into())
            } else {
                Condition::NotReady("3 of 4 pods tried".into())
            }
        }))
        .await;
        let Addresses {
            admin, readiness, ..
        } = running.addresses;
        let (status, body) = get(admin, "/readyz").await;
        assert_eq!(status, 503);
        assert!(body.contains("3 of 4 pods tried"), "{body}");
        // Strangers are told which condition, and nothing about pods.
        let expected = (503, "not ready: capture\n".to_owned());
        assert_eq!(get(readiness, "/healthz/ready").await, expected);
        synced.cancel();
        assert_eq!(get(admin, "/readyz").await.0, 200);
        assert_eq!(get(readiness, "/readyz").await, (200, "ready\n".to_owned()));
        assert_eq!(get_json(admin, "/healthz").await["status"], "ok");
        running.stop().await;
    }

    #[tokio::test]
    async fn views_are_json_or_a_table_and_unknown_ones_are_404() {
        const COLUMNS: &[Column] = &[Column {
            header: "POD",
            fields: &["name"],
        }];
        let running = Running::start(state().view(
            "pods",
            COLUMNS,
            || json!([{"name": "shop/web-0", "attempts": 2}]),
        ))
        .await;
        let admin = running.addresses.admin;
        assert_eq!(get_json(admin, "/pods").await[0]["attempts"], 2);
        assert_eq!(get_text(admin, "/pods").await, "POD\nshop/web-0\n");
        assert_eq!(get(admin, "/secrets").await.0, 404);
        let index = get_json(admin, "/").await;
        assert_eq!(
            index,
            json!([
                "/healthz",
                "/readyz",
                "/connections",
                "/connections/ended",
                "/pods"
            ])
        );
        running.stop().await;
    }

    #[tokio::test]
    async fn a_view_that_fails_harms_no_other() {
        let running = Running::start(
            state()
                .view("broken", &[], || -> Value { panic!("a test of panics") })
                .view("pods", &[], || json!([])),
        )
        .await;
        let admin = running.addresses.admin;
        for _ in 0..10 {
            assert_eq!(get(admin, "/broken").await.0, 503);
        }
        assert_eq!(get(admin, "/pods").await.0, 200);
        running.stop().await;
    }

    #[tokio::test]
    async fn other_methods_and_other_hosts_are_refused() {
        let running = Running::start(state()).await;
        let admin = running.addresses.admin;
        for method in ["POST", "PUT", "DELETE", "HEAD", "OPTIONS", "CONNECT"] {
            let line = format!("{method} /healthz HTTP/1.1");
            let (status, _, _) = ask(admin, &[&line, "Host: localhost"]).await;
            assert!(matches!(status, 400 | 405), "{method} {status}");
        }
        let rebound = ["GET /connections HTTP/1.1", "Host: evil.example:15000"];
        assert_eq!(ask(admin, &rebound).await.0, 403);
        assert_eq!(ask(admin, &["GET /connections HTTP/1.1"]).await.0, 403);
        running.stop().await;
    }

    #[tokio::test]
    async fn connections_show_both_identities_and_can_be_chosen() {
        let telemetry = Telemetry::new();
        let web = telemetry.open(info());
        let api = telemetry.open(info_from("api"));
        web.established();
        web.bytes().add_sent(12);
        let running = Running::start(AdminState::new("node-a", telemetry)).await;
        let admin = running.addresses.admin;
        let all = get_json(admin, "/connections").await;
        assert_eq!(all.as_array().unwrap().len(), 2);
        assert_eq!(
            all[0]["source_principal"],
            "spiffe://cluster.local/ns/shop/sa/web"
        );
        assert_eq!(
            all[0]["destination_principal"],
            "spiffe://cluster.local/ns/shop/sa/cart"
        );
        assert_eq!(all[0]["phase"], "established");
        assert_eq!(all[0]["sent_bytes"], 12);
        assert_eq!(all[1]["phase"], "connecting");
        let chosen = get_json(admin, "/connections?pod=shop/api-0&namespace=shop").await;
        assert_eq!(chosen[0]["id"], api.id());
        assert_eq!(chosen.as_array().unwrap().len(), 1);
        assert_eq!(
            get_json(admin, "/connections?namespace=other").await,
            json!([])
        );
        let first = ["GET /connections?limit=1 HTTP/1.1", "Host: [::1]:15000"];
        let (_, head, body) = ask(admin, &first).await;
        assert!(head.contains("x-total-count: 2"), "{head}");
        let shown: Vec<Value> = serde_json::from_str(&body).unwrap();
        assert_eq!(shown.len(), 1);
        assert_eq!(get(admin, "/connections?limit=x").await.0, 400);
        let table = get_text(admin, "/connections").await;
        assert!(table.starts_with("ID  DIRECTION  PHASE"), "{table}");
        assert!(table.contains("shop/web-0"), "{table}");
        web.close(End::Complete);
        api.close(End::Complete);
        assert_eq!(get_json(admin, "/connections").await, json!([]));
        let ended = get_json(admin, "/connections/ended?pod=shop/api-0").await;
        assert_eq!(ended.as_array().unwrap().len(), 1);
        assert_eq!(ended[0]["close_reason"], "complete");
        assert_eq!(ended[0]["source_workload"], "api");
        let table = get_text(admin, "/connections/ended").await;
        assert!(table.contains("END       REASON"), "{table}");
        running.stop().await;
    }

    #[tokio::test]
    async fn metrics_are_open_metrics_and_only_on_their_own_listener() {
        let telemetry = Telemetry::new();
        telemetry.open(info()).close(End::Complete);
        let running = Running::start(AdminState::new("node-a", telemetry)).await;
        let metrics = running.addresses.metrics;
        let lines = ["GET /metrics HTTP/1.1", "Host: node-a.example:15020"];
        let (status, head, body) = ask(metrics, &lines).await;
        assert_eq!(status, 200);
        assert!(
            head.contains("application/openmetrics-text; version=1.0.0"),
            "{head}"
        );
        assert!(body.ends_with("# EOF\n"), "{body}");
        assert_eq!(get(metrics, "/connections").await.0, 404);
        assert_eq!(get(running.addresses.admin, "/metrics").await.0, 404);
        assert_eq!(
            get(running.addresses.readiness, "/connections").await.0,
            404
        );
        running.stop().await;
    }

    #[tokio::test]
    async fn the_admin_endpoint_is_not_bound_beyond_loopback_unless_asked_for() {
        let options = AdminOptions {
            admin: ([0, 0, 0, 0], 0).into(),
            ..AdminOptions::default()
        };
        let refused = Admin::bind(&options, Arc::new(state())).await;
        assert!(matches!(refused, Err(AdminError::NotLoopback(_))));
    }

    #[tokio::test]
    async fn connections_over_the_limit_are_closed_at_once_and_counted() {
        let telemetry = Telemetry::new();
        let running = Running::start(AdminState::new("node-a", telemetry.clone())).await;
        let readiness = running.addresses.readiness;
        let mut idle = Vec::new();
        for _ in 0..super::super::listener::CONNECTIONS {
            idle.push(TcpStream::connect(readiness).await.unwrap());
        }
        let mut beyond = TcpStream::connect(readiness).await.unwrap();
        let mut nothing = [0; 1];
        let read = tokio::time::timeout(Duration::from_secs(10), beyond.read(&mut nothing));
        assert!(matches!(read.await.unwrap(), Ok(0) | Err(_)));
        let refused = "undermesh_admin_connections_refused_total";
        let metrics = telemetry.scrape().unwrap();
        assert_eq!(total(&metrics, refused, &["listener=\"readiness\""]), 1);
        assert_eq!(total(&metrics, refused, &[]), 1);
        drop(idle);
        running.stop().await;
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_says_nothing_is_put_out() {
        let running = Running::start(state()).await;
        let mut silent = TcpStream::connect(running.addresses.readiness)
            .await
            .unwrap();
        let (start, mut heard) = (tokio::time::Instant::now(), Vec::new());
        // Time goes on by itself while nothing happens.
        silent.read_to_end(&mut heard).await.unwrap();
        assert!(start.elapsed() < Duration::from_secs(60));
        running.stop().await;
    }
}
