//! The mesh as the requests of one connection see it: looked up once for each snapshot, so that a
//! request that follows another finds everything ready.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, OnceLock};

use parking_lot::Mutex;

use super::leg::{Leg, To, ToService, retry, timeouts};
use super::{Client, Engine, Frontend, Network};
use crate::mesh::route::{Backend, BackendTarget, Mirror, RouteTable, Rule};
use crate::mesh::{FallbackBackend, ObjectName, Snapshot, TrafficPolicy};
use crate::outbound::connect::{Failure, Way};
use crate::outbound::destinations::{DestinationId, EndpointId, RouteKey, Traffic};

/// Legs and ways that a connection keeps; at the bound it forgets them and looks them up anew.
const KEPT: usize = 1024;

/// One snapshot, and what was found in it. A request reads one from its start to its end.
pub(super) struct View {
    pub(super) snapshot: Arc<Snapshot>,
    routes: Option<Arc<RouteTable>>,
    own: OnceLock<Arc<Leg>>,
    legs: Mutex<HashMap<LegKey, Arc<Leg>>>,
    ways: Mutex<HashMap<EndpointId, Arc<Way>>>,
}

/// Which leg, by the addresses of what leads to it: the snapshot keeps routes in place, and a leg
/// its policy, for as long as the view lives.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct LegKey {
    rule: Option<usize>,
    target: usize,
}

impl LegKey {
    fn new<T>(rule: Option<&Arc<Rule>>, target: &T) -> Self {
        Self {
            rule: rule.map(|rule| Arc::as_ptr(rule) as usize),
            target: std::ptr::from_ref(target) as usize,
        }
    }
}

impl View {
    pub(super) fn new(snapshot: Arc<Snapshot>, frontend: &Frontend, namespace: &str) -> Self {
        let routes = match frontend {
            Frontend::Service { service, port } => snapshot.routes(service, *port, namespace),
            Frontend::Pod(_) => None,
        };
        Self {
            snapshot,
            routes,
            own: OnceLock::new(),
            legs: Mutex::default(),
            ways: Mutex::default(),
        }
    }

    /// The routes attached to what the client dialled, if there are any.
    pub(super) fn routes(&self) -> Option<&Arc<RouteTable>> {
        self.routes.as_ref()
    }

    /// The leg of requests that no route is attached for.
    pub(super) fn own<N: Network>(&self, client: &Client<N>) -> Arc<Leg> {
        let leg = self.own.get_or_init(|| {
            Arc::new(match &client.caller.frontend {
                Frontend::Service { service, port } => {
                    self.to_service(client, service, *port, None)
                }
                Frontend::Pod(endpoint) => self.to_pod(&client.engine, endpoint),
            })
        });
        leg.clone()
    }

    /// The leg from a rule to one of its backends. None if that is no Service's.
    pub(super) fn backend<N: Network>(
        &self,
        client: &Client<N>,
        rule: &Arc<Rule>,
        backend: &Backend,
    ) -> Option<Arc<Leg>> {
        let BackendTarget::Service { name, port } = &backend.target else {
            return None;
        };
        let key = LegKey::new(Some(rule), backend);
        Some(self.leg(key, || self.to_service(client, name, *port, Some(rule))))
    }

    /// The leg to what a leg's policy falls back to.
    pub(super) fn fallback<N: Network>(
        &self,
        client: &Client<N>,
        from: &Leg,
        backend: &FallbackBackend,
    ) -> Arc<Leg> {
        let key = LegKey::new(from.rule.as_ref(), backend);
        let rule = from.rule.as_ref();
        let FallbackBackend { service, port } = backend;
        self.leg(key, || self.to_service(client, service, *port, rule))
    }

    /// The leg to a mirror. None if that is no Service's.
    pub(super) fn mirror<N: Network>(
        &self,
        client: &Client<N>,
        mirror: &Mirror,
    ) -> Option<Arc<Leg>> {
        let BackendTarget::Service { name, port } = &mirror.target else {
            return None;
        };
        let key = LegKey::new(None, mirror);
        Some(self.leg(key, || self.to_service(client, name, *port, None)))
    }

