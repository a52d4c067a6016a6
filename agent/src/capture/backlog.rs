//! The queues of connections that wait to be accepted at the agent's listeners in a pod.

use std::net::TcpListener;
use std::os::fd::AsFd as _;
use std::sync::{Arc, Weak};

use parking_lot::Mutex;
use serde::Serialize;

use super::accept::Role;
use super::sys;

/// The queue of one listener.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Backlog {
    /// What the listener is for; there is one for each family of the pod.
    pub role: Role,
    /// Connections that wait now.
    pub waiting: u32,
    /// How many may: the agent's wish or the pod's `net.core.somaxconn`, whichever is less.
    pub room: u32,
    /// SYNs and handshakes that found no room, or no memory, since the listener was opened. The
    /// kernel drops them in silence, and clients try again.
    pub dropped: u32,
}

/// The listeners of one pod. They are not kept open by it: a listener that is there means an agent
/// that is alive.
#[derive(Debug, Default)]
pub(super) struct Backlogs(Mutex<Vec<(Role, Weak<TcpListener>)>>);

impl Backlogs {
    pub fn watch(&self, role: Role, listener: &Arc<TcpListener>) {
        self.0.lock().push((role, Arc::downgrade(listener)));
    }

    /// What the kernel says now of those that are open.
    pub fn read(&self) -> Vec<Backlog> {
        let listeners = self.0.lock();
        listeners
            .iter()
            .filter_map(|(role, listener)| {
                let queue = sys::listen_queue(listener.upgrade()?.as_fd()).ok()?;
                Some(Backlog {
                    role: *role,
                    waiting: queue.waiting,
                    room: queue.room,
                    dropped: queue.dropped,
                })
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::net::{Ipv4Addr, SocketAddr};

    use socket2::{Domain, Socket, Type};
    use tokio::time::{Duration, Instant, sleep};

    use super::*;

    fn connecting(to: SocketAddr) -> Socket {
        let client = Socket::new(Domain::IPV4, Type::STREAM.nonblocking(), None).unwrap();
        let error = client.connect(&to.into());
        let waits = |error: io::Error| error.raw_os_error() == Some(libc::EINPROGRESS);
        assert!(error.map_or_else(waits, |()| true));
        client
    }

    #[tokio::test]
    async fn a_queue_that_overflows_counts_what_it_drops_and_one_that_is_closed_is_gone() {
        let socket = Socket::new(Domain::IPV4, Type::STREAM.nonblocking(), None).unwrap();
        socket
            .bind(&SocketAddr::from((Ipv4Addr::LOCALHOST, 0)).into())
            .unwrap();
        socket.listen(2).unwrap();
        let listener = Arc::new(TcpListener::from(socket));
        let backlogs = Backlogs::default();
        backlogs.watch(Role::Inbound, &listener);
        let empty = Backlog {
            role: Role::Inbound,
            waiting: 0,
            room: 2,
            dropped: 0,
        };
        assert_eq!(backlogs.read(), [empty]);
        let to = listener.local_addr().unwrap();
        let _clients: Vec<_> = (0..20).map(|_| connecting(to)).collect();
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            let now = backlogs.read()[0];
            // One more than its bound is taken.
            if now.waiting == 3 && now.dropped > 0 {
                break;
            }
            assert!(Instant::now() < deadline, "{now:?}");
            sleep(Duration::from_millis(5)).await;
        }
        drop(listener);
        assert_eq!(backlogs.read(), []);
    }
}
