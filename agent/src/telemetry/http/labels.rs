//! The labels of request metrics.

use std::fmt;
use std::sync::Arc;

use http::Method;
use prometheus_client::encoding::{EncodeLabelSet, LabelSetEncoder};

use super::ResponseFlag;
use crate::mesh::ObjectName;
use crate::telemetry::labels::{Labels, OVERFLOW, UNKNOWN, label};

/// Value of a label for what does not apply: no route is attached, no status came.
pub(super) const NONE: &str = "none";

/// Value of a label for what is not one of its known values.
const OTHER: &str = "other";

/// Who asked whom, by which route: the labels that a client connection's requests share.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct ScopeLabels {
    pub ends: Labels,
    pub route: RouteLabel,
}

/// The label `route`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) enum RouteLabel {
    None,
    Named(Arc<str>),
    Overflow,
}

impl RouteLabel {
    pub fn of(route: Option<&Arc<str>>) -> Self {
        route.map_or(Self::None, |route| Self::Named(route.clone()))
    }

    fn as_str(&self) -> &str {
        match self {
            Self::None => NONE,
            Self::Named(name) => name,
            Self::Overflow => OVERFLOW,
        }
    }
}

impl ScopeLabels {
    pub fn overflow(&self) -> Self {
        Self {
            ends: self.ends.overflow(),
            route: RouteLabel::Overflow,
        }
    }
}

impl EncodeLabelSet for ScopeLabels {
    fn encode(&self, encoder: &mut LabelSetEncoder<'_>) -> fmt::Result {
        self.ends.encode(encoder)?;
        label(encoder, "route", self.route.as_str())
    }
}

/// A Service and a route: the labels of what is counted besides requests.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) enum RouteScope {
    Of(Option<ObjectName>, RouteLabel),
    Overflow,
}

impl EncodeLabelSet for RouteScope {
    fn encode(&self, encoder: &mut LabelSetEncoder<'_>) -> fmt::Result {
        let (name, namespace, route) = match self {
            Self::Of(Some(service), route) => (&*service.name, &*service.namespace, route.as_str()),
            Self::Of(None, route) => (UNKNOWN, UNKNOWN, route.as_str()),
            Self::Overflow => (OVERFLOW, OVERFLOW, OVERFLOW),
        };
        label(encoder, "destination_service_name", name)?;
        label(encoder, "destination_service_namespace", namespace)?;
        label(encoder, "route", route)
    }
}

/// What a request asked and how it was answered: the labels that differ from request to request.
/// All are of known values, so that neither a client nor a server can make labels up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct OutcomeLabels {
    pub method: MethodLabel,
    pub status: StatusLabel,
    pub grpc: GrpcLabel,
    pub flag: Option<ResponseFlag>,
}

/// The label `method`: those of RFC 9110 and RFC 5789.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum MethodLabel {
    Known(&'static str),
    Other,
    Overflow,
}

impl MethodLabel {
    pub fn of(method: &Method) -> Self {
        const KNOWN: [&str; 9] = [
            "GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH",
        ];
        KNOWN
            .into_iter()
            .find(|known| *known == method.as_str())
            .map_or(Self::Other, Self::Known)
    }

    const fn as_str(self) -> &'static str {
        match self {
            Self::Known(name) => name,
            Self::Other => OTHER,
            Self::Overflow => OVERFLOW,
        }
    }
}

/// The labels `status` and `status_class`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum StatusLabel {
    /// No answer began.
    None,
    /// 100 to 599.
    Known(u16),
    /// HTTP allows three digits; no more is known of these.
    Other,
    /// One of this class (its first digit), of an answer that found no room for labels of its own.
    Overflow(u8),
}

impl StatusLabel {
    pub fn of(status: Option<u16>) -> Self {
        match status {
            None => Self::None,
            Some(code @ 100..=599) => Self::Known(code),
            Some(_) => Self::Other,
        }
    }

