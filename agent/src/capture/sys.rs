//! The system calls that no crate offers in safe code: `bpf(2)` on links, the cookie of a socket's
//! network namespace, and `madvise(2)` on the program itself; and what a crate leaves to its caller's
//! word. The only unsafe code of the agent.
#![allow(unsafe_code)]

use std::ffi::CString;
use std::io;
use std::net::TcpListener;
use std::os::fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;
use std::sync::Arc;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// What the agent's allocator, jemalloc, does: what is freed goes back to the kernel within a second, as a
/// burst of connections should, and there are few arenas, since each keeps memory of its own.
/// `_RJEM_MALLOC_CONF` in the environment is read after it.
// SAFETY: jemalloc declares it weak, as a pointer to a string that ends with 0.
#[unsafe(export_name = "_rjem_malloc_conf")]
#[used]
static ALLOCATOR: &[u8; 47] = b"narenas:4,dirty_decay_ms:1000,muzzy_decay_ms:0\0";

/// Commands of `bpf(2)`: `enum bpf_cmd` of include/uapi/linux/bpf.h.
#[repr(i32)]
#[derive(Clone, Copy)]
enum Command {
    MapUpdateElem = 2,
    ObjPin = 6,
    ObjGet = 7,
    ObjGetInfoByFd = 15,
    ProgQuery = 16,
    LinkCreate = 28,
    LinkUpdate = 29,
    LinkDetach = 34,
}

/// Where a program attaches: `enum bpf_attach_type` of include/uapi/linux/bpf.h.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum AttachType {
    /// `BPF_CGROUP_SOCK_OPS`
    SockOps = 3,
    /// `BPF_CGROUP_INET4_CONNECT`
    Connect4 = 10,
    /// `BPF_CGROUP_INET6_CONNECT`
    Connect6 = 11,
    /// `BPF_CGROUP_SETSOCKOPT`
    SetSockopt = 22,
    /// `BPF_SK_LOOKUP`
    Lookup = 36,
}

/// What the kernel says about a link: `struct bpf_link_info`, for cgroup and netns links.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct LinkInfo {
    kind: u32,
    /// Number of the link.
    pub(super) id: u32,
    /// Number of its program.
    pub(super) program_id: u32,
    padding: u32,
    /// The union: `cgroup_id: u64`, or `netns_ino: u32`.
    target: [u32; 2],
    /// Room for the other kinds of link.
    rest: [u64; 8],
}

impl LinkInfo {
    /// Inode of the cgroup directory it is attached to; 0 when that is gone.
    pub(super) fn cgroup_id(&self) -> u64 {
        let [low, high] = self.target.map(u32::to_ne_bytes);
        let mut bytes = [0; 8];
        bytes[..4].copy_from_slice(&low);
        bytes[4..].copy_from_slice(&high);
        u64::from_ne_bytes(bytes)
    }

    /// Inode of the network namespace it is attached to; 0 when that is gone.
    pub(super) fn netns_inode(&self) -> u64 {
        u64::from(self.target[0])
    }
}

fn bpf<T>(command: Command, attributes: &mut T) -> io::Result<RawFd> {
    // SAFETY: `attributes` is the structure of this command, as each caller sees to, valid for the
    // call; its size is given, and the kernel takes what lies beyond as zero.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command as libc::c_int,
            std::ptr::from_mut(attributes),
            size_of::<T>(),
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    RawFd::try_from(result).map_err(io::Error::other)
}

/// Takes a descriptor that the kernel has just made.
fn own(descriptor: RawFd) -> OwnedFd {
    // SAFETY: `bpf(2)` returned it from a command that makes a descriptor (close-on-exec) for us.
    unsafe { OwnedFd::from_raw_fd(descriptor) }
}

#[repr(C)]
struct ObjectAttributes {
    path: u64,
    descriptor: u32,
    flags: u32,
}

fn c_path(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(io::Error::other)
}

/// Pins an object on a bpffs (`BPF_OBJ_PIN`).
pub(super) fn pin(object: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let path = c_path(path)?;
    let mut attributes = ObjectAttributes {
        path: path.as_ptr() as u64,
        descriptor: object.as_raw_fd().cast_unsigned(),
        flags: 0,
    };
    bpf(Command::ObjPin, &mut attributes).map(drop)
}

