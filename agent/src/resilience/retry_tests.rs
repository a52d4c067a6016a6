//! What is sent again, and what never is.

use rand::SeedableRng;
use rand::rngs::SmallRng;

use super::*;
use crate::resilience::budget::{BudgetSettings, RetryBudget};
use crate::resilience::outcome::Unsent;
use crate::resilience::timeout::Timeouts;

const GET: Nature = Nature {
    method: Method::Safe,
    body: Body::None,
};
const POST: Nature = Nature {
    method: Method::Other,
    body: Body::Buffered,
};
const RESET: Outcome = Outcome::Failure(Failure::Reset);
const UNAVAILABLE: Outcome = Outcome::Failure(Failure::Status(Code::Http(503)));
const REFUSED: Outcome = Outcome::Unsent(Unsent::ConnectFailed);

struct Bench {
    budget: RetryBudget,
    rng: SmallRng,
    retries: Retries,
}

fn bench(nature: Nature) -> Bench {
    let budget = RetryBudget::new(&BudgetSettings::default());
    let timeouts = Timeouts {
        request: Some(Duration::from_secs(15)),
        ..Timeouts::default()
    };
    let deadline = timeouts.deadline(Timestamp::ZERO);
    Bench {
        retries: Retries::begin(&budget, nature, deadline, Timestamp::ZERO),
        budget,
        rng: SmallRng::seed_from_u64(1),
    }
}

impl Bench {
    fn after(&mut self, policy: &RetryPolicy, outcome: Outcome) -> Decision {
        self.with(policy, outcome, Facts::default(), Timestamp::ZERO)
    }

    fn with(
        &mut self,
        policy: &RetryPolicy,
        outcome: Outcome,
        facts: Facts,
        now: Timestamp,
    ) -> Decision {
        self.retries
            .next(policy, outcome, facts, &self.budget, &mut self.rng, now)
    }
}

fn is_retry(decision: Decision) -> bool {
    matches!(decision, Decision::Retry { .. })
}

fn usual() -> RetryPolicy {
    RetryPolicy::of_route(2, Vec::new())
}

#[test]
fn a_post_is_never_sent_twice_after_bytes_were_sent() {
    for outcome in [RESET, UNAVAILABLE, Outcome::Failure(Failure::Timeout)] {
        assert_eq!(
            bench(POST).after(&usual(), outcome),
            Decision::Stop(Stop::NotRepeatable)
        );
    }
    let vouched = RetryPolicy {
        repeat: Repeat::Any,
        ..usual()
    };
    assert!(is_retry(bench(POST).after(&vouched, RESET)));
}

#[test]
fn what_was_provably_never_sent_is_retried_whatever_the_method_and_without_any_policy() {
    for unsent in [
        Unsent::ConnectFailed,
        Unsent::ConnectTimeout,
        Unsent::StreamRefused,
        Unsent::GoingAway,
    ] {
        assert!(is_retry(
            bench(POST).after(&RetryPolicy::default(), Outcome::Unsent(unsent))
        ));
    }
}

#[test]
fn without_a_policy_nothing_else_is_retried() {
    for outcome in [RESET, UNAVAILABLE, Outcome::Failure(Failure::Timeout)] {
        assert_eq!(
            bench(GET).after(&RetryPolicy::default(), outcome),
            Decision::Stop(Stop::NotRetriable)
        );
    }
}

#[test]
fn a_retry_limit_without_a_condition_retries_the_usual() {
    assert!(is_retry(
        bench(GET).after(&RetryPolicy::of_route(3, Vec::new()), UNAVAILABLE)
    ));
    assert!(is_retry(
        bench(GET).after(&RetryPolicy::of_route(3, Vec::new()), RESET)
    ));
}

#[test]
fn a_body_that_is_not_wholly_kept_is_not_replayed() {
    let streaming = Nature {
        method: Method::Idempotent,
        body: Body::Streaming,
    };
    assert_eq!(
        bench(streaming).after(&usual(), RESET),
        Decision::Stop(Stop::NotRepeatable)
    );
    let kept = Nature {
        method: Method::Idempotent,
        body: Body::Buffered,
    };
    assert!(is_retry(bench(kept).after(&usual(), RESET)));
}

#[test]
fn an_answer_that_the_client_has_seen_is_not_taken_back() {
    let facts = Facts {
        answer: Answer::Begun,
        retry_after: None,
    };
    assert_eq!(
        bench(GET).with(&usual(), RESET, facts, Timestamp::ZERO),
        Decision::Stop(Stop::AnswerBegun)
    );
}

#[test]
fn conditions_are_met_by_status_class_and_code() {
    let only = |condition| RetryPolicy::of_route(1, vec![condition]);
    let internal = Outcome::Failure(Failure::Status(Code::Http(500)));
    assert!(is_retry(
        bench(GET).after(&only(Condition::ServerError), internal)
    ));
    assert!(!is_retry(
        bench(GET).after(&only(Condition::GatewayError), internal)
    ));
    let conflict = Outcome::CallerError(Code::Http(409));
    assert!(is_retry(
        bench(GET).after(&only(Condition::Code(Code::Http(409))), conflict)
    ));
    let exhausted = Outcome::CallerError(Code::Grpc(grpc::RESOURCE_EXHAUSTED));
    assert!(is_retry(bench(GET).after(&usual(), exhausted)));
}

