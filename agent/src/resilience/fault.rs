//! Faults on purpose, to test what depends on a destination.

use std::time::Duration;

use rand::Rng;

use super::outcome::Code;
use super::validate::{Faults, Validate};

/// Which requests are delayed or failed on purpose. Default none.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct FaultPolicy {
    /// Delays a share of requests.
    pub delay: Option<Delay>,
    /// Fails a share of requests.
    pub abort: Option<Abort>,
}

/// A delay on purpose.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Delay {
    /// Which share. Range 0 to 1.
    pub share: f64,
    /// How long. Range 1 ms to 10 min.
    pub time: Duration,
}

/// A failure on purpose.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Abort {
    /// Which share. Range 0 to 1.
    pub share: f64,
    /// With what. HTTP 200 to 599, gRPC 0 to 16.
    pub with: Code,
}

/// What happens to one request. An abort on purpose is [`super::Outcome::Shed`] to breaker and
/// ejection: no endpoint has failed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Fault {
    /// Wait so long first.
    pub delay: Option<Duration>,
    /// Then answer with this instead of asking the destination.
    pub abort: Option<Code>,
}

impl FaultPolicy {
    /// The lot of one request. The two shares are drawn independently.
    pub fn decide(&self, rng: &mut (impl Rng + ?Sized)) -> Fault {
        let mut hits = |share: f64| share > 0.0 && rng.random::<f64>() < share;
        Fault {
            delay: self
                .delay
                .filter(|delay| hits(delay.share))
                .map(|delay| delay.time),
            abort: self
                .abort
                .filter(|abort| hits(abort.share))
                .map(|abort| abort.with),
        }
    }
}

impl Validate for FaultPolicy {
    fn check(&self, at: &str, faults: &mut Faults) {
        if let Some(delay) = &self.delay {
            faults.share(delay.share, at, "delay.share");
            faults.duration(
                delay.time,
                Duration::from_millis(1),
                Duration::from_secs(600),
                at,
                "delay.time",
            );
        }
        if let Some(abort) = &self.abort {
            faults.share(abort.share, at, "abort.share");
            match abort.with {
                Code::Http(code) => faults.range(code, 200, 599, at, "abort.with"),
                Code::Grpc(code) => faults.range(code, 0, 16, at, "abort.with"),
            }
        }
    }
}

#[cfg(test)]
#[cfg(not(loom))]
mod tests {
    use super::*;
    use rand::SeedableRng;
    use rand::rngs::SmallRng;

    #[test]
    fn faults_hit_the_share_that_was_asked_for_and_independently() {
        let policy = FaultPolicy {
            delay: Some(Delay {
                share: 0.5,
                time: Duration::from_secs(1),
            }),
            abort: Some(Abort {
                share: 0.1,
                with: Code::Http(503),
            }),
        };
        let mut rng = SmallRng::seed_from_u64(1);
        let lots: Vec<Fault> = (0..10_000).map(|_| policy.decide(&mut rng)).collect();
        let count = |wanted: fn(&Fault) -> bool| lots.iter().filter(|fault| wanted(fault)).count();
        assert!((4800..5200).contains(&count(|fault| fault.delay.is_some())));
        assert!((900..1100).contains(&count(|fault| fault.abort.is_some())));
        assert!((400..600).contains(&count(
            |fault| fault.abort.is_some() && fault.delay.is_some()
        )));
    }

    #[test]
    fn no_policy_means_no_fault() {
        assert_eq!(
            FaultPolicy::default().decide(&mut SmallRng::seed_from_u64(1)),
            Fault::default()
        );
    }
}
