//! The connections to one endpoint for one source: which request gets which, and when a new one is made.

use std::future::Future;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use parking_lot::Mutex;
use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio::time::Instant;

use super::client::{Kind, Lease, NeverSent, SendError};
use super::h1::{Condition, H1};
use super::h2::{Fitness, H2};
use super::io::HttpIo;
use super::places::{Entry, Grant, Place, Places};
use super::pool::{PoolLimits, PoolStatus, Terms, Totals, UpstreamKey};
use super::server::Wire;
use crate::fairness;

/// Whatever has to live as long as a connection: a permit, a guard that counts.
pub type Held = Box<dyn Send + Sync>;

/// A fresh connection to an endpoint.
pub struct Connected {
    /// The connection.
    pub io: HttpIo,
    /// Dropped with the connection.
    pub held: Option<Held>,
}

impl Connected {
    fn holding(mut self, place: Option<Place>) -> Self {
        if let Some(place) = place {
            self.held = Some(Box::new((self.held.take(), place)));
        }
        self
    }
}

impl<IO: Into<HttpIo>> From<IO> for Connected {
    fn from(io: IO) -> Self {
        Self {
            io: io.into(),
            held: None,
        }
    }
}

/// The connections to one endpoint for one source.
pub struct Upstreams {
    limits: PoolLimits,
    protocol: Wire,
    /// Where its connections live, and end.
    runtime: Handle,
    state: Mutex<State>,
    totals: Arc<Totals>,
    /// Set when the source or the endpoint is gone: what comes back is closed.
    closed: AtomicBool,
}

#[derive(Default)]
struct State {
    /// The one used last is at the end, and is used next.
    #[expect(
        clippy::vec_box,
        reason = "requests and the pool hand the same box to and fro"
    )]
    idle: Vec<Box<H1>>,
    multiplexed: Vec<Arc<H2>>,
    /// The HTTP/2 handshake that others wait for.
    flight: Option<watch::Receiver<()>>,
}

impl std::fmt::Debug for Upstreams {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Upstreams")
            .field("protocol", &self.protocol)
            .finish_non_exhaustive()
    }
}

impl Upstreams {
    /// Connections of one owner, outside any pool: nobody looks after idle ones, so that they live
    /// as long as their owner or their peer likes. To be called on the runtime that is to serve them.
    #[must_use]
    pub fn new(protocol: Wire, limits: PoolLimits) -> Arc<Self> {
        Self::counted(protocol, limits, Arc::default())
    }

    pub(super) fn counted(protocol: Wire, limits: PoolLimits, totals: Arc<Totals>) -> Arc<Self> {
        Arc::new(Self {
            limits,
            protocol,
            runtime: Handle::current(),
            state: Mutex::default(),
            totals,
            closed: AtomicBool::new(false),
        })
    }