#[test]
fn attempts_end() {
    let mut bench = bench(GET);
    assert!(is_retry(bench.after(&usual(), REFUSED)));
    assert!(is_retry(bench.after(&usual(), REFUSED)));
    assert_eq!(
        bench.after(&usual(), REFUSED),
        Decision::Stop(Stop::AttemptsSpent)
    );
    assert_eq!(bench.budget.granted(), 2);
}

#[test]
fn retry_after_is_waited_for_up_to_the_cap() {
    let ask = |seconds| Facts {
        retry_after: Some(Duration::from_secs(seconds)),
        ..Facts::default()
    };
    let decision = bench(GET).with(&usual(), UNAVAILABLE, ask(1), Timestamp::ZERO);
    assert_eq!(
        decision,
        Decision::Retry {
            after: Duration::from_secs(1)
        }
    );
    let decision = bench(GET).with(&usual(), UNAVAILABLE, ask(2), Timestamp::ZERO);
    assert_eq!(decision, Decision::Stop(Stop::RetryAfterTooLong));
}

#[test]
fn no_attempt_is_begun_that_the_deadline_would_end() {
    let late = Timestamp::ZERO + Duration::from_millis(14_999);
    let ask = Facts {
        retry_after: Some(Duration::from_millis(500)),
        ..Facts::default()
    };
    assert_eq!(
        bench(GET).with(&usual(), UNAVAILABLE, ask, late),
        Decision::Stop(Stop::DeadlineNear)
    );
}

#[test]
fn over_budget_the_original_error_goes_through_and_is_counted() {
    let none = BudgetSettings {
        ratio: 0.0,
        minimum_rate: 0.0,
        ..BudgetSettings::default()
    };
    let mut bench = Bench {
        budget: RetryBudget::new(&none),
        ..bench(GET)
    };
    assert_eq!(
        bench.after(&usual(), REFUSED),
        Decision::Stop(Stop::BudgetSpent)
    );
    assert_eq!(bench.budget.refused(), 1);
}

#[test]
fn a_deposit_is_counted_once_however_often_its_request_is_attempted() {
    let budget = RetryBudget::new(&BudgetSettings {
        ratio: 1.0,
        minimum_rate: 0.0,
        ..BudgetSettings::default()
    });
    let deadline = Timeouts::default().deadline(Timestamp::ZERO);
    let mut rng = SmallRng::seed_from_u64(1);
    let mut retries = Retries::begin(&budget, GET, deadline, Timestamp::ZERO);
    let policy = RetryPolicy {
        retries: 10,
        ..usual()
    };
    let granted = (0..10).filter(|_| {
        is_retry(retries.next(
            &policy,
            REFUSED,
            Facts::default(),
            &budget,
            &mut rng,
            Timestamp::ZERO,
        ))
    });
    assert_eq!(
        granted.count(),
        1,
        "one request pays for one retry, and retries pay for none"
    );
}

#[test]
fn a_success_a_shed_and_a_cancellation_are_not_retried() {
    for outcome in [Outcome::Success, Outcome::Shed, Outcome::Cancelled] {
        assert_eq!(
            bench(GET).after(&usual(), outcome),
            Decision::Stop(Stop::Done)
        );
    }
}

#[test]
fn a_slow_read_is_hedged_once_and_pays_from_the_budget() {
    let hedge = Hedge {
        after: Duration::from_millis(50),
        attempts: 1,
    };
    let policy = RetryPolicy {
        hedge: Some(hedge),
        ..usual()
    };
    let mut read = bench(GET);
    assert!(!read.retries.hedge(
        &policy,
        Duration::from_millis(49),
        &read.budget,
        Timestamp::ZERO
    ));
    assert!(read.retries.hedge(
        &policy,
        Duration::from_millis(50),
        &read.budget,
        Timestamp::ZERO
    ));
    assert!(!read.retries.hedge(
        &policy,
        Duration::from_millis(90),
        &read.budget,
        Timestamp::ZERO
    ));
    assert_eq!(read.budget.granted(), 1);
    let mut write = bench(POST);
    assert!(!write.retries.hedge(
        &policy,
        Duration::from_secs(1),
        &write.budget,
        Timestamp::ZERO
    ));
}

#[test]
fn settings_out_of_range_are_named() {
    let policy = RetryPolicy {
        retries: 11,
        conditions: vec![Condition::Code(Code::Http(200))],
        ..usual()
    };
    let fields: Vec<String> = policy
        .validate()
        .unwrap_err()
        .into_iter()
        .map(|fault| fault.field)
        .collect();
    assert_eq!(fields, ["retries", "codes"]);
}

#[test]
fn a_body_that_outgrew_what_is_kept_meanwhile_ends_the_retries() {
    let budget = RetryBudget::new(&BudgetSettings::default());
    let policy = RetryPolicy::of_route(2, Vec::new());
    let nature = Nature {
        method: Method::Safe,
        body: Body::Buffered,
    };
    let mut rng = SmallRng::seed_from_u64(1);
    let deadline = Deadline::at(Timestamp::NEVER);
    let mut retries = Retries::begin(&budget, nature, deadline, Timestamp::ZERO);
    let mut next = |retries: &mut Retries| {
        let outcome = Outcome::Failure(Failure::Reset);
        let facts = Facts::default();
        retries.next(&policy, outcome, facts, &budget, &mut rng, Timestamp::ZERO)
    };
    assert!(matches!(next(&mut retries), Decision::Retry { .. }));
    retries.set_body(Body::Streaming);
    assert_eq!(next(&mut retries), Decision::Stop(Stop::NotRepeatable));
}
