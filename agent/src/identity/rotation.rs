//! When a certificate is asked for: at once, again at half of its life, and again after a pause
//! that grows when it failed. Pure: time and chance are passed in.

use std::time::{Duration, SystemTime};

/// How certificates are renewed.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RotationPolicy {
    /// Share of the remaining life after which a certificate is renewed. Default 0.5.
    pub share: f64,
    /// How far chance moves that moment, as a share of the life in either direction, so that a
    /// node's certificates do not all come due at once. Default 0.05.
    pub jitter: f64,
    /// Pause after the first failure; it doubles with each further one, and chance takes up to
    /// half of it away. Default 200 ms.
    pub retry: Duration,
    /// Longest pause between attempts. Default 30 s.
    pub retry_cap: Duration,
}

impl Default for RotationPolicy {
    fn default() -> Self {
        Self {
            share: 0.5,
            jitter: 0.05,
            retry: Duration::from_millis(200),
            retry_cap: Duration::from_secs(30),
        }
    }
}

impl RotationPolicy {
    /// How long after its arrival a certificate with so much life left is renewed. Counted from
    /// the arrival, because a CA sets the start of validity back to allow for clocks that differ.
    /// `chance` is uniform in 0..1.
    #[must_use]
    pub fn renew_after(&self, life: Duration, chance: f64) -> Duration {
        let share = self.share + self.jitter * (2.0 * chance - 1.0);
        life.mul_f64(share.clamp(0.0, 1.0))
    }

    /// The pause after so many failures in a row (from 1). `chance` is uniform in 0..1.
    #[must_use]
    pub fn retry_after(&self, failures: u32, chance: f64) -> Duration {
        let doublings = failures.saturating_sub(1).min(31);
        let pause = self.retry.saturating_mul(1 << doublings);
        pause
            .min(self.retry_cap)
            .mul_f64(1.0 - chance.clamp(0.0, 1.0) / 2.0)
    }
}

/// Where one identity stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Attempt {
    /// The next request goes out at this time.
    Due(SystemTime),
    /// A request is under way.
    UnderWay,
}

/// The timetable of one identity.
#[derive(Debug, Clone)]
pub(super) struct Plan {
    attempt: Attempt,
    failures: u32,
    last_error: Option<String>,
}

impl Plan {
    /// Due at once.
    pub(super) fn new(now: SystemTime) -> Self {
        Self {
            attempt: Attempt::Due(now),
            failures: 0,
            last_error: None,
        }
    }

    /// When the next request goes out; none while one is under way.
    pub(super) fn due(&self) -> Option<SystemTime> {
        match self.attempt {
            Attempt::Due(at) => Some(at),
            Attempt::UnderWay => None,
        }
    }

    /// The error of the last attempt, if it failed.
    pub(super) fn last_error(&self) -> Option<&str> {
        self.last_error.as_deref()
    }

    /// A request went out.
    pub(super) fn started(&mut self) {
        self.attempt = Attempt::UnderWay;
    }

    /// Asks again at once, whatever was planned.
    pub(super) fn hurry(&mut self, now: SystemTime) {
        if let Attempt::Due(at) = &mut self.attempt {
            *at = now.min(*at);
        }
    }

    /// A certificate that ends at `not_after` arrived at `now`.
    pub(super) fn issued(
        &mut self,
        policy: &RotationPolicy,
        now: SystemTime,
        not_after: SystemTime,
        chance: f64,
    ) {
        let life = not_after.duration_since(now).unwrap_or_default();
        self.failures = 0;
        self.last_error = None;
        // Never sooner than a failed attempt would be repeated: a CA that hands out certificates
        // with next to no life must not be asked in a tight loop.
        let pause = policy.renew_after(life, chance).max(policy.retry);
        self.attempt = Attempt::Due(now + pause);
    }

    /// The request failed.
    pub(super) fn failed(
        &mut self,
        policy: &RotationPolicy,
        now: SystemTime,
        error: String,
        chance: f64,
    ) {
        self.failures = self.failures.saturating_add(1);
        self.last_error = Some(error);
        self.attempt = Attempt::Due(now + policy.retry_after(self.failures, chance));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DAY: Duration = Duration::from_secs(24 * 3600);

    fn start() -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000)
    }

    #[test]
    fn a_day_long_certificate_is_renewed_at_half_life_give_or_take_a_twentieth() {
        let policy = RotationPolicy::default();
        assert_eq!(policy.renew_after(DAY, 0.5), DAY / 2);
        assert_eq!(policy.renew_after(DAY, 0.0), DAY.mul_f64(0.45));
        assert!(policy.renew_after(DAY, 0.999) < DAY.mul_f64(0.55));
    }

    #[test]
    fn the_pause_doubles_to_its_cap_and_chance_takes_at_most_half() {
        let policy = RotationPolicy::default();
        let ms = Duration::from_millis;
        assert_eq!(policy.retry_after(1, 0.0), ms(200));
        assert_eq!(policy.retry_after(2, 0.0), ms(400));
        assert_eq!(policy.retry_after(4, 1.0), ms(800));
        assert_eq!(policy.retry_after(60, 0.0), Duration::from_secs(30));
        assert_eq!(policy.retry_after(u32::MAX, 1.0), Duration::from_secs(15));
    }

    #[test]
    fn a_plan_runs_from_first_request_to_rotation_through_failures() {
        let policy = RotationPolicy::default();
        let mut plan = Plan::new(start());
        assert_eq!(plan.due(), Some(start()));
        plan.started();
        assert_eq!(plan.due(), None);
        plan.failed(&policy, start(), "no route".to_owned(), 0.0);
        assert_eq!(plan.due(), Some(start() + Duration::from_millis(200)));
        assert_eq!(plan.last_error(), Some("no route"));
        plan.started();
        plan.issued(&policy, start(), start() + DAY, 0.5);
        assert_eq!(plan.due(), Some(start() + DAY / 2));
        assert_eq!(plan.last_error(), None);
        plan.started();
        plan.failed(&policy, start() + DAY / 2, "away".to_owned(), 0.0);
        let again = start() + DAY / 2 + Duration::from_millis(200);
        assert_eq!(
            plan.due(),
            Some(again),
            "failures were forgotten by success"
        );
    }

    #[test]
    fn a_certificate_without_life_is_not_asked_for_in_a_tight_loop() {
        let policy = RotationPolicy::default();
        let mut plan = Plan::new(start());
        plan.issued(&policy, start(), start() - DAY, 0.5);
        assert_eq!(plan.due(), Some(start() + policy.retry));
    }

    #[test]
    fn hurrying_does_not_start_a_second_request() {
        let mut plan = Plan::new(start() + DAY);
        plan.hurry(start());
        assert_eq!(plan.due(), Some(start()));
        plan.started();
        plan.hurry(start());
        assert_eq!(plan.due(), None);
    }

    proptest::proptest! {
        #[test]
        fn renewal_always_falls_within_the_life(seconds in 1_u64..400_000, chance in 0.0..1.0_f64) {
            let life = Duration::from_secs(seconds);
            let after = RotationPolicy::default().renew_after(life, chance);
            proptest::prop_assert!(after >= life.mul_f64(0.449) && after <= life.mul_f64(0.551));
        }
    }
}
