//! The answer on its way to the client, and who hears of its end.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use bytes::Bytes;
use http::Response;
use hyper::body::{Body, Frame, SizeHint};
use tokio::time::{Instant, Sleep, sleep_until};

use super::admit::Admission;
use super::attempt::Answered;
use super::leg::Leg;
use super::request::{Kind, Outgoing};
use super::route::Routed;
use super::verdict::{grpc_status, of_grpc_trailers};
use super::{Client, Network};
use crate::http::{BodyError, ProxyBody, Replay, UpstreamBody, to_downstream};
use crate::outbound::clock::Clock;
use crate::outbound::destinations::EndpointId;
use crate::resilience::destination::Attempt;
use crate::resilience::limit::Slot;
use crate::resilience::{Failure, Outcome, Timestamp};
use crate::telemetry::{RequestEnd, RequestRecord, ResponseFlag};

/// A probe's answer that goes well for so long decides: its stream may go on for hours, and a
/// breaker must not wait for it.
const PROBE_DECIDES_AFTER: Duration = Duration::from_secs(1);

/// Frames of an answer that nobody wants which are read if they are there, so that its connection
/// can be used again.
const DISCARDED_FRAMES: usize = 16;

/// Who hears how a request ended: the endpoint's ejection and balance, and the breaker. Dropped, it
/// is no verdict, and everything that it holds is free again.
pub(super) struct Judges {
    pub(super) leg: Arc<Leg>,
    admission: Admission,
    attempt: Option<Attempt<EndpointId>>,
}

impl Judges {
    pub(super) fn new(
        leg: Arc<Leg>,
        admission: Admission,
        attempt: Option<Attempt<EndpointId>>,
    ) -> Self {
        Self {
            leg,
            admission,
            attempt,
        }
    }

    /// Whether somebody waits for this request in particular.
    fn is_probe(&self) -> bool {
        self.admission.is_probe() || self.attempt.as_ref().is_some_and(Attempt::is_probe)
    }

    /// Tells them how it goes, while it goes on.
    fn settle(&mut self, outcome: Outcome, now: Timestamp) {
        self.admission.settle(outcome, now);
        if let Some(attempt) = &mut self.attempt {
            attempt.settle(outcome, now);
        }
    }

    pub(super) fn finish(mut self, outcome: Outcome, now: Timestamp) {
        self.settle(outcome, now);
        self.admission.finish(outcome, now);
    }
}

/// Passes an answer on. From here on the client has seen of it, so nothing is tried again.
pub(super) fn pass_on<N: Network>(
    client: &Client<N>,
    routed: &Routed,
    request: Outgoing,
    answered: Answered,
    judges: Judges,
) -> Response<ProxyBody> {
    let Answered {
        mut head,
        body,
        first,
        endpoint,
        outcome,
        ..
    } = answered;
    let Outgoing {
        body: sent,
        kind,
        mut record,
        deadline,
        place,
        ..
    } = request;
    sent.settle();
    to_downstream(&mut head);
    if let Some(by) = &routed.by {
        by.answer_session(endpoint, &mut head);
    }
    routed.filter(&mut head);
    let moved = Instant::now();
    record.answered_at(head.status, moved);
    if kind == Kind::Grpc
        && let Some(status) = grpc_status(&head.headers)
    {
        record.grpc_status(status.into());
    }
    let clock = client.engine.clock();
    let now = clock.at(moved);
    let stream = &judges.leg.policy.streams;
    let ends = [
        deadline.left(now),
        stream
            .max_duration
            .map(|most| most.saturating_sub(moved.saturating_duration_since(record.started()))),
    ];
    let ends = ends.into_iter().flatten().min();
    let mut body = AnswerBody {
        body,
        first,
        outcome,
        idle: stream.stream_idle,
        ends: ends.map(|left| moved + left),
        // A failure is told at once: a body does not make it better.
        decides: judges.is_probe().then(|| moved + PROBE_DECIDES_AFTER),
        moved,
        taken: sent.taken(),
        sent,
        timer: None,
        clock,
        watch: Some(Watch {
            judges,
            record,
            place,
        }),
    };
    if outcome
        .is_some_and(|outcome| outcome.of_destination() == Some(crate::resilience::Verdict::Bad))
    {
        body.settle(outcome.unwrap_or(Outcome::Success), moved);
    }
    if body.is_end_stream() {
        body.end(RequestEnd::Complete, moved);
        return Response::from_parts(head, ProxyBody::Empty);
    }
    Response::from_parts(head, ProxyBody::Other(Box::pin(body)))
}

/// Gives up an answer that nobody wants. What of it is there is read, so that the connection under
/// it can be used again; the rest is not waited for.
pub(super) fn discard(mut body: UpstreamBody) {
    let mut cx = Context::from_waker(Waker::noop());
    for _ in 0..DISCARDED_FRAMES {
        match Pin::new(&mut body).poll_frame(&mut cx) {
            Poll::Ready(Some(Ok(_))) => {}
            Poll::Ready(None | Some(Err(_))) | Poll::Pending => return,
        }
    }
}

/// The body of an answer. It tells all who are concerned of its end, also if it is dropped.
struct AnswerBody {
    body: UpstreamBody,
    /// What was looked at already.
    first: Option<Frame<Bytes>>,
    /// How it went as far as the head tells; none if the trailers will.
    outcome: Option<Outcome>,
    /// How long nothing may move.
    idle: Option<Duration>,
    /// When it must be over.
    ends: Option<Instant>,
    /// When it has gone well for long enough, if somebody waits for that.
    decides: Option<Instant>,
    /// When something moved last.
    moved: Instant,
    /// The request's body, of which so much was taken then.
    sent: Replay,
    taken: u64,
    timer: Option<Pin<Box<Sleep>>>,
    clock: Clock,
    watch: Option<Watch>,
}

