use parking_lot::Mutex;
use tokio::time::{Instant, sleep, timeout};

use super::*;
use crate::outbound::destinations::tests::{destinations, endpoint, mesh, reachable};

/// A Service with these endpoints, and what was tried.
struct Stage {
    reachable: Reachable,
    policy: TrafficPolicy,
    config: MeshConfig,
    clock: Clock,
    tried: Mutex<Vec<(EndpointId, Duration)>>,
}

/// An app whose queue is full: the SYN that is sent then is the first that it takes.
const SYN_AGAIN: Duration = Duration::from_secs(3);

impl Stage {
    fn new(endpoints: u8) -> Self {
        let endpoints =
            (1..=endpoints).map(|number| endpoint(&format!("10.0.1.{number}:80"), true));
        let (destinations, _) = destinations(mesh(&endpoints.collect::<Vec<_>>()));
        let clock = destinations.clock();
        Self {
            reachable: reachable(&destinations, "10.0.0.1"),
            policy: TrafficPolicy::default(),
            config: MeshConfig::default(),
            clock,
            tried: Mutex::default(),
        }
    }

    /// Every endpoint answers after this long, to whoever is still there. How long it all took.
    async fn run(&self, answer_after: Option<Duration>) -> (Result<(), FailureReason>, Duration) {
        let began = Instant::now();
        let tries = Tries {
            reachable: &self.reachable,
            policy: &self.policy,
            config: &self.config,
            clock: self.clock,
        };
        let open = |endpoint, limit| async move {
            self.tried.lock().push((endpoint, limit));
            let answer = async {
                match answer_after {
                    Some(after) => sleep(after).await,
                    None => std::future::pending().await,
                }
            };
            let late = |_| Failure::of_endpoint(FailureReason::ConnectTimeout, "no answer");
            timeout(limit, answer).await.map_err(late)
        };
        let result = tries.run(open).await;
        let result = result.map(|_| ()).map_err(|failure| failure.reason);
        (result, began.elapsed())
    }

    fn limits(&self) -> Vec<Duration> {
        self.tried.lock().iter().map(|(_, limit)| *limit).collect()
    }
}

fn seconds(all: &[u64]) -> Vec<Duration> {
    all.iter().copied().map(Duration::from_secs).collect()
}

#[tokio::test(start_paused = true)]
async fn a_client_waits_for_the_only_endpoint_while_its_syn_is_sent_again() {
    let stage = Stage::new(1);
    assert_eq!(stage.run(Some(SYN_AGAIN)).await, (Ok(()), SYN_AGAIN));
    assert_eq!(stage.limits(), seconds(&[10]));
}

#[tokio::test(start_paused = true)]
async fn an_endpoint_that_is_silent_for_good_is_given_up_in_a_bounded_time() {
    let stage = Stage::new(1);
    let (result, took) = stage.run(None).await;
    assert_eq!(result, Err(FailureReason::ConnectTimeout));
    assert_eq!(took, stage.config.last_connect_timeout);
}

#[tokio::test(start_paused = true)]
async fn a_silent_endpoint_is_left_soon_where_another_could_take_over_and_the_last_is_waited_for() {
    let stage = Stage::new(3);
    let (result, took) = stage.run(Some(SYN_AGAIN)).await;
    assert_eq!(result, Ok(()));
    assert_eq!(stage.limits(), seconds(&[1, 1, 10]));
    let waits = 2 * stage.config.connect_timeout + SYN_AGAIN;
    assert!(
        (waits..waits + Duration::from_secs(1)).contains(&took),
        "{took:?}"
    );
    let tried = stage.tried.lock();
    assert!((0..3).all(|at| {
        tried[at + 1..]
            .iter()
            .all(|(other, _)| *other != tried[at].0)
    }));
}

#[tokio::test(start_paused = true)]
async fn the_last_attempt_that_the_policy_knows_is_waited_for_too() {
    let mut stage = Stage::new(9);
    stage.policy.settings.retry.retries = 1;
    assert_eq!(stage.run(None).await.0, Err(FailureReason::ConnectTimeout));
    assert_eq!(stage.limits(), seconds(&[1, 10]));
}

#[tokio::test(start_paused = true)]
async fn whoever_allows_every_endpoint_more_time_than_the_last_allows_the_last_no_less() {
    let mut stage = Stage::new(2);
    stage.config.connect_timeout = Duration::from_secs(30);
    assert_eq!(stage.run(None).await.0, Err(FailureReason::ConnectTimeout));
    assert_eq!(stage.limits(), seconds(&[30, 30]));
}

#[tokio::test(start_paused = true)]
async fn what_is_no_fault_of_an_endpoint_is_tried_nowhere_else() {
    let stage = Stage::new(3);
    let tries = Tries {
        reachable: &stage.reachable,
        policy: &stage.policy,
        config: &stage.config,
        clock: stage.clock,
    };
    let open = |endpoint, limit| {
        stage.tried.lock().push((endpoint, limit));
        async { Err::<(), _>(Failure::new(FailureReason::Denied, "no")) }
    };
    let failure = tries.run(open).await.err().unwrap();
    assert_eq!(failure.reason, FailureReason::Denied);
    assert_eq!(stage.limits(), seconds(&[1]));
}
