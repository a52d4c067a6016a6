//! Makes connections of one kind and says how many did what they should.

use std::io::{self, ErrorKind, IoSlice, IoSliceMut, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use clap::Args;
use nix::sched::{CloneFlags, unshare};
use nix::sys::socket::{setsockopt, sockopt};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use serde::{Deserialize, Serialize};
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

use super::kind::{Expected, Kind};

const LIMIT: Duration = Duration::from_secs(10);
/// Send the first bytes with the SYN.
const MSG_FASTOPEN: i32 = 0x2000_0000;
/// For a refusal: nothing of it may wait for a time-out.
const SOON: Duration = Duration::from_secs(2);
/// In which a pod may close as many connections to one destination as it likes.
const MINUTE: Duration = Duration::from_secs(60);
/// Threads of that pod.
const AT_A_TIME: u32 = 8;
/// `EINPROGRESS` of `errno.h`.
const EINPROGRESS: i32 = 115;
/// Longer than all other kinds take together.
const LONGEST: Duration = Duration::from_secs(1800);
/// What is said on each connection.
const LINE: &[u8] = b"undermesh\n";
/// A mark of the app's own; not the mesh's bit.
const APP_MARK: u32 = 0x0000_0007;

/// What is to be made.
#[derive(Debug, Clone, Args)]
pub struct ConnectOptions {
    /// The kind.
    #[arg(long)]
    pub kind: Kind,
    /// Where to.
    #[arg(long)]
    pub to: SocketAddr,
    /// How many.
    #[arg(long, default_value_t = 1)]
    pub attempts: u32,
    /// To bind to.
    #[arg(long)]
    pub source: Option<IpAddr>,
    /// A cgroup to move to before connecting.
    #[arg(long)]
    pub cgroup: Option<PathBuf>,
    /// Sockets are made at once, connections when this file is there.
    #[arg(long)]
    pub after: Option<PathBuf>,
}

/// What came of it.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct ConnectReport {
    /// Connections tried.
    pub attempts: u64,
    /// Connections that did what their kind should, seen from here.
    pub right: u64,
    /// Connections that were refused or reset.
    pub refused: u64,
    /// The first errors.
    pub errors: Vec<String>,
}

impl ConnectReport {
    fn add(&mut self, outcome: io::Result<()>, expected: Expected) {
        self.attempts += 1;
        let refusal = outcome.as_ref().err().is_some_and(is_refusal);
        self.refused += u64::from(refusal);
        match (outcome, expected) {
            (Ok(()), Expected::Captured | Expected::Native) => self.right += 1,
            (Ok(()), Expected::Bounded) => self.right += 1,
            (Err(_), Expected::Refused | Expected::Bounded) if refusal => self.right += 1,
            (Ok(()), Expected::Refused) => self.note("it worked".to_owned()),
            (Err(error), _) => self.note(error.to_string()),
        }
    }

    fn note(&mut self, error: String) {
        if self.errors.len() < 5 {
            self.errors.push(error);
        }
    }
}

fn is_refusal(error: &io::Error) -> bool {
    use ErrorKind as K;
    matches!(
        error.kind(),
        K::ConnectionRefused | K::ConnectionReset | K::BrokenPipe
    )
}

/// Runs it all.
pub fn run(options: &ConnectOptions) -> io::Result<ConnectReport> {
    let mut report = ConnectReport::default();
    let expected = options.kind.expected();
    match options.kind {
        Kind::Concurrent | Kind::PastTheLimit => concurrent(options, &mut report, expected),
        Kind::Many => many(options, &mut report)?,
        Kind::MadeBefore => {
            let sockets: Vec<Socket> = (0..options.attempts)
                .map(|_| stream(options.to, Protocol::TCP))
                .collect::<io::Result<_>>()?;
            println!("made");
            let start = Instant::now();
            let there = || options.after.as_ref().is_none_or(|file| file.exists());
            while !there() && start.elapsed() < LONGEST {
                std::thread::sleep(Duration::from_millis(10));
            }
            for socket in sockets {
                let made = socket.connect(&options.to.into()).map(|()| socket);
                report.add(made.and_then(|socket| talk(socket, options.to)), expected);
            }
        }
        Kind::IoUring => {
            for _ in 0..options.attempts {
                report.add(over_io_uring(options.to), expected);
            }
        }
        kind => {
            if let Some(cgroup) = &options.cgroup {
                std::fs::write(cgroup.join("cgroup.procs"), std::process::id().to_string())?;
            }
            for _ in 0..options.attempts {
                report.add(once(kind, options), expected);
            }
        }
    }
    Ok(report)
}