/// Opens what is pinned (`BPF_OBJ_GET`).
pub(super) fn open_pin(path: &Path) -> io::Result<OwnedFd> {
    let path = c_path(path)?;
    let mut attributes = ObjectAttributes {
        path: path.as_ptr() as u64,
        descriptor: 0,
        flags: 0,
    };
    bpf(Command::ObjGet, &mut attributes).map(own)
}

/// Sets what a map of sockets' storage (`BPF_MAP_TYPE_SK_STORAGE`, 5.2) of four bytes each has for a socket
/// (`BPF_MAP_UPDATE_ELEM`). As often at once as one likes, which aya's own way does not let two threads.
pub(super) fn store_at_socket(
    map: BorrowedFd<'_>,
    socket: BorrowedFd<'_>,
    value: u32,
) -> io::Result<()> {
    #[repr(C)]
    struct Attributes {
        map: u32,
        padding: u32,
        key: u64,
        value: u64,
        flags: u64,
    }
    let key = socket.as_raw_fd();
    let mut attributes = Attributes {
        map: map.as_raw_fd().cast_unsigned(),
        padding: 0,
        key: (&raw const key) as u64,
        value: (&raw const value) as u64,
        flags: 0,
    };
    bpf(Command::MapUpdateElem, &mut attributes).map(drop)
}

/// Attaches a program to a cgroup or a network namespace (`BPF_LINK_CREATE`, 5.7).
pub(super) fn link(
    program: BorrowedFd<'_>,
    target: BorrowedFd<'_>,
    kind: AttachType,
) -> io::Result<OwnedFd> {
    #[repr(C)]
    struct Attributes {
        program: u32,
        target: u32,
        attach_type: u32,
        flags: u32,
    }
    let mut attributes = Attributes {
        program: program.as_raw_fd().cast_unsigned(),
        target: target.as_raw_fd().cast_unsigned(),
        attach_type: kind as u32,
        flags: 0,
    };
    bpf(Command::LinkCreate, &mut attributes).map(own)
}

/// Puts another program into a link, without a moment between (`BPF_LINK_UPDATE`, 5.7). ENOLINK:
/// what it was attached to is gone.
pub(super) fn update_link(link: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    #[repr(C)]
    struct Attributes {
        link: u32,
        program: u32,
        flags: u32,
        former_program: u32,
    }
    let mut attributes = Attributes {
        link: link.as_raw_fd().cast_unsigned(),
        program: program.as_raw_fd().cast_unsigned(),
        flags: 0,
        former_program: 0,
    };
    bpf(Command::LinkUpdate, &mut attributes).map(drop)
}

/// Takes the program off (`BPF_LINK_DETACH`, 5.9), before it returns: closing and unpinning a link
/// do so some time later.
pub(super) fn detach_link(link: BorrowedFd<'_>) -> io::Result<()> {
    let mut attributes = link.as_raw_fd().cast_unsigned();
    bpf(Command::LinkDetach, &mut attributes).map(drop)
}

/// What the kernel says about a link (`BPF_OBJ_GET_INFO_BY_FD`).
pub(super) fn link_info(link: BorrowedFd<'_>) -> io::Result<LinkInfo> {
    #[repr(C)]
    struct Attributes {
        descriptor: u32,
        length: u32,
        info: u64,
    }
    let mut info = LinkInfo::default();
    let mut attributes = Attributes {
        descriptor: link.as_raw_fd().cast_unsigned(),
        length: size_of::<LinkInfo>() as u32,
        info: (&raw mut info) as u64,
    };
    bpf(Command::ObjGetInfoByFd, &mut attributes)?;
    Ok(info)
}

/// Numbers of the programs attached to a cgroup itself, at most 64 (`BPF_PROG_QUERY`).
pub(super) fn attached(cgroup: BorrowedFd<'_>, kind: AttachType) -> io::Result<Vec<u32>> {
    #[repr(C)]
    struct Attributes {
        target: u32,
        attach_type: u32,
        query_flags: u32,
        attach_flags: u32,
        programs: u64,
        count: u32,
        padding: u32,
    }
    let mut programs = [0_u32; 64];
    let mut attributes = Attributes {
        target: cgroup.as_raw_fd().cast_unsigned(),
        attach_type: kind as u32,
        query_flags: 0,
        attach_flags: 0,
        programs: programs.as_mut_ptr() as u64,
        count: programs.len() as u32,
        padding: 0,
    };
    bpf(Command::ProgQuery, &mut attributes)?;
    Ok(programs
        .into_iter()
        .take(attributes.count as usize)
        .collect())
}

