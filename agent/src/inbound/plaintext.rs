//! A connection that came to a pod without a tunnel.

use super::Inbound;
use super::deliver::deliver;
use crate::capture::Accepted;
use crate::mesh::{Mode, authorize};
use crate::relay::relay_tcp;
use crate::telemetry::{ConnectionInfo, Direction, FailureReason, Party, Security};

impl Inbound {
    /// Serves one plaintext connection to its end: refused by a reset if the pod is STRICT.
    pub async fn serve_plaintext(&self, accepted: Accepted) {
        let Accepted {
            pod,
            stream,
            peer,
            local,
            ..
        } = accepted;
        let _live = pod.track();
        let workload = pod.workload();
        let connection = self.telemetry.open(ConnectionInfo {
            direction: Direction::Inbound,
            // Nobody vouches for a source address, so it names no workload.
            source: Party::unknown(peer),
            destination: Party::of(&workload, local),
            service: None,
            security: Security::Plaintext,
            original_destination: local,
        });
        // A pod that left the mesh while this connection was on its way takes what it always took.
        let mode = workload.mode().unwrap_or(Mode::Permissive);
        if let Err(denied) = authorize(mode, None) {
            return connection.fail(FailureReason::PlaintextRefused, &denied);
        }
        let limit = self.snapshot.load().config().connect_timeout;
        let app = match deliver(&pod, peer, local, limit).await {
            Ok(app) => app,
            Err(failure) => return connection.fail(failure.reason, &failure.detail),
        };
        connection.established();
        let bytes = connection.bytes().clone();
        let ended = relay_tcp(stream, app, (&*bytes).into(), pod.gone()).await;
        connection.close(ended.into());
    }
}