struct Watch {
    judges: Judges,
    record: RequestRecord,
    /// Among the requests of its pod.
    place: Slot,
}

/// Why a body does not go on.
#[derive(Clone, Copy)]
enum Over {
    Deadline,
    Idle,
}

impl AnswerBody {
    /// Tells judges how it goes, while it goes on.
    fn settle(&mut self, outcome: Outcome, now: Instant) {
        self.decides = None;
        if let Some(watch) = &mut self.watch {
            watch.judges.settle(outcome, self.clock.at(now));
        }
    }

    fn end(&mut self, end: RequestEnd, now: Instant) {
        let Some(watch) = self.watch.take() else {
            return;
        };
        let Watch {
            judges,
            record,
            place,
        } = watch;
        let told = self.outcome;
        let is_bad =
            told.is_some_and(|told| told.of_destination() == Some(crate::resilience::Verdict::Bad));
        let outcome = match end {
            _ if is_bad => told.unwrap_or(Outcome::Cancelled),
            RequestEnd::Complete => {
                told.unwrap_or_else(|| of_grpc_trailers(&judges.leg.policy, None))
            }
            RequestEnd::ResetByDestination => Outcome::Failure(Failure::Reset),
            RequestEnd::Cut if record.flagged() == Some(ResponseFlag::RequestTimeout) => {
                Outcome::Failure(Failure::Timeout)
            }
            RequestEnd::Cut | RequestEnd::ResetBySource | RequestEnd::Cancelled => {
                Outcome::Cancelled
            }
        };
        judges.finish(outcome, self.clock.at(now));
        record.bytes().add_received(self.sent.taken());
        record.close_at(end, now);
        drop(place);
    }

    fn passed(&mut self, frame: &Frame<Bytes>, now: Instant) {
        self.moved = now;
        let Some(watch) = &mut self.watch else {
            return;
        };
        if let Some(data) = frame.data_ref() {
            watch.record.bytes().add_sent(data.len() as u64);
        } else if let Some(trailers) = frame.trailers_ref() {
            let policy = &watch.judges.leg.policy;
            if self.outcome.is_none() {
                self.outcome = Some(of_grpc_trailers(policy, Some(trailers)));
            }
            if let Some(status) = grpc_status(trailers) {
                watch.record.grpc_status(status.into());
            }
        }
    }

    /// Nothing is there at the moment: has it been too long?
    fn poll_over(&mut self, cx: &mut Context<'_>) -> Poll<Over> {
        loop {
            let idle = self.idle.map(|idle| self.moved + idle);
            let alarms = [idle, self.ends, self.decides];
            let Some(next) = alarms.into_iter().flatten().min() else {
                return Poll::Pending;
            };
            let timer = self
                .timer
                .get_or_insert_with(|| Box::pin(sleep_until(next)));
            if timer.deadline() != next {
                // Later moments are looked at when the earlier one has come.
                if timer.deadline() > next || timer.is_elapsed() {
                    timer.as_mut().reset(next);
                }
            }
            std::task::ready!(timer.as_mut().poll(cx));
            let now = Instant::now();
            if self.decides.is_some_and(|at| at <= now) {
                self.settle(Outcome::Success, now);
            }
            if self.ends.is_some_and(|at| at <= now) {
                return Poll::Ready(Over::Deadline);
            }
            // The other direction may have moved meanwhile.
            let taken = self.sent.taken();
            if taken != std::mem::replace(&mut self.taken, taken) {
                self.moved = now;
            } else if idle.is_some_and(|at| at <= now) {
                return Poll::Ready(Over::Idle);
            }
        }
    }

    fn cut(&mut self, over: Over) -> BodyError {
        let flag = match over {
            Over::Deadline => ResponseFlag::RequestTimeout,
            Over::Idle => ResponseFlag::StreamTimeout,
        };
        if let Some(watch) = &mut self.watch {
            watch.record.flag(flag);
        }
        self.end(RequestEnd::Cut, Instant::now());
        BodyError::Ended(flag.as_str())
    }
}

impl Body for AnswerBody {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let this = self.get_mut();
        let frame = match this.first.take() {
            Some(frame) => Some(Ok(frame)),
            None => match Pin::new(&mut this.body).poll_frame(cx) {
                Poll::Ready(frame) => frame,
                Poll::Pending => {
                    let over = std::task::ready!(this.poll_over(cx));
                    return Poll::Ready(Some(Err(this.cut(over))));
                }
            },
        };
        let now = Instant::now();
        match &frame {
            Some(Ok(frame)) => {
                this.passed(frame, now);
                // Who polls does not come back for an end that it can see.
                if this.is_end_stream() {
                    this.end(RequestEnd::Complete, now);
                }
            }
            Some(Err(_)) => this.end(RequestEnd::ResetByDestination, now),
            None => this.end(RequestEnd::Complete, now),
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.first.is_none() && self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        match &self.first {
            None => self.body.size_hint(),
            // The body does not count it any more.
            Some(_) => SizeHint::default(),
        }
    }
}

impl Drop for AnswerBody {
    fn drop(&mut self) {
        if self.watch.is_some() {
            self.end(RequestEnd::ResetBySource, Instant::now());
        }
    }
}
