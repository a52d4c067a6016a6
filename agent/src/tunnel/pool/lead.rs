//! Making a tunnel that others wait for.

use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Weak};

use tokio::sync::{OwnedSemaphorePermit, watch};
use tokio::time::timeout;
use tracing::Instrument;

use super::{Pool, TunnelKey};
use crate::fairness;
use crate::identity::WorkloadCertificate;
use crate::tunnel::client::{Fitness, IdleBounds, Place, Tunnel, establish};
use crate::tunnel::error::{Stage, TunnelError};
use crate::tunnel::liveness::Transport;
use crate::tunnel::status::count;

/// How a handshake stands that others wait for.
#[derive(Clone)]
pub(super) enum Flight {
    UnderWay,
    Landed,
    Failed(TunnelError),
}

/// The one who makes the tunnel that others wait for. Dropped, it lets another one lead.
pub(super) struct Lead<'a> {
    pub(super) pool: &'a Pool,
    pub(super) key: &'a TunnelKey,
    pub(super) id: u64,
    pub(super) permit: Option<OwnedSemaphorePermit>,
    pub(super) flight: watch::Sender<Flight>,
}

impl Pool {
    /// Makes a tunnel, and takes the first place in it before others see it.
    pub(super) async fn lead<D, F, T>(
        self: &Arc<Self>,
        mut lead: Lead<'_>,
        certificate: &Arc<WorkloadCertificate>,
        dial: &D,
    ) -> Result<Place, TunnelError>
    where
        D: Fn() -> F,
        F: Future<Output = io::Result<T>> + Send,
        T: Transport,
    {
        let address = lead.key.address;
        let bounds = &self.options.limits;
        let permit = lead.permit.take();
        let made = async {
            let permit = match permit {
                Some(permit) => permit,
                None => self.evicted(address).await?,
            };
            let transport = match timeout(bounds.dial, dial()).await {
                Ok(Ok(transport)) => transport,
                Ok(Err(error)) => {
                    return Err(TunnelError::Dial {
                        address,
                        source: Arc::new(error),
                    });
                }
                Err(_) => {
                    return Err(TunnelError::Timeout {
                        address,
                        stage: Stage::Dial,
                        after: bounds.dial,
                    });
                }
            };
            let established = establish(lead.id, lead.key, certificate, transport, bounds).await?;
            Ok((established, permit))
        };
        let (established, permit) = match made.await {
            Ok(made) => made,
            Err(error) => {
                count(&self.counters.failed);
                lead.fail(error.clone());
                return Err(error);
            }
        };
        let place = lead.land(&established.tunnel)?;
        count(&self.counters.established);
        let (pool, key) = (Arc::downgrade(self), lead.key.clone());
        let bounds = bounds.clone();
        let idle = IdleBounds {
            alone: self.options.idle,
            surplus: self.options.surplus,
        };
        let span = tracing::debug_span!("tunnel", id = lead.id, netns_cookie = key.netns_cookie,
            source = %key.source, %address, peer = %established.tunnel.peer);
        let driven = async move {
            let id = established.tunnel.id;
            let is_surplus = || is_surplus(&pool, &key, id);
            established.drive(idle, is_surplus, bounds).await;
            forget(&pool, &key, id);
            drop(permit);
        };
        fairness::spawn(driven.instrument(span));
        Ok(place)
    }

    async fn evicted(&self, address: SocketAddr) -> Result<OwnedSemaphorePermit, TunnelError> {
        let room = self.room.clone().acquire_owned();
        match timeout(self.options.limits.dial, room).await {
            Ok(Ok(permit)) => Ok(permit),
            Ok(Err(_)) | Err(_) => Err(TunnelError::Saturated {
                address,
                bound: self.options.tunnels,
            }),
        }
    }
}

impl Lead<'_> {
    /// The tunnel is there: a place in it for the leader, then for all.
    fn land(&self, tunnel: &Arc<Tunnel>) -> Result<Place, TunnelError> {
        let mut keys = self.pool.keys.lock();
        // Not there, or not ours: the source was closed meanwhile.
        let tunnels = keys
            .get_mut(self.key)
            .filter(|tunnels| {
                tunnels
                    .flight
                    .as_ref()
                    .is_some_and(|(id, _)| *id == self.id)
            })
            .ok_or(TunnelError::SourceGone)?;
        let place = tunnel.claim(1).ok_or(TunnelError::SourceGone)?;
        tunnels.flight = None;
        tunnels.open.push(tunnel.clone());
        drop(keys);
        self.flight.send_replace(Flight::Landed);
        Ok(place)
    }

    fn fail(&self, error: TunnelError) {
        self.leave();
        self.flight.send_replace(Flight::Failed(error));
    }

    fn leave(&self) {
        let mut keys = self.pool.keys.lock();
        if let Some(tunnels) = keys.get_mut(self.key) {
            tunnels.flight.take_if(|(id, _)| *id == self.id);
            if tunnels.is_unused() {
                keys.remove(self.key);
            }
        }
    }
}

impl Drop for Lead<'_> {
    fn drop(&mut self) {
        self.leave();
    }
}

/// Whether the next stream has no need of this tunnel, which is idle. Of those that are all idle the oldest stays.
fn is_surplus(pool: &Weak<Pool>, key: &TunnelKey, id: u64) -> bool {
    let Some(pool) = pool.upgrade() else {
        return false;
    };
    let limit = pool.options.streams_per_tunnel;
    let keys = pool.keys.lock();
    let Some(tunnels) = keys.get(key) else {
        return false;
    };
    let mut others = tunnels.open.iter().filter(|other| other.id != id);
    others.any(|other| {
        other.fitness(limit) == Fitness::Good && (other.id < id || other.streams() > 0)
    })
}

fn forget(pool: &Weak<Pool>, key: &TunnelKey, id: u64) {
    let Some(pool) = pool.upgrade() else {
        return;
    };
    let mut keys = pool.keys.lock();
    if let Some(tunnels) = keys.get_mut(key) {
        tunnels.open.retain(|tunnel| tunnel.id != id);
        if tunnels.is_unused() {
            keys.remove(key);
        }
    }
}
