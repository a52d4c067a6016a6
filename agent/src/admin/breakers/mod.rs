//! What `/breakers` shows: the destinations of this node, their breakers and endpoints.

mod metrics;
mod watch;

pub use metrics::report;
pub use watch::BreakerWatch;

use std::sync::Arc;

use serde::Serialize;

use super::Column;
use crate::resilience::BreakerBook;
use crate::resilience::book::{BreakerView, ConnectionsView, DestinationView, EndpointView};
use watch::Moved;

/// `/breakers` as a table; JSON has the endpoints too.
pub const BREAKER_COLUMNS: &[Column] = &[
    column("DESTINATION", &["destination"]),
    column("ROUTE", &["route"]),
    column("STATE", &["state"]),
    column("FORCED", &["forced"]),
    column("FAILURES", &["failures"]),
    column("REJECTIONS", &["rejections"]),
    column("SINCE", &["since"]),
    column("CAUSE", &["cause"]),
    column("ENDPOINTS", &["endpoints_serving"]),
    column("EJECTED", &["endpoints_ejected"]),
    column("RETRIES", &["retries_granted"]),
    column("REFUSED", &["retries_refused"]),
];

const fn column(header: &'static str, fields: &'static [&'static str]) -> Column {
    Column { header, fields }
}

/// One breaker of `/breakers`, with its destination.
#[derive(Debug, Serialize)]
pub struct BreakerRow {
    destination: Arc<str>,
    #[serde(flatten)]
    breaker: BreakerView,
    #[serde(flatten)]
    moved: Option<Moved>,
    endpoints_serving: usize,
    endpoints_ejected: usize,
    ejections_withheld: u64,
    retries_granted: u64,
    retries_refused: u64,
    /// Where a policy limits them.
    #[serde(skip_serializing_if = "Option::is_none")]
    connections: Option<ConnectionsView>,
    endpoints: Vec<EndpointView>,
}

/// Every breaker of this node, by destination and route.
#[must_use]
pub fn rows(book: &dyn BreakerBook, watch: &BreakerWatch) -> Vec<BreakerRow> {
    let mut destinations = book.list();
    destinations.sort_by(|one, other| one.destination.cmp(&other.destination));
    destinations
        .into_iter()
        .flat_map(|destination| rows_of(destination, watch))
        .collect()
}

fn rows_of(destination: DestinationView, watch: &BreakerWatch) -> Vec<BreakerRow> {
    let DestinationView {
        destination,
        mut breakers,
        endpoints,
        ejections_withheld,
        retries_granted,
        retries_refused,
        connections,
    } = destination;
    breakers.sort_by(|one, other| one.route.cmp(&other.route));
    let ejected = endpoints.iter().filter(|one| one.is_ejected()).count();
    breakers
        .into_iter()
        .map(|breaker| BreakerRow {
            destination: destination.clone(),
            moved: watch.moved(&breaker.name),
            breaker,
            endpoints_serving: endpoints.len() - ejected,
            endpoints_ejected: ejected,
            ejections_withheld,
            retries_granted,
            retries_refused,
            connections,
            endpoints: endpoints.clone(),
        })
        .collect()
}

#[cfg(test)]
pub(crate) mod testing {
    use parking_lot::Mutex;

    use super::*;
    use crate::resilience::BreakerState;
    use crate::resilience::book::{NoSuchBreaker, Standing};
    use crate::resilience::breaker::Forced;

    /// One destination with the breaker of one route.
    #[derive(Debug, Default)]
    pub(crate) struct OneBreaker {
        pub(crate) forced: Mutex<Option<Forced>>,
    }

    pub(crate) const DESTINATION: &str = "shop/cart:80";
    pub(crate) const ROUTE: &str = "HTTPRoute/shop/cart/main";

    impl BreakerBook for OneBreaker {
        fn list(&self) -> Vec<DestinationView> {
            let forced = *self.forced.lock();
            let endpoint = |endpoint: &str, standing| EndpointView {
                endpoint: endpoint.to_owned(),
                standing,
                in_flight: 1,
                weight: 1,
            };
            vec![DestinationView {
                destination: DESTINATION.into(),
                breakers: vec![BreakerView {
                    name: format!("{DESTINATION}/{ROUTE}").into(),
                    route: ROUTE.into(),
                    state: match forced {
                        Some(Forced::Open) => BreakerState::Open,
                        Some(Forced::Closed) | None => BreakerState::Closed,
                    },
                    forced,
                    failures: 3,
                    rejections: 2,
                }],
                endpoints: vec![
                    endpoint("10.0.0.1:8080", Standing::Serving),
                    endpoint("10.0.0.2:8080", Standing::Ejected),
                ],
                ejections_withheld: 5,
                retries_granted: 7,
                retries_refused: 11,
                connections: Some(ConnectionsView {
                    open: 4,
                    waiting: 6,
                    in_vain: 8,
                    refused: 7,
                }),
            }]
        }

        fn force(
            &self,
            destination: &str,
            route: Option<&str>,
            forced: Option<Forced>,
        ) -> Result<usize, NoSuchBreaker> {
            if destination != DESTINATION {
                return Err(NoSuchBreaker::Destination(destination.to_owned()));
            }
            if let Some(route) = route.filter(|route| *route != ROUTE) {
                return Err(NoSuchBreaker::Route {
                    destination: destination.to_owned(),
                    route: route.to_owned(),
                });
            }
            *self.forced.lock() = forced;
            Ok(1)
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::testing::{OneBreaker, ROUTE};
    use super::*;
    use crate::resilience::breaker::{Cause, Transition};
    use crate::resilience::{BreakerState, Event, EventSink, Timestamp};

    #[test]
    fn a_row_tells_of_the_breaker_its_last_move_and_its_endpoints() {
        let watch = BreakerWatch::new();
        watch.event(Event::Breaker(Transition {
            breaker: format!("shop/cart:80/{ROUTE}").into(),
            at: Timestamp::ZERO,
            from: BreakerState::Closed,
            to: BreakerState::Open,
            cause: Cause::FailureRatio {
                failed: 18,
                total: 20,
            },
        }));
        let rows = serde_json::to_value(rows(&OneBreaker::default(), &watch)).unwrap();
        let row = &rows[0];
        for (field, value) in [
            ("destination", json!("shop/cart:80")),
            ("route", json!(ROUTE)),
            ("state", json!("closed")),
            ("failures", json!(3)),
            ("rejections", json!(2)),
            ("cause", json!("18 of 20 requests failed")),
            ("endpoints_serving", json!(1)),
            ("endpoints_ejected", json!(1)),
            ("retries_refused", json!(11)),
            (
                "connections",
                json!({"open": 4, "waiting": 6, "in_vain": 8, "refused": 7}),
            ),
        ] {
            assert_eq!(row[field], value, "{field}");
        }
        assert!(row["since"].is_string());
        assert_eq!(row["endpoints"][1]["standing"], "ejected");
        assert!(row.get("name").is_none());
    }
}
