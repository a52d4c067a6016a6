//! The metrics of breakers, ejections and retry budgets, by destination.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use super::BreakerWatch;
use crate::resilience::BreakerBook;
use crate::resilience::book::{BreakerView, ConnectionsView, DestinationView, EndpointView};
use crate::telemetry::{Labelled, Telemetry};

/// Shows the breakers, ejections and retry budgets of this node in the metrics. Their number is that
/// of what `book` keeps, which it bounds.
pub fn report(telemetry: &Telemetry, book: &Arc<dyn BreakerBook>, watch: &Arc<BreakerWatch>) {
    let each = |of: fn(&BreakerView) -> f64| {
        let book = book.clone();
        move || by_breaker(&book.list(), of)
    };
    telemetry.register_gauge(
        "undermesh_circuit_breaker_state",
        "0: closed, 1: open, 2: half-open",
        each(|breaker| f64::from(breaker.state as u8)),
    );
    let counted = |of: fn(&BreakerView) -> u64| {
        let book = book.clone();
        move || by_breaker(&book.list(), of)
    };
    telemetry.register_counter(
        "undermesh_circuit_breaker_failures",
        "Failed requests that circuit breakers have seen",
        counted(|breaker| breaker.failures),
    );
    telemetry.register_counter(
        "undermesh_circuit_breaker_rejections",
        "Requests that open circuit breakers have rejected",
        counted(|breaker| breaker.rejections),
    );
    report_moves(telemetry, book, watch);
    report_endpoints(telemetry, book);
    report_connections(telemetry, book);
    let budgets = book.clone();
    telemetry.register_counter(
        "undermesh_retry_budget_retries",
        "Retries that retry budgets have granted and refused",
        move || {
            let of = |destination: &DestinationView, outcome: &str, value| Labelled {
                labels: vec![
                    ("destination", destination.destination.to_string()),
                    ("outcome", outcome.to_owned()),
                ],
                value,
            };
            let both = |destination: &DestinationView| {
                [
                    of(destination, "granted", destination.retries_granted),
                    of(destination, "refused", destination.retries_refused),
                ]
            };
            budgets.list().iter().flat_map(both).collect()
        },
    );
}

/// States between two scrapes do not show in the gauge; moves do.
fn report_moves(telemetry: &Telemetry, book: &Arc<dyn BreakerBook>, watch: &Arc<BreakerWatch>) {
    let (book, watch) = (book.clone(), watch.clone());
    let ejections = watch.clone();
    telemetry.register_counter(
        "undermesh_circuit_breaker_transitions",
        "Moves of circuit breakers, by the state that they moved to",
        move || {
            let destinations = book.list();
            let mut owners: HashMap<&str, (&DestinationView, &BreakerView)> = HashMap::new();
            for destination in &destinations {
                for breaker in &destination.breakers {
                    owners.insert(&breaker.name, (destination, breaker));
                }
            }
            let names: HashSet<&str> = destinations.iter().map(|one| &*one.destination).collect();
            watch.retain(
                |breaker| owners.contains_key(breaker),
                |name| names.contains(name),
            );
            let sample = |(name, to, value): (Arc<str>, &str, u64)| {
                let (destination, route) = match owners.get(&*name) {
                    Some((destination, breaker)) => (&destination.destination, &breaker.route),
                    None => (&name, &name),
                };
                Labelled {
                    labels: vec![
                        ("destination", destination.to_string()),
                        ("route", route.to_string()),
                        ("to", to.to_owned()),
                    ],
                    value,
                }
            };
            watch.transitions().into_iter().map(sample).collect()
        },
    );
    telemetry.register_counter(
        "undermesh_outlier_ejections",
        "Ejections of endpoints, by cause",
        move || {
            let sample = |(destination, cause, value): (Arc<str>, &str, u64)| Labelled {
                labels: vec![
                    ("destination", destination.to_string()),
                    ("cause", cause.to_owned()),
                ],
                value,
            };
            ejections.ejections().into_iter().map(sample).collect()
        },
    );
}

fn report_endpoints(telemetry: &Telemetry, book: &Arc<dyn BreakerBook>) {
    let ejected = book.clone();
    telemetry.register_gauge(
        "undermesh_outlier_ejected",
        "Endpoints that are ejected now",
        move || {
            by_destination(&ejected.list(), |destination| {
                let endpoints = destination.endpoints.iter();
                endpoints
                    .filter(|one| EndpointView::is_ejected(one))
                    .count() as f64
            })
        },
    );
    let withheld = book.clone();
    telemetry.register_counter(
        "undermesh_outlier_ejections_withheld",
        "Endpoints that were not ejected because too many are already",
        move || {
            by_destination(&withheld.list(), |destination| {
                destination.ejections_withheld
            })
        },
    );
}

