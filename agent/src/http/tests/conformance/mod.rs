//! What RFC 9112, RFC 9113 and RFC 7541 demand of those who speak them, case by case: the cases of
//! h2spec for HTTP/2, and those of their like for HTTP/1.1.
//!
//! A case says what the RFC demands. Where our libraries answer otherwise the case says that too
//! (`instead`), and `docs/requests.md` gives the reason; a change of either fails the test.

mod frames;
mod hpack;
mod http1;
mod messages;
mod upstreams;
mod windows;

use super::http2::answering;
use super::raw;
use super::*;

/// Error codes (RFC 9113 §7).
const PROTOCOL_ERROR: u32 = 1;
const FLOW_CONTROL_ERROR: u32 = 3;
const STREAM_CLOSED: u32 = 5;
const FRAME_SIZE_ERROR: u32 = 6;
const REFUSED_STREAM: u32 = 7;
const CANCEL: u32 = 8;
const COMPRESSION_ERROR: u32 = 9;

/// What a client sees of what it sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Seen {
    /// The connection ended with GOAWAY and this code.
    Connection(u32),
    /// A stream was reset with this code, and the connection goes on.
    Stream(u32),
    /// Stream 1 was answered with this status, and the connection goes on.
    Answered(u16),
    /// Nothing, and the connection goes on.
    Ignored,
    /// The connection ended without a word.
    Closed,
}

use Seen::{Answered, Connection, Ignored, Stream};

/// One thing that a client does.
struct Case {
    /// Of RFC 9113, unless it says another.
    section: &'static str,
    what: &'static str,
    steps: Vec<Step>,
    /// What the RFC demands.
    demanded: Seen,
    /// What comes instead.
    instead: Option<Seen>,
}

enum Step {
    Send(Vec<u8>),
    /// Waits for the end of the answer on stream 1.
    Answer,
}

fn case(section: &'static str, what: &'static str, frames: Vec<u8>, demanded: Seen) -> Case {
    Case {
        section,
        what,
        steps: vec![Step::Send(frames)],
        demanded,
        instead: None,
    }
}

impl Case {
    /// After the answer to what it has sent so far it sends more.
    fn then(mut self, frames: Vec<u8>) -> Self {
        self.steps.push(Step::Answer);
        self.steps.push(Step::Send(frames));
        self
    }

    /// A known deviation.
    fn instead(mut self, seen: Seen) -> Self {
        self.instead = Some(seen);
        self
    }
}

/// One after the other.
fn all(frames: &[Vec<u8>]) -> Vec<u8> {
    frames.concat()
}

/// A block of a request without a body, whole.
fn request(stream: u32) -> Vec<u8> {
    let flags = raw::END_STREAM | raw::END_HEADERS;
    raw::frame(raw::HEADERS, flags, stream, &raw::request())
}

/// A request whose body is to come.
fn open(stream: u32) -> Vec<u8> {
    raw::frame(raw::HEADERS, raw::END_HEADERS, stream, &raw::request())
}

/// A request without a body, with this block.
fn of_block(block: &[u8]) -> Vec<u8> {
    let flags = raw::END_STREAM | raw::END_HEADERS;
    raw::frame(raw::HEADERS, flags, 1, block)
}

fn data(stream: u32, flags: u8, payload: &[u8]) -> Vec<u8> {
    raw::frame(raw::DATA, flags, stream, payload)
}

fn reset(stream: u32) -> Vec<u8> {
    raw::frame(raw::RST_STREAM, 0, stream, &CANCEL.to_be_bytes())
}

fn settings(pairs: &[(u16, u32)]) -> Vec<u8> {
    let mut payload = Vec::new();
    for (id, value) in pairs {
        payload.extend(id.to_be_bytes());
        payload.extend(value.to_be_bytes());
    }
    raw::frame(raw::SETTINGS, 0, 0, &payload)
}