/// Cookie of the network namespace that a socket is in (`SO_NETNS_COOKIE`, 5.14). It is never used
/// again for another until the machine boots.
pub(super) fn netns_cookie(socket: BorrowedFd<'_>) -> io::Result<u64> {
    cookie(socket, libc::SO_NETNS_COOKIE)
}

/// Cookie of a socket (`SO_COOKIE`).
pub(super) fn socket_cookie(socket: BorrowedFd<'_>) -> io::Result<u64> {
    cookie(socket, libc::SO_COOKIE)
}

fn cookie(socket: BorrowedFd<'_>, option: libc::c_int) -> io::Result<u64> {
    let mut cookie = 0_u64;
    get_option(socket, libc::SOL_SOCKET, option, &mut cookie)?;
    Ok(cookie)
}

/// Takes code and constants, the program's and its libraries', out of the process's resident memory; what is
/// needed again comes back page by page from the page cache. Returns how many bytes were resident of them.
///
/// For moments at which nothing runs: what start runs is a large part of the code and never runs again, and Linux
/// maps with each page that is run up to fifteen others around it (`fault_around_bytes`).
pub fn forget_code() -> io::Result<usize> {
    let mut forgotten = 0;
    for mapping in unwritten(&std::fs::read_to_string("/proc/self/smaps")?) {
        // SAFETY: the kernel said that these are pages of a file, mapped private and not writable, of which not one
        // was ever written (as relocations and a debugger's breakpoints are), in memory or swapped out. So whoever
        // touches them next finds the same bytes, read from the file that the mapping holds, as after the kernel
        // itself had evicted them.
        let result = unsafe {
            libc::madvise(
                std::ptr::with_exposed_provenance_mut(mapping.range.start),
                mapping.range.len(),
                libc::MADV_DONTNEED,
            )
        };
        if result != 0 {
            return Err(io::Error::last_os_error());
        }
        forgotten += mapping.resident_bytes;
    }
    Ok(forgotten)
}

/// A part of a file in memory.
#[derive(Debug, PartialEq, Eq)]
struct Mapping {
    range: std::ops::Range<usize>,
    resident_bytes: usize,
}

/// Those mappings of files that cannot be written, and of which no page was, by what `/proc/PID/smaps` says (proc(5)).
/// One of which it does not say so counts as written.
fn unwritten(smaps: &str) -> Vec<Mapping> {
    let mut mappings = Vec::new();
    let mut lines = smaps.lines().peekable();
    while let Some(line) = lines.next() {
        let Some(range) = of_file(line) else {
            continue;
        };
        let (mut resident_bytes, mut anonymous, mut swapped) = (0, None, None);
        while let Some((name, rest)) = lines.peek().and_then(|line| line.split_once(':')) {
            // The head of the next mapping has its first colon behind a space.
            if name.contains(' ') {
                break;
            }
            let kib = rest.trim().strip_suffix(" kB");
            let kib = kib.and_then(|number| number.parse::<usize>().ok());
            match name {
                "Rss" => resident_bytes = kib.unwrap_or(0) * 1024,
                "Anonymous" => anonymous = kib,
                "Swap" => swapped = kib,
                _ => {}
            }
            lines.next();
        }
        if (anonymous, swapped) == (Some(0), Some(0)) && resident_bytes > 0 {
            mappings.push(Mapping {
                range,
                resident_bytes,
            });
        }
    }
    mappings
}

/// The addresses that such a line is the head of, if they are a file's that cannot be written there.
fn of_file(line: &str) -> Option<std::ops::Range<usize>> {
    let mut fields = line.splitn(6, ' ').map(str::trim);
    let (start, end) = fields.next()?.split_once('-')?;
    let is_readable = matches!(fields.next()?, "r-xp" | "r--p");
    let is_file = fields.nth(3)?.starts_with('/');
    let address = |text| usize::from_str_radix(text, 16).ok();
    (is_readable && is_file).then_some(address(start)?..address(end)?)
}

/// A listening socket's queue of connections that wait to be accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ListenQueue {
    /// How many wait.
    pub(super) waiting: u32,
    /// How many may.
    pub(super) room: u32,
    /// SYNs and handshakes that found none, or no memory, since the socket was made
    /// (`tcp_listendrop`).
    pub(super) dropped: u32,
}

