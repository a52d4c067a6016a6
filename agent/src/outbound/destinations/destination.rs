//! One destination: the endpoints of a Service's port, and the routes that lead there.

use std::collections::{HashMap, HashSet};
use std::hash::{BuildHasher, RandomState};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use parking_lot::Mutex;

use super::name::{DestinationId, EndpointId, RouteKey, Traffic};
use super::reachable::Reachable;
use crate::http::Places;
use crate::mesh::{Endpoint, Locality, Nearness, Readiness, Snapshot, Workload};
use crate::resilience::destination::DestinationSettings;
use crate::resilience::ejection::SourceId;
use crate::resilience::limit::{
    AdaptiveLimit, AdaptiveSettings, ConcurrencyLimit, LimitSettings, Rate, RateLimit, Rates,
};
use crate::resilience::{
    self, Algorithm, BalanceSettings, Breaker, BreakerSettings, Breakers, BudgetSettings,
    EjectionSettings, EventSink, Member, Timestamp,
};

/// The endpoints of one family, as requests are balanced over them.
pub type Balanced = resilience::Destination<EndpointId>;

/// The most routes of a destination with a breaker and limits of their own; those beyond share one.
const ROUTES_MAX: usize = 1024;
/// As many connections as are asked for.
const NO_LIMIT: u32 = u32::MAX;
/// A route that nobody asked for in so long is forgotten, with its breaker, unless an operator holds
/// that.
const ROUTE_IDLE: Duration = Duration::from_secs(600);

/// A destination, shared by all that send there.
#[derive(Debug)]
pub struct Destination {
    id: DestinationId,
    name: Arc<str>,
    /// The node that asks.
    node: Arc<str>,
    seed: u64,
    sink: Arc<dyn EventSink>,
    now: ArcSwap<Followed>,
    /// How many connections there may be, for requests and opaque ones together.
    places: Arc<Places>,
    breakers: Breakers<RouteKey>,
    /// Locked for one look-up by connections that resolve their route, never by requests.
    routes: Mutex<HashMap<RouteKey, Known>>,
}

/// A destination as a snapshot has it.
#[derive(Debug)]
struct Followed {
    endpoints: Arc<[Endpoint]>,
    shape: Shape,
    v4: Arc<Balanced>,
    v6: Arc<Balanced>,
    total: Option<Arc<RateLimit>>,
    /// How many requests may be in flight as their latency has it, if that is asked for.
    adaptive: Option<Arc<AdaptiveLimit>>,
}

/// The settings that all routes to a destination share.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
struct Shape {
    balance: BalanceSettings,
    ejection: EjectionSettings,
    budget: BudgetSettings,
    total: Option<Rate>,
    adaptive: Option<AdaptiveSettings>,
    locality: Locality,
    connections: Option<u32>,
    pending: u32,
}

/// What a route of a destination has of its own.
#[derive(Debug)]
pub struct Route {
    /// Which one.
    pub key: RouteKey,
    /// Its breaker.
    pub breaker: Arc<Breaker>,
    /// Its rate limits, if it or the destination has any.
    pub rates: Option<Rates>,
    /// How many requests may be in flight, if that is limited.
    pub places: Option<Arc<ConcurrencyLimit>>,
}

#[derive(Debug)]
struct Known {
    route: Arc<Route>,
    breaker: BreakerSettings,
    limits: LimitSettings,
    total: Option<Arc<RateLimit>>,
    last: Timestamp,
}

impl Destination {
    /// The destination as the snapshot has it; none if the snapshot has no such port. It shares its
    /// places with `sibling`, the same port as it is asked for other traffic.
    pub(super) fn new(
        id: DestinationId,
        node: Arc<str>,
        seed: u64,
        sink: Arc<dyn EventSink>,
        snapshot: &Snapshot,
        sibling: Option<&Self>,
        now: Timestamp,
    ) -> Option<Arc<Self>> {
        let endpoints = endpoints_of(&id, snapshot)?;
        let name: Arc<str> = id.to_string().into();
        let shape = Shape::of(&id, snapshot);
        let followed = Followed {
            v4: shape.balanced(&name, seed, &sink),
            v6: shape.balanced(&name, seed, &sink),
            total: shape.total(now),
            adaptive: shape.adaptive(now),
            endpoints,
            shape,
        };
        followed.fill(snapshot, &node, now);
        let places = match sibling {
            Some(sibling) => sibling.places.clone(),
            None => Places::new(NO_LIMIT, shape.pending),
        };
        shape.bound(&places);
        let breakers = Breakers::new(
            name.clone(),
            ROUTES_MAX,
            BreakerSettings::default(),
            seed ^ RandomState::new().hash_one(&id),
            sink.clone(),
        );
        Some(Arc::new(Self {
            id,
            name,
            node,
            seed,
            sink,
            now: ArcSwap::from_pointee(followed),
            places,
            breakers,
            routes: Mutex::default(),
        }))
    }

    /// Which one.
    #[must_use]
    pub fn id(&self) -> &DestinationId {
        &self.id
    }

