//! The rule and the routes that lead marked connections of a pod over lo, in the pod's namespace.
//!
//! One rule, before all but `local`, sends the mark to a table of ours, and there
//! `local default dev lo src <pod IP> metric 1` catches everything, and
//! `local default dev <eth0> src <pod IP> metric 2` what is bound to the pod's device. A second
//! table, which no rule names, holds the kernel settings from before enrolment: it outlives the
//! agent and dies with the pod.

use std::collections::BTreeSet;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use futures_util::StreamExt;
use rtnetlink::packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload,
};
use rtnetlink::packet_route::address::{AddressAttribute, AddressMessage};
use rtnetlink::packet_route::route::{
    RouteAttribute, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use rtnetlink::packet_route::rule::{RuleAction, RuleAttribute, RuleMessage};
use rtnetlink::packet_route::{AddressFamily, RouteNetlinkMessage};
use thiserror::Error;
use tokio::task::JoinHandle;

use super::kernel::CAPTURE_MARK;
use super::netns::{Netns, NetnsError, NetnsWorker};
use super::sysctl::Former;

/// The table that marked connections are routed by.
pub const TABLE: u32 = 30_061;
/// The table that only holds the note of former kernel settings.
const NOTE_TABLE: u32 = TABLE + 1;
/// After `local` (0), before everything else.
const PRIORITY: u32 = 1;
/// Marks rules and routes as ours for those who look (`ip -d rule`).
const PROTOCOL: RouteProtocol = RouteProtocol::Other(117);
/// lo is the first device of every namespace.
const LO: u32 = 1;

/// Why the network of a pod could not be read or changed.
#[derive(Debug, Error)]
pub enum NetworkError {
    /// The namespace could not be entered.
    #[error(transparent)]
    Netns(#[from] NetnsError),
    /// The kernel refused a request.
    #[error("cannot {what}")]
    Request {
        /// What was asked for.
        what: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// The netlink connection broke.
    #[error("netlink: {0}")]
    Netlink(String),
}

/// Something that capture needs in the pod's network.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Entry {
    /// The rule for the mark.
    Rule(IpVersion),
    /// A route of [`TABLE`].
    Route {
        /// Index of its device.
        device: u32,
        /// Metric.
        metric: u32,
        /// The address that an unbound socket gets.
        source: IpAddr,
    },
    /// A rule or route in our table that is not as it should be.
    Other(IpVersion),
}

/// IPv4 or IPv6.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum IpVersion {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl IpVersion {
    fn of(address: IpAddr) -> Self {
        match address {
            IpAddr::V4(_) => Self::V4,
            IpAddr::V6(_) => Self::V6,
        }
    }

    fn family(self) -> AddressFamily {
        match self {
            Self::V4 => AddressFamily::Inet,
            Self::V6 => AddressFamily::Inet6,
        }
    }
}

/// An address of the pod, and the device that has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceAddress {
    /// The address.
    pub address: IpAddr,
    /// Index of the device.
    pub device: u32,
}

/// What a pod with these addresses needs.
#[must_use]
pub fn needed(addresses: &[DeviceAddress]) -> BTreeSet<Entry> {
    addresses
        .iter()
        .flat_map(|&DeviceAddress { address, device }| {
            let route = |device, metric| Entry::Route {
                device,
                metric,
                source: address,
            };
            [
                route(LO, 1),
                route(device, 2),
                Entry::Rule(IpVersion::of(address)),
            ]
        })
        .collect()
}

/// A netlink connection into a pod's namespace.
pub struct Network {
    handle: rtnetlink::Handle,
    connection: JoinHandle<()>,
}

impl Drop for Network {
    fn drop(&mut self) {
        self.connection.abort();
    }
}

impl Network {
    /// Opens the connection.
    pub async fn open(netns: &Netns, worker: &NetnsWorker) -> Result<Self, NetworkError> {
        let (connection, handle, _) = worker
            .run(netns, rtnetlink::new_connection)
            .await?
            .map_err(|source| NetworkError::Request {
                what: "open a netlink socket",
                source,
            })?;
        Ok(Self {
            handle,
            connection: tokio::spawn(connection),
        })
    }

