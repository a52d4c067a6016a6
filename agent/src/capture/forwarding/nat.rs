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
/// In the flags of a message: the chains changed while they were listed.
const NLM_F_DUMP_INTR: u16 = 0x10;
/// Of a message; of what nfnetlink puts before the attributes; of an attribute.
const HEADER: usize = 16;
const NFGENMSG: usize = 4;
const ATTRIBUTE: usize = 4;
/// An answer to one request takes no more datagrams; beyond, it is taken for one that says so.
const MOST_DATAGRAMS: usize = 1_024;
/// How often a list is asked for again that changed meanwhile.
const MOST_LISTS: u32 = 4;

/// Who translates addresses here. To be called in the pod's namespace. A kernel that has neither
/// translates nothing; one that does not say is an error.
pub(super) fn translator() -> io::Result<Option<&'static str>> {
    if nftables_translates()? {
        return Ok(Some("nftables"));
    }
    // Of the calling thread's namespace. The table is there once somebody has used it.
    for file in ["ip_tables_names", "ip6_tables_names"] {
        match fs::read_to_string(format!("/proc/thread-self/net/{file}")) {
            Ok(tables) if tables.lines().any(|table| table == "nat") => {
                return Ok(Some("iptables"));
            }
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            Ok(_) | Err(_) => {}
        }
    }
    Ok(None)
}

fn nftables_translates() -> io::Result<bool> {
    let socket = match Socket::new(NETLINK_NETFILTER) {
        Err(error) if error.raw_os_error() == Some(libc::EPROTONOSUPPORT) => return Ok(false),
        socket => socket?,
    };
    translates(socket)
}

fn translates(mut socket: Socket) -> io::Result<bool> {
    socket.bind_auto()?;
    socket.connect(&SocketAddr::new(0, 0))?;
    let length = HEADER + NFGENMSG;
    let mut request = Vec::with_capacity(length);
    request.extend(u32::try_from(length).unwrap_or_default().to_ne_bytes());
    request.extend(NFT_MSG_GETCHAIN.to_ne_bytes());
    request.extend(REQUEST_DUMP.to_ne_bytes());
    // Sequence and port, and then family (any), version and resource.
    request.extend([0; 8 + NFGENMSG]);
    for _ in 0..MOST_LISTS {
        socket.send(&request, 0)?;
        match list(&socket)? {
            Listed::Translates => return Ok(true),
            Listed::Nothing => return Ok(false),
            Listed::Changed => {}
        }
    }
    Err(io::Error::new(
        io::ErrorKind::Interrupted,
        "the chains of nftables change while they are listed",
    ))
}

/// What a whole list of chains says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Listed {
    Translates,
    Nothing,
    /// Perhaps not all of it was seen.
    Changed,
}

