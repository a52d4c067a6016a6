//! The retry budget: retries are paid for by requests, so that a failing destination is never
//! asked much more often than its clients asked.
//!
//! Within the window, `retries ≤ max(ratio × requests, minimum rate × window)`. It is a window of
//! requests, not of requests in flight: a budget of active requests shrinks just when requests
//! fail fast (envoy-mobile#811). The minimum is a floor and not an addition, so at high rates the
//! amplification stays at `1 + ratio`.
//!
//! Runs at the source, one per (node, destination): limits of several nodes add up, and so do the
//! requests that pay for them.

use std::time::Duration;

use super::rolling::{Added, RollingCounter};
use super::sync::{AtomicU64, Ordering};
use super::time::Timestamp;
use super::validate::{Faults, Validate};

const BUCKETS: usize = 10;

/// How many retries requests pay for.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct BudgetSettings {
    /// Retries per request, over the window. Range 0 to 1, default 0.2.
    pub ratio: f64,
    /// Retries per second that are allowed whatever the requests. Range 0 to 10,000, default 10.
    pub minimum_rate: f64,
    /// The window. Range 1 s to 1 h, default 10 s.
    pub window: Duration,
}

impl Default for BudgetSettings {
    fn default() -> Self {
        Self {
            ratio: 0.2,
            minimum_rate: 10.0,
            window: Duration::from_secs(10),
        }
    }
}

impl Validate for BudgetSettings {
    fn check(&self, at: &str, faults: &mut Faults) {
        faults.share(self.ratio, at, "ratio");
        faults.range(self.minimum_rate, 0.0, 10_000.0, at, "minimumRate");
        faults.duration(
            self.window,
            Duration::from_secs(1),
            Duration::from_secs(3600),
            at,
            "window",
        );
    }
}

/// One destination's budget. Lock-free.
#[derive(Debug)]
pub struct RetryBudget {
    ratio: f64,
    floor: u64,
    requests: RollingCounter<BUCKETS>,
    retries: RollingCounter<BUCKETS>,
    granted: AtomicU64,
    refused: AtomicU64,
}

/// The proof that a request has paid. It cannot be copied, and a retry needs one but makes none:
/// so a request pays once, however often it is attempted.
#[derive(Debug)]
#[must_use]
pub struct Deposit(());

/// No retry left in the window: the original error goes through.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the retry budget is spent")]
pub struct BudgetSpent;

/// Where requests pay and retries are paid from.
pub trait Purse {
    /// A request begins, and pays.
    fn deposit(&self, now: Timestamp) -> Deposit;

    /// Asks for one retry of a request that has paid.
    ///
    /// # Errors
    /// [`BudgetSpent`] when the window's retries are used up; counted.
    fn withdraw(&self, deposit: &Deposit, now: Timestamp) -> Result<(), BudgetSpent>;
}

impl RetryBudget {
    /// An unspent budget.
    pub fn new(settings: &BudgetSettings) -> Self {
        Self {
            ratio: settings.ratio,
            floor: (settings.minimum_rate * settings.window.as_secs_f64()) as u64,
            requests: RollingCounter::new(settings.window),
            retries: RollingCounter::new(settings.window),
            granted: AtomicU64::new(0),
            refused: AtomicU64::new(0),
        }
    }

    /// Takes one retry, if there is one left.
    fn reserve(&self, now: Timestamp) -> Result<Added, BudgetSpent> {
        // Reserve, then look: of several workers at the limit each sees the reservations of the
        // others, so together they never exceed it. At worst both step back.
        let reserved = self.retries.add(now);
        let allowed = ((self.ratio * self.requests.sum(now) as f64) as u64).max(self.floor);
        if self.retries.sum(now) <= allowed {
            return Ok(reserved);
        }
        self.retries.take_back(reserved);
        Err(self.refuse())
    }

    fn refuse(&self) -> BudgetSpent {
        self.refused.fetch_add(1, Ordering::Relaxed);
        BudgetSpent
    }

    /// Retries granted since the start.
    pub fn granted(&self) -> u64 {
        self.granted.load(Ordering::Relaxed)
    }

    /// Retries refused since the start.
    pub fn refused(&self) -> u64 {
        self.refused.load(Ordering::Relaxed)
    }
}

impl Purse for RetryBudget {
    fn deposit(&self, now: Timestamp) -> Deposit {
        self.requests.add(now);
        Deposit(())
    }

    fn withdraw(&self, _: &Deposit, now: Timestamp) -> Result<(), BudgetSpent> {
        self.reserve(now)?;
        self.granted.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
}

/// One source's part of a destination's budget. A source whose every request fails would spend what
/// the requests of all have paid; so each spends at most what its own have paid (or the minimum),
/// and all together no more than the whole.
#[derive(Clone, Copy, Debug)]
pub struct Share<'a> {
    /// The source's own account.
    pub own: &'a RetryBudget,
    /// The destination's.
    pub whole: &'a RetryBudget,
}

impl Purse for Share<'_> {
    fn deposit(&self, now: Timestamp) -> Deposit {
        self.own.requests.add(now);
        self.whole.deposit(now)
    }

    fn withdraw(&self, deposit: &Deposit, now: Timestamp) -> Result<(), BudgetSpent> {
        let reserved = self.own.reserve(now)?;
        self.whole
            .withdraw(deposit, now)
            .inspect_err(|_| self.own.retries.take_back(reserved))
    }
}

