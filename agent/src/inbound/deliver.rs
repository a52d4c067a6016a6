//! The last step: to the app, over lo, with the client's own address as the source.

use std::net::SocketAddr;
use std::time::Duration;

use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::capture::{Dial, DialError, EnrolledPod};
use crate::telemetry::{FailureReason, error_chain};

/// Why the app could not be reached.
#[derive(Debug)]
pub(super) struct Undelivered {
    pub(super) reason: FailureReason,
    pub(super) detail: String,
}

/// Connects to the app, which sees `client` as its peer's address.
pub(super) async fn deliver(
    pod: &EnrolledPod,
    client: SocketAddr,
    app: SocketAddr,
    limit: Duration,
) -> Result<TcpStream, Undelivered> {
    match timeout(
        limit,
        pod.connect(Dial::Deliver {
            source: client,
            destination: app,
        }),
    )
    .await
    {
        Ok(Ok(stream)) => Ok(stream),
        Ok(Err(error)) => Err(undelivered(&error)),
        Err(_) => Err(Undelivered {
            reason: FailureReason::ConnectTimeout,
            detail: format!(
                "the app at {app} did not answer within {limit:?}; a listener that is bound to a \
                 device or has a mark of its own cannot be delivered to"
            ),
        }),
    }
}

fn undelivered(error: &DialError) -> Undelivered {
    let reason = match error {
        DialError::Refused(_) => FailureReason::ConnectRefused,
        DialError::Gone => FailureReason::PodGone,
        DialError::Misdirected(_) => FailureReason::PeerIdentity,
        DialError::NoSourcePort(_) => FailureReason::NoSourcePort,
        DialError::Unreachable { .. } => FailureReason::Unreachable,
        DialError::Netns(_) | DialError::Kernel(_) | DialError::Io { .. } => {
            FailureReason::Internal
        }
    };
    Undelivered {
        reason,
        detail: format!("to the app: {}", error_chain(error)),
    }
}