    /// Label `destination`.
    #[must_use]
    pub fn name(&self) -> &Arc<str> {
        &self.name
    }

    /// Whether nothing has to be done to have it as this snapshot has it.
    pub(super) fn is_as_in(&self, snapshot: &Snapshot) -> bool {
        let now = self.now.load();
        endpoints_of(&self.id, snapshot).is_some_and(|there| Arc::ptr_eq(&there, &now.endpoints))
            && Shape::of(&self.id, snapshot) == now.shape
    }

    /// Makes it as this snapshot has it, changing only what changed: endpoints that stay keep what
    /// is known of them, and those that leave are told of. To be called with the newest snapshot, and
    /// by one at a time. False if the snapshot has no such port: then it has no endpoints any more.
    pub(super) fn follow(
        &self,
        snapshot: &Snapshot,
        time: Timestamp,
        departed: &mut Vec<SocketAddr>,
    ) -> bool {
        let _one_at_a_time = self.routes.lock();
        let now = self.now.load();
        let there = endpoints_of(&self.id, snapshot);
        let exists = there.is_some();
        let endpoints = there.unwrap_or_default();
        let shape = Shape::of(&self.id, snapshot);
        if Arc::ptr_eq(&endpoints, &now.endpoints) && shape == now.shape {
            return exists;
        }
        let keeps = shape.keeps_balanced(&now.shape);
        let balanced = |there: &Arc<Balanced>| match keeps {
            true => there.clone(),
            false => shape.balanced(&self.name, self.seed, &self.sink),
        };
        let followed = Followed {
            v4: balanced(&now.v4),
            v6: balanced(&now.v6),
            total: match shape.total == now.shape.total {
                true => now.total.clone(),
                false => shape.total(time),
            },
            adaptive: match shape.adaptive == now.shape.adaptive {
                true => now.adaptive.clone(),
                false => shape.adaptive(time),
            },
            endpoints,
            shape,
        };
        followed.fill(snapshot, &self.node, time);
        // Connections that are open still count under another limit.
        shape.bound(&self.places);
        let stay: HashSet<SocketAddr> = followed.used().map(|one| one.address).collect();
        let before = now.used().map(|one| one.address);
        departed.extend(before.filter(|address| !stay.contains(address)));
        self.now.store(Arc::new(followed));
        exists
    }

    /// Its endpoints as a pod sees them that dialled an address of this family. To be kept by
    /// connections: making it takes a lock.
    #[must_use]
    pub fn reachable(
        &self,
        client: &Workload,
        source: SourceId,
        dialled: SocketAddr,
        time: Timestamp,
    ) -> Reachable {
        let now = self.now.load();
        let (first, second) = match dialled {
            SocketAddr::V4(_) => (&now.v4, &now.v6),
            SocketAddr::V6(_) => (&now.v6, &now.v4),
        };
        let reaches_both = client
            .addresses
            .iter()
            .any(|own| own.is_ipv4() != dialled.is_ipv4());
        Reachable::new(first, reaches_both.then_some(second), source, time)
    }

    /// The route's breaker and limits under these settings. Where they changed it has new ones;
    /// requests under way keep the old.
    #[must_use]
    pub fn route(
        &self,
        key: &RouteKey,
        breaker: &BreakerSettings,
        limits: &LimitSettings,
        time: Timestamp,
    ) -> Arc<Route> {
        let mut routes = self.routes.lock();
        let total = self.now.load().total.clone();
        let key = match routes.len() < ROUTES_MAX || routes.contains_key(key) {
            true => key,
            false => &RouteKey::Others,
        };
        let known = routes.get_mut(key);
        if let Some(known) = known {
            known.last = time;
            let same_total =
                known.total.as_ref().map(Arc::as_ptr) == total.as_ref().map(Arc::as_ptr);
            if known.breaker == *breaker && known.limits == *limits && same_total {
                return known.route.clone();
            }
            if known.breaker != *breaker {
                self.breakers.forget(key);
            }
        }
        let old = routes.get(key);
        let places = limits.concurrency.map(|most| {
            let there = old.and_then(|known| known.route.places.clone());
            let places = there.unwrap_or_else(|| ConcurrencyLimit::new(most));
            places.set(most);
            places
        });
        let has_rates =
            limits.rates.source.is_some() || limits.rates.route.is_some() || total.is_some();
        let route = Arc::new(Route {
            key: key.clone(),
            breaker: self.breakers.of(key, breaker),
            rates: has_rates.then(|| Rates::new(&limits.rates, total.clone(), time)),
            places,
        });
        let known = Known {
            route: route.clone(),
            breaker: *breaker,
            limits: *limits,
            total,
            last: time,
        };
        routes.insert(key.clone(), known);
        route
    }

    /// The limit of connections, for requests and opaque ones together, if there is one.
    #[must_use]
    pub fn places(&self) -> Option<Arc<Places>> {
        let is_limited = self.now.load().shape.connections.is_some();
        is_limited.then(|| self.places.clone())
    }

