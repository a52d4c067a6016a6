//! Messages with descriptors: JSON behind its length, on a unix stream. The descriptors of a message
//! are sent with its first byte, and so arrive with it (unix(7), `SCM_RIGHTS`).

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use serde::Serialize;
use serde::de::DeserializeOwned;
use socket2::{Domain, SockAddr, Socket, Type};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, Interest};
use tokio::net::{UnixListener, UnixStream};
use tokio::time::{Instant, sleep, timeout};

use super::{ANSWER, BATCH, HandoverError};

/// Longest message in bytes. The identities of 4,096 pods take less; more is refused.
const MESSAGE: usize = 512 * 1024;
/// Successors that wait for an answer; a further one is told that the agent is busy.
const BACKLOG: i32 = 16;
const ROOT: u32 = 0;
/// Between two tries to connect to an agent whose queue is full.
const RETRY: Duration = Duration::from_millis(50);

/// Where successors are waited for.
pub(super) struct Door(UnixListener);

impl Door {
    /// Binds; nothing may be at the path.
    pub fn open(path: &Path) -> io::Result<Self> {
        let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
        socket.bind(&SockAddr::unix(path)?)?;
        socket.set_nonblocking(true)?;
        socket.listen(BACKLOG)?;
        let listener = OwnedFd::from(socket).into();
        Ok(Self(UnixListener::from_std(listener)?))
    }

    /// The next successor.
    pub async fn accept(&self) -> io::Result<Channel> {
        let (stream, _) = self.0.accept().await?;
        Ok(Channel(stream))
    }
}

/// One side of a hand-over. After an error it is of no more use.
pub(super) struct Channel(UnixStream);

impl Channel {
    /// Connects to a running agent. One whose queue is full answers later, if at all: it is asked
    /// until `limit`, and the error is of kind [`WouldBlock`](io::ErrorKind::WouldBlock) then.
    pub async fn connect(path: &Path, limit: Duration) -> io::Result<Self> {
        let deadline = Instant::now() + limit;
        loop {
            match Self::try_connect(path).await {
                Err(error) if is_busy(&error) && Instant::now() < deadline => sleep(RETRY).await,
                result => return result,
            }
        }
    }

    /// The same, once.
    pub async fn try_connect(path: &Path) -> io::Result<Self> {
        Ok(Self(UnixStream::connect(path).await?))
    }

    #[cfg(test)]
    pub fn pair() -> io::Result<(Self, Self)> {
        let (one, other) = UnixStream::pair()?;
        Ok((Self(one), Self(other)))
    }

    /// An error unless the kernel says that the other process was root's when it connected or
    /// began to listen.
    pub fn check_peer(&self) -> Result<(), HandoverError> {
        match self.0.peer_cred()?.uid() {
            ROOT => Ok(()),
            uid => Err(HandoverError::NotRoot(uid)),
        }
    }

    /// Sends a message, with at most [`BATCH`] descriptors.
    pub async fn send(
        &mut self,
        message: &impl Serialize,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<(), HandoverError> {
        let text = serde_json::to_vec(message).map_err(|error| protocol(&error))?;
        let length = u32::try_from(text.len()).unwrap_or(u32::MAX);
        if text.len() > MESSAGE {
            return Err(too_long(length));
        }
        let mut frame = length.to_be_bytes().to_vec();
        frame.extend(text);
        let send = async {
            let begin = || begin(&self.0, &frame, descriptors);
            let sent = self.0.async_io(Interest::WRITABLE, begin).await?;
            self.0.write_all(&frame[sent..]).await
        };
        ended(timeout(ANSWER, send).await)
    }

    /// The next message and its descriptors, all of them close-on-exec.
    pub async fn receive<T: DeserializeOwned>(
        &mut self,
        limit: Duration,
    ) -> Result<(T, Vec<OwnedFd>), HandoverError> {
        let mut descriptors = Vec::new();
        let receive = async {
            let mut length = [0; 4];
            let mut known = 0;
            while known < length.len() {
                let take = || take(&self.0, &mut length[known..]);
                let (taken, came) = self.0.async_io(Interest::READABLE, take).await?;
                if taken == 0 {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
                known += taken;
                descriptors.extend(came);
            }
            let length = u32::from_be_bytes(length);
            match usize::try_from(length) {
                Ok(bytes) if bytes <= MESSAGE => {
                    let mut text = vec![0; bytes];
                    self.0.read_exact(&mut text).await?;
                    Ok(Ok(text))
                }
                _ => Ok(Err(too_long(length))),
            }
        };
        let text = ended(timeout(limit, receive).await)??;
        let message = serde_json::from_slice(&text).map_err(|error| protocol(&error))?;
        Ok((message, descriptors))
    }
}

/// Sends what there is room for of a message, and its descriptors with that.
fn begin(socket: &UnixStream, frame: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(BATCH))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() && !control.push(SendAncillaryMessage::ScmRights(descriptors)) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let data = [IoSlice::new(frame)];
    let flags = SendFlags::NOSIGNAL;
    Ok(sendmsg(socket.as_fd(), &data, &mut control, flags)?)
}

/// Receives some bytes, and the descriptors that came with them.
fn take(socket: &UnixStream, bytes: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>)> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(BATCH))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut data = [IoSliceMut::new(bytes)];
    let flags = RecvFlags::CMSG_CLOEXEC;
    let received = recvmsg(socket.as_fd(), &mut data, &mut control, flags)?;
    let mut descriptors = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            descriptors.extend(rights);
        }
    }
    if received.flags.contains(ReturnFlags::CTRUNC) {
        let missing = "descriptors are missing: too many are open here, or too many came";
        return Err(io::Error::other(missing));
    }
    Ok((received.bytes, descriptors))
}

/// Whether an agent is there, and its queue is full (unix(7), EAGAIN).
pub(super) fn is_busy(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::WouldBlock
}

/// Whether no process listens at the path.
pub(super) fn is_nobody(error: &io::Error) -> bool {
    use io::ErrorKind as K;
    matches!(error.kind(), K::NotFound | K::ConnectionRefused)
}

fn ended<T, E>(outcome: Result<io::Result<T>, E>) -> Result<T, HandoverError> {
    use io::ErrorKind as K;
    match outcome {
        Err(_) => Err(HandoverError::Late),
        Ok(Ok(value)) => Ok(value),
        Ok(Err(error)) => Err(match error.kind() {
            K::BrokenPipe | K::ConnectionReset | K::NotConnected | K::UnexpectedEof => {
                HandoverError::Gone
            }
            _ => error.into(),
        }),
    }
}

fn too_long(length: u32) -> HandoverError {
    HandoverError::Protocol(format!("{length} bytes, more than {MESSAGE}"))
}

fn protocol(error: &serde_json::Error) -> HandoverError {
    HandoverError::Protocol(error.to_string())
}
