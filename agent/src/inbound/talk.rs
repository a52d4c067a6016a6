//! A client and an app that have been brought together: HTTP is served request by request, and all
//! else is relayed.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpStream;

use super::deliver::deliver;
use super::http::{Redial, Stops, Visit, serve, upstreams};
use super::recognize::{hint_for, recognize};
use super::{Caller, Inbound};
use crate::capture::EnrolledPod;
use crate::http::{HttpIo, Wire};
use crate::relay::{Early, Ended, Peer, relay_tcp, relay_tunnel_after};
use crate::telemetry::{Connection, Direction, End, Party, Security};

/// Who talks to whom.
pub(super) struct Talk<'a> {
    pub(super) pod: &'a Arc<EnrolledPod>,
    pub(super) caller: Caller,
    pub(super) app: SocketAddr,
    pub(super) security: Security,
    /// How long connecting to the app may take.
    pub(super) limit: Duration,
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
    /// Serves a client that has reached its app until both have ended.
    pub(super) async fn talk(
        &self,
        talk: Talk<'_>,
        mut client: HttpIo,
        app: TcpStream,
        connection: &Connection,
    ) -> End {
        let workload = talk.pod.workload();
        let (hint, silence) = {
            let snapshot = self.snapshot.load();
            let silence = snapshot.config().detection_timeout;
            (hint_for(&snapshot, &workload, talk.app), silence)
        };
        let recognized = tokio::select! {
            recognized = recognize(&mut client, &app, hint, silence) => recognized,
            () = talk.pod.gone().cancelled() => return Ended::Stopped.into(),
        };
        match recognized {
            Ok(Some(wire)) => self.serve_http(talk, wire, client, app, connection).await,
            Ok(None) => relay(client, app, talk.pod, connection).await.into(),
            Err(_) => Ended::Reset(Peer::Downstream).into(),
        }
    }

    async fn serve_http(
        &self,
        talk: Talk<'_>,
        wire: Wire,
        client: HttpIo,
        app: TcpStream,
        connection: &Connection,
    ) -> End {
        let Talk {
            pod,
            caller,
            app: address,
            security,
            limit,
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
        match serve(&self.http, visit, wire, client, app, bytes, stops).await {
            Ok(served) => served.end.into(),
            // The app was gone before the first request.
            Err(_) => Ended::Reset(Peer::Upstream).into(),
        }
    }
}

async fn relay(
    client: HttpIo,
    app: TcpStream,
    pod: &EnrolledPod,
    connection: &Connection,
) -> Ended {
    let counts = (&**connection.bytes()).into();
    match client {
        HttpIo::Socket(client) => relay_tcp(client, app, counts, pod.gone()).await,
        HttpIo::Tunnel(client) => {
            let early = Early::default();
            relay_tunnel_after(early, app, Peer::Upstream, client, counts, pod.gone()).await
        }
    }
}