    /// The limit of requests in flight that follows their latency, if there is one: of all routes.
    #[must_use]
    pub fn adaptive(&self) -> Option<Arc<AdaptiveLimit>> {
        self.now.load().adaptive.clone()
    }

    /// The routes that were asked for, for status, metrics and operators.
    #[must_use]
    pub fn routes(&self) -> Vec<Arc<Route>> {
        let routes = self.routes.lock();
        routes.values().map(|known| known.route.clone()).collect()
    }

    /// Its endpoints of both families.
    #[must_use]
    pub fn balanced(&self) -> [Arc<Balanced>; 2] {
        let now = self.now.load();
        [now.v4.clone(), now.v6.clone()]
    }

    pub(super) fn maintain(&self, time: Timestamp) {
        for balanced in self.balanced() {
            balanced.maintain(time);
        }
        self.routes.lock().retain(|key, known| {
            let keep = Arc::strong_count(&known.route) > 1
                || time.since(known.last) < ROUTE_IDLE
                || known.route.breaker.forced().is_some();
            if !keep {
                self.breakers.forget(key);
            }
            keep
        });
    }

    pub(super) fn forget_source(&self, source: SourceId) {
        for balanced in self.balanced() {
            balanced.forget_source(source);
        }
    }
}

impl Followed {
    /// The endpoints that get requests: in each family the ready ones, or, where none is, those that
    /// are leaving and serve still.
    fn used(&self) -> impl Iterator<Item = &Endpoint> {
        let least = |is_v4: bool| {
            let of_family = |one: &&Endpoint| one.address.is_ipv4() == is_v4;
            let family = self.endpoints.iter().filter(of_family);
            let best = family.map(|one| one.readiness).max();
            best.unwrap_or(Readiness::Ready).max(Readiness::Leaving)
        };
        let (v4, v6) = (least(true), least(false));
        self.endpoints.iter().filter(move |one| {
            let least = if one.address.is_ipv4() { v4 } else { v6 };
            one.readiness >= least
        })
    }

    /// Gives the balancers the endpoints that get requests, those first that the policy wants first.
    fn fill(&self, snapshot: &Snapshot, node: &str, time: Timestamp) {
        let here = snapshot.node(node).map(AsRef::as_ref);
        let tier = |endpoint: &Endpoint| {
            if self.shape.locality == Locality::Any {
                return 0;
            }
            let pod = endpoint
                .workload
                .as_ref()
                .and_then(|uid| snapshot.workload(uid));
            let there = pod
                .and_then(|pod| snapshot.node(&pod.node))
                .map(AsRef::as_ref);
            self.shape.locality.tier(Nearness::between(here, there))
        };
        for (balanced, is_v4) in [(&self.v4, true), (&self.v6, false)] {
            let members: Vec<Member<EndpointId>> = self
                .used()
                .filter(|endpoint| endpoint.address.is_ipv4() == is_v4)
                .map(|endpoint| Member {
                    tier: tier(endpoint),
                    ..Member::new(endpoint.into())
                })
                .collect();
            balanced.replace(&members, time);
        }
    }
}

impl Shape {
    fn of(id: &DestinationId, snapshot: &Snapshot) -> Self {
        let policy = snapshot.policy_of_service(&id.service, id.port);
        let settings = &policy.settings;
        let mut shape = Self {
            balance: settings.balance,
            ejection: settings.ejection,
            budget: settings.budget,
            total: settings.limits.rates.total,
            adaptive: settings.limits.adaptive,
            locality: policy.locality,
            connections: policy.connections.connections,
            pending: policy.connections.pending,
        };
        if id.traffic == Traffic::Connections && shape.balance.algorithm == Algorithm::PeakEwma {
            // How long a connection lasts is no latency.
            shape.balance.algorithm = Algorithm::LeastRequest;
        }
        shape
    }

    /// Sets the limit of connections.
    fn bound(&self, places: &Arc<Places>) {
        places.set(self.connections.unwrap_or(NO_LIMIT), self.pending);
    }

    fn keeps_balanced(&self, other: &Self) -> bool {
        let of = |shape: &Self| (shape.balance, shape.ejection, shape.budget);
        of(self) == of(other)
    }

    fn balanced(&self, name: &Arc<str>, seed: u64, sink: &Arc<dyn EventSink>) -> Arc<Balanced> {
        let settings = DestinationSettings {
            balance: self.balance,
            ejection: self.ejection,
            budget: self.budget,
            seed,
            sink: sink.clone(),
        };
        Balanced::new(name.clone(), settings)
    }

    fn total(&self, time: Timestamp) -> Option<Arc<RateLimit>> {
        self.total.map(|rate| Arc::new(RateLimit::new(rate, time)))
    }

    fn adaptive(&self, time: Timestamp) -> Option<Arc<AdaptiveLimit>> {
        let settings = self.adaptive?;
        Some(AdaptiveLimit::new(settings, time))
    }
}

fn endpoints_of(id: &DestinationId, snapshot: &Snapshot) -> Option<Arc<[Endpoint]>> {
    let port = snapshot.service(&id.service)?.port(id.port)?;
    Some(port.endpoints.clone())
}