    /// Which devices have these addresses; those that no device has are left out.
    pub async fn devices(&self, addresses: &[IpAddr]) -> Result<Vec<DeviceAddress>, NetworkError> {
        let request = RouteNetlinkMessage::GetAddress(AddressMessage::default());
        let present: Vec<DeviceAddress> = self
            .dump("list addresses", request)
            .await?
            .into_iter()
            .filter_map(|message| match message {
                RouteNetlinkMessage::NewAddress(message) => Some(message),
                _ => None,
            })
            .flat_map(|message| {
                let device = message.header.index;
                message
                    .attributes
                    .into_iter()
                    .filter_map(move |attribute| match attribute {
                        AddressAttribute::Local(address) | AddressAttribute::Address(address) => {
                            Some(DeviceAddress { address, device })
                        }
                        _ => None,
                    })
            })
            .collect();
        Ok(addresses
            .iter()
            .filter_map(|address| present.iter().find(|found| found.address == *address))
            .copied()
            .collect())
    }

    /// Adds what is missing and takes away what else is in our table. Returns how many entries
    /// that were.
    pub async fn ensure(&self, needed: &BTreeSet<Entry>) -> Result<usize, NetworkError> {
        let present = self.present().await?;
        let mut changes = 0;
        for (entry, message) in &present {
            if !needed.contains(entry) {
                self.delete(message.clone()).await?;
                changes += 1;
            }
        }
        // Routes before rules, so that the mark never leads to an empty table. The order of `Entry`
        // is the other way round.
        for entry in needed.iter().rev() {
            if !present.iter().any(|(found, _)| found == entry)
                && let Some(message) = to_message(entry)
            {
                self.add("add a rule or route", message).await?;
                changes += 1;
            }
        }
        Ok(changes)
    }

    /// Takes rule and routes away, the rule first. The note stays.
    pub async fn remove(&self) -> Result<(), NetworkError> {
        let mut present = self.present().await?;
        present.sort_by_key(|(entry, _)| !matches!(entry, Entry::Rule(_)));
        for (_, message) in present {
            self.delete(message).await?;
        }
        Ok(())
    }

    /// The kernel settings that an earlier enrolment noted.
    pub async fn note(&self) -> Result<Option<Former>, NetworkError> {
        Ok(self
            .notes()
            .await?
            .iter()
            .find_map(|message| Former::from_note(metric(message))))
    }

    /// Notes the kernel settings from before enrolment.
    pub async fn put_note(&self, former: Former) -> Result<(), NetworkError> {
        let mut message = route(IpVersion::V4, NOTE_TABLE, RouteType::Unreachable);
        message
            .attributes
            .push(RouteAttribute::Priority(former.to_note()));
        self.add(
            "note the former kernel settings",
            RouteNetlinkMessage::NewRoute(message),
        )
        .await
    }

    /// Takes the note away.
    pub async fn remove_note(&self) -> Result<(), NetworkError> {
        for message in self.notes().await? {
            self.delete(RouteNetlinkMessage::DelRoute(message)).await?;
        }
        Ok(())
    }

    async fn notes(&self) -> Result<Vec<RouteMessage>, NetworkError> {
        self.routes(IpVersion::V4, NOTE_TABLE).await
    }

    /// What is in our table, with the message that deletes it.
    async fn present(&self) -> Result<Vec<(Entry, RouteNetlinkMessage)>, NetworkError> {
        let mut present = Vec::new();
        for version in [IpVersion::V4, IpVersion::V6] {
            for rule in self.rules(version).await? {
                present.push((
                    rule_entry(version, &rule),
                    RouteNetlinkMessage::DelRule(rule),
                ));
            }
            for route in self.routes(version, TABLE).await? {
                present.push((
                    route_entry(version, &route),
                    RouteNetlinkMessage::DelRoute(route),
                ));
            }
        }
        Ok(present)
    }

    async fn rules(&self, version: IpVersion) -> Result<Vec<RuleMessage>, NetworkError> {
        let mut request = RuleMessage::default();
        request.header.family = version.family();
        let messages = self
            .dump("list rules", RouteNetlinkMessage::GetRule(request))
            .await;
        // A kernel without IPv6 has no rules for it.
        let messages = match messages {
            Err(NetworkError::Request { source, .. })
                if version == IpVersion::V6
                    && source.raw_os_error().is_some_and(is_unsupported) =>
            {
                return Ok(Vec::new());
            }
            other => other?,
        };
        Ok(messages
            .into_iter()
            .filter_map(|message| match message {
                RouteNetlinkMessage::NewRule(rule)
                    if rule.attributes.contains(&RuleAttribute::Table(TABLE)) =>
                {
                    Some(rule)
                }
                _ => None,
            })
            .collect())
    }