    /// See [`UpstreamPool::get`].
    pub async fn get<C, F, E>(self: &Arc<Self>, terms: &Terms<'_>, connect: C) -> Result<Lease, E>
    where
        C: FnOnce() -> F,
        F: Future<Output = Result<Connected, E>>,
        E: From<SendError>,
    {
        if let Some(lease) = self.find(terms) {
            return Ok(lease);
        }
        // Boxed: it is most of what a request's future would be, and few requests come here.
        match self.protocol {
            Wire::Http1 => Box::pin(self.make_h1(terms, connect)).await,
            Wire::Http2 => Box::pin(self.make_h2(terms, connect)).await,
        }
    }

    /// What [`Upstreams::get`] gives at once, if there is that.
    #[must_use]
    pub fn find(self: &Arc<Self>, terms: &Terms<'_>) -> Option<Lease> {
        match self.protocol {
            Wire::Http1 => {
                // Nobody passes those who wait.
                let is_crowded = terms.places.as_ref().is_some_and(|one| one.has_line());
                let connection = (!is_crowded).then(|| self.take_idle(terms)).flatten()?;
                Some((connection, self.clone()).into())
            }
            Wire::Http2 => self.multiplex(&mut self.state.lock(), terms),
        }
    }

    /// A connection that another leaves, or a new one.
    async fn make_h1<C, F, E>(self: &Arc<Self>, terms: &Terms<'_>, connect: C) -> Result<Lease, E>
    where
        C: FnOnce() -> F,
        F: Future<Output = Result<Connected, E>>,
        E: From<SendError>,
    {
        let place = match self.enter(terms).await? {
            Some(Grant::Lease(lease)) => {
                count(&self.totals.reused);
                return Ok(lease);
            }
            Some(Grant::Place(place)) => Some(place),
            None => None,
        };
        let connected = connect().await?;
        let made = self.connect_h1(connected, place, terms).await;
        made.map_err(E::from)
    }

    /// Waits for leave to make a connection, or for one that another leaves; none if they are not
    /// limited.
    async fn enter(self: &Arc<Self>, terms: &Terms<'_>) -> Result<Option<Grant>, SendError> {
        let Some(places) = &terms.places else {
            return Ok(None);
        };
        let turn = match places.enter(Arc::downgrade(self))? {
            Entry::Place(place) => return Ok(Some(Grant::Place(place))),
            Entry::Wait(turn) => turn,
        };
        // Stays set if the request gives up meanwhile.
        let waits = |now| {
            if let Some(waits) = terms.waits {
                waits.store(now, Ordering::Relaxed);
            }
        };
        waits(true);
        let grant = turn.come().await?;
        waits(false);
        Ok(Some(grant))
    }

    /// Hands an idle connection of these places to the first who waits for one, or closes it if that
    /// cannot use it. False if none is idle.
    pub(super) fn pass_on(self: &Arc<Self>, places: &Arc<Places>) -> bool {
        let connection = {
            let mut state = self.state.lock();
            match state.idle.iter().rposition(|one| one.is_of(places)) {
                Some(at) => state.idle.remove(at),
                None => {
                    let unused = |one: &Arc<H2>| one.is_of(places) && one.idle_since().is_some();
                    let at = state.multiplexed.iter().position(unused);
                    if let Some(at) = at {
                        state.multiplexed.remove(at).retire();
                    }
                    return at.is_some();
                }
            }
        };
        self.totals.idle.fetch_sub(1, Ordering::Relaxed);
        let mut connection = connection;
        if connection.condition() == Condition::Free {
            let unwanted = places.offer_first(self, (connection, self.clone()).into());
            if let Err(Lease(Kind::H1 { connection, .. })) = unwanted {
                // Who asks may be on another worker.
                self.runtime.spawn(connection.close());
            }
        }
        true
    }

    /// Gives the streams that a connection has room for to those who wait. One that has none left
    /// makes room for who cannot use it.
    pub(super) fn serve_line(self: &Arc<Self>, connection: &Arc<H2>, places: &Arc<Places>) {
        while places.offer_stream(self, || connection.claim_again().map(Lease::from)) {}
        if connection.streams() == 0 && places.has_line() {
            self.pass_on(places);
        }
    }

    /// Keeps a connection that was made before anybody needed it.
    pub async fn adopt(self: &Arc<Self>, connected: Connected) -> Result<(), SendError> {
        match self.protocol {
            Wire::Http1 => {
                count(&self.totals.created);
                self.take_back(new_h1(connected).await?);
            }
            Wire::Http2 => {
                count(&self.totals.created);
                self.keep_h2(new_h2(connected, None).await?);
            }
        }
        Ok(())
    }

    async fn connect_h1(
        self: &Arc<Self>,
        connected: Connected,
        place: Option<Place>,
        terms: &Terms<'_>,
    ) -> Result<Lease, SendError> {
        count(&self.totals.created);
        let places = place.as_ref().map(|place| place.places().clone());
        let mut connection = new_h1(connected.holding(place)).await?;
        connection.places = places;
        connection.limit(terms);
        Ok((connection, self.clone()).into())
    }

    async fn connect_h2(
        self: &Arc<Self>,
        connected: Connected,
        place: Option<Place>,
        terms: &Terms<'_>,
    ) -> Result<Lease, SendError> {
        count(&self.totals.created);
        let places = place.as_ref().map(|place| place.places().clone());
        let line = places.clone().map(|places| (places, Arc::downgrade(self)));
        let connection = new_h2(connected.holding(place), line).await?;
        let stream = connection.claim(terms);
        self.keep_h2(connection.clone());
        if let Some(places) = places.filter(|places| places.has_line()) {
            self.serve_line(&connection, &places);
        }
        // No policy allows a connection less than one request.
        let stream = stream.ok_or(SendError::NeverSent(NeverSent::ClosedBeforeSent))?;
        Ok(stream.into())
    }

    fn keep_h2(&self, connection: Arc<H2>) {
        let mut state = self.state.lock();
        if self.is_closed() {
            connection.retire();
        } else {
            state.multiplexed.push(connection);
        }
    }

    /// Looks for an idle connection that is still good.
    fn take_idle(&self, terms: &Terms<'_>) -> Option<Box<H1>> {
        loop {
            let mut connection = self.state.lock().idle.pop()?;
            self.totals.idle.fetch_sub(1, Ordering::Relaxed);
            connection.limit(terms);
            match connection.condition() {
                Condition::Free if connection.is_spent() => {
                    fairness::spawn(connection.close());
                }
                Condition::Free => {
                    count(&self.totals.reused);
                    return Some(connection);
                }
                Condition::Ended => {
                    count(&self.totals.found_closed);
                    fairness::spawn(connection.close());
                }
                Condition::Broken => count(&self.totals.found_closed),
            }
        }
    }

    /// A connection whose request is over: it is kept for the next, if it may carry another.
    pub(super) fn take_back(self: &Arc<Self>, mut connection: Box<H1>) {
        if connection.is_spent() {
            fairness::spawn(connection.close());
            return;
        }
        connection.since = Instant::now();
        let places = connection.places.clone();
        let surplus = {
            let mut state = self.state.lock();
            let full = self.is_closed()
                || state.idle.len() >= self.limits.idle_per_key
                || self.totals.idle.load(Ordering::Relaxed) >= self.limits.idle_total;
            if full {
                Some(connection)
            } else {
                self.totals.idle.fetch_add(1, Ordering::Relaxed);
                state.idle.push(connection);
                None
            }
        };
        if let Some(connection) = surplus {
            count(&self.totals.overflowed);
            fairness::spawn(connection.close());
        } else if let Some(places) = places.filter(|places| places.has_line()) {
            self.pass_on(&places);
        }
    }

    /// A stream of a connection that another makes, or of a new one.
    async fn make_h2<C, F, E>(self: &Arc<Self>, terms: &Terms<'_>, connect: C) -> Result<Lease, E>
    where
        C: FnOnce() -> F,
        F: Future<Output = Result<Connected, E>>,
        E: From<SendError>,
    {
        let mut place = None;
        let landed = {
            let mut waited = false;
            loop {
                let flight = {
                    let mut state = self.state.lock();
                    if let Some(lease) = self.multiplex(&mut state, terms) {
                        return Ok(lease);
                    }
                    // Whoever has waited for another's handshake in vain makes its own.
                    match state.flight.clone().filter(|_| !waited) {
                        Some(flight) => Some(flight),
                        None if place.is_none() && terms.places.is_some() => None,
                        None => {
                            let (landed, flight) = watch::channel(());
                            state.flight = Some(flight);
                            break landed;
                        }
                    }
                };
                let Some(mut flight) = flight else {
                    match self.enter(terms).await? {
                        Some(Grant::Lease(lease)) => {
                            count(&self.totals.reused);
                            return Ok(lease);
                        }
                        Some(Grant::Place(leave)) => place = Some(leave),
                        None => {}
                    }
                    continue;
                };
                waited = true;
                // Whoever makes a connection of its own later asks again.
                place = None;
                // The sender goes away with its handshake, whatever came of it.
                while flight.changed().await.is_ok() {}
            }
        };
        let connected = connect().await;
        let lease = match connected {
            Ok(connected) => self
                .connect_h2(connected, place, terms)
                .await
                .map_err(E::from),
            Err(error) => Err(error),
        };
        drop(landed);
        self.state
            .lock()
            .flight
            .take_if(|flight| flight.has_changed().is_err());
        lease
    }

    /// A stream on a connection that has room, or on the least loaded if no more may be made.
    fn multiplex(&self, state: &mut State, terms: &Terms<'_>) -> Option<Lease> {
        loop {
            state
                .multiplexed
                .retain(|connection| connection.fitness() != Fitness::Dead);
            let room = state
                .multiplexed
                .iter()
                .find(|connection| connection.fitness() == Fitness::Room);
            let connection = match room {
                Some(connection) => connection,
                None if state.multiplexed.len() >= self.limits.h2_per_key => state
                    .multiplexed
                    .iter()
                    .min_by_key(|connection| connection.streams())?,
                None => return None,
            };
            // One that has no place to give is retired by that, and looked at no more.
            if let Some(place) = connection.claim(terms) {
                count(&self.totals.reused);
                return Some(place.into());
            }
        }
    }

    fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }

    /// Closes what is idle, and whatever comes back later.
    pub(super) fn close(&self, cut: Cut) {
        self.closed.store(true, Ordering::Release);
        let state = std::mem::take(&mut *self.state.lock());
        self.totals
            .idle
            .fetch_sub(state.idle.len(), Ordering::Relaxed);
        for connection in state.idle {
            match cut {
                Cut::InOrder => drop(self.runtime.spawn(connection.close())),
                Cut::AtOnce => drop(connection),
            }
        }
        for connection in state.multiplexed {
            match cut {
                Cut::InOrder => connection.retire(),
                Cut::AtOnce => connection.abort(),
            }
        }
    }

    /// Closes what has idled for too long or was closed by its peer.
    pub(super) fn sweep(&self, now: Instant) {
        let (mut expired, mut dead) = (Vec::new(), Vec::new());
        {
            let mut state = self.state.lock();
            let mut kept = Vec::with_capacity(state.idle.len());
            for mut connection in state.idle.drain(..) {
                match connection.condition() {
                    Condition::Free if !connection.is_expired(now, self.limits.idle) => {
                        kept.push(connection);
                    }
                    Condition::Free | Condition::Ended => expired.push(connection),
                    Condition::Broken => dead.push(connection),
                }
            }
            state.idle = kept;
            state.multiplexed.retain(|connection| {
                let expired = connection.is_expired(now, self.limits.idle_h2);
                if expired {
                    connection.retire();
                    count(&self.totals.expired);
                }
                !expired && connection.fitness() != Fitness::Dead
            });
        }
        self.totals
            .idle
            .fetch_sub(expired.len() + dead.len(), Ordering::Relaxed);
        for connection in expired {
            count(&self.totals.expired);
            self.runtime.spawn(connection.close());
        }
    }

    pub(super) fn is_unused(&self) -> bool {
        let state = self.state.lock();
        state.idle.is_empty() && state.multiplexed.is_empty() && state.flight.is_none()
    }

    pub(super) fn status(&self, key: &UpstreamKey) -> PoolStatus {
        let state = self.state.lock();
        let streams = state.multiplexed.iter().map(|h2| h2.streams());
        PoolStatus {
            source: key.source,
            endpoint: key.endpoint,
            protocol: key.protocol,
            way: key.way,
            worker: key.worker,
            idle: state.idle.len(),
            multiplexed: state.multiplexed.len(),
            streams: streams.sum(),
        }
    }
}

impl Drop for Upstreams {
    fn drop(&mut self) {
        let idle = self.state.get_mut().idle.len();
        self.totals.idle.fetch_sub(idle, Ordering::Relaxed);
    }
}

/// How connections are closed that nobody wants any more.
#[derive(Debug, Clone, Copy)]
pub(super) enum Cut {
    InOrder,
    AtOnce,
}

async fn new_h1(connected: Connected) -> Result<Box<H1>, SendError> {
    let made = H1::new(connected).await;
    made.map_err(|error| SendError::Reset(error.into()))
}

async fn new_h2(
    connected: Connected,
    line: Option<(Arc<Places>, Weak<Upstreams>)>,
) -> Result<Arc<H2>, SendError> {
    let made = H2::new(connected, line).await;
    made.map_err(|error| SendError::Reset(error.into()))
}

fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}
