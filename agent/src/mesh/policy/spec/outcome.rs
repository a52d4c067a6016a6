//! Faults on purpose, time limits, and what is left when nothing is left.

use http::HeaderName;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::units::{Percentage, Span};
use super::{Apply, set};
use crate::mesh::policy::{FallbackBackend, TrafficPolicy};
use crate::mesh::route::{HeaderMatch, HeaderMatchKind};
use crate::mesh::{ObjectName, is_kubernetes_name};
use crate::resilience::fallback::{Fallback, FixedResponse};
use crate::resilience::fault::{Abort, Delay};
use crate::resilience::outcome::Code;
use crate::resilience::validate::Faults;

/// The longest fixed body, in bytes.
const BODY_MAX: usize = 64 << 10;

/// Requests that are delayed or failed on purpose. Runs at the source, before the breaker, which does
/// not see it.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
#[schemars(inline)]
pub struct Fault {
    /// Delays a share of requests. Default none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub delay: Option<FaultDelay>,
    /// Fails a share of requests. Default none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub abort: Option<FaultAbort>,
    /// Only requests with all of these headers. At most 16; default all requests.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 16))]
    pub headers: Option<Vec<FaultHeader>>,
}

/// A delay on purpose.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[schemars(inline)]
pub struct FaultDelay {
    /// Which share of requests, in per cent. Range 0 to 100.
    pub percentage: Percentage,
    /// How long. Range 1ms to 10m.
    pub time: Span,
}

/// A failure on purpose: one of `httpStatus` and `grpcStatus`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[schemars(inline)]
pub struct FaultAbort {
    /// Which share of requests, in per cent. Range 0 to 100.
    pub percentage: Percentage,
    /// Answers with this HTTP status. Range 200 to 599.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 200, max = 599))]
    pub http_status: Option<u16>,
    /// Answers with this gRPC status. Range 0 to 16.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 16))]
    pub grpc_status: Option<u8>,
}

/// A header that a request must have, as in an HTTPRoute.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[schemars(inline)]
pub struct FaultHeader {
    /// How the value is compared. Default Exact.
    #[serde(default, rename = "type", skip_serializing_if = "Option::is_none")]
    pub kind: Option<FaultHeaderMatch>,
    /// Its name.
    #[schemars(length(min = 1, max = 256))]
    pub name: String,
    /// Its value, or the regular expression that the whole value must match.
    #[schemars(length(min = 1, max = 4096))]
    pub value: String,
}

/// How a header's value is compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[schemars(inline)]
#[allow(missing_docs, reason = "the names are Gateway API's")]
pub enum FaultHeaderMatch {
    Exact,
    RegularExpression,
}

/// How long things may take. Runs at the source, for each request or connection by itself.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
#[schemars(inline)]
pub struct TimeoutsSpec {
    /// A connection to an endpoint, and how long opaque TCP waits for its place where `limits` say
    /// how many there may be. Range 1ms to 1m, default the mesh's `connectTimeout`, 1s.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub connect: Option<Span>,
    /// A whole request, retries included. A route's own `timeouts.request` comes before it. Range
    /// 1ms to 24h, default and 0s: no limit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub request: Option<Span>,
    /// One attempt of a request, at most `request`. A route's own `timeouts.backendRequest` comes
    /// before it. Range 1ms to 24h, default none; 0s: none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub attempt: Option<Span>,
    /// An upstream HTTP connection without a request, or an opaque TCP connection on which nothing
    /// moves, is closed after this. Range 1ms to 24h; 0s, the default: 4s for HTTP/1.1, 60s for
    /// HTTP/2, no limit for opaque TCP.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub idle: Option<Span>,
    /// A request whose answer has begun, and on which nothing moves, is reset after this. Range 1ms
    /// to 24h, default 5m; 0s: no limit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stream_idle: Option<Span>,
    /// A request, or an opaque TCP connection, is reset after this, whatever moves. Range 1ms to
    /// 24h, default none; 0s: no limit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_duration: Option<Span>,
}

/// What a client gets when its destination cannot answer: the breaker is open, there is no endpoint,
/// or the last attempt failed. One of `backend` and `response`. Runs at the source.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
#[schemars(inline)]
pub struct FallbackSpec {
    /// Another Service of the policy's namespace. It has no fallback of its own then.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub backend: Option<BackendRef>,
    /// A fixed response.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub response: Option<ResponseSpec>,
}

/// A Service of the policy's namespace.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[schemars(inline)]
pub struct BackendRef {
    /// Its name.
    #[schemars(length(min = 1, max = 253))]
    pub name: String,
    /// Its port.
    #[schemars(range(min = 1, max = 65_535))]
    pub port: u16,
}

/// A response that is made here.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[schemars(inline)]
pub struct ResponseSpec {
    /// HTTP status. Range 200 to 599.
    #[schemars(range(min = 200, max = 599))]
    pub status: u16,
    /// The body, at most 65536 bytes. Default none.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    #[schemars(length(max = 65_536))]
    pub body: String,
}

