//! Source ports for deliveries, chosen by the agent.
//!
//! A delivery poses as the client: a connection from the client's address to the app, inside the
//! pod. TCP tells connections apart by addresses and ports only, so it must not have the port of a
//! real connection of that client. The kernel knows our own deliveries and refuses a second one
//! (`EADDRNOTAVAIL`); real connections are known here. Clients take their ports from
//! `ip_local_port_range`, so ports outside it come first.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::ops::RangeInclusive;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use parking_lot::Mutex;

/// Below are the ports that some servers take for a sign of trust.
const FIRST: u16 = 1024;

/// The source ports of one pod's deliveries.
#[derive(Debug)]
pub struct SourcePorts {
    /// Above the range, where few servers listen.
    preferred: Cycle,
    /// Below it.
    spare: Cycle,
    /// Real connections to the pod, counted because one may follow another before the first is
    /// forgotten. As many as the pod may have live connections, at most.
    taken: Arc<Mutex<HashMap<Tuple, u32>>>,
}

/// From which ports to choose.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Choice {
    /// Those where few servers listen.
    Preferred,
    /// Those that are left when the preferred ones are in use.
    Spare,
}

type Tuple = (SocketAddr, SocketAddr);

/// A real connection; forgotten when this is dropped.
#[derive(Debug)]
pub struct Taken {
    tuple: Tuple,
    taken: Arc<Mutex<HashMap<Tuple, u32>>>,
}

impl SourcePorts {
    /// For a pod whose own sockets take ports of this range. `start` spreads the first choice.
    #[must_use]
    pub fn new(local: &RangeInclusive<u16>, start: u32) -> Self {
        let above = local.end().checked_add(1).map(|first| first..=u16::MAX);
        let below = local
            .start()
            .checked_sub(1)
            .filter(|last| *last >= FIRST)
            .map(|last| FIRST..=last);
        // Where the range is everything, there is nothing better than the range.
        let preferred = above.or_else(|| below.clone()).unwrap_or(FIRST..=u16::MAX);
        Self {
            spare: Cycle::new(below.unwrap_or_else(|| preferred.clone()), start),
            preferred: Cycle::new(preferred, start),
            taken: Arc::default(),
        }
    }

    /// Notes a real connection.
    #[must_use]
    pub fn take(&self, client: SocketAddr, destination: SocketAddr) -> Taken {
        let tuple = (client, destination);
        *self.taken.lock().entry(tuple).or_insert(0) += 1;
        Taken {
            tuple,
            taken: self.taken.clone(),
        }
    }

    /// The next port for a delivery. None if real connections hold as many as are looked at.
    #[must_use]
    pub fn choose(&self, choice: Choice, client: IpAddr, destination: SocketAddr) -> Option<u16> {
        const LOOKED_AT: usize = 256;
        let cycle = match choice {
            Choice::Preferred => &self.preferred,
            Choice::Spare => &self.spare,
        };
        let taken = self.taken.lock();
        (0..LOOKED_AT)
            .map(|_| cycle.next())
            .find(|&port| !taken.contains_key(&(SocketAddr::new(client, port), destination)))
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        let mut taken = self.taken.lock();
        if let Some(count) = taken.get_mut(&self.tuple) {
            *count -= 1;
            if *count == 0 {
                taken.remove(&self.tuple);
            }
        }
    }
}

/// Ports taken in turn, round and round, so that none returns soon.
#[derive(Debug)]
struct Cycle {
    first: u16,
    size: u32,
    next: AtomicU32,
}

impl Cycle {
    fn new(ports: RangeInclusive<u16>, start: u32) -> Self {
        Self {
            first: *ports.start(),
            size: u32::from(ports.end() - ports.start()) + 1,
            next: AtomicU32::new(start),
        }
    }

    fn next(&self) -> u16 {
        let index = self.next.fetch_add(1, Ordering::Relaxed) % self.size;
        // The index is below the size, so the sum is at most the last port.
        self.first + index as u16
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const PREFERRED: Choice = Choice::Preferred;

    fn address(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    proptest! {
        #[test]
        fn a_chosen_port_is_neither_privileged_nor_one_that_the_pod_gives_away(
            first in 1025_u16.., length in 0_u16..60_000, start: u32,
        ) {
            let local = first..=first.saturating_add(length);
            let ports = SourcePorts::new(&local, start);
            let destination = address("10.0.0.1:80");
            for choice in [Choice::Preferred, Choice::Spare].repeat(50) {
                let port = ports
                    .choose(choice, "10.0.0.2".parse().unwrap(), destination)
                    .unwrap();
                prop_assert!(port >= FIRST);
                prop_assert!(!local.contains(&port));
            }
        }
    }

    #[test]
    fn the_port_of_a_real_connection_is_skipped_until_it_ends() {
        // Two ports are above: 65534 and 65535.
        let ports = SourcePorts::new(&(1..=65_533), 0);
        let destination = address("10.0.0.1:80");
        let client = address("10.0.0.2:65534");
        let real = ports.take(client, destination);
        let again = ports.take(client, destination);
        for _ in 0..4 {
            assert_eq!(
                ports.choose(PREFERRED, client.ip(), destination),
                Some(65_535)
            );
        }
        drop(real);
        assert_eq!(
            ports.choose(PREFERRED, client.ip(), destination),
            Some(65_535)
        );
        drop(again);
        let chosen: Vec<_> = (0..2)
            .map(|_| ports.choose(PREFERRED, client.ip(), destination).unwrap())
            .collect();
        assert!(chosen.contains(&65_534), "{chosen:?}");
    }

    #[test]
    fn a_real_connection_of_one_client_takes_no_port_from_another() {
        let ports = SourcePorts::new(&(1..=65_534), 0);
        let destination = address("10.0.0.1:80");
        let _real = ports.take(address("10.0.0.2:65535"), destination);
        let other = "10.0.0.3".parse().unwrap();
        assert_eq!(ports.choose(PREFERRED, other, destination), Some(65_535));
        let same = "10.0.0.2".parse().unwrap();
        assert_eq!(ports.choose(PREFERRED, same, destination), None);
        assert_eq!(
            ports.choose(PREFERRED, same, address("10.0.0.1:81")),
            Some(65_535)
        );
    }

    #[test]
    fn ports_are_taken_in_turn_so_that_none_returns_soon() {
        let ports = SourcePorts::new(&(32_768..=60_999), 7);
        let destination = address("10.0.0.1:80");
        let mut seen = std::collections::HashSet::new();
        for _ in 0..4_536 {
            seen.insert(ports.choose(PREFERRED, "10.0.0.2".parse().unwrap(), destination));
        }
        assert_eq!(seen.len(), 4_536);
    }

    #[test]
    fn a_pod_that_gives_away_every_port_still_gets_one() {
        let ports = SourcePorts::new(&(1..=u16::MAX), 0);
        let port = ports.choose(
            PREFERRED,
            "10.0.0.2".parse().unwrap(),
            address("10.0.0.1:80"),
        );
        assert_eq!(port, Some(FIRST));
    }
}
