//! Are addresses translated in this network namespace? Asked of nftables over netlink, which the
//! iptables of today is too, and of the tables of the former iptables.

use std::fs;
use std::io;

use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_NETFILTER};

/// Messages of linux/netfilter/nfnetlink.h and nf_tables.h: a list of all chains is asked for.
const NFNL_SUBSYS_NFTABLES: u16 = 10 << 8;
const NFT_MSG_NEWCHAIN: u16 = NFNL_SUBSYS_NFTABLES | 3;
const NFT_MSG_GETCHAIN: u16 = NFNL_SUBSYS_NFTABLES | 4;
/// How many rules are in a chain, in network order; jumps to it count too.
const NFTA_CHAIN_USE: u16 = 6;
/// What a chain is for, as text.
const NFTA_CHAIN_TYPE: u16 = 7;
/// `NLM_F_REQUEST | NLM_F_DUMP` of linux/netlink.h.
const REQUEST_DUMP: u16 = 0x1 | 0x300;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
/// Of a message; of what nfnetlink puts before the attributes; of an attribute.
const HEADER: usize = 16;
const NFGENMSG: usize = 4;
const ATTRIBUTE: usize = 4;
/// An answer to one request takes no more datagrams; beyond, it is taken for one that says so.
const MOST_DATAGRAMS: usize = 1_024;

/// Who translates addresses here. To be called in the pod's namespace. A kernel that has neither
/// translates nothing.
pub(super) fn translator() -> Option<&'static str> {
    if translates().unwrap_or(false) {
        return Some("nftables");
    }
    // Of the calling thread's namespace. The table is there once somebody has used it.
    ["ip_tables_names", "ip6_tables_names"]
        .into_iter()
        .filter_map(|file| fs::read_to_string(format!("/proc/thread-self/net/{file}")).ok())
        .any(|tables| tables.lines().any(|table| table == "nat"))
        .then_some("iptables")
}

fn translates() -> io::Result<bool> {
    let mut socket = Socket::new(NETLINK_NETFILTER)?;
    socket.bind_auto()?;
    socket.connect(&SocketAddr::new(0, 0))?;
    let length = HEADER + NFGENMSG;
    let mut request = Vec::with_capacity(length);
    request.extend(u32::try_from(length).unwrap_or_default().to_ne_bytes());
    request.extend(NFT_MSG_GETCHAIN.to_ne_bytes());
    request.extend(REQUEST_DUMP.to_ne_bytes());
    // Sequence and port, and then family (any), version and resource.
    request.extend([0; 8 + NFGENMSG]);
    socket.send(&request, 0)?;
    for _ in 0..MOST_DATAGRAMS {
        let (datagram, _) = socket.recv_from_full()?;
        match answer(&datagram) {
            Answer::Translates => return Ok(true),
            Answer::End => return Ok(false),
            Answer::More => {}
        }
    }
    Ok(true)
}

#[derive(Debug, PartialEq, Eq)]
enum Answer {
    /// A chain of rules that translate.
    Translates,
    /// That was all, or the kernel has no nftables.
    End,
    /// Another datagram follows.
    More,
}

fn answer(mut datagram: &[u8]) -> Answer {
    while let Some((length, kind)) = message(datagram) {
        match kind {
            NLMSG_DONE | NLMSG_ERROR => return Answer::End,
            NFT_MSG_NEWCHAIN if is_translation(&datagram[HEADER..length]) => {
                return Answer::Translates;
            }
            _ => datagram = datagram.get(align(length)..).unwrap_or_default(),
        }
    }
    Answer::More
}

/// Length with its header, and type.
fn message(bytes: &[u8]) -> Option<(usize, u16)> {
    let length = u32::from_ne_bytes(bytes.get(..4)?.try_into().ok()?);
    let kind = u16::from_ne_bytes(bytes.get(4..6)?.try_into().ok()?);
    let length = usize::try_from(length).ok()?;
    (HEADER..=bytes.len())
        .contains(&length)
        .then_some((length, kind))
}

fn is_translation(payload: &[u8]) -> bool {
    let (mut rules, mut translates) = (0, false);
    let mut attributes = payload.get(NFGENMSG..).unwrap_or_default();
    while let Some((kind, value, rest)) = attribute(attributes) {
        match kind {
            NFTA_CHAIN_USE => rules = value.try_into().map_or(0, u32::from_be_bytes),
            NFTA_CHAIN_TYPE => translates = value.strip_suffix(b"\0") == Some(b"nat"),
            _ => {}
        }
        attributes = rest;
    }
    translates && rules > 0
}

fn attribute(bytes: &[u8]) -> Option<(u16, &[u8], &[u8])> {
    let length = usize::from(u16::from_ne_bytes(bytes.get(..2)?.try_into().ok()?));
    let kind = u16::from_ne_bytes(bytes.get(2..4)?.try_into().ok()?);
    let value = bytes.get(ATTRIBUTE..length)?;
    Some((kind, value, bytes.get(align(length)..).unwrap_or_default()))
}

/// Both are padded to four bytes.
fn align(length: usize) -> usize {
    length.next_multiple_of(4)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn chain(kind: &[u8], rules: u32) -> Vec<u8> {
        let mut bytes = vec![0; HEADER + NFGENMSG];
        let mut add = |number: u16, value: &[u8]| {
            let length = u16::try_from(ATTRIBUTE + value.len()).unwrap();
            bytes.extend(length.to_ne_bytes());
            bytes.extend(number.to_ne_bytes());
            bytes.extend(value);
            bytes.resize(align(bytes.len()), 0);
        };
        add(3, b"chain\0");
        add(NFTA_CHAIN_USE, &rules.to_be_bytes());
        add(NFTA_CHAIN_TYPE, kind);
        finish(bytes, NFT_MSG_NEWCHAIN)
    }

    fn finish(mut bytes: Vec<u8>, kind: u16) -> Vec<u8> {
        let length = u32::try_from(bytes.len()).unwrap();
        bytes[..4].copy_from_slice(&length.to_ne_bytes());
        bytes[4..6].copy_from_slice(&kind.to_ne_bytes());
        bytes
    }

    #[test]
    fn only_a_chain_for_translation_with_rules_translates() {
        let end = || finish(vec![0; HEADER + 4], NLMSG_DONE);
        let of = |parts: &[Vec<u8>]| answer(&parts.concat());
        assert_eq!(
            of(&[chain(b"filter\0", 3), chain(b"nat\0", 0)]),
            Answer::More
        );
        assert_eq!(of(&[chain(b"filter\0", 3), end()]), Answer::End);
        assert_eq!(
            of(&[chain(b"filter\0", 3), chain(b"nat\0", 1), end()]),
            Answer::Translates
        );
        assert_eq!(of(&[finish(vec![0; 36], NLMSG_ERROR)]), Answer::End);
    }

    proptest! {
        #[test]
        fn whatever_comes_is_read_to_its_end(datagram in proptest::collection::vec(any::<u8>(), 0..200)) {
            answer(&datagram);
            is_translation(&datagram);
        }
    }
}
