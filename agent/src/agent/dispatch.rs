//! Whose work a connection is, and which part of the agent does it.

use std::sync::{Arc, OnceLock, Weak};

use crate::capture::{Accepted, Capture, EnrolledPod, Handler, Role, Task, in_parts};
use crate::fairness::{self, Fairness, Payer, Turns};
use crate::inbound::Inbound;
use crate::outbound::Outbound;
use crate::workers::WorkerId;

/// Hands what capture accepts to the part that it is for.
pub(super) struct Dispatch {
    pub(super) outbound: Arc<Outbound>,
    pub(super) inbound: Arc<Inbound>,
    /// Of each worker.
    pub(super) fairness: Arc<[Arc<Fairness>]>,
    /// Set right after capture was started, before it knows of any pod.
    pub(super) capture: OnceLock<Weak<Capture>>,
}

impl Dispatch {
    /// Has a task take turns with those of the other pods on this worker.
    fn turns<F>(&self, payer: Payer, task: F) -> Turns<F> {
        // Connections are handled on workers; what is not counts with the first.
        let here = WorkerId::current().map_or(0, WorkerId::index);
        self.fairness[here].turns(payer, task)
    }
}

impl Handler for Dispatch {
    fn accepting(&self, pod: &EnrolledPod, accepting: Task) -> Task {
        let payer = Payer {
            pod: pod.netns_cookie(),
            client: fairness::Client::Itself,
        };
        Box::pin(self.turns(payer, accepting))
    }

    fn handle(&self, accepted: Accepted) -> Task {
        let client = match accepted.role {
            Role::Outbound => fairness::Client::Itself,
            Role::Inbound | Role::Hbone => fairness::Client::At(accepted.peer.ip()),
        };
        let payer = Payer {
            pod: accepted.pod.netns_cookie(),
            client,
        };
        match accepted.role {
            Role::Outbound => {
                let outbound = self.outbound.clone();
                let Some(capture) = self.capture.get().and_then(Weak::upgrade) else {
                    return Box::pin(std::future::ready(()));
                };
                let setup = Box::pin(outbound.serve(accepted, capture));
                Box::pin(self.turns(payer, in_parts(setup)))
            }
            Role::Inbound => {
                let setup = Box::pin(self.inbound.clone().serve_plaintext(accepted));
                Box::pin(self.turns(payer, in_parts(setup)))
            }
            Role::Hbone => {
                let tunnel = self.inbound.clone().serve_tunnel(accepted);
                Box::pin(self.turns(payer, tunnel))
            }
        }
    }
}