fn window_update(stream: u32, increment: u32) -> Vec<u8> {
    raw::frame(raw::WINDOW_UPDATE, 0, stream, &increment.to_be_bytes())
}

/// A client that writes frames by hand.
struct Peer {
    stream: TcpStream,
}

impl Peer {
    /// After both prefaces; ours begins with SETTINGS (RFC 9113 §3.4).
    async fn connect(proxy: &Proxy) -> Self {
        let mut stream = proxy.connect().await;
        stream.write_all(raw::PREFACE).await.unwrap();
        let (kind, id, _) = raw::read(&mut stream).await.unwrap();
        assert_eq!((kind, id), (raw::SETTINGS, 0), "the server's preface");
        let mut peer = Self { stream };
        peer.send(&raw::frame(raw::SETTINGS, raw::ACK, 0, b""))
            .await;
        peer
    }

    /// A server that answers errors does not wait for the rest of what it is sent.
    async fn send(&mut self, frames: &[u8]) {
        let _ = self.stream.write_all(frames).await;
    }

    /// The next frame of these kinds.
    async fn next(&mut self, kinds: &[u8]) -> Option<(u8, u32, Vec<u8>)> {
        loop {
            let frame = raw::read(&mut self.stream).await?;
            if kinds.contains(&frame.0) {
                return Some(frame);
            }
        }
    }

    /// Until the answer on stream 1 has ended.
    async fn answered(&mut self) {
        loop {
            let (kind, flags, id, _) = raw::read_flags(&mut self.stream).await.unwrap();
            let ends = matches!(kind, raw::DATA | raw::HEADERS) && flags & raw::END_STREAM != 0;
            if ends && id == 1 {
                return;
            }
        }
    }

    /// What came of all that was sent. A further request tells whether the connection goes on.
    async fn outcome(mut self, expected: Seen) -> Seen {
        const PROBE: u32 = 99;
        self.send(&request(PROBE)).await;
        let mut answered = None;
        let mut goes_on = false;
        while let Some((kind, id, payload)) = raw::read(&mut self.stream).await {
            match kind {
                raw::GOAWAY => {
                    let code = u32::from_be_bytes(payload[4..8].try_into().unwrap());
                    // And then the connection ends (RFC 9113 §5.4.1).
                    while raw::read(&mut self.stream).await.is_some() {}
                    return Connection(code);
                }
                raw::RST_STREAM if id != PROBE => {
                    return Stream(u32::from_be_bytes(payload.try_into().unwrap()));
                }
                raw::HEADERS if id == PROBE => goes_on = true,
                raw::HEADERS if answered.is_none() => answered = Some(raw::status(&payload)),
                _ => {}
            }
            match (answered, expected) {
                (Some(status), Answered(_)) if goes_on => return Answered(status),
                (_, Answered(_) | Stream(_)) => {}
                _ if goes_on => return Ignored,
                _ => {}
            }
        }
        Seen::Closed
    }
}

/// Runs every case against a connection of its own, and tells of all that fail.
async fn hold(cases: Vec<Case>) {
    let upstream = answering(b"ok").await;
    let proxy = Proxy::to(upstream.address, Wire::Http2).await;
    let mut wrong = Vec::new();
    for case in cases {
        let expected = case.instead.unwrap_or(case.demanded);
        let mut peer = Peer::connect(&proxy).await;
        for step in &case.steps {
            match step {
                Step::Send(frames) => peer.send(frames).await,
                Step::Answer => peer.answered().await,
            }
        }
        let outcome = timeout(FAR / 4, peer.outcome(expected)).await;
        if outcome != Ok(expected) {
            wrong.push(format!(
                "{} {}: {:?} demanded, {expected:?} expected, {outcome:?} seen",
                case.section, case.what, case.demanded
            ));
        }
        assert_ne!(
            Some(case.demanded),
            case.instead,
            "{}: no deviation",
            case.what
        );
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
