//! The guard of a request.

use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::time::Instant;

use super::labels::{GrpcLabel, MethodLabel, OutcomeLabels, StatusLabel};
use super::requester::{ChosenEndpoint, Requester, Scope};
use super::{AttemptView, RequestEnd, RequestEvent, RequestInfo, ResponseFlag, access};
use crate::mesh::{ObjectName, Workload};
use crate::telemetry::{ByteCount, Security, access_log};

/// Attempts that the access log tells of; a request has more only if hedges and retries meet.
const ATTEMPTS: usize = 16;

/// A request under way. It counts and is logged once, at its end: close it with
/// [`RequestRecord::close`]; if it is dropped instead, it counts as cancelled, because that is what
/// becomes of the task when the connection under it is gone.
#[must_use = "dropping the record counts the request as cancelled"]
pub struct RequestRecord {
    pub(super) requester: Arc<Requester>,
    pub(super) info: RequestInfo,
    pub(super) started_at: SystemTime,
    started: Instant,
    service: Option<ObjectName>,
    route: Option<Arc<str>>,
    scope: Option<Arc<Scope>>,
    pub(super) attempts: Vec<AttemptView>,
    pub(super) attempts_total: u32,
    pub(super) status: Option<u16>,
    pub(super) grpc_status: Option<u32>,
    pub(super) flag: Option<ResponseFlag>,
    pub(super) detail: Option<String>,
    pub(super) bytes: Arc<ByteCount>,
    first_byte: Option<Instant>,
    ended: bool,
}

/// Where the time of a request went.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Times {
    /// Waiting: backoff, and for places in queues.
    pub queue: Duration,
    /// Connecting.
    pub connect: Duration,
    /// From the request's head to that of its answer, less the two above.
    pub first_byte: Option<Duration>,
    /// From the answer's head to its end.
    pub body: Option<Duration>,
    /// All of it.
    pub total: Duration,
}

/// Where events of a request are counted.
pub struct RequestEvents {
    scope: Arc<Scope>,
    requester: Arc<Requester>,
}

impl fmt::Debug for RequestEvents {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RequestEvents").finish_non_exhaustive()
    }
}

impl RequestEvents {
    /// Counts one.
    pub fn count(&self, event: RequestEvent) {
        let routes = &self.requester.telemetry.http().routes;
        let Scope {
            route_scope,
            route_series,
            ..
        } = &*self.scope;
        routes.count(route_scope, route_series, |series| series.add(event));
    }
}

impl RequestRecord {
    pub(super) fn new(requester: Arc<Requester>, info: RequestInfo) -> Self {
        requester.telemetry.http().begin(requester.direction);
        Self {
            requester,
            info,
            started_at: SystemTime::now(),
            started: Instant::now(),
            service: None,
            route: None,
            scope: None,
            attempts: Vec::new(),
            attempts_total: 0,
            status: None,
            grpc_status: None,
            flag: None,
            detail: None,
            bytes: Arc::default(),
            first_byte: None,
            ended: false,
        }
    }

    /// Tells which Service it is for, and by which route (the rule's name). A fallback tells the
    /// Service that it goes to.
    pub fn route(&mut self, service: Option<&ObjectName>, route: Option<&Arc<str>>) {
        self.service = service.cloned();
        self.route = route.cloned();
        self.scope = None;
    }

    /// Tells where it is sent: of several attempts, the last counts. The identity is that of the
    /// pod, if it is in the mesh.
    pub fn endpoint(
        &mut self,
        address: SocketAddr,
        workload: Option<&Arc<Workload>>,
        security: Security,
    ) {
        let endpoint = ChosenEndpoint {
            address,
            workload,
            security,
        };
        let scope =
            self.requester
                .scope(self.service.as_ref(), self.route.as_ref(), Some(&endpoint));
        self.scope = Some(scope);
    }

    /// An attempt ended.
    pub fn attempt(&mut self, attempt: AttemptView) {
        self.attempts_total = self.attempts_total.saturating_add(1);
        if self.attempts.len() < ATTEMPTS {
            self.attempts.push(attempt);
        }
    }

    /// Counts something that happened on its way, by its Service and route.
    pub fn event(&mut self, event: RequestEvent) {
        self.events().count(event);
    }

