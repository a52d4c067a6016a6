//! A client and an app that have been brought together: HTTP is served request by request, and all
//! else is relayed.

use std::future::Future;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpStream;

use super::deliver::deliver;
use super::http::{Redial, Stops, Visit, serve, upstreams};
use super::recognize::{hint_for, recognize};
use super::{Caller, Inbound};
use crate::capture::{EnrolledPod, OfPod, Slot, Task, Tracked};
use crate::http::{HttpIo, Wire};
use crate::relay::{Early, Ended, Peer, begin_tunnel, relay_tcp, relay_tunnel};
use crate::telemetry::{Connection, Direction, End, Party, Security};

/// Who talks to whom.
pub(super) struct Talk {
    pub(super) pod: Arc<EnrolledPod>,
    pub(super) caller: Caller,
    pub(super) app: SocketAddr,
    pub(super) security: Security,
    /// How long connecting to the app may take.
    pub(super) limit: Duration,
    pub(super) connection: Connection,
    /// Its place among the connections of the pod, where nobody else keeps it.
    pub(super) live: Option<(Tracked, Slot)>,
}

/// The way to an app, as its client.
struct ToApp {
    pod: Arc<EnrolledPod>,
    client: SocketAddr,
    app: SocketAddr,
    limit: Duration,
}

impl Redial for ToApp {
    async fn redial(&self) -> Result<TcpStream, String> {
        deliver(&self.pod, self.client, self.app, self.limit)
            .await
            .map_err(|undelivered| undelivered.detail)
    }
}

impl Inbound {
    /// Sees what a client says that has reached its app, and gives back what serves the two until both have ended.
    pub(super) async fn talk(
        self: Arc<Self>,
        talk: Talk,
        mut client: HttpIo,
        app: TcpStream,
    ) -> Option<Task> {
        let workload = talk.pod.workload();
        let (hint, silence) = {
            let snapshot = self.snapshot.load();
            let silence = snapshot.config().detection_timeout;
            (hint_for(&snapshot, &workload, talk.app), silence)
        };
        let recognized = tokio::select! {
            recognized = recognize(&mut client, &app, hint, silence) => recognized,
            () = talk.pod.gone().cancelled() => {
                talk.connection.close(Ended::Stopped.into());
                return None;
            }
        };
        match recognized {
            Ok(Some(wire)) => Some(Box::pin(async move {
                self.serve_http(talk, wire, client, app).await;
            })),
            Ok(None) => relay(talk, client, app).await,
            Err(_) => {
                talk.connection.close(Ended::Reset(Peer::Downstream).into());
                None
            }
        }
    }

    async fn serve_http(&self, talk: Talk, wire: Wire, client: HttpIo, app: TcpStream) {
        let Talk {
            pod,
            caller,
            app: address,
            security,
            limit,
            connection,
            live: _live,
        } = talk;
        let source = match &caller.identity {
            Some(identity) => self.party(identity, caller.address),
            None => Party::unknown(caller.address),
        };
        let requester =
            self.telemetry
                .requester(Direction::Inbound, source, address, connection.id());
        let visit = Visit {
            redial: ToApp {
                pod: pod.clone(),
                client: caller.address,
                app: address,
                limit,
            },
            caller,
            app: address,
            workload: pod.workload(),
            security,
            requester,
            gate: self.http.gate.clone(),
            upstreams: upstreams(wire),
        };
        let stops = Stops {
            drain: &self.drain,
            gone: pod.gone(),
        };
        let bytes = connection.bytes().clone();
        let end: End = match serve(&self.http, visit, wire, client, app, bytes, stops).await {
            Ok(served) => served.end.into(),
            // The app was gone before the first request.
            Err(_) => Ended::Reset(Peer::Upstream).into(),
        };
        connection.close(end);
    }
}

/// Hands over what was looked at, and gives back what moves all that follows. That is in memory for as long as the
/// connection idles, so nothing else is in it.
async fn relay(talk: Talk, client: HttpIo, app: TcpStream) -> Option<Task> {
    let Talk {
        pod,
        connection,
        live,
        ..
    } = talk;
    let bytes = connection.bytes().clone();
    let relay: Pin<Box<dyn Future<Output = Ended> + Send>> = match client {
        HttpIo::Socket(client) => Box::pin(relay_tcp(client, app, OfPod { pod, bytes })),
        HttpIo::Tunnel(client) => {
            let early = Early::default();
            let counts = (&*bytes).into();
            let begun = begin_tunnel(early, app, Peer::Upstream, client, counts, pod.gone()).await;
            let (app, send, receive) = match begun {
                Ok(begun) => begun,
                Err(ended) => {
                    connection.close(ended.into());
                    return None;
                }
            };
            let connection = OfPod { pod, bytes };
            Box::pin(relay_tunnel(app, Peer::Upstream, send, receive, connection))
        }
    };
    Some(Box::pin(async move {
        let ended = relay.await;
        connection.close(ended.into());
        drop(live);
    }))
}
