//! Reading and changing a pod's network over rtnetlink.

use std::collections::BTreeSet;
use std::net::IpAddr;

use futures_util::StreamExt;
use rtnetlink::packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload,
};
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::address::{AddressAttribute, AddressMessage};
use rtnetlink::packet_route::link::{LinkAttribute, LinkFlags, LinkMessage};
use rtnetlink::packet_route::route::{RouteAttribute, RouteMessage, RouteType};
use rtnetlink::packet_route::rule::{RuleAttribute, RuleMessage};
use tokio::task::JoinHandle;

use super::messages::{metric, route, route_entry, rule_entry, to_message};
use super::{Device, DeviceAddress, Entry, IpVersion, NOTE_TABLE, NetworkError, TABLE};
use crate::capture::netns::{Netns, NetnsWorker};
use crate::capture::sysctl::Former;

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

    /// Every device.
    pub async fn all_devices(&self) -> Result<Vec<Device>, NetworkError> {
        let request = RouteNetlinkMessage::GetLink(LinkMessage::default());
        let messages = self.dump("list devices", request).await?;
        let devices = messages.into_iter().filter_map(|message| match message {
            RouteNetlinkMessage::NewLink(link) => Some(link),
            _ => None,
        });
        Ok(devices
            .map(|link| Device {
                index: link.header.index,
                name: name(&link),
                is_up: link.header.flags.contains(LinkFlags::Up),
                is_loopback: link.header.flags.contains(LinkFlags::Loopback),
            })
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

fn name(link: &LinkMessage) -> String {
    let mut parts = link.attributes.iter();
    parts
        .find_map(|part| match part {
            LinkAttribute::IfName(name) => Some(name.clone()),
            _ => None,
        })
        .unwrap_or_default()
}

fn is_unsupported(errno: i32) -> bool {
    matches!(errno, libc::EAFNOSUPPORT | libc::EOPNOTSUPP)
}