impl Apply for Fault {
    fn apply(&self, to: &mut TrafficPolicy) {
        let Self {
            delay,
            abort,
            headers,
        } = self;
        let fault = &mut to.settings.fault;
        let delay = delay.as_ref().map(|FaultDelay { percentage, time }| {
            Some(Delay {
                share: percentage.share(),
                time: time.0,
            })
        });
        set(&mut fault.delay, delay);
        let abort = abort.as_ref().map(|abort| {
            abort.code().map(|with| Abort {
                share: abort.percentage.share(),
                with,
            })
        });
        set(&mut fault.abort, abort);
        let matches = |headers: &Vec<FaultHeader>| {
            headers
                .iter()
                .filter_map(|one| one.compile().ok())
                .collect()
        };
        set(&mut to.fault_match, headers.as_ref().map(matches));
    }

    fn check(&self, at: &str, faults: &mut Faults) {
        if let Some(abort) = &self.abort {
            let fine = abort.http_status.is_some() != abort.grpc_status.is_some();
            let reason = "must have one of httpStatus and grpcStatus";
            faults.require(fine, at, "abort", reason);
        }
        let headers = self.headers.as_deref().unwrap_or_default();
        let length = headers.len();
        let reason = format_args!("must be at most 16, are {length}");
        faults.require(length <= 16, at, "headers", reason);
        for (index, header) in headers.iter().enumerate() {
            if let Err(reason) = header.compile() {
                faults.require(false, at, &format!("headers[{index}]"), reason);
            }
        }
    }
}

impl FaultAbort {
    fn code(&self) -> Option<Code> {
        let http = self.http_status.map(Code::Http);
        http.or(self.grpc_status.map(Code::Grpc))
    }
}

impl FaultHeader {
    fn compile(&self) -> Result<HeaderMatch, String> {
        let name = HeaderName::try_from(self.name.as_str())
            .map_err(|_| format!("{:?} is not a header's name", self.name))?;
        let kind = match self.kind {
            None | Some(FaultHeaderMatch::Exact) => HeaderMatchKind::Exact,
            Some(FaultHeaderMatch::RegularExpression) => HeaderMatchKind::Regex,
        };
        HeaderMatch::new(name, kind, &self.value).map_err(|error| error.to_string())
    }
}

impl Apply for TimeoutsSpec {
    fn apply(&self, to: &mut TrafficPolicy) {
        let Self {
            connect,
            request,
            attempt,
            idle,
            stream_idle,
            max_duration,
        } = self;
        let timeouts = &mut to.settings.timeouts;
        set(&mut timeouts.request, request.map(Span::or_none));
        set(&mut timeouts.attempt, attempt.map(Span::or_none));
        set(&mut to.streams.connect, connect.map(|span| Some(span.0)));
        set(&mut to.streams.idle, idle.map(Span::or_none));
        set(&mut to.streams.stream_idle, stream_idle.map(Span::or_none));
        set(
            &mut to.streams.max_duration,
            max_duration.map(Span::or_none),
        );
    }

    fn check(&self, at: &str, faults: &mut Faults) {
        let request = self.request.and_then(Span::or_none);
        if let (Some(request), Some(attempt)) = (request, self.attempt) {
            let request = Span(request);
            let reason = format_args!("must be at most `request`, {request}, is {attempt}");
            faults.require(attempt.0 <= request.0, at, "attempt", reason);
        }
    }
}

impl FallbackSpec {
    /// Puts it in force; a backend is of this namespace.
    pub(super) fn apply(&self, to: &mut TrafficPolicy, namespace: &str) {
        if let Some(BackendRef { name, port }) = &self.backend {
            to.settings.fallback = Fallback::Backend(FallbackBackend {
                service: ObjectName::new(namespace, name),
                port: *port,
            });
        } else if let Some(ResponseSpec { status, body }) = &self.response {
            to.settings.fallback = Fallback::Fixed(FixedResponse {
                status: *status,
                body: body.clone().into_bytes(),
            });
        }
    }

    pub(super) fn check(&self, at: &str, faults: &mut Faults) {
        let fine = self.backend.is_some() != self.response.is_some();
        let (parent, field) = at.rsplit_once('.').unwrap_or(("", at));
        let reason = "must have one of backend and response";
        faults.require(fine, parent, field, reason);
        if let Some(backend) = &self.backend {
            let reason = format_args!("{:?} is not a name", backend.name);
            let fine = is_kubernetes_name(&backend.name);
            faults.require(fine, at, "backend.name", reason);
            faults.range(backend.port, 1, u16::MAX, at, "backend.port");
        }
        if let Some(response) = &self.response {
            let length = response.body.len();
            let reason = format_args!("must be at most {BODY_MAX} bytes, are {length}");
            faults.require(length <= BODY_MAX, at, "response.body", reason);
        }
    }
}