    /// The endpoint of a destination that has this address. Linear in their number.
    pub(super) fn endpoint_at(
        &self,
        destination: &DestinationId,
        address: SocketAddr,
    ) -> Option<EndpointId> {
        let service = self.snapshot.service(&destination.service)?;
        let endpoints = &service.port(destination.port)?.endpoints;
        let found = endpoints.iter().find(|one| one.address == address);
        found.map(EndpointId::from)
    }

    /// How an endpoint is reached. What the snapshot alone does not decide is asked each time: a pod
    /// of this node may be enrolled at any moment.
    pub(super) fn way<N: Network>(
        &self,
        client: &Client<N>,
        endpoint: &EndpointId,
    ) -> Result<Arc<Way>, Failure> {
        if let Some(way) = self.ways.lock().get(endpoint) {
            return Ok(way.clone());
        }
        let way = Arc::new(client.network.way(&self.snapshot, endpoint)?);
        if way.is_lasting() {
            let mut ways = self.ways.lock();
            if ways.len() >= KEPT {
                ways.clear();
            }
            ways.insert(endpoint.clone(), way.clone());
        }
        Ok(way)
    }

    fn leg(&self, key: LegKey, make: impl FnOnce() -> Leg) -> Arc<Leg> {
        if let Some(leg) = self.legs.lock().get(&key) {
            return leg.clone();
        }
        // Not under the lock: it may wait for others.
        let leg = Arc::new(make());
        let mut legs = self.legs.lock();
        if legs.len() >= KEPT {
            legs.clear();
        }
        legs.insert(key, leg.clone());
        leg
    }

    fn to_service<N: Network>(
        &self,
        client: &Client<N>,
        service: &ObjectName,
        port: u16,
        rule: Option<&Arc<Rule>>,
    ) -> Leg {
        let route = rule.map(|rule| &rule.route);
        let policy = self.snapshot.policy_of(service, port, route);
        let now = client.engine.clock().now();
        let id = DestinationId {
            service: service.clone(),
            port,
            traffic: Traffic::Requests,
        };
        let key = rule.map_or(RouteKey::Http, |rule| RouteKey::Rule(rule.name.clone()));
        let destination = client.engine.destinations.of(&id, &self.snapshot);
        let to = destination.map_or(To::Nowhere, |destination| {
            let settings = &policy.settings;
            let route = destination.route(&key, &settings.breaker, &settings.limits, now);
            To::Service(ToService {
                route,
                endpoints: destination.reachable(
                    &client.caller.workload,
                    client.caller.source,
                    client.caller.local,
                    now,
                ),
                destination,
            })
        });
        self.with_policy(Some(service.clone()), rule.cloned(), policy, to)
    }

    fn to_pod(&self, engine: &Engine, endpoint: &EndpointId) -> Leg {
        let policy = Arc::default();
        let to = To::Pod(endpoint.clone(), engine.direct_budget.clone());
        self.with_policy(None, None, policy, to)
    }

    fn with_policy(
        &self,
        service: Option<ObjectName>,
        rule: Option<Arc<Rule>>,
        policy: Arc<TrafficPolicy>,
        to: To,
    ) -> Leg {
        let settings = &policy.settings;
        let mut limits = settings.timeouts;
        limits.connect = policy.connect_limit(self.snapshot.config());
        let mut timeouts = timeouts(&limits, rule.as_deref());
        // Whatever moves, and whether an answer has begun or not.
        let lasting = policy.streams.max_duration;
        timeouts.request = timeouts.request.into_iter().chain(lasting).min();
        Leg {
            service,
            timeouts,
            retry: retry(&settings.retry, rule.as_deref()),
            rule,
            policy,
            to,
        }
    }
}
