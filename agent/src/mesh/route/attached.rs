//! Which routes are attached to which Services, as a snapshot holds it.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::{RouteId, RouteKind, RouteStatus, RouteTable, StreamRoutes};
use crate::mesh::ObjectName;

/// The routes in force on one port of a Service, all of one kind.
#[derive(Debug, Clone, PartialEq)]
pub enum Attached {
    /// GRPCRoutes or HTTPRoutes.
    Requests(Arc<RouteTable>),
    /// TLSRoutes or TCPRoutes.
    Streams(Arc<StreamRoutes>),
}

impl Attached {
    /// The kind of the routes.
    #[must_use]
    pub fn kind(&self) -> RouteKind {
        match self {
            Self::Requests(table) => table.kind(),
            Self::Streams(routes) => routes.kind(),
        }
    }
}

/// Routes by the Service's port.
pub type PortRoutes = BTreeMap<u16, Attached>;

/// All routes of one Service.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ServiceRoutes {
    /// Of the Service's own namespace: for all clients that have no others.
    pub producer: PortRoutes,
    /// Of other namespaces: only for the clients of these, instead of the producer's (GEP-1294,
    /// "Namespace boundaries").
    pub consumers: BTreeMap<Arc<str>, PortRoutes>,
}

impl ServiceRoutes {
    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.producer.is_empty() && self.consumers.values().all(BTreeMap::is_empty)
    }

    /// Those for clients of this namespace on this port.
    #[must_use]
    pub fn attached(&self, port: u16, client_namespace: &str) -> Option<&Attached> {
        self.consumers
            .get(client_namespace)
            .and_then(|consumer| consumer.get(&port))
            .or_else(|| self.producer.get(&port))
    }

    /// Whether somebody has a route on this port.
    #[must_use]
    pub fn has_port(&self, port: u16) -> bool {
        self.producer.contains_key(&port)
            || self
                .consumers
                .values()
                .any(|consumer| consumer.contains_key(&port))
    }
}

/// All routes of a mesh. Cloning shares structure.
#[derive(Debug, Clone, Default)]
pub struct Routes {
    services: imbl::HashMap<ObjectName, Arc<ServiceRoutes>>,
    statuses: imbl::OrdMap<RouteId, Arc<RouteStatus>>,
}

impl Routes {
    /// Those of a Service.
    #[must_use]
    pub fn of(&self, service: &ObjectName) -> Option<&Arc<ServiceRoutes>> {
        self.services.get(service)
    }

    pub(in crate::mesh) fn set(
        &mut self,
        service: &ObjectName,
        routes: Option<Arc<ServiceRoutes>>,
    ) {
        match routes.filter(|routes| !routes.is_empty()) {
            Some(routes) => {
                self.services.insert(service.clone(), routes);
            }
            None => {
                self.services.remove(service);
            }
        }
    }

    /// Status of a route.
    #[must_use]
    pub fn status(&self, route: &RouteId) -> Option<&Arc<RouteStatus>> {
        self.statuses.get(route)
    }

    /// Statuses of all routes.
    pub fn statuses(&self) -> impl Iterator<Item = &Arc<RouteStatus>> {
        self.statuses.values()
    }

    pub(in crate::mesh) fn set_status(
        &mut self,
        route: &RouteId,
        status: Option<Arc<RouteStatus>>,
    ) {
        match status {
            Some(status) => {
                self.statuses.insert(route.clone(), status);
            }
            None => {
                self.statuses.remove(route);
            }
        }
    }
}