fn list(socket: &Socket) -> io::Result<Listed> {
    let mut listed = Listed::Nothing;
    for _ in 0..MOST_DATAGRAMS {
        let (datagram, _) = socket.recv_from_full()?;
        if read(&datagram, &mut listed)? == Progress::End {
            return Ok(listed);
        }
    }
    Ok(Listed::Translates)
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Progress {
    /// That was all.
    End,
    /// Another datagram follows.
    More,
}

fn read(mut datagram: &[u8], listed: &mut Listed) -> io::Result<Progress> {
    while let Some(Message {
        length,
        kind,
        flags,
    }) = message(datagram)
    {
        if flags & NLM_F_DUMP_INTR != 0 && *listed == Listed::Nothing {
            *listed = Listed::Changed;
        }
        match kind {
            NLMSG_DONE => return Ok(Progress::End),
            NLMSG_ERROR => return refusal(&datagram[HEADER..length]).map(|()| Progress::End),
            NFT_MSG_NEWCHAIN if is_translation(&datagram[HEADER..length]) => {
                *listed = Listed::Translates;
            }
            _ => {}
        }
        datagram = datagram.get(align(length)..).unwrap_or_default();
    }
    Ok(Progress::More)
}

/// An error that only says that the kernel has no nftables is none.
fn refusal(payload: &[u8]) -> io::Result<()> {
    let code = payload.get(..4).and_then(|code| code.try_into().ok());
    let code = code.map_or(libc::EBADMSG, |code| {
        i32::from_ne_bytes(code).saturating_neg()
    });
    match code {
        // nfnetlink's answer where nobody registered for these messages (nfnetlink_rcv_msg).
        libc::EINVAL | libc::EOPNOTSUPP => Ok(()),
        code => Err(io::Error::from_raw_os_error(code)),
    }
}

/// The head of a message.
struct Message {
    /// With the head.
    length: usize,
    kind: u16,
    flags: u16,
}

fn message(bytes: &[u8]) -> Option<Message> {
    let length = u32::from_ne_bytes(bytes.get(..4)?.try_into().ok()?);
    let kind = u16::from_ne_bytes(bytes.get(4..6)?.try_into().ok()?);
    let flags = u16::from_ne_bytes(bytes.get(6..8)?.try_into().ok()?);
    let length = usize::try_from(length).ok()?;
    (HEADER..=bytes.len()).contains(&length).then_some(Message {
        length,
        kind,
        flags,
    })
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

    /// What comes of one datagram.
    fn of(parts: &[Vec<u8>]) -> Result<(Progress, Listed), i32> {
        let mut listed = Listed::Nothing;
        let progress = read(&parts.concat(), &mut listed);
        let progress = progress.map_err(|error| error.raw_os_error().unwrap())?;
        Ok((progress, listed))
    }

    fn end() -> Vec<u8> {
        finish(vec![0; HEADER + 4], NLMSG_DONE)
    }

    #[test]
    fn only_a_chain_for_translation_with_rules_translates() {
        use Listed::{Nothing, Translates};
        use Progress::{End, More};
        assert_eq!(
            of(&[chain(b"filter\0", 3), chain(b"nat\0", 0)]),
            Ok((More, Nothing))
        );
        assert_eq!(of(&[chain(b"filter\0", 3), end()]), Ok((End, Nothing)));
        assert_eq!(
            of(&[chain(b"filter\0", 3), chain(b"nat\0", 1), end()]),
            Ok((End, Translates))
        );
    }

    #[test]
    fn a_kernel_without_nftables_translates_nothing_and_any_other_error_is_one() {
        let error = |code: i32| {
            let mut bytes = vec![0; HEADER];
            bytes.extend((-code).to_ne_bytes());
            bytes.resize(36, 0);
            of(&[finish(bytes, NLMSG_ERROR)])
        };
        for code in [libc::EINVAL, libc::EOPNOTSUPP] {
            assert_eq!(error(code), Ok((Progress::End, Listed::Nothing)));
        }
        for code in [libc::EPERM, libc::ENOMEM, libc::EINTR] {
            assert_eq!(error(code), Err(code));
        }
        assert_eq!(
            of(&[finish(vec![0; HEADER], NLMSG_ERROR)]),
            Err(libc::EBADMSG)
        );
    }

    #[test]
    fn a_list_that_changed_meanwhile_says_nothing_unless_it_says_yes() {
        let interrupted = |mut bytes: Vec<u8>| {
            bytes[6..8].copy_from_slice(&NLM_F_DUMP_INTR.to_ne_bytes());
            bytes
        };
        assert_eq!(
            of(&[interrupted(chain(b"filter\0", 1)), end()]),
            Ok((Progress::End, Listed::Changed))
        );
        assert_eq!(
            of(&[interrupted(chain(b"nat\0", 1)), end()]),
            Ok((Progress::End, Listed::Translates))
        );
    }

    proptest! {
        #[test]
        fn whatever_comes_is_read_to_its_end(datagram in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = read(&datagram, &mut Listed::Nothing);
            is_translation(&datagram);
        }
    }
}
