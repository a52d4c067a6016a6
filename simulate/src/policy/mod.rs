//! What is compared: Undermesh and the published algorithms of others.

use std::time::Duration;

use rand::rngs::SmallRng;

use crate::resilience::{Outcome, Timestamp};

pub mod envoy;
pub mod linkerd;
pub mod none;
pub mod undermesh;

/// What a proxy does next with a request.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Step {
    /// Sends an attempt to this endpoint.
    Send(u32),
    /// Waits, then is asked again.
    Wait(Duration),
    /// Answers the client.
    Finish(Outcome),
}

/// An endpoint was ejected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ejected {
    /// Which one.
    pub endpoint: u32,
    /// The only client that it is ejected for; `None` is all of the node.
    pub only_for: Option<u32>,
}

/// One node's proxy.
pub trait Proxy {
    /// What it keeps for a request.
    type Ticket;

    /// A request begins.
    fn begin(&mut self, client: u32, rng: &mut SmallRng, now: Timestamp) -> (Self::Ticket, Step);

    /// An attempt has ended.
    fn ended(
        &mut self,
        ticket: &mut Self::Ticket,
        outcome: Outcome,
        rng: &mut SmallRng,
        now: Timestamp,
    ) -> Step;

    /// A wait is over.
    fn resume(&mut self, ticket: &mut Self::Ticket, rng: &mut SmallRng, now: Timestamp) -> Step;

    /// The client has gone away.
    fn cancel(&mut self, ticket: Self::Ticket, now: Timestamp);

    /// Discovery says which endpoints there are.
    fn members(&mut self, present: &[u32], now: Timestamp);

    /// Ten times a second. `reachable` says whether a connection could be made in the background.
    fn tick(&mut self, reachable: &dyn Fn(u32) -> bool, rng: &mut SmallRng, now: Timestamp);

    /// Ejections since the last call.
    fn take_ejections(&mut self) -> Vec<Ejected>;

    /// How long a connection may take.
    fn connect_timeout(&self) -> Duration;
}