    fn class(self) -> &'static str {
        let digit = match self {
            Self::None => return NONE,
            Self::Other => return OTHER,
            Self::Known(code) => code / 100,
            Self::Overflow(digit) => digit.into(),
        };
        match digit {
            1 => "1xx",
            2 => "2xx",
            3 => "3xx",
            4 => "4xx",
            5 => "5xx",
            _ => OTHER,
        }
    }

    fn overflow(self) -> Self {
        Self::Overflow(match self {
            Self::Known(code) => (code / 100) as u8,
            Self::Overflow(digit) => digit,
            Self::None | Self::Other => 0,
        })
    }
}

/// The label `grpc_status`, by number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum GrpcLabel {
    None,
    Known(u8),
    Other,
    Overflow,
}

impl GrpcLabel {
    pub fn of(status: Option<u32>) -> Self {
        match status {
            None => Self::None,
            Some(code @ 0..=16) => Self::Known(code as u8),
            Some(_) => Self::Other,
        }
    }
}

impl OutcomeLabels {
    /// Those of an answer that found no room: its class is all that is kept.
    pub fn overflow(self) -> Self {
        Self {
            method: MethodLabel::Overflow,
            status: self.status.overflow(),
            grpc: GrpcLabel::Overflow,
            flag: None,
        }
    }
}

/// All labels of a request.
pub(super) struct RequestLabels<'a> {
    pub scope: &'a ScopeLabels,
    pub outcome: OutcomeLabels,
}

impl EncodeLabelSet for RequestLabels<'_> {
    fn encode(&self, encoder: &mut LabelSetEncoder<'_>) -> fmt::Result {
        self.scope.encode(encoder)?;
        let OutcomeLabels {
            method,
            status,
            grpc,
            flag,
        } = self.outcome;
        label(encoder, "method", method.as_str())?;
        label(encoder, "status_class", status.class())?;
        match status {
            StatusLabel::None => label(encoder, "status", NONE)?,
            StatusLabel::Known(code) => label(encoder, "status", code)?,
            StatusLabel::Other => label(encoder, "status", OTHER)?,
            StatusLabel::Overflow(_) => label(encoder, "status", OVERFLOW)?,
        }
        match grpc {
            GrpcLabel::None => label(encoder, "grpc_status", NONE)?,
            GrpcLabel::Known(code) => label(encoder, "grpc_status", code)?,
            GrpcLabel::Other => label(encoder, "grpc_status", OTHER)?,
            GrpcLabel::Overflow => label(encoder, "grpc_status", OVERFLOW)?,
        }
        label(encoder, "flag", flag.map_or(NONE, ResponseFlag::as_str))
    }
}

/// A series of events: whose, and which.
pub(super) struct EventLabels<'a> {
    pub scope: &'a RouteScope,
    pub label: &'static str,
    pub value: &'static str,
}

impl EncodeLabelSet for EventLabels<'_> {
    fn encode(&self, encoder: &mut LabelSetEncoder<'_>) -> fmt::Result {
        self.scope.encode(encoder)?;
        label(encoder, self.label, self.value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_peers_make_up_becomes_one_value() {
        let invented = Method::from_bytes(b"BREW").unwrap();
        assert_eq!(MethodLabel::of(&invented), MethodLabel::Other);
        assert_eq!(MethodLabel::of(&Method::PATCH).as_str(), "PATCH");
        assert_eq!(StatusLabel::of(Some(999)), StatusLabel::Other);
        assert_eq!(StatusLabel::of(Some(404)).class(), "4xx");
        assert_eq!(StatusLabel::of(None).class(), NONE);
        assert_eq!(GrpcLabel::of(Some(17)), GrpcLabel::Other);
        assert_eq!(GrpcLabel::of(Some(16)), GrpcLabel::Known(16));
    }

    #[test]
    fn an_overflowing_answer_keeps_its_class() {
        let labels = OutcomeLabels {
            method: MethodLabel::of(&Method::GET),
            status: StatusLabel::of(Some(503)),
            grpc: GrpcLabel::None,
            flag: Some(ResponseFlag::Overload),
        };
        assert_eq!(labels.overflow().status.class(), "5xx");
        assert_eq!(labels.overflow().overflow(), labels.overflow());
    }
}
