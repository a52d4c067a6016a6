//! No policy: a random endpoint, once. What kube-proxy does.

use std::time::Duration;

use rand::Rng;
use rand::rngs::SmallRng;

use super::{Ejected, Proxy, Step};
use crate::resilience::{Outcome, Timestamp};

/// Picks at random and passes on what comes.
#[derive(Debug, Default)]
pub struct Plain {
    present: Vec<u32>,
}

impl Proxy for Plain {
    type Ticket = ();

    fn begin(&mut self, _: u32, rng: &mut SmallRng, _: Timestamp) -> ((), Step) {
        (
            (),
            Step::Send(self.present[rng.random_range(0..self.present.len())]),
        )
    }

    fn ended(&mut self, (): &mut (), outcome: Outcome, _: &mut SmallRng, _: Timestamp) -> Step {
        Step::Finish(outcome)
    }

    fn resume(&mut self, (): &mut (), _: &mut SmallRng, _: Timestamp) -> Step {
        Step::Finish(Outcome::Shed)
    }

    fn cancel(&mut self, (): (), _: Timestamp) {}

    fn members(&mut self, present: &[u32], _: Timestamp) {
        self.present = present.to_vec();
    }

    fn tick(&mut self, _: &dyn Fn(u32) -> bool, _: &mut SmallRng, _: Timestamp) {}

    fn take_ejections(&mut self) -> Vec<Ejected> {
        Vec::new()
    }

    fn connect_timeout(&self) -> Duration {
        // Linux gives up a SYN after about two minutes; clients do long before.
        Duration::from_secs(127)
    }
}
