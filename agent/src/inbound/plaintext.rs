//! A connection that came to a pod without a tunnel.

use std::sync::Arc;

use super::deliver::deliver;
use super::talk::Talk;
use super::{Caller, Inbound};
use crate::capture::{Accepted, Task};
use crate::mesh::{Mode, authorize};
use crate::telemetry::{ConnectionInfo, Direction, FailureReason, Party, Security};

impl Inbound {
    /// Sets one plaintext connection up, and gives back what serves it to its end: refused by a reset if the pod is
    /// STRICT.
    pub async fn serve_plaintext(self: Arc<Self>, accepted: Accepted) -> Option<Task> {
        let Accepted {
            pod,
            stream,
            peer,
            local,
            ..
        } = accepted;
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
            connection.fail(FailureReason::PlaintextRefused, &denied);
            return None;
        }
        // There is no other app, and the client gives up when it likes.
        let limit = self.snapshot.load().config().last_connect_limit();
        let app = match deliver(&pod, peer, local, limit).await {
            Ok(app) => app,
            Err(failure) => {
                connection.fail(failure.reason, &failure.detail);
                return None;
            }
        };
        connection.established();
        let caller = Caller {
            identity: None,
            address: peer,
        };
        let talk = Talk {
            pod,
            caller,
            app: local,
            security: Security::Plaintext,
            limit,
            connection,
            live: None,
        };
        self.talk(talk, stream.into(), app).await
    }
}