fn stream(to: SocketAddr, protocol: Protocol) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(to), Type::STREAM, Some(protocol))?;
    socket.set_read_timeout(Some(LIMIT))?;
    socket.set_write_timeout(Some(LIMIT))?;
    Ok(socket)
}

fn once(kind: Kind, options: &ConnectOptions) -> io::Result<()> {
    let to = options.to;
    let target = SockAddr::from(to);
    let tcp = || stream(to, Protocol::TCP);
    let connected = |socket: Socket| socket.connect(&target).map(|()| socket);
    // Nothing is sent before the first write: what happens in between is up to the app.
    let deferred = |between: &dyn Fn(&Socket) -> io::Result<()>| -> io::Result<Socket> {
        let socket = tcp()?;
        setsockopt(&socket, sockopt::TcpFastOpenConnect, &true)?;
        socket.connect(&target)?;
        between(&socket)?;
        Ok(socket)
    };
    let socket = match kind {
        Kind::NonBlocking => {
            let socket = tcp()?;
            socket.connect_timeout(&target, LIMIT)?;
            socket
        }
        Kind::FastOpenConnect => deferred(&|_| Ok(()))?,
        Kind::FastOpenSend => {
            let socket = tcp()?;
            let sent = socket.send_to_with_flags(LINE, &target, MSG_FASTOPEN)?;
            if sent != LINE.len() {
                return Err(ErrorKind::WriteZero.into());
            }
            return answered(&mut socket.into(), to);
        }
        Kind::Mptcp => connected(stream(to, Protocol::MPTCP)?)?,
        Kind::BoundSource | Kind::FromSecondary => {
            let socket = tcp()?;
            let source = options.source.ok_or(ErrorKind::InvalidInput)?;
            socket.bind(&SocketAddr::new(source, 0).into())?;
            connected(socket)?
        }
        Kind::BoundDevice => {
            let socket = tcp()?;
            socket.bind_device(Some(b"eth0"))?;
            connected(socket)?
        }
        Kind::BoundDeviceRetransmit => {
            while_a_syn_is_lost(tcp()?, &target, |socket| socket.bind_device(Some(b"eth0")))?
        }
        Kind::UnmarkedRetransmit => {
            while_a_syn_is_lost(tcp()?, &target, |socket| socket.set_mark(0))?
        }
        Kind::UnmarkedOpen => {
            let mut stream = TcpStream::from(connected(tcp()?)?);
            stream.write_all(LINE)?;
            let mut answer = vec![0; LINE.len()];
            stream.read_exact(&mut answer)?;
            let socket = Socket::from(stream);
            socket.set_mark(APP_MARK)?;
            // What follows looks for a way of its own.
            socket
        }
        Kind::BoundDeviceLate | Kind::BoundDeviceUnprivileged => {
            deferred(&|socket| socket.bind_device(Some(b"eth0")))?
        }
        Kind::Marked => {
            let socket = tcp()?;
            socket.set_mark(APP_MARK)?;
            let socket = connected(socket)?;
            if socket.mark()? & APP_MARK != APP_MARK {
                return Err(io::Error::other("the app's own mark was lost"));
            }
            socket
        }
        Kind::UnmarkedLate => deferred(&|socket| socket.set_mark(0))?,
        Kind::DontRoute => {
            let socket = tcp()?;
            setsockopt(&socket, sockopt::DontRoute, &true)?;
            connected(socket)?
        }
        Kind::Reconnected => {
            let socket = tcp()?;
            let own = match to {
                SocketAddr::V4(_) => IpAddr::from(Ipv4Addr::LOCALHOST),
                SocketAddr::V6(_) => Ipv6Addr::LOCALHOST.into(),
            };
            if socket.connect(&SocketAddr::new(own, 1).into()).is_ok() {
                return Err(io::Error::other("port 1 answers"));
            }
            rustix::net::connect_unspec(&socket)?;
            let socket = connected(socket)?;
            rustix::net::connect_unspec(&socket)?;
            connected(socket)?
        }
        Kind::PortReuse => return reused(to),
        Kind::MovedThread => {
            let socket = tcp()?;
            let moved = move || -> io::Result<()> {
                unshare(CloneFlags::CLONE_NEWNET)?;
                socket.connect(&SockAddr::from(to))?;
                talk(socket, to)
            };
            let thread = std::thread::spawn(moved);
            return thread.join().map_err(|_| ErrorKind::Other)?;
        }
        Kind::ToClosedPort => {
            let start = Instant::now();
            let refused = connected(tcp()?).and_then(|socket| talk(socket, to));
            if start.elapsed() > SOON {
                return Err(io::Error::other(format!(
                    "told after {:?}",
                    start.elapsed()
                )));
            }
            return refused;
        }
        Kind::Passed => connected(passed(to)?)?,
        _ => connected(tcp()?)?,
    };
    talk(socket, to)
}

