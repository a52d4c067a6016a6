//! Sockets made ahead of need. Only a thread of its own may enter a pod's network namespace, and to
//! wake it for every connection costs several times what a socket does.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use socket2::Socket;
use tokio::time::Instant;

use super::counters::{Counters, Event};
use super::kernel::Family;
use super::share::{PodShare, Spare};
use super::sockets;

/// The most sockets of one family that a pod has unused.
const BATCH_MAX: usize = 16;

/// A pod that has used up its sockets within this has twice as many made; any other has one made
/// when it needs one, and none lies unused.
const BUSY: Duration = Duration::from_secs(1);

/// The unused sockets of a pod, at most [`BATCH_MAX`] of each family, and no more in all pods than
/// [`PodShare::spare`] gives out. A pod that gets none has each socket made when it needs one.
pub(super) struct Stock {
    share: Arc<PodShare>,
    counters: Arc<Counters>,
    v4: Mutex<Kept>,
    v6: Mutex<Kept>,
}

/// The sockets of one family.
#[derive(Default)]
struct Kept {
    unused: Vec<(Socket, Spare)>,
    /// The last batch: with how many sockets there were to be then, and when it was asked for.
    last: Option<(usize, Instant)>,
    /// Whether a batch is on its way.
    filling: bool,
    /// Whether any was taken since [`Stock::tend`] looked.
    used: bool,
    /// Nothing is kept any more.
    closed: bool,
}

/// What there is for a connection.
pub(super) struct Taken {
    /// A socket, if one lay there.
    pub socket: Option<Socket>,
    /// More of them, to be made in the pod's namespace.
    pub batch: Option<Batch>,
}

/// Sockets that are to be made. Dropped, others may ask for them.
pub(super) struct Batch {
    stock: Arc<Stock>,
    family: Family,
    size: usize,
}

impl Stock {
    pub fn new(share: Arc<PodShare>, counters: Arc<Counters>) -> Arc<Self> {
        Arc::new(Self {
            share,
            counters,
            v4: Mutex::default(),
            v6: Mutex::default(),
        })
    }

    /// Takes a socket, and says whether more are to be made.
    pub fn take(self: &Arc<Self>, family: Family, now: Instant) -> Taken {
        let mut kept = self.of(family).lock();
        kept.used = true;
        let socket = kept.unused.pop().map(|(socket, _)| socket);
        let size = kept.missing(now, socket.is_some());
        Taken {
            batch: size.map(|size| Batch {
                stock: self.clone(),
                family,
                size,
            }),
            socket,
        }
    }

    /// Takes a socket that others had made meanwhile.
    pub fn left(&self, family: Family) -> Option<Socket> {
        let taken = self.of(family).lock().unused.pop();
        taken.map(|(socket, _)| socket)
    }

    /// Closes what nobody took a socket from since the last call.
    pub fn tend(&self) {
        for kept in [&self.v4, &self.v6] {
            let mut kept = kept.lock();
            if !std::mem::take(&mut kept.used) {
                kept.last = None;
                kept.unused = Vec::new();
            }
        }
    }

    /// Closes all of them, and keeps none from now on: an open socket keeps its namespace.
    pub fn close(&self) {
        for kept in [&self.v4, &self.v6] {
            let mut kept = kept.lock();
            kept.closed = true;
            kept.unused = Vec::new();
        }
    }

    fn of(&self, family: Family) -> &Mutex<Kept> {
        match family {
            Family::V4 => &self.v4,
            Family::V6 => &self.v6,
        }
    }
}

impl Kept {
    /// How many sockets are to be made now, if any.
    fn missing(&mut self, now: Instant, found: bool) -> Option<usize> {
        let (last, since) = match self.last {
            Some((size, at)) => (size, now.saturating_duration_since(at)),
            None => (0, Duration::MAX),
        };
        if self.filling || self.closed || self.unused.len() > last / 4 {
            return None;
        }
        let size = match since < BUSY {
            true => (last * 2).min(BATCH_MAX),
            false => 1,
        };
        let missing = size.saturating_sub(self.unused.len());
        // One that is enough, or one for whoever asks.
        if missing == 0 || (found && size == 1) {
            return None;
        }
        self.last = Some((size, now));
        self.filling = true;
        Some(missing)
    }
}

impl Batch {
    /// Makes the sockets. To be called in the pod's namespace. An error leaves it to those who need
    /// a socket to make it, and to learn of it.
    pub fn make(self) {
        for _ in 0..self.size {
            let Some(room) = self.stock.share.spare() else {
                self.stock.counters.count(Event::SpareWithoutRoom);
                return;
            };
            let Ok(socket) = sockets::new_socket(self.family) else {
                return;
            };
            let mut kept = self.stock.of(self.family).lock();
            if kept.closed {
                return;
            }
            kept.unused.push((socket, room));
        }
    }

