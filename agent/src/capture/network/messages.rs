//! What capture needs in a pod's network, in the words of rtnetlink, and back.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::route::{
    RouteAddress, RouteAttribute, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use rtnetlink::packet_route::rule::{RuleAction, RuleAttribute, RuleMessage};

use super::{Entry, IpVersion, PRIORITY, TABLE};
use crate::capture::kernel::CAPTURE_MARK;

/// Marks rules and routes as ours for those who look (`ip -d rule`).
const PROTOCOL: RouteProtocol = RouteProtocol::Other(117);

/// What a rule in our table is.
pub(super) fn rule_entry(version: IpVersion, rule: &RuleMessage) -> Entry {
    let wanted = [
        RuleAttribute::Priority(PRIORITY),
        RuleAttribute::FwMark(CAPTURE_MARK),
        RuleAttribute::FwMask(CAPTURE_MARK),
    ];
    if rule.header.action == RuleAction::ToTable
        && wanted.iter().all(|part| rule.attributes.contains(part))
    {
        Entry::Rule(version)
    } else {
        Entry::Other(version)
    }
}

/// What a route in our table is.
pub(super) fn route_entry(version: IpVersion, route: &RouteMessage) -> Entry {
    let device = route.attributes.iter().find_map(|part| match part {
        RouteAttribute::Oif(device) => Some(*device),
        _ => None,
    });
    let source = route.attributes.iter().find_map(|part| match part {
        RouteAttribute::PrefSource(source) => match source {
            RouteAddress::Inet(source) => Some((*source).into()),
            RouteAddress::Inet6(source) => Some((*source).into()),
            _ => None,
        },
        _ => None,
    });
    match (device, source) {
        (Some(device), Some(source))
            if route.header.kind == RouteType::Local
                && route.header.destination_prefix_length == 0 =>
        {
            Entry::Route {
                device,
                metric: metric(route),
                source,
            }
        }
        _ => Entry::Other(version),
    }
}

/// Its metric, 0 where it has none.
pub(super) fn metric(route: &RouteMessage) -> u32 {
    route
        .attributes
        .iter()
        .find_map(|part| match part {
            RouteAttribute::Priority(metric) => Some(*metric),
            _ => None,
        })
        .unwrap_or(0)
}

/// The message that lays an entry; none for what is never laid.
pub(super) fn to_message(entry: &Entry) -> Option<RouteNetlinkMessage> {
    match *entry {
        Entry::Rule(version) => {
            let mut message = RuleMessage::default();
            message.header.family = version.family();
            message.header.action = RuleAction::ToTable;
            message.attributes = vec![
                RuleAttribute::Table(TABLE),
                RuleAttribute::Priority(PRIORITY),
                RuleAttribute::FwMark(CAPTURE_MARK),
                RuleAttribute::FwMask(CAPTURE_MARK),
                RuleAttribute::Protocol(PROTOCOL),
            ];
            Some(RouteNetlinkMessage::NewRule(message))
        }
        Entry::Route {
            device,
            metric,
            source,
        } => {
            let mut message = route(IpVersion::of(source), TABLE, RouteType::Local);
            message.attributes.extend([
                RouteAttribute::Oif(device),
                RouteAttribute::Priority(metric),
                RouteAttribute::PrefSource(source.into()),
            ]);
            Some(RouteNetlinkMessage::NewRoute(message))
        }
        Entry::Other(_) => None,
    }
}

/// A default route of a table, without device.
pub(super) fn route(version: IpVersion, table: u32, kind: RouteType) -> RouteMessage {
    let mut message = RouteMessage::default();
    message.header.address_family = version.family();
    message.header.protocol = PROTOCOL;
    message.header.scope = match kind {
        RouteType::Local => RouteScope::Host,
        _ => RouteScope::Universe,
    };
    message.header.kind = kind;
    // iproute2 names the destination too: kernels compare it when they delete.
    message.attributes = vec![
        RouteAttribute::Table(table),
        RouteAttribute::Destination(match version {
            IpVersion::V4 => IpAddr::from(Ipv4Addr::UNSPECIFIED).into(),
            IpVersion::V6 => IpAddr::from(Ipv6Addr::UNSPECIFIED).into(),
        }),
    ];
    message
}

#[cfg(test)]
mod tests {
    use rtnetlink::packet_route::AddressFamily;

    use super::*;
    use crate::capture::network::needed;
    use crate::capture::network::tests::pod;

    #[test]
    fn what_is_laid_is_recognised_when_it_is_read_back() {
        for entry in needed(&pod()) {
            let read = match to_message(&entry).unwrap() {
                RouteNetlinkMessage::NewRule(rule) => {
                    let version = match rule.header.family {
                        AddressFamily::Inet => IpVersion::V4,
                        _ => IpVersion::V6,
                    };
                    rule_entry(version, &rule)
                }
                RouteNetlinkMessage::NewRoute(route) => route_entry(IpVersion::V4, &route),
                other => panic!("{other:?}"),
            };
            assert_eq!(read, entry);
        }
    }

    #[test]
    fn a_rule_for_our_table_with_another_mark_is_not_ours() {
        let Some(RouteNetlinkMessage::NewRule(mut rule)) = to_message(&Entry::Rule(IpVersion::V4))
        else {
            panic!("not a rule");
        };
        rule.attributes
            .retain(|part| !matches!(part, RuleAttribute::FwMask(_)));
        assert_eq!(
            rule_entry(IpVersion::V4, &rule),
            Entry::Other(IpVersion::V4)
        );
    }
}
