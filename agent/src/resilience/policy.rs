//! All settings of a (destination, route) together. The defaults are what traffic gets without any
//! policy, and are safe: they retry only what never reached an application, and shed nothing.

use super::balance::BalanceSettings;
use super::breaker::BreakerSettings;
use super::budget::BudgetSettings;
use super::ejection::EjectionSettings;
use super::fallback::Fallback;
use super::fault::FaultPolicy;
use super::limit::LimitSettings;
use super::outcome::{GrpcClassifier, HttpClassifier};
use super::retry::RetryPolicy;
use super::timeout::Timeouts;
use super::validate::{Faults, Validate, join};

/// Everything that can be configured. `B` names a backend to fall back to.
#[derive(Clone, Debug, PartialEq)]
pub struct Policy<B> {
    /// Which HTTP statuses are failures.
    pub http: HttpClassifier,
    /// Which gRPC statuses are failures.
    pub grpc: GrpcClassifier,
    /// Time limits.
    pub timeouts: Timeouts,
    /// Retries.
    pub retry: RetryPolicy,
    /// What pays for them; one per destination.
    pub budget: BudgetSettings,
    /// The circuit breaker.
    pub breaker: BreakerSettings,
    /// Ejection of endpoints; one per destination.
    pub ejection: EjectionSettings,
    /// Balancing; one per destination.
    pub balance: BalanceSettings,
    /// Rate and concurrency limits.
    pub limits: LimitSettings,
    /// Faults on purpose.
    pub fault: FaultPolicy,
    /// What is left when nothing is left.
    pub fallback: Fallback<B>,
}

impl<B> Default for Policy<B> {
    fn default() -> Self {
        Self {
            http: HttpClassifier::default(),
            grpc: GrpcClassifier::default(),
            timeouts: Timeouts::default(),
            retry: RetryPolicy::default(),
            budget: BudgetSettings::default(),
            breaker: BreakerSettings::default(),
            ejection: EjectionSettings::default(),
            balance: BalanceSettings::default(),
            limits: LimitSettings::default(),
            fault: FaultPolicy::default(),
            fallback: Fallback::None,
        }
    }
}

impl<B> Validate for Policy<B> {
    fn check(&self, at: &str, faults: &mut Faults) {
        self.http.check(&join(at, "http"), faults);
        self.grpc.check(&join(at, "grpc"), faults);
        self.timeouts.check(&join(at, "timeouts"), faults);
        self.retry.check(&join(at, "retry"), faults);
        self.budget.check(&join(at, "budget"), faults);
        self.breaker.check(&join(at, "breaker"), faults);
        self.ejection.check(&join(at, "ejection"), faults);
        self.balance.check(&join(at, "balance"), faults);
        self.limits.check(&join(at, "limits"), faults);
        self.fault.check(&join(at, "fault"), faults);
        self.fallback.check(&join(at, "fallback"), faults);
    }
}

#[cfg(test)]
#[cfg(not(loom))]
mod tests {
    use super::*;

    #[test]
    fn the_defaults_are_valid() {
        assert_eq!(Policy::<String>::default().validate(), Ok(()));
    }

    #[test]
    fn every_fault_is_reported_with_its_path_and_reason() {
        let mut policy = Policy::<String>::default();
        policy.breaker.failure_ratio = f64::NAN;
        policy.breaker.open_time.jitter = 2.0;
        policy.ejection.max_ejected = -0.5;
        policy.budget.ratio = 3.0;
        let faults = policy.validate().unwrap_err();
        let said: Vec<String> = faults.iter().map(ToString::to_string).collect();
        assert_eq!(
            said,
            [
                "budget.ratio: must be from 0 to 1, is 3",
                "breaker.failureRatio: must be from 0.01 to 1, is NaN",
                "breaker.openTime.jitter: must be from 0 to 1, is 2",
                "ejection.maxEjected: must be from 0 to 1, is -0.5",
            ]
        );
    }
}