/// Connects where the first SYN is lost, and does something before the second.
fn while_a_syn_is_lost(
    socket: Socket,
    target: &SockAddr,
    between: impl FnOnce(&Socket) -> io::Result<()>,
) -> io::Result<Socket> {
    socket.set_nonblocking(true)?;
    match socket.connect(target) {
        Err(error) if error.raw_os_error() == Some(EINPROGRESS) => {}
        Ok(()) => return Err(io::Error::other("the first SYN was answered")),
        Err(error) => return Err(error),
    }
    let start = Instant::now();
    between(&socket)?;
    let mut events = [PollFd::new(&socket, PollFlags::OUT)];
    if poll(
        &mut events,
        Some(&LIMIT.try_into().map_err(io::Error::other)?),
    )? == 0
    {
        return Err(ErrorKind::TimedOut.into());
    }
    match socket.take_error()? {
        Some(error) => Err(error),
        // RFC 6298 (2.1): a SYN is sent again after a second.
        None if start.elapsed() < Duration::from_millis(500) => {
            Err(io::Error::other("no SYN was lost"))
        }
        None => Ok(socket),
    }
}

/// Twice from one port: the second finds the first in TIME_WAIT.
fn reused(to: SocketAddr) -> io::Result<()> {
    let unspecified = match to {
        SocketAddr::V4(_) => IpAddr::from(Ipv4Addr::UNSPECIFIED),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let mut port = 0;
    for _ in 0..2 {
        let socket = stream(to, Protocol::TCP)?;
        socket.set_reuse_address(true)?;
        socket.bind(&SocketAddr::new(unspecified, port).into())?;
        socket.connect(&to.into())?;
        let local = socket.local_addr()?.as_socket();
        port = local.map_or(0, |local| local.port());
        talk(socket, to)?;
        // A time stamp must have passed before TIME_WAIT gives its tuple away (tcp_tw_reuse).
        std::thread::sleep(Duration::from_millis(1100));
    }
    Ok(())
}

/// Made by another process, which ends then: it comes through SCM_RIGHTS.
fn passed(to: SocketAddr) -> io::Result<Socket> {
    let (near, far) = std::os::unix::net::UnixStream::pair()?;
    let status = Command::new(std::env::current_exe()?)
        .args(["give", "--to", &to.to_string()])
        .stdin(OwnedFd::from(far))
        .status()?;
    if !status.success() {
        return Err(io::Error::other(format!("the giver: {status}")));
    }
    let mut space = [std::mem::MaybeUninit::uninit(); 64];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0];
    let mut bytes = [IoSliceMut::new(&mut byte)];
    recvmsg(&near, &mut bytes, &mut control, RecvFlags::empty())?;
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(mut descriptors) = message {
            let got: Option<OwnedFd> = descriptors.next();
            return got.map(Socket::from).ok_or(ErrorKind::InvalidData.into());
        }
    }
    Err(ErrorKind::InvalidData.into())
}

/// Makes a socket, and gives it to whoever is at the other end of stdin.
pub fn give(to: SocketAddr) -> io::Result<()> {
    let socket = stream(to, Protocol::TCP)?;
    let descriptors = [socket.as_fd()];
    let mut space = [std::mem::MaybeUninit::uninit(); 64];
    let mut control = SendAncillaryBuffer::new(&mut space);
    control.push(SendAncillaryMessage::ScmRights(&descriptors));
    let bytes = [IoSlice::new(b"x")];
    sendmsg(io::stdin(), &bytes, &mut control, SendFlags::empty())?;
    Ok(())
}