    /// Counts what happens by its Service and route, for as long as somebody likes: the request itself
    /// may have ended.
    #[must_use]
    pub fn events(&mut self) -> RequestEvents {
        RequestEvents {
            scope: self.settled(),
            requester: self.requester.clone(),
        }
    }

    /// Says why the client gets what it gets; the last word counts.
    pub fn flag(&mut self, flag: ResponseFlag) {
        self.flag = Some(flag);
    }

    /// What was flagged.
    #[must_use]
    pub fn flagged(&self) -> Option<ResponseFlag> {
        self.flag
    }

    /// An explanation for the access log (at most 512 bytes of it).
    pub fn detail(&mut self, detail: &dyn fmt::Display) {
        self.detail = Some(access_log::truncated(detail));
    }

    /// The answer's head goes to the client: its status, and the end of the time to the first byte.
    pub fn answered(&mut self, status: http::StatusCode) {
        self.answered_at(status, Instant::now());
    }

    /// [`RequestRecord::answered`], for who has looked at the clock.
    pub fn answered_at(&mut self, status: http::StatusCode, now: Instant) {
        self.status = Some(status.as_u16());
        self.first_byte = Some(now);
    }

    /// `grpc-status`, from the trailers or the head.
    pub fn grpc_status(&mut self, status: u32) {
        self.grpc_status = Some(status);
    }

    /// Bytes of the two bodies. What is added after the end is not logged.
    #[must_use]
    pub fn bytes(&self) -> &Arc<ByteCount> {
        &self.bytes
    }

    /// When it was announced.
    #[must_use]
    pub fn started(&self) -> Instant {
        self.started
    }

    /// Ends it.
    pub fn close(self, end: RequestEnd) {
        self.close_at(end, Instant::now());
    }

    /// [`RequestRecord::close`], for who has looked at the clock.
    pub fn close_at(mut self, end: RequestEnd, now: Instant) {
        self.end(end, now);
    }

    fn end(&mut self, end: RequestEnd, now: Instant) {
        self.ended = true;
        self.flag = self.flag.or(match end {
            RequestEnd::Complete => None,
            RequestEnd::ResetBySource => Some(ResponseFlag::ClientGone),
            RequestEnd::ResetByDestination => Some(ResponseFlag::UpstreamReset),
            RequestEnd::Cut => Some(ResponseFlag::StreamTimeout),
            RequestEnd::Cancelled => Some(ResponseFlag::Cancelled),
        });
        let times = self.times(now);
        let outcome = OutcomeLabels {
            method: MethodLabel::of(&self.info.method),
            status: StatusLabel::of(self.status),
            grpc: GrpcLabel::of(self.grpc_status),
            flag: self.flag,
        };
        let scope = self.settled();
        let http = self.requester.telemetry.http();
        http.scopes.count(&scope.labels, &scope.series, |series| {
            http.record(series, outcome, times.total);
        });
        http.end(self.requester.direction);
        access::write(self, &scope, times, end);
    }

    /// Its scope; one without an endpoint if none was chosen.
    fn settled(&mut self) -> Arc<Scope> {
        if let Some(scope) = &self.scope {
            return scope.clone();
        }
        let scope = self
            .requester
            .scope(self.service.as_ref(), self.route.as_ref(), None);
        self.scope.insert(scope).clone()
    }

    fn times(&self, now: Instant) -> Times {
        let queue = self.attempts.iter().map(|attempt| attempt.waited).sum();
        let connect = self.attempts.iter().map(|attempt| attempt.connect).sum();
        let first_byte = self.first_byte.map(|first| {
            let spent: Duration = queue + connect;
            first
                .saturating_duration_since(self.started)
                .saturating_sub(spent)
        });
        Times {
            queue,
            connect,
            first_byte,
            body: self
                .first_byte
                .map(|first| now.saturating_duration_since(first)),
            total: now.saturating_duration_since(self.started),
        }
    }
}

impl Drop for RequestRecord {
    fn drop(&mut self) {
        if !self.ended {
            self.end(RequestEnd::Cancelled, Instant::now());
        }
    }
}

impl fmt::Debug for RequestRecord {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RequestRecord")
            .field("info", &self.info)
            .finish_non_exhaustive()
    }
}
