//! How long things may take, and what is left of it.

use std::time::Duration;

use super::time::Timestamp;
use super::validate::{Faults, Validate};

/// The time limits of a route.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timeouts {
    /// The whole request, retries included (`timeouts.request`). Range 1 ms to 24 h. Default none:
    /// it would cut downloads, streams and long polls that nobody asked to cut.
    pub request: Option<Duration>,
    /// One attempt (`timeouts.backendRequest`). At most `request`. Default none.
    pub attempt: Option<Duration>,
    /// A connection to an endpoint. Range 1 ms to 60 s, default 1 s.
    pub connect: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self {
            request: None,
            attempt: None,
            connect: Duration::from_secs(1),
        }
    }
}

impl Timeouts {
    /// The deadline of a request that begins now.
    pub fn deadline(&self, now: Timestamp) -> Deadline {
        Deadline(self.request.map_or(Timestamp::NEVER, |limit| now + limit))
    }

    /// How long an attempt that begins now may take: its own limit, or what is left if that is less.
    /// `None` is no limit.
    pub fn attempt(&self, deadline: Deadline, now: Timestamp) -> Option<Duration> {
        match (self.attempt, deadline.left(now)) {
            (Some(own), Some(left)) => Some(own.min(left)),
            (own, left) => own.or(left),
        }
    }

    /// How long a connection that begins now may take.
    pub fn connect(&self, deadline: Deadline, now: Timestamp) -> Duration {
        deadline
            .left(now)
            .map_or(self.connect, |left| left.min(self.connect))
    }
}

impl Validate for Timeouts {
    fn check(&self, at: &str, faults: &mut Faults) {
        const MILLISECOND: Duration = Duration::from_millis(1);
        const DAY: Duration = Duration::from_secs(86_400);
        let request = self.request.unwrap_or(DAY);
        faults.duration(request, MILLISECOND, DAY, at, "request");
        faults.duration(
            self.attempt.unwrap_or(MILLISECOND),
            MILLISECOND,
            request.max(MILLISECOND),
            at,
            "backendRequest",
        );
        faults.duration(
            self.connect,
            MILLISECOND,
            Duration::from_secs(60),
            at,
            "connect",
        );
    }
}

/// When a request must be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Deadline(Timestamp);

impl Deadline {
    /// A deadline at this moment; [`Timestamp::NEVER`] is none.
    pub const fn at(moment: Timestamp) -> Self {
        Self(moment)
    }

    /// What is left, zero when it has passed; `None` without a deadline.
    pub fn left(self, now: Timestamp) -> Option<Duration> {
        (self.0 != Timestamp::NEVER).then(|| self.0.since(now))
    }

    /// Whether something that takes this long is done in time.
    pub fn allows(self, wait: Duration, now: Timestamp) -> bool {
        self.left(now).is_none_or(|left| wait < left)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn the_time_of_an_attempt_shrinks_with_what_is_left_of_the_request() {
        let timeouts = Timeouts {
            request: Some(10 * SECOND),
            attempt: Some(4 * SECOND),
            ..Timeouts::default()
        };
        let deadline = timeouts.deadline(Timestamp::ZERO);
        assert_eq!(
            timeouts.attempt(deadline, Timestamp::ZERO),
            Some(4 * SECOND)
        );
        assert_eq!(
            timeouts.attempt(deadline, Timestamp::ZERO + 8 * SECOND),
            Some(2 * SECOND)
        );
        assert_eq!(
            timeouts.attempt(deadline, Timestamp::ZERO + 20 * SECOND),
            Some(Duration::ZERO)
        );
        assert_eq!(
            timeouts.connect(deadline, Timestamp::ZERO + 9 * SECOND + SECOND / 2),
            SECOND / 2
        );
    }

    #[test]
    fn an_attempt_must_not_outlast_its_request() {
        let timeouts = Timeouts {
            request: Some(SECOND),
            attempt: Some(2 * SECOND),
            ..Timeouts::default()
        };
        assert_eq!(timeouts.validate().unwrap_err()[0].field, "backendRequest");
        assert!(Timeouts::default().validate().is_ok());
        assert!(
            Timeouts {
                request: None,
                ..Timeouts::default()
            }
            .validate()
            .is_ok()
        );
    }
}