    /// Makes the sockets, one of them to be used at once.
    pub fn make_with_first(mut self) -> io::Result<Socket> {
        self.size = self.size.saturating_sub(1);
        let first = sockets::new_socket(self.family)?;
        self.make();
        Ok(first)
    }
}

impl Drop for Batch {
    fn drop(&mut self) {
        self.stock.of(self.family).lock().filling = false;
    }
}

#[cfg(test)]
mod tests {
    use super::super::share::{NodeShare, SPARES};
    use super::*;

    const FAMILY: Family = Family::V4;
    const DESCRIPTORS: u64 = 20_000;

    fn stock() -> Arc<Stock> {
        Stock::new(NodeShare::new(DESCRIPTORS).join(), Arc::default())
    }

    /// A connection's socket, made where there is none. Returns how many were made for it.
    fn connect(stock: &Arc<Stock>, now: Instant) -> usize {
        let Taken { socket, batch } = stock.take(FAMILY, now);
        let size = batch.as_ref().map_or(0, |batch| batch.size);
        match (socket, batch) {
            (Some(_), Some(batch)) => batch.make(),
            (None, Some(batch)) => drop(batch.make_with_first().unwrap()),
            (Some(_), None) => {}
            (None, None) => panic!("no socket, and none is made"),
        }
        size
    }

    fn unused(stock: &Stock) -> usize {
        stock.of(FAMILY).lock().unused.len()
    }

    #[test]
    fn a_pod_that_connects_now_and_then_has_no_socket_lying_unused() {
        let stock = stock();
        let mut now = Instant::now();
        for _ in 0..10 {
            assert_eq!(connect(&stock, now), 1);
            assert_eq!(unused(&stock), 0);
            now += BUSY;
        }
    }

    #[test]
    fn a_busy_pod_has_its_sockets_made_many_at_a_time_and_never_keeps_more_than_the_bound() {
        let stock = stock();
        let now = Instant::now();
        let mut batches = Vec::new();
        for _ in 0..1_000 {
            batches.extend(Some(connect(&stock, now)).filter(|&made| made > 0));
            assert!(unused(&stock) <= BATCH_MAX);
        }
        assert!(batches.len() <= 1_000 / 12 + 5, "{}", batches.len());
        // Whoever comes last finds one.
        assert!(unused(&stock) > 0);
    }

    #[test]
    fn who_finds_none_while_a_batch_is_on_its_way_asks_for_none_of_his_own() {
        let stock = stock();
        let now = Instant::now();
        let first = stock.take(FAMILY, now).batch.unwrap();
        assert!(stock.take(FAMILY, now).batch.is_none());
        assert!(stock.left(FAMILY).is_none());
        // The batch was lost: the next may ask again.
        drop(first);
        assert!(stock.take(FAMILY, now).batch.is_some());
    }

    #[test]
    fn what_nobody_needs_any_more_is_closed() {
        let stock = stock();
        let now = Instant::now();
        (0..20).for_each(|_| _ = connect(&stock, now));
        stock.tend();
        assert!(unused(&stock) > 0);
        stock.tend();
        assert_eq!(unused(&stock), 0);
    }

    #[test]
    fn a_pod_that_is_gone_keeps_no_socket_and_gets_none() {
        let stock = stock();
        let now = Instant::now();
        (0..20).for_each(|_| _ = connect(&stock, now));
        let late = Batch {
            stock: stock.clone(),
            family: FAMILY,
            size: BATCH_MAX,
        };
        stock.close();
        assert_eq!(unused(&stock), 0);
        late.make();
        assert_eq!(unused(&stock), 0);
        assert!(stock.take(FAMILY, now).batch.is_none());
    }

    #[test]
    fn where_all_pods_keep_as_many_as_they_may_the_next_has_its_own_made_one_by_one() {
        let node = NodeShare::new(DESCRIPTORS);
        let others = node.join();
        let all: Vec<_> = std::iter::from_fn(|| others.spare()).collect();
        assert_eq!(all.len(), SPARES);
        let late = Stock::new(node.join(), Arc::default());
        let now = Instant::now();
        (0..40).for_each(|_| _ = connect(&late, now));
        assert_eq!(unused(&late), 0);
        assert!(late.counters.get(Event::SpareWithoutRoom) > 0);
        drop(all);
        (0..40).for_each(|_| _ = connect(&late, now));
        assert!(unused(&late) > 0);
    }
}