/// A line there and back, the true peer, and an end in order.
fn talk(socket: Socket, to: SocketAddr) -> io::Result<()> {
    let mut stream = TcpStream::from(socket);
    stream.set_nonblocking(false)?;
    stream.write_all(LINE)?;
    answered(&mut stream, to)
}

fn answered(stream: &mut TcpStream, to: SocketAddr) -> io::Result<()> {
    let mut answer = vec![0; LINE.len()];
    stream.read_exact(&mut answer)?;
    // Earlier a fast open may be under way still, later the socket has no peer any more.
    let peer = stream.peer_addr()?;
    if (peer.ip(), peer.port()) != (to.ip(), to.port()) {
        return Err(io::Error::other(format!("getpeername says {peer}")));
    }
    stream.shutdown(std::net::Shutdown::Write)?;
    stream.read_to_end(&mut answer)?;
    if answer == LINE {
        Ok(())
    } else {
        Err(io::Error::other(format!(
            "{} bytes came back",
            answer.len()
        )))
    }
}

/// The crate keeps its descriptor to itself: the true peer is what the agent logs.
fn over_io_uring(to: SocketAddr) -> io::Result<()> {
    tokio_uring::start(async move {
        let stream = tokio_uring::net::TcpStream::connect(to).await?;
        let (written, _) = stream.write_all(LINE.to_vec()).await;
        written?;
        stream.shutdown(std::net::Shutdown::Write)?;
        let mut answer = Vec::new();
        loop {
            let (read, buffer) = stream.read(vec![0; 64]).await;
            match read? {
                0 => break,
                count => answer.extend_from_slice(&buffer[..count]),
            }
        }
        if answer == LINE {
            Ok(())
        } else {
            Err(io::Error::other(format!(
                "{} bytes came back",
                answer.len()
            )))
        }
    })
}

/// Several at a time, each closed before its successor. Those that are not done within the minute are wrong.
fn many(options: &ConnectOptions, report: &mut ConnectReport) -> io::Result<()> {
    let start = Instant::now();
    let share = options.attempts.div_ceil(AT_A_TIME);
    let workers: Vec<_> = (0..AT_A_TIME)
        .map(|index| {
            let count = share.min(options.attempts.saturating_sub(index * share));
            let options = options.clone();
            std::thread::spawn(move || {
                let mut own = ConnectReport::default();
                for _ in 0..count {
                    let outcome = once(Kind::Many, &options);
                    let late = outcome.is_ok() && start.elapsed() > MINUTE;
                    let outcome = if late {
                        Err(ErrorKind::TimedOut.into())
                    } else {
                        outcome
                    };
                    own.add(outcome, Expected::Captured);
                }
                own
            })
        })
        .collect();
    for worker in workers {
        let own = worker.join().map_err(|_| ErrorKind::Other)?;
        report.attempts += own.attempts;
        report.right += own.right;
        report.refused += own.refused;
        own.errors.into_iter().for_each(|error| report.note(error));
    }
    Ok(())
}

/// All open before the first is asked to answer a second time. Each has its first answer before the next is
/// opened: connect(2) of a captured one returns when the agent has it, which is before the server has it, and
/// nobody's queue is to be tried here.
fn concurrent(options: &ConnectOptions, report: &mut ConnectReport, expected: Expected) {
    let mut open = Vec::new();
    for _ in 0..options.attempts {
        let made = (|| -> io::Result<TcpStream> {
            let socket = stream(options.to, Protocol::TCP)?;
            socket.connect(&options.to.into())?;
            let mut stream = TcpStream::from(socket);
            stream.write_all(b"under")?;
            let mut first = [0; 5];
            stream.read_exact(&mut first)?;
            match &first {
                b"under" => Ok(stream),
                _ => Err(io::Error::other("wrong bytes")),
            }
        })();
        match made {
            Ok(stream) => open.push(stream),
            Err(error) => report.add(Err(error), expected),
        }
    }
    for stream in &mut open {
        let outcome = (|| -> io::Result<()> {
            stream.write_all(b"mesh\n")?;
            stream.shutdown(std::net::Shutdown::Write)?;
            let mut rest = Vec::new();
            stream.read_to_end(&mut rest)?;
            if rest == b"mesh\n" {
                Ok(())
            } else {
                Err(io::Error::other("wrong bytes"))
            }
        })();
        report.add(outcome, expected);
    }
}
