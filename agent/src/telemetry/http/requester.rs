//! Whose requests are counted, and what they have in common.

use std::net::SocketAddr;
use std::sync::Arc;

use parking_lot::Mutex;

use super::labels::{RouteLabel, RouteScope, ScopeLabels};
use super::series::{RouteSeries, ScopeSeries};
use super::table::Tracked;
use super::{RequestInfo, RequestRecord};
use crate::mesh::{ObjectName, Workload};
use crate::telemetry::labels::Labels;
use crate::telemetry::line::Common;
use crate::telemetry::{ConnectionInfo, Direction, Party, Security, Telemetry};

/// Scopes that a connection keeps. At the bound it forgets all and begins anew: a scope costs one
/// look into the tables of series.
const SCOPES: usize = 64;

/// The client of one downstream connection. What its requests have in common is worked out once
/// here, so that a request costs no label.
pub struct Requester {
    pub(super) telemetry: Arc<Telemetry>,
    pub(super) direction: Direction,
    pub(super) source: Party,
    pub(super) original_destination: SocketAddr,
    pub(super) connection: u64,
    /// The one that was asked for last is at the front: of several there are few.
    scopes: Mutex<Vec<(ScopeKey, Arc<Scope>)>>,
}

/// Requests that differ in nothing but what they ask and how they are answered.
pub(super) struct Scope {
    pub service: Option<ObjectName>,
    pub route: Option<Arc<str>>,
    pub destination: Party,
    pub security: Security,
    pub labels: ScopeLabels,
    pub series: Arc<Tracked<ScopeSeries>>,
    pub route_scope: RouteScope,
    pub route_series: Arc<Tracked<RouteSeries>>,
    /// What the lines of all its requests say of the two ends, once there was one: some 600 bytes.
    pub line: Common,
}

/// By address of the texts and of the workload, which the scope keeps alive: comparing them would cost more
/// than it saves.
#[derive(Clone, Copy, PartialEq, Eq)]
struct ScopeKey {
    service: Option<(usize, usize)>,
    route: Option<usize>,
    endpoint: Option<(SocketAddr, Option<usize>, Security)>,
}

impl ScopeKey {
    fn of(
        service: Option<&ObjectName>,
        route: Option<&Arc<str>>,
        endpoint: Option<&ChosenEndpoint<'_>>,
    ) -> Self {
        let place = |text: &Arc<str>| Arc::as_ptr(text).cast::<u8>() as usize;
        Self {
            service: service.map(|name| (place(&name.namespace), place(&name.name))),
            route: route.map(place),
            endpoint: endpoint.map(|endpoint| {
                let workload = endpoint.workload.map(|one| Arc::as_ptr(one) as usize);
                (endpoint.address, workload, endpoint.security)
            }),
        }
    }
}

/// Where a request is sent.
#[derive(Debug, Clone, Copy)]
pub(super) struct ChosenEndpoint<'a> {
    pub address: SocketAddr,
    pub workload: Option<&'a Arc<Workload>>,
    pub security: Security,
}

impl ChosenEndpoint<'_> {
    fn party(&self) -> Party {
        match self.workload {
            Some(workload) => Party::of(workload, self.address),
            None => Party::unknown(self.address),
        }
    }
}

impl Requester {
    pub(in crate::telemetry) fn new(
        telemetry: Arc<Telemetry>,
        direction: Direction,
        source: Party,
        original_destination: SocketAddr,
        connection: u64,
    ) -> Arc<Self> {
        Arc::new(Self {
            telemetry,
            direction,
            source,
            original_destination,
            connection,
            scopes: Mutex::default(),
        })
    }

    /// Announces a request. It is counted and logged once, when the record is closed or dropped.
    pub fn request(self: &Arc<Self>, info: RequestInfo) -> RequestRecord {
        RequestRecord::new(self.clone(), info)
    }

    #[cfg(test)]
    pub(super) fn scopes(&self) -> usize {
        self.scopes.lock().len()
    }

    /// The scope of these.
    pub(super) fn scope(
        &self,
        service: Option<&ObjectName>,
        route: Option<&Arc<str>>,
        endpoint: Option<&ChosenEndpoint<'_>>,
    ) -> Arc<Scope> {
        let key = ScopeKey::of(service, route, endpoint);
        {
            let mut scopes = self.scopes.lock();
            if let Some(at) = scopes.iter().position(|(known, _)| *known == key) {
                scopes.swap(0, at);
                return scopes[0].1.clone();
            }
        }
        // Not under the lock: the tables of series have locks of their own.
        let scope = Arc::new(self.new_scope(service, route, endpoint));
        let mut scopes = self.scopes.lock();
        if scopes.len() >= SCOPES {
            scopes.clear();
        }
        scopes.push((key, scope.clone()));
        scope
    }

    fn new_scope(
        &self,
        service: Option<&ObjectName>,
        route: Option<&Arc<str>>,
        endpoint: Option<&ChosenEndpoint<'_>>,
    ) -> Scope {
        let destination = endpoint.map_or_else(
            || Party::unknown(self.original_destination),
            ChosenEndpoint::party,
        );
        let security = endpoint.map_or(Security::Unknown, |endpoint| endpoint.security);
        let ends = Labels::of(&ConnectionInfo {
            direction: self.direction,
            source: self.source.clone(),
            destination: destination.clone(),
            service: service.cloned(),
            security,
            original_destination: self.original_destination,
        });
        let route_label = RouteLabel::of(route);
        let labels = ScopeLabels {
            ends,
            route: route_label.clone(),
        };
        let route_scope = RouteScope::Of(service.cloned(), route_label);
        let http = self.telemetry.http();
        Scope {
            service: service.cloned(),
            route: route.cloned(),
            destination,
            security,
            series: http.scopes.get(&labels),
            labels,
            route_series: http.routes.get(&route_scope),
            route_scope,
            line: Common::default(),
        }
    }
}

impl std::fmt::Debug for Requester {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Requester")
            .field("connection", &self.connection)
            .finish_non_exhaustive()
    }
}