    async fn routes(
        &self,
        version: IpVersion,
        table: u32,
    ) -> Result<Vec<RouteMessage>, NetworkError> {
        let mut request = RouteMessage::default();
        request.header.address_family = version.family();
        Ok(self
            .dump("list routes", RouteNetlinkMessage::GetRoute(request))
            .await?
            .into_iter()
            .filter_map(|message| match message {
                RouteNetlinkMessage::NewRoute(route)
                    if route.header.address_family == version.family()
                        && route.attributes.contains(&RouteAttribute::Table(table)) =>
                {
                    Some(route)
                }
                _ => None,
            })
            .collect())
    }

    async fn add(
        &self,
        what: &'static str,
        message: RouteNetlinkMessage,
    ) -> Result<(), NetworkError> {
        match self
            .request(what, message, NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL)
            .await
        {
            Err(NetworkError::Request { source, .. })
                if source.raw_os_error() == Some(libc::EEXIST) =>
            {
                Ok(())
            }
            other => other.map(drop),
        }
    }

    async fn delete(&self, message: RouteNetlinkMessage) -> Result<(), NetworkError> {
        match self
            .request("remove a rule or route", message, NLM_F_ACK)
            .await
        {
            Err(NetworkError::Request { source, .. })
                if matches!(source.raw_os_error(), Some(libc::ESRCH | libc::ENOENT)) =>
            {
                Ok(())
            }
            other => other.map(drop),
        }
    }

    async fn dump(
        &self,
        what: &'static str,
        message: RouteNetlinkMessage,
    ) -> Result<Vec<RouteNetlinkMessage>, NetworkError> {
        self.request(what, message, NLM_F_DUMP).await
    }

    async fn request(
        &self,
        what: &'static str,
        message: RouteNetlinkMessage,
        flags: u16,
    ) -> Result<Vec<RouteNetlinkMessage>, NetworkError> {
        let mut request = NetlinkMessage::from(message);
        request.header.flags = NLM_F_REQUEST | flags;
        let mut replies = self
            .handle
            .clone()
            .request(request)
            .map_err(|error| NetworkError::Netlink(error.to_string()))?;
        let mut messages = Vec::new();
        while let Some(reply) = replies.next().await {
            match reply.payload {
                NetlinkPayload::InnerMessage(message) => messages.push(message),
                NetlinkPayload::Error(error) if error.code.is_some() => {
                    return Err(NetworkError::Request {
                        what,
                        source: error.to_io(),
                    });
                }
                NetlinkPayload::Overrun(_) => {
                    return Err(NetworkError::Netlink("the answer was cut off".to_owned()));
                }
                _ => {}
            }
        }
        Ok(messages)
    }
}

fn is_unsupported(errno: i32) -> bool {
    matches!(errno, libc::EAFNOSUPPORT | libc::EOPNOTSUPP)
}

fn rule_entry(version: IpVersion, rule: &RuleMessage) -> Entry {
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

fn route_entry(version: IpVersion, route: &RouteMessage) -> Entry {
    let device = route.attributes.iter().find_map(|part| match part {
        RouteAttribute::Oif(device) => Some(*device),
        _ => None,
    });
    let source = route.attributes.iter().find_map(|part| match part {
        RouteAttribute::PrefSource(source) => match source {
            rtnetlink::packet_route::route::RouteAddress::Inet(source) => Some((*source).into()),
            rtnetlink::packet_route::route::RouteAddress::Inet6(source) => Some((*source).into()),
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

fn metric(route: &RouteMessage) -> u32 {
    route
        .attributes
        .iter()
        .find_map(|part| match part {
            RouteAttribute::Priority(metric) => Some(*metric),
            _ => None,
        })
        .unwrap_or(0)
}

fn to_message(entry: &Entry) -> Option<RouteNetlinkMessage> {
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
fn route(version: IpVersion, table: u32, kind: RouteType) -> RouteMessage {
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
    use super::*;

    fn pod() -> Vec<DeviceAddress> {
        ["10.0.0.5", "fd00::5"]
            .into_iter()
            .map(|address| DeviceAddress {
                address: address.parse().unwrap(),
                device: 7,
            })
            .collect()
    }

    #[test]
    fn each_family_needs_its_rule_and_a_route_over_lo_and_one_over_its_device() {
        let needed = needed(&pod());
        assert_eq!(needed.len(), 6);
        for address in pod() {
            for (device, metric) in [(1, 1), (7, 2)] {
                assert!(needed.contains(&Entry::Route {
                    device,
                    metric,
                    source: address.address
                }));
            }
        }
    }

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