#[cfg(test)]
#[cfg(not(loom))]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn at_total_failure_no_more_than_a_fifth_is_added() {
        let budget = RetryBudget::new(&BudgetSettings::default());
        let mut now = Timestamp::ZERO;
        let mut sent = 0;
        for _ in 0..60_000 {
            let deposit = budget.deposit(now);
            sent += 1;
            // Every attempt fails, and every failure asks for three retries.
            for _ in 0..3 {
                sent += u64::from(budget.withdraw(&deposit, now).is_ok());
            }
            now = now + Duration::from_millis(1);
        }
        assert!(sent as f64 / 60_000.0 <= 1.2, "{sent} attempts");
        assert!(sent as f64 / 60_000.0 > 1.19, "{sent} attempts");
    }

    #[test]
    fn with_next_to_no_traffic_the_minimum_rate_is_still_granted() {
        let budget = RetryBudget::new(&BudgetSettings::default());
        let deposit = budget.deposit(Timestamp::ZERO);
        let granted = (0..1000)
            .filter(|_| budget.withdraw(&deposit, Timestamp::ZERO).is_ok())
            .count();
        assert_eq!(granted, 100);
        assert_eq!(budget.refused(), 900);
    }

    #[test]
    fn a_budget_does_not_shrink_while_requests_fail_fast() {
        // envoy-mobile#811: a share of *active* requests is next to nothing when they fail at once.
        let budget = RetryBudget::new(&BudgetSettings {
            minimum_rate: 0.0,
            ..BudgetSettings::default()
        });
        for _ in 0..1000 {
            let _gone_at_once = budget.deposit(Timestamp::ZERO);
        }
        let deposit = budget.deposit(Timestamp::ZERO);
        let granted = (0..1000)
            .filter(|_| budget.withdraw(&deposit, Timestamp::ZERO).is_ok())
            .count();
        assert_eq!(granted, 200);
    }

    #[test]
    fn a_source_whose_every_request_fails_spends_only_its_own_part() {
        let settings = BudgetSettings {
            minimum_rate: 1.0,
            ..BudgetSettings::default()
        };
        let (whole, loud, quiet) = (
            RetryBudget::new(&settings),
            RetryBudget::new(&settings),
            RetryBudget::new(&settings),
        );
        let of = |own| Share { own, whole: &whole };
        let mut taken = 0;
        for _ in 0..1000 {
            let deposit = of(&loud).deposit(Timestamp::ZERO);
            let _paid_by_the_quiet_one = of(&quiet).deposit(Timestamp::ZERO);
            for _ in 0..3 {
                taken += u32::from(of(&loud).withdraw(&deposit, Timestamp::ZERO).is_ok());
            }
        }
        assert_eq!(taken, 200);
        let deposit = of(&quiet).deposit(Timestamp::ZERO);
        let left = (0..1000)
            .filter(|_| of(&quiet).withdraw(&deposit, Timestamp::ZERO).is_ok())
            .count();
        assert_eq!(left, 200);
    }

    proptest! {
        #[test]
        fn the_budget_is_never_exceeded_in_any_window(
            ratio in 0.0..1.0f64,
            rate in 0.0..20.0f64,
            steps in proptest::collection::vec((0u64..400, 0u32..4), 1..400),
        ) {
            let settings = BudgetSettings { ratio, minimum_rate: rate, window: Duration::from_secs(10) };
            let budget = RetryBudget::new(&settings);
            let mut now = Timestamp::ZERO;
            let (mut requests, mut retries) = (Vec::new(), Vec::new());
            for (gap, wanted) in steps {
                now = now + Duration::from_millis(gap);
                let deposit = budget.deposit(now);
                requests.push(now);
                for _ in 0..wanted {
                    if budget.withdraw(&deposit, now).is_ok() {
                        retries.push(now);
                    }
                }
                // The window as the buckets cut it.
                let within = |moment: &&Timestamp| now.as_nanos() / 1_000_000_000 - moment.as_nanos() / 1_000_000_000 < 10;
                let paid = requests.iter().filter(within).count();
                let spent = retries.iter().filter(within).count();
                let allowed = ((ratio * paid as f64) as usize).max((rate * 10.0) as usize);
                // The window slides: what was right when granted may be more than what is left of
                // the requests that paid. So the bound is asked for at each grant.
                if retries.last() == Some(&now) {
                    prop_assert!(spent <= allowed, "{spent} of {allowed}");
                }
            }
        }
    }
}

#[cfg(test)]
#[cfg(loom)]
mod model {
    use super::*;
    use loom::sync::Arc;
    use loom::thread;

    #[test]
    fn workers_at_the_limit_never_exceed_it_together() {
        loom::model(|| {
            let settings = BudgetSettings {
                ratio: 0.0,
                minimum_rate: 1.0,
                window: Duration::from_secs(1),
            };
            let budget = Arc::new(RetryBudget::new(&settings));
            let other = {
                let budget = Arc::clone(&budget);
                thread::spawn(move || budget.withdraw(&Deposit(()), Timestamp::ZERO).is_ok())
            };
            let mine = budget.withdraw(&Deposit(()), Timestamp::ZERO).is_ok();
            let theirs = other.join().unwrap();
            assert!(!(mine && theirs));
        });
    }
}
