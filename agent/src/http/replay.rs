//! A request's body that can be sent more than once.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, Waker, ready};

use bytes::Bytes;
use http::HeaderMap;
use hyper::body::Incoming;
use hyper::body::{Body, Frame, SizeHint};
use parking_lot::Mutex;

use super::body::BodyError;
use crate::fairness::Reserved;
use crate::resilience::retry;

/// A request's body: what has been taken from the client is kept, up to a bound, so that each
/// attempt sends it from its first byte. Beyond the bound it streams on, and cannot be repeated.
///
/// The client's bytes are taken only as the attempt's connection takes them, so a slow upstream
/// stalls the client and costs no more than the bound.
pub struct Replay {
    shared: Option<Arc<Shared>>,
}

/// The body of one attempt.
pub struct ReplayBody {
    shared: Option<Arc<Shared>>,
    attempt: u64,
    /// Kept chunks that this attempt has sent.
    next: usize,
    progress: Sending,
    gate: Option<Arc<Gate>>,
}

struct Shared {
    size: SizeHint,
    kept: Mutex<Kept>,
    /// Number of the last attempt that has sent all it will send.
    over: AtomicU64,
}

/// Tells when an attempt's body is over, without holding it.
pub(super) struct Tail {
    shared: Arc<Shared>,
    attempt: u64,
}

impl Tail {
    /// Whether it was sent to its end, or given up.
    pub(super) fn is_over(&self) -> bool {
        self.shared.over.load(Ordering::Acquire) >= self.attempt
    }
}