/// Of destinations whose connections a policy limits.
fn report_connections(telemetry: &Telemetry, book: &Arc<dyn BreakerBook>) {
    let limited = |of: fn(&ConnectionsView) -> f64| {
        let book = book.clone();
        move || {
            let sample = |one: &DestinationView| {
                let connections = one.connections.as_ref()?;
                let value = of(connections);
                Some(Labelled::one("destination", &one.destination, value))
            };
            book.list().iter().filter_map(sample).collect()
        }
    };
    telemetry.register_gauge(
        "undermesh_upstream_connections",
        "Connections to a destination where a policy limits them, for requests and opaque ones",
        limited(|connections| f64::from(connections.open)),
    );
    telemetry.register_gauge(
        "undermesh_upstream_connections_waiting",
        "Requests and opaque connections that wait for a connection",
        limited(|connections| connections.waiting as f64),
    );
    let book = book.clone();
    telemetry.register_counter(
        "undermesh_upstream_connections_shed",
        "Requests and opaque connections that got no connection",
        move || {
            let both = |one: &DestinationView| {
                let name = one.destination.to_string();
                let of = |limit: &str, value| Labelled {
                    labels: vec![("destination", name.clone()), ("limit", limit.to_owned())],
                    value,
                };
                one.connections
                    .iter()
                    .flat_map(|connections| {
                        [
                            of("connections", connections.in_vain),
                            of("pending", connections.refused),
                        ]
                    })
                    .collect::<Vec<_>>()
            };
            book.list().iter().flat_map(both).collect()
        },
    );
}

fn by_breaker<V>(
    destinations: &[DestinationView],
    of: impl Fn(&BreakerView) -> V,
) -> Vec<Labelled<V>> {
    let mut samples = Vec::new();
    for destination in destinations {
        for breaker in &destination.breakers {
            samples.push(Labelled {
                labels: vec![
                    ("destination", destination.destination.to_string()),
                    ("route", breaker.route.to_string()),
                ],
                value: of(breaker),
            });
        }
    }
    samples
}

fn by_destination<V>(
    destinations: &[DestinationView],
    of: impl Fn(&DestinationView) -> V,
) -> Vec<Labelled<V>> {
    destinations
        .iter()
        .map(|one| Labelled::one("destination", &one.destination, of(one)))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::super::testing::{DESTINATION, OneBreaker, ROUTE};
    use super::*;
    use crate::resilience::breaker::{Cause, Forced, Transition};
    use crate::resilience::{BreakerState, Event, EventSink, Timestamp};
    use crate::telemetry::testing::total;

    #[test]
    fn every_breaker_shows_its_state_its_counts_and_its_moves() {
        let telemetry = Telemetry::new();
        let one = Arc::new(OneBreaker::default());
        let book: Arc<dyn BreakerBook> = one.clone();
        let watch = BreakerWatch::new();
        report(&telemetry, &book, &watch);
        *one.forced.lock() = Some(Forced::Open);
        for (from, to) in [
            (BreakerState::Closed, BreakerState::Open),
            (BreakerState::Open, BreakerState::HalfOpen),
            (BreakerState::HalfOpen, BreakerState::Open),
        ] {
            watch.event(Event::Breaker(Transition {
                breaker: format!("{DESTINATION}/{ROUTE}").into(),
                at: Timestamp::ZERO,
                from,
                to,
                cause: Cause::ProbeFailed,
            }));
        }
        let metrics = telemetry.scrape().unwrap();
        let place = [
            "destination=\"shop/cart:80\"",
            "route=\"HTTPRoute/shop/cart/main\"",
        ];
        for (name, expected) in [
            ("undermesh_circuit_breaker_state", 1),
            ("undermesh_circuit_breaker_failures_total", 3),
            ("undermesh_circuit_breaker_rejections_total", 2),
            ("undermesh_circuit_breaker_transitions_total", 3),
        ] {
            assert_eq!(total(&metrics, name, &place), expected, "{name}");
        }
        let opened = ["to=\"open\""];
        let transitions = "undermesh_circuit_breaker_transitions_total";
        assert_eq!(total(&metrics, transitions, &opened), 2);
        let destination = [place[0]];
        for (name, expected) in [
            ("undermesh_outlier_ejected", 1),
            ("undermesh_outlier_ejections_withheld_total", 5),
            ("undermesh_retry_budget_retries_total", 18),
            ("undermesh_upstream_connections", 4),
            ("undermesh_upstream_connections_waiting", 6),
            ("undermesh_upstream_connections_shed_total", 15),
        ] {
            assert_eq!(total(&metrics, name, &destination), expected, "{name}");
        }
    }

    #[test]
    fn every_metric_of_breakers_is_documented() {
        let documentation = include_str!("../../../../docs/metrics.md");
        let telemetry = Telemetry::new();
        let book: Arc<dyn BreakerBook> = Arc::new(OneBreaker::default());
        report(&telemetry, &book, &BreakerWatch::new());
        let metrics = telemetry.scrape().unwrap();
        let families = metrics
            .lines()
            .filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next());
        for name in families {
            assert!(documentation.contains(&format!("`{name}")), "{name}");
        }
    }
}
