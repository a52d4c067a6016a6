//! Every number of the wire, in one place.

use std::time::Duration;

use super::room::Room;

/// Receive window of one stream.
///
/// Together with [`MAX_STREAMS`] it decides whether a stalled stream can stop its neighbours:
/// ztunnel's 4 MiB in a connection window of 16 MiB means that four unread streams freeze a tunnel.
/// Here all streams together fit: 2 MiB × 128 = 256 MiB.
///
/// Room is given back by halves, and only for frames that were written on. Of 512 KiB, two of the
/// largest frames, each side stood still while the other worked, and the longer the busier the node: one stream carried
/// half as much again with 2 MiB, and a fifth more with 1 MiB. A reader that stands still holds as much, in
/// its agent, as the kernel lets its socket hold in either direction (`tcp_rmem`, `tcp_wmem`: 4 to 6 MiB).
pub(super) const STREAM_WINDOW: u32 = 2 * 1024 * 1024;

/// The same while the agent is short of memory: a frame of a careful peer, and no more.
pub(super) const SHORT_WINDOW: u32 = 64 * 1024;

/// Streams that a peer may have open in one tunnel. ztunnel's client uses 100.
pub(super) const MAX_STREAMS: u32 = 128;

/// Receive window of a tunnel: no smaller than all its streams' windows.
pub(super) const TUNNEL_WINDOW: u32 = STREAM_WINDOW * MAX_STREAMS;

/// Largest DATA frame received. Every frame is handed from one task to another, and that costs more than
/// moving 64 KiB; larger ones than this delay the neighbours' frames for little gain.
pub(super) const MAX_FRAME: u32 = 256 * 1024;

/// Largest chunk sent: with the head of its frame (RFC 9113 section 4.1, 9 bytes) it fills 16
/// records of TLS. Ten bytes more would be another record, and another write.
pub const MAX_CHUNK: usize = 16 * TLS_RECORD - 9;

/// What one record of TLS carries at most (RFC 8446 section 5.1).
pub(super) const TLS_RECORD: usize = 16 * 1024;

/// Bytes of one stream that wait in this process for the socket: h2 gives no capacity beyond it.
pub(super) const SEND_BUFFER: usize = 512 * 1024;

/// Ciphertext that waits for the socket: room for one chunk, so that it goes out in one write.
pub(super) const TLS_BUFFER: usize = 16 * TLS_RECORD;

/// Header list of a request, as ztunnel announces it.
pub(super) const SERVER_HEADER_LIST: u32 = 64 * 1024;

/// Header list of an answer, as ztunnel announces it.
pub(super) const CLIENT_HEADER_LIST: u32 = 16 * 1024;

/// Streams reset by the peer before they were accepted (rapid reset): beyond it, GOAWAY.
const PENDING_ACCEPT_RESETS: usize = 20;

/// Streams that we reset and still remember, and for how long, so that what was in flight is
/// ignored and not charged as the peer's error. h2 remembers 50 for 1 s, which a tunnel full of
/// aborted downloads over a slow link overruns.
const REMEMBERED_RESETS: usize = 512;
const REMEMBERED_FOR: Duration = Duration::from_secs(10);

/// Resets forced on us by a peer's malformed or surplus streams in a tunnel's life: beyond it,
/// GOAWAY with ENHANCE_YOUR_CALM.
const LOCAL_ERROR_RESETS: usize = 1024;

/// Bookkeeping that unread small DATA frames may cost, in bytes, 256 a frame: half the window.
/// Beyond it (520,000 unread one-byte frames), GOAWAY with ENHANCE_YOUR_CALM. Empty frames
/// (100 in a row) and CONTINUATION (as many as the header list needs) have h2's own limits.
const SMALL_FRAMES: usize = (TUNNEL_WINDOW / 2) as usize;

/// Bounds of tunnels in time, and in what streams hold. The defaults are ztunnel's where it has one.
#[derive(Debug, Clone)]
pub struct Limits {
    /// For the TCP connection. The dialler may have a shorter bound of its own. Default 10 s.
    pub dial: Duration,
    /// For TLS and the HTTP/2 preface. Default 5 s.
    pub handshake: Duration,
    /// For the answer to CONNECT, which includes the peer's dial of its app. Default 10 s.
    pub answer: Duration,
    /// A reused tunnel that gives no sign of life for this long after a CONNECT is asked for one
    /// by PING. Default 200 ms.
    pub nudge: Duration,
    /// … and is given up for new streams if none comes within this time. Default 500 ms; so that
    /// a caller who allows a second still gets a fresh tunnel.
    pub silence: Duration,
    /// PING when nothing was received for this long. Default 10 s.
    pub ping_interval: Duration,
    /// The tunnel is dead if then nothing comes for this long. Default 20 s.
    pub ping_timeout: Duration,
    /// A server closes a tunnel that had no stream for this long, or up to twice as long. Default
    /// 10 min, so that the client, which knows more, is first.
    pub server_idle: Duration,
    /// Streams that are open at a drain may go on for this long. Default 30 s.
    pub drain: Duration,
    /// What streams may hold unread. Default that of the process.
    pub room: Room,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            dial: Duration::from_secs(10),
            handshake: Duration::from_secs(5),
            answer: Duration::from_secs(10),
            nudge: Duration::from_millis(200),
            silence: Duration::from_millis(500),
            ping_interval: Duration::from_secs(10),
            ping_timeout: Duration::from_secs(20),
            server_idle: Duration::from_secs(600),
            drain: Duration::from_secs(30),
            room: Room::default(),
        }
    }
}

pub(super) fn client() -> h2::client::Builder {
    let mut builder = h2::client::Builder::new();
    builder
        .initial_window_size(STREAM_WINDOW)
        .initial_connection_window_size(TUNNEL_WINDOW)
        .max_frame_size(MAX_FRAME)
        .max_header_list_size(CLIENT_HEADER_LIST)
        .max_send_buffer_size(SEND_BUFFER)
        .max_concurrent_reset_streams(REMEMBERED_RESETS)
        .reset_stream_duration(REMEMBERED_FOR)
        .max_pending_accept_reset_streams(PENDING_ACCEPT_RESETS)
        .max_local_error_reset_streams(Some(LOCAL_ERROR_RESETS))
        .data_frame_budget(SMALL_FRAMES)
        .enable_push(false);
    builder
}

pub(super) fn server() -> h2::server::Builder {
    let mut builder = h2::server::Builder::new();
    builder
        .initial_window_size(STREAM_WINDOW)
        .initial_connection_window_size(TUNNEL_WINDOW)
        .max_concurrent_streams(MAX_STREAMS)
        .max_frame_size(MAX_FRAME)
        .max_header_list_size(SERVER_HEADER_LIST)
        .max_send_buffer_size(SEND_BUFFER)
        .max_concurrent_reset_streams(REMEMBERED_RESETS)
        .reset_stream_duration(REMEMBERED_FOR)
        .max_pending_accept_reset_streams(PENDING_ACCEPT_RESETS)
        .max_local_error_reset_streams(Some(LOCAL_ERROR_RESETS))
        .data_frame_budget(SMALL_FRAMES);
    builder
}

const _: () = assert!(MAX_CHUNK <= MAX_FRAME as usize);
// A stalled stream cannot take what its neighbours need.
const _: () = assert!(STREAM_WINDOW as u64 * MAX_STREAMS as u64 <= TUNNEL_WINDOW as u64);