struct Kept {
    /// The client; none where all was kept already.
    source: Option<Incoming>,
    /// Bytes taken from it.
    taken: u64,
    chunks: Vec<Bytes>,
    trailers: Option<HeaderMap>,
    /// How many bytes more may be kept; none once something was given up.
    room: Option<usize>,
    /// What the chunks may take of their pod's memory. Copies have their chunks in common.
    reserved: Option<Arc<Reserved>>,
    /// Kept chunks that the last attempt has sent.
    sent: usize,
    progress: Progress,
    /// Number of the attempt that may take from the client.
    attempt: u64,
    /// Whoever waits for the client, to be told that it was superseded.
    waiter: Option<Waker>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Sending {
    NotBegun,
    Begun,
    Ended,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Progress {
    Streaming,
    Whole,
    Broken,
}

/// Holds a body back until the upstream asks for it: `Expect: 100-continue` (RFC 9110 §10.1.1).
#[derive(Default)]
pub(super) struct Gate {
    state: Mutex<(bool, Option<Waker>)>,
}

impl Gate {
    pub(super) fn open(&self) {
        let mut state = self.state.lock();
        state.0 = true;
        if let Some(waker) = state.1.take() {
            waker.wake();
        }
    }

    fn poll_open(&self, cx: &mut Context<'_>) -> Poll<()> {
        let mut state = self.state.lock();
        if state.0 {
            return Poll::Ready(());
        }
        state.1 = Some(cx.waker().clone());
        Poll::Pending
    }
}

impl Replay {
    /// Keeps at most so many bytes of the body. Costs nothing for a request without one.
    #[must_use]
    pub fn new(body: Incoming, replay_bytes: usize) -> Self {
        Self::keeping(body, replay_bytes, None)
    }

    /// Keeps as much as was reserved, which is given back once nothing is kept any more. Without a
    /// reservation nothing is.
    #[must_use]
    pub fn within(body: Incoming, reserved: Option<Reserved>) -> Self {
        let room = reserved.as_ref().map_or(0, Reserved::bytes);
        Self::keeping(body, room, reserved)
    }

    fn keeping(body: Incoming, room: usize, reserved: Option<Reserved>) -> Self {
        if body.is_end_stream() {
            return Self { shared: None };
        }
        Self {
            shared: Some(Arc::new(Shared {
                size: body.size_hint(),
                kept: Mutex::new(Kept {
                    source: Some(body),
                    taken: 0,
                    chunks: Vec::new(),
                    trailers: None,
                    room: Some(room),
                    reserved: reserved.map(Arc::new),
                    sent: 0,
                    progress: Progress::Streaming,
                    attempt: 0,
                    waiter: None,
                }),
                over: AtomicU64::new(0),
            })),
        }
    }

    /// No body.
    #[must_use]
    pub fn empty() -> Self {
        Self { shared: None }
    }

    /// What it is as far as sending it again goes: `Buffered` as long as everything that was taken
    /// from the client is still kept, whether or not the client has more to say.
    #[must_use]
    pub fn nature(&self) -> retry::Body {
        match &self.shared {
            None => retry::Body::None,
            Some(shared) if shared.kept.lock().room.is_some() => retry::Body::Buffered,
            Some(_) => retry::Body::Streaming,
        }
    }

    /// Whether the client's end of the body was seen, so that an attempt needs nothing more of it.
    #[must_use]
    pub fn is_whole(&self) -> bool {
        self.shared
            .as_ref()
            .is_none_or(|shared| shared.kept.lock().progress == Progress::Whole)
    }

    /// Whether the client broke the body off: no attempt can succeed any more.
    #[must_use]
    pub fn is_broken(&self) -> bool {
        self.shared
            .as_ref()
            .is_some_and(|shared| shared.kept.lock().progress == Progress::Broken)
    }

    /// Bytes that were taken from the client so far.
    #[must_use]
    pub fn taken(&self) -> u64 {
        self.shared
            .as_ref()
            .map_or(0, |shared| shared.kept.lock().taken)
    }

    /// The same body for another request, which takes nothing from this one. None unless all of it is
    /// kept.
    #[must_use]
    pub fn copy(&self) -> Option<Self> {
        let Some(shared) = &self.shared else {
            return Some(Self::empty());
        };
        let kept = shared.kept.lock();
        if kept.progress != Progress::Whole || kept.room.is_none() {
            return None;
        }
        let copy = Kept {
            source: None,
            taken: kept.taken,
            chunks: kept.chunks.clone(),
            trailers: kept.trailers.clone(),
            room: kept.room,
            reserved: kept.reserved.clone(),
            sent: 0,
            progress: Progress::Whole,
            attempt: 0,
            waiter: None,
        };
        Some(Self {
            shared: Some(Arc::new(Shared {
                size: SizeHint::with_exact(copy.chunks.iter().map(|one| one.len() as u64).sum()),
                kept: Mutex::new(copy),
                over: AtomicU64::new(0),
            })),
        })
    }

    /// The last attempt was answered for good: what it has sent need not be kept any longer.
    pub fn settle(&self) {
        if let Some(shared) = &self.shared {
            let mut kept = shared.kept.lock();
            kept.room = kept.room.map(|_| 0);
            if kept.sent >= kept.chunks.len() {
                kept.forget();
            }
        }
    }

    /// The body for the next attempt, from its first byte. An earlier attempt's gets no more of it.
    #[must_use]
    pub fn attempt(&self) -> ReplayBody {
        let attempt = self.shared.as_ref().map_or(0, |shared| {
            let mut kept = shared.kept.lock();
            kept.attempt += 1;
            kept.sent = 0;
            if let Some(waker) = kept.waiter.take() {
                waker.wake();
            }
            kept.attempt
        });
        ReplayBody {
            shared: self.shared.clone(),
            attempt,
            next: 0,
            progress: match self.shared {
                None => Sending::Ended,
                Some(_) => Sending::NotBegun,
            },
            gate: None,
        }
    }
}

impl ReplayBody {
    /// No body.
    #[must_use]
    pub fn empty() -> Self {
        Replay::empty().attempt()
    }

    /// None for a body that is at its end from the start.
    pub(super) fn tail(&self) -> Option<Tail> {
        self.shared.clone().map(|shared| Tail {
            shared,
            attempt: self.attempt,
        })
    }

    fn end(&mut self) {
        self.progress = Sending::Ended;
        if let Some(shared) = &self.shared {
            shared.over.fetch_max(self.attempt, Ordering::Release);
        }
    }

    /// Holds it back until the gate opens.
    pub(super) fn behind(&mut self, gate: Arc<Gate>) {
        self.gate = Some(gate);
    }
}

impl Kept {
    /// The frame after `next` kept chunks.
    fn poll_frame(
        &mut self,
        cx: &mut Context<'_>,
        next: &mut usize,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        if let Some(chunk) = self.chunks.get(*next) {
            *next += 1;
            self.sent = *next;
            return Poll::Ready(Some(Ok(Frame::data(chunk.clone()))));
        }
        match self.progress {
            Progress::Whole => {
                let trailers = self.trailers.clone();
                return Poll::Ready(trailers.map(|trailers| Ok(Frame::trailers(trailers))));
            }
            Progress::Broken => return Poll::Ready(Some(Err(BodyError::NotKept))),
            Progress::Streaming => {}
        }
        let Some(source) = &mut self.source else {
            return Poll::Ready(None);
        };
        let Poll::Ready(taken) = Pin::new(&mut *source).poll_frame(cx) else {
            self.waiter = Some(cx.waker().clone());
            return Poll::Pending;
        };
        let spent = source.is_end_stream();
        match &taken {
            None => self.progress = Progress::Whole,
            Some(Err(_)) => self.progress = Progress::Broken,
            Some(Ok(frame)) => {
                if let Some(data) = frame.data_ref() {
                    self.keep(data);
                    *next = self.chunks.len();
                    self.sent = *next;
                } else if let Some(trailers) = frame.trailers_ref() {
                    self.trailers = Some(trailers.clone());
                }
                if frame.is_trailers() || spent {
                    self.progress = Progress::Whole;
                }
            }
        }
        Poll::Ready(taken.map(|frame| frame.map_err(BodyError::Downstream)))
    }

    /// Whether nothing comes after `next` kept chunks.
    fn is_spent(&self, next: usize) -> bool {
        self.progress == Progress::Whole && self.trailers.is_none() && next >= self.chunks.len()
    }

    fn keep(&mut self, data: &Bytes) {
        self.taken += data.len() as u64;
        match self.room.and_then(|room| room.checked_sub(data.len())) {
            Some(room) => {
                self.room = Some(room);
                self.chunks.push(data.clone());
            }
            None => {
                self.room = None;
                self.forget();
            }
        }
    }

    fn forget(&mut self) {
        self.chunks = Vec::new();
        self.reserved = None;
    }
}

impl Drop for ReplayBody {
    fn drop(&mut self) {
        self.end();
    }
}

impl Body for ReplayBody {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let this = self.get_mut();
        if let Some(gate) = &this.gate {
            ready!(gate.poll_open(cx));
            this.gate = None;
        }
        if this.progress == Sending::Ended {
            return Poll::Ready(None);
        }
        let Some(shared) = &this.shared else {
            return Poll::Ready(None);
        };
        let mut kept = shared.kept.lock();
        if kept.attempt != this.attempt {
            return Poll::Ready(Some(Err(BodyError::Superseded)));
        }
        // An attempt that begins after a part was given up has no beginning to send.
        if this.progress == Sending::NotBegun && kept.room.is_none() {
            return Poll::Ready(Some(Err(BodyError::NotKept)));
        }
        this.progress = Sending::Begun;
        let frame = ready!(kept.poll_frame(cx, &mut this.next));
        let ended = match &frame {
            None | Some(Err(_)) => true,
            Some(Ok(frame)) => frame.is_trailers() || kept.is_spent(this.next),
        };
        drop(kept);
        if ended {
            this.end();
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.progress == Sending::Ended
    }

    fn size_hint(&self) -> SizeHint {
        match &self.shared {
            None => SizeHint::with_exact(0),
            Some(shared) => shared.size,
        }
    }
}