/// What the kernel says about a listener: `tcp_get_info` gives the queue's length and bound in two
/// fields that mean something else for connections, and `SO_MEMINFO` (4.12) has the drops.
pub(super) fn listen_queue(socket: BorrowedFd<'_>) -> io::Result<ListenQueue> {
    /// Fields of `struct tcp_info` up to `tcpi_sacked` (include/uapi/linux/tcp.h).
    #[repr(C)]
    #[derive(Default)]
    struct TcpInfo {
        bytes: [u8; 8],
        rto: u32,
        ato: u32,
        snd_mss: u32,
        rcv_mss: u32,
        unacked: u32,
        sacked: u32,
    }
    /// `SK_MEMINFO_DROPS` of include/uapi/linux/sock_diag.h.
    const DROPS: usize = 8;
    let mut info = TcpInfo::default();
    get_option(socket, libc::IPPROTO_TCP, libc::TCP_INFO, &mut info)?;
    let mut memory = [0_u32; DROPS + 1];
    get_option(socket, libc::SOL_SOCKET, SO_MEMINFO, &mut memory)?;
    Ok(ListenQueue {
        waiting: info.unacked,
        room: info.sacked,
        dropped: memory[DROPS],
    })
}

/// Has the runtime that this is called on tell when there is a connection to accept. The listener must not
/// block.
pub(super) fn watch_listener(listener: Arc<TcpListener>) -> io::Result<AsyncFd<Arc<TcpListener>>> {
    // SAFETY: the listener owns its descriptor and is never asked for another; it is in an `Arc` that is dropped
    // after the registration, so it is open for as long as that lasts.
    let watched = unsafe { AsyncFd::register_with_interest(listener, Interest::READABLE) };
    watched.map_err(io::Error::from)
}

/// `SO_MEMINFO` of include/uapi/asm-generic/socket.h.
const SO_MEMINFO: libc::c_int = 55;

/// Callers give a value of integers only, of which every bit pattern is one.
fn get_option<T>(
    socket: BorrowedFd<'_>,
    level: libc::c_int,
    option: libc::c_int,
    value: &mut T,
) -> io::Result<()> {
    let mut length = size_of::<T>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `length` bytes to `value`, which holds integers.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            level,
            option,
            std::ptr::from_mut(value).cast(),
            &raw mut length,
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_pages_of_files_that_nobody_wrote_are_forgotten() {
        let found = |head: &str, anonymous: u32, swap: u32| {
            let smaps = format!(
                "{head}\nSize: 12 kB\nRss: 8 kB\nAnonymous: {anonymous} kB\nSwap: {swap} kB\nVmFlags: rd ex\n\
                 7f00-8000 rw-p 00000000 00:00 0 \nRss: 4 kB\nAnonymous: 4 kB\nSwap: 0 kB\n"
            );
            unwritten(&smaps)
        };
        let code = "55d0c000-55d0f000 r-xp 00008000 fe:00 4711    /opt/the agent: 2";
        let own = Mapping {
            range: 0x55d0_c000..0x55d0_f000,
            resident_bytes: 8192,
        };
        assert_eq!(found(code, 0, 0), [own]);
        for sound in [
            "55d0c000-55d0f000 r--p 00000000 fe:00 4711 /opt/agent",
            "55d0c000-55d0f000 r-xp 00000000 fe:00 4712 /lib/libc.so.6",
            "55d0c000-55d0f000 r-xp 00000000 fe:00 4711 /opt/agent (deleted)",
        ] {
            assert_eq!(found(sound, 0, 0).len(), 1, "{sound}");
        }
        // Relocated, or with a breakpoint; and the same, swapped out.
        assert_eq!(found(code, 4, 0), []);
        assert_eq!(found(code, 0, 4), []);
        for other in [
            "55d0c000-55d0f000 rw-p 00000000 fe:00 4711 /opt/agent",
            "55d0c000-55d0f000 r--s 00000000 fe:00 4711 /opt/agent",
            "55d0c000-55d0f000 ---p 00000000 fe:00 4711 /opt/agent",
            "55d0c000-55d0f000 r-xp 00000000 00:00 0",
            "55d0c000-55d0f000 r-xp 00000000 00:00 0 [vdso]",
            "",
        ] {
            assert_eq!(found(other, 0, 0), [], "{other}");
        }
        let silent = format!("{code}\nRss: 8 kB\n");
        assert_eq!(unwritten(&silent), [], "of which nothing is said");
    }

    #[test]
    fn a_program_runs_on_after_its_code_was_forgotten() {
        assert!(forget_code().unwrap() > 0);
        assert_eq!("still there".len(), 11);
    }
}
