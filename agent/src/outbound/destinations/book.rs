//! What operators see of destinations, and what they may do to their breakers.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::destination::Destination;
use super::{Destinations, Route};
use crate::http::PlaceCounts;
use crate::resilience::BreakerBook;
use crate::resilience::book::{
    BreakerView, ConnectionsView, DestinationView, EndpointView, NoSuchBreaker, Standing,
};
use crate::resilience::breaker::Forced;

impl BreakerBook for Destinations {
    fn list(&self) -> Vec<DestinationView> {
        // Requests and connections to one port are balanced by themselves, and shown together.
        let mut by_name: BTreeMap<Arc<str>, DestinationView> = BTreeMap::new();
        for destination in self.all() {
            let name = destination.name();
            let view = by_name
                .entry(name.clone())
                .or_insert_with(|| DestinationView {
                    destination: name.clone(),
                    breakers: Vec::new(),
                    endpoints: Vec::new(),
                    ejections_withheld: 0,
                    retries_granted: 0,
                    retries_refused: 0,
                    connections: None,
                });
            add(view, &destination);
        }
        by_name.into_values().collect()
    }

    fn force(
        &self,
        destination: &str,
        route: Option<&str>,
        forced: Option<Forced>,
    ) -> Result<usize, NoSuchBreaker> {
        let all = self.all();
        let mut known = false;
        let mut count = 0;
        for one in all.iter().filter(|one| &**one.name() == destination) {
            known = true;
            let wanted = |key: &Arc<Route>| route.is_none_or(|route| key.key.to_string() == route);
            for found in one.routes().iter().filter(|one| wanted(one)) {
                found.breaker.force(forced, self.clock().now());
                count += 1;
            }
        }
        match (known, count, route) {
            (false, _, _) => Err(NoSuchBreaker::Destination(destination.to_owned())),
            (true, 0, Some(route)) => Err(NoSuchBreaker::Route {
                destination: destination.to_owned(),
                route: route.to_owned(),
            }),
            _ => Ok(count),
        }
    }
}

fn add(view: &mut DestinationView, destination: &Destination) {
    // Requests and connections have them in common.
    view.connections = destination.places().map(|places| {
        let PlaceCounts {
            taken,
            waiting,
            in_vain,
            refused,
        } = places.counts();
        ConnectionsView {
            open: taken,
            waiting,
            in_vain,
            refused,
        }
    });
    for route in destination.routes() {
        let breaker = &route.breaker;
        view.breakers.push(BreakerView {
            name: breaker.name().clone(),
            route: route.key.to_string().into(),
            state: breaker.state(),
            forced: breaker.forced(),
            failures: breaker.failures(),
            rejections: breaker.rejections(),
        });
    }
    for balanced in destination.balanced() {
        view.ejections_withheld += balanced.ejector().held_by_bound();
        view.retries_granted += balanced.budget().granted();
        view.retries_refused += balanced.budget().refused();
        view.endpoints
            .extend(balanced.endpoints().iter().map(|endpoint| EndpointView {
                endpoint: endpoint.target().address.to_string(),
                standing: match endpoint.is_ejected() {
                    true => Standing::Ejected,
                    false => Standing::Serving,
                },
                in_flight: endpoint.in_flight(),
                weight: endpoint.weight(),
            }));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::outbound::destinations::tests::{destinations, endpoint, id, mesh};
    use crate::outbound::destinations::{DestinationId, RouteKey, Traffic};
    use crate::resilience::limit::LimitSettings;
    use crate::resilience::{BreakerSettings, BreakerState};

    #[test]
    fn a_destination_is_listed_once_and_its_breakers_can_be_held() {
        let (destinations, shared) = destinations(mesh(&[endpoint("10.0.1.1:80", true)]));
        let now = destinations.clock().now();
        let (breaker, limits) = (BreakerSettings::default(), LimitSettings::default());
        let requests = DestinationId {
            traffic: Traffic::Requests,
            ..id()
        };
        let rule = RouteKey::Rule("HTTPRoute/shop/cart/0".into());
        let snapshot = shared.load();
        let connections = destinations.of(&id(), &snapshot).unwrap();
        let requests = destinations.of(&requests, &snapshot).unwrap();
        let held = [
            connections.route(&RouteKey::Tcp, &breaker, &limits, now),
            requests.route(&RouteKey::Http, &breaker, &limits, now),
            requests.route(&rule, &breaker, &limits, now),
        ];
        let list = destinations.list();
        assert_eq!(list.len(), 1);
        assert_eq!(&*list[0].destination, "shop/cart:80");
        let mut routes: Vec<&str> = list[0].breakers.iter().map(|one| &*one.route).collect();
        routes.sort_unstable();
        assert_eq!(routes, ["HTTPRoute/shop/cart/0", "none", "tcp"]);

        let open = Some(Forced::Open);
        assert_eq!(destinations.force("shop/cart:80", None, open), Ok(3));
        assert!(held.iter().all(|one| one.breaker.admit(now).is_err()));
        assert_eq!(destinations.force("shop/cart:80", Some("tcp"), None), Ok(1));
        assert_eq!(held[0].breaker.state(), BreakerState::Closed);
        assert_eq!(held[1].breaker.forced(), open);
        let nobody = destinations.force("shop/nobody:80", None, open);
        assert!(matches!(nobody, Err(NoSuchBreaker::Destination(_))));
        let nothing = destinations.force("shop/cart:80", Some("other"), open);
        assert!(matches!(nothing, Err(NoSuchBreaker::Route { .. })));
    }
}
