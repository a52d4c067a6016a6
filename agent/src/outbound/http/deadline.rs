//! When a request must be done: what the policy allows, and what a gRPC client asks for.

use std::time::Duration;

use http::{HeaderMap, HeaderName, HeaderValue};

use crate::resilience::Timestamp;
use crate::resilience::timeout::{Deadline, Timeouts};

const GRPC_TIMEOUT: HeaderName = HeaderName::from_static("grpc-timeout");

/// The most that fits into `grpc-timeout`: 8 digits (gRPC over HTTP/2, `TimeoutValue`).
const MOST: u128 = 99_999_999;

/// The earlier of what the policy allows and what the client asked for.
pub(super) fn deadline(timeouts: &Timeouts, headers: &HeaderMap, now: Timestamp) -> Deadline {
    let allowed = timeouts.deadline(now);
    let Some(asked) = headers.get(GRPC_TIMEOUT).and_then(parse) else {
        return allowed;
    };
    match allowed.left(now) {
        Some(left) if left <= asked => allowed,
        _ => Deadline::at(now + asked),
    }
}

/// Tells the server of a gRPC request how much time is left, so that it does not work for nobody.
pub(super) fn tell(deadline: Deadline, headers: &mut HeaderMap, now: Timestamp) {
    if let Some(left) = deadline.left(now) {
        headers.insert(GRPC_TIMEOUT, format(left));
    }
}

/// `TimeoutValue TimeoutUnit`, as in `100m`.
fn parse(value: &HeaderValue) -> Option<Duration> {
    let value = value.to_str().ok()?;
    let (digits, unit) = value.split_at_checked(value.len().checked_sub(1)?)?;
    if digits.is_empty() || digits.len() > 8 || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let amount: u64 = digits.parse().ok()?;
    Some(match unit {
        "H" => Duration::from_secs(amount * 3600),
        "M" => Duration::from_secs(amount * 60),
        "S" => Duration::from_secs(amount),
        "m" => Duration::from_millis(amount),
        "u" => Duration::from_micros(amount),
        "n" => Duration::from_nanos(amount),
        _ => return None,
    })
}

/// In the finest unit that fits, rounded down: a server must not be told of more than there is.
fn format(left: Duration) -> HeaderValue {
    let nanos = left.as_nanos();
    let units = [
        ("n", 1),
        ("u", 1_000),
        ("m", 1_000_000),
        ("S", 1_000_000_000),
        ("M", 60_000_000_000),
    ];
    let fits = units.iter().find(|(_, size)| nanos / size <= MOST);
    let (unit, size) = fits.unwrap_or(&("H", 3_600_000_000_000));
    let text = format!("{}{unit}", (nanos / size).min(MOST));
    // Digits and a letter.
    HeaderValue::try_from(text).unwrap_or(HeaderValue::from_static("0n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(value: &str) -> HeaderMap {
        HeaderMap::from_iter([(GRPC_TIMEOUT, value.parse().unwrap())])
    }

    #[test]
    fn the_earlier_of_both_deadlines_holds() {
        let now = Timestamp::ZERO + Duration::from_secs(100);
        let policy = |request| Timeouts {
            request,
            ..Timeouts::default()
        };
        let second = Duration::from_secs(1);
        for (request, header, left) in [
            (None, "2S", Some(2 * second)),
            (Some(second), "2S", Some(second)),
            (Some(3 * second), "2S", Some(2 * second)),
            (Some(3 * second), "2 hours", Some(3 * second)),
            (None, "123456789m", None),
            (None, "m", None),
            (None, "", None),
            (None, "1M", Some(60 * second)),
            // Later than any moment: as if there were none.
            (None, "99999999H", None),
            (None, "+5S", None),
        ] {
            let deadline = deadline(&policy(request), &asked(header), now);
            assert_eq!(deadline.left(now), left, "{header}");
        }
    }

    #[test]
    fn a_server_is_told_what_is_left_and_never_more() {
        for (left, told) in [
            (Duration::ZERO, "0n"),
            (Duration::from_nanos(99_999_999), "99999999n"),
            (Duration::from_nanos(100_000_999), "100000u"),
            (Duration::from_secs(99_999), "99999000m"),
            (Duration::from_secs(100_000), "100000S"),
            (Duration::from_secs(100_000_000), "1666666M"),
        ] {
            let mut headers = asked("1S");
            tell(
                Deadline::at(Timestamp::ZERO + left),
                &mut headers,
                Timestamp::ZERO,
            );
            assert_eq!(headers[GRPC_TIMEOUT], told);
            let back = parse(&headers[GRPC_TIMEOUT]).unwrap();
            assert!(back <= left);
        }
    }
}
