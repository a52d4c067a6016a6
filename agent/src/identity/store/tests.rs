//! The store in simulated time: tokio's clock is paused, and the wall clock follows it.

use std::sync::atomic::AtomicUsize;

use super::*;
use crate::identity::RootsError;
use crate::identity::testing::TestAuthority;

const HOUR: Duration = Duration::from_secs(3600);
const DAY: Duration = Duration::from_secs(24 * 3600);

fn web() -> SpiffeId {
    "spiffe://cluster.local/ns/shop/sa/web".parse().unwrap()
}

fn cart() -> SpiffeId {
    "spiffe://cluster.local/ns/shop/sa/cart".parse().unwrap()
}

/// What the CA does with a request.
#[derive(Clone, Copy, PartialEq)]
enum Mood {
    Willing,
    Away,
    Panicking,
    Silent,
}

/// A CA in this process, which lives in simulated time.
struct Ca {
    authority: Mutex<Arc<TestAuthority>>,
    roots: Mutex<Option<Roots>>,
    mood: Mutex<Mood>,
    lifetime: Duration,
    clock: Clock,
    set_back: Arc<Mutex<Duration>>,
    asked: Mutex<Vec<SystemTime>>,
    at_once: AtomicUsize,
    most_at_once: AtomicUsize,
}

impl Ca {
    fn new(lifetime: Duration) -> Arc<Self> {
        // Whole seconds, as in X.509, so that ends are exact.
        let start = SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000);
        let began = Instant::now();
        let set_back = Arc::new(Mutex::new(Duration::ZERO));
        let by = set_back.clone();
        let clock: Clock = Arc::new(move || start + began.elapsed() - *by.lock());
        let authority = TestAuthority::at("cluster.local", clock());
        Arc::new(Self {
            roots: Mutex::new(Some(authority.roots())),
            authority: Mutex::new(Arc::new(authority)),
            mood: Mutex::new(Mood::Willing),
            lifetime,
            clock,
            set_back,
            asked: Mutex::default(),
            at_once: AtomicUsize::new(0),
            most_at_once: AtomicUsize::new(0),
        })
    }

    fn mood(&self, mood: Mood) {
        *self.mood.lock() = mood;
    }

    fn asked(&self) -> usize {
        self.asked.lock().len()
    }
}

impl Issuer for Ca {
    fn issue<'a>(&'a self, id: &'a SpiffeId) -> Issuing<'a, WorkloadCertificate> {
        Box::pin(async move {
            self.asked.lock().push((self.clock)());
            let now = self.at_once.fetch_add(1, Ordering::SeqCst) + 1;
            self.most_at_once.fetch_max(now, Ordering::SeqCst);
            tokio::time::sleep(Duration::from_millis(10)).await;
            self.at_once.fetch_sub(1, Ordering::SeqCst);
            let mood = *self.mood.lock();
            match mood {
                Mood::Away => Err(IssueError::new("the CA is away")),
                Mood::Panicking => panic!("as the test wants it"),
                Mood::Silent => std::future::pending().await,
                Mood::Willing => {
                    let authority = self.authority.lock().clone();
                    Ok(authority.issue_at(id, self.lifetime, (self.clock)()))
                }
            }
        })
    }

    fn roots(&self) -> Issuing<'_, Roots> {
        let roots = self.roots.lock().clone();
        Box::pin(async move { roots.ok_or(IssueError::new(RootsError::Empty)) })
    }
}

struct Running {
    ca: Arc<Ca>,
    store: Arc<Certificates>,
    stop: CancellationToken,
    run: tokio::task::JoinHandle<()>,
}

impl Running {
    fn new(lifetime: Duration) -> Self {
        let ca = Ca::new(lifetime);
        let store = Certificates::new(CertificatesOptions {
            clock: ca.clock.clone(),
            ..CertificatesOptions::new(ca.clone())
        });
        let stop = CancellationToken::new();
        let run = tokio::spawn(store.clone().run(stop.clone()));
        Self {
            ca,
            store,
            stop,
            run,
        }
    }

    fn want(&self, ids: &[SpiffeId]) {
        self.store.want(ids.iter().cloned().collect());
    }

    async fn ready(&self, id: &SpiffeId) -> Result<Arc<WorkloadCertificate>, CertificateError> {
        self.store.ready(id, HOUR).await
    }
}

#[tokio::test(start_paused = true)]
async fn a_wanted_identity_is_issued_and_waited_for() {
    let node = Running::new(DAY);
    let id = web();
    assert_eq!(
        node.store.current(&id).unwrap_err(),
        CertificateError::NotWanted(web())
    );
    node.want(&[web()]);
    assert!(matches!(
        node.store.current(&id),
        Err(CertificateError::NotYetIssued { .. })
    ));
    let certificate = node.ready(&id).await.unwrap();
    assert_eq!(certificate.id, id);
    assert!(Arc::ptr_eq(&certificate, &node.store.current(&id).unwrap()));
    let status = serde_json::to_value(node.store.status()).unwrap();
    assert_eq!(status[0]["id"], "spiffe://cluster.local/ns/shop/sa/web");
    assert_eq!(status[0]["state"], "valid");
    assert_eq!(status[0]["serial"], certificate.serial.as_str());
    assert_eq!(status[0]["not_after"], "2027-01-16T08:00:01Z");
    assert!(status[0]["last_error"].is_null());
}

#[tokio::test(start_paused = true)]
async fn waiting_ends_at_its_limit_with_the_reason() {
    let node = Running::new(DAY);
    node.ca.mood(Mood::Away);
    node.want(&[web()]);
    let began = Instant::now();
    let error = node.store.ready(&web(), Duration::from_secs(3)).await;
    assert_eq!(
        error.unwrap_err(),
        CertificateError::NotYetIssued {
            id: web(),
            last_error: Some("the CA is away".to_owned())
        }
    );
    assert_eq!(began.elapsed(), Duration::from_secs(3));
}

#[tokio::test(start_paused = true)]
async fn over_ten_days_each_rotation_falls_at_half_life_and_no_moment_is_without_certificate() {
    let node = Running::new(DAY);
    node.want(&[web()]);
    node.ready(&web()).await.unwrap();
    for _ in 0..10 * 24 * 60 {
        tokio::time::sleep(Duration::from_secs(60)).await;
        node.store.current(&web()).unwrap();
    }
    let asked = node.ca.asked.lock().clone();
    assert!((18..=22).contains(&asked.len()), "{}", asked.len());
    for pair in asked.windows(2) {
        let pause = pair[1].duration_since(pair[0]).unwrap();
        assert!(pause > HOUR * 10 && pause < HOUR * 14, "{pause:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn rotation_swaps_the_certificate_and_leaves_the_old_one_to_those_who_hold_it() {
    let node = Running::new(DAY);
    node.want(&[web()]);
    let first = node.ready(&web()).await.unwrap();
    tokio::time::sleep(HOUR * 14).await;
    let second = node.store.current(&web()).unwrap();
    assert_ne!(first.serial, second.serial);
    assert_ne!(first.chain(), second.chain());
    assert_eq!(Arc::strong_count(&first), 1, "the store forgot it");
}

#[tokio::test(start_paused = true)]
async fn while_the_ca_is_away_the_certificate_serves_to_its_end_and_not_a_moment_longer() {
    let node = Running::new(HOUR);
    node.want(&[web()]);
    let certificate = node.ready(&web()).await.unwrap();
    node.ca.mood(Mood::Away);
    let left = certificate
        .not_after
        .duration_since((node.ca.clock)())
        .unwrap();
    tokio::time::sleep(left - Duration::from_secs(1)).await;
    assert!(node.store.current(&web()).is_ok());
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(
        node.store.current(&web()).unwrap_err(),
        CertificateError::Expired {
            id: web(),
            since: certificate.not_after,
            last_error: Some("the CA is away".to_owned())
        }
    );
    assert_eq!(node.store.status()[0].state, CertificateState::Expired);

    node.ca.mood(Mood::Willing);
    let new = node.ready(&web()).await.unwrap();
    assert_ne!(new.serial, certificate.serial);
}

#[tokio::test(start_paused = true)]
async fn an_hour_without_a_ca_costs_a_bounded_number_of_requests() {
    let node = Running::new(DAY);
    node.ca.mood(Mood::Away);
    node.want(&[web()]);
    tokio::time::sleep(HOUR).await;
    // 30 s at most between two, 15 s at least, and a few short ones at the start.
    let asked = node.ca.asked();
    assert!((110..=260).contains(&asked), "{asked}");
}

#[tokio::test(start_paused = true)]
async fn an_identity_that_left_is_forgotten_and_gets_a_new_key_when_it_comes_back() {
    let node = Running::new(DAY);
    node.want(&[web(), cart()]);
    let first = node.ready(&web()).await.unwrap();
    node.ready(&cart()).await.unwrap();
    node.want(&[cart()]);
    assert_eq!(
        node.store.current(&web()).unwrap_err(),
        CertificateError::NotWanted(web())
    );
    assert_eq!(Arc::strong_count(&first), 1, "key and configs are dropped");
    assert_eq!(node.store.status().len(), 1);
    node.want(&[web(), cart()]);
    assert_ne!(node.ready(&web()).await.unwrap().chain(), first.chain());
    assert_eq!(node.ca.asked(), 3, "cart was not asked for again");
}

#[tokio::test(start_paused = true)]
async fn a_certificate_for_an_identity_that_left_meanwhile_is_dropped() {
    let node = Running::new(DAY);
    node.want(&[web()]);
    tokio::time::sleep(Duration::from_millis(5)).await;
    assert_eq!(node.ca.asked(), 1);
    node.want(&[]);
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert!(node.store.status().is_empty());
    assert!(node.store.current(&web()).is_err());
}

#[tokio::test(start_paused = true)]
async fn a_hundred_identities_are_issued_four_at_a_time() {
    let node = Running::new(DAY);
    let ids: Vec<SpiffeId> = (0..100)
        .map(|n| format!("spiffe://cluster.local/ns/shop/sa/s{n}"))
        .map(|id| id.parse().unwrap())
        .collect();
    node.want(&ids);
    for id in &ids {
        node.ready(id).await.unwrap();
    }
    assert_eq!(node.ca.most_at_once.load(Ordering::SeqCst), 4);
    assert_eq!(node.ca.asked(), 100);
}

#[tokio::test(start_paused = true)]
async fn a_request_that_panics_counts_as_failed_and_is_repeated() {
    let node = Running::new(DAY);
    node.ca.mood(Mood::Panicking);
    node.want(&[web()]);
    tokio::time::sleep(Duration::from_millis(50)).await;
    let error = node.store.current(&web()).unwrap_err().to_string();
    assert!(error.contains("ended badly"), "{error}");
    node.ca.mood(Mood::Willing);
    node.ready(&web()).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn new_roots_are_in_force_for_a_certificate_that_is_held() {
    let node = Running::new(DAY);
    node.want(&[web()]);
    let first = node.ready(&web()).await.unwrap();
    let next = TestAuthority::at("cluster.local", (node.ca.clock)());
    let both = format!("{}{}", node.ca.authority.lock().root_pem(), next.root_pem());
    let both = Roots::from_pem(both.as_bytes()).unwrap();
    *node.ca.roots.lock() = Some(both.clone());
    tokio::time::sleep(Duration::from_secs(15)).await;
    let second = node.store.current(&web()).unwrap();
    assert_eq!(second.serial, first.serial, "no new one was needed");
    assert_eq!(*second.roots(), both);
    assert_eq!(node.ca.asked(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_certificate_that_does_not_fit_the_new_roots_is_replaced_at_once() {
    let node = Running::new(DAY);
    node.want(&[web()]);
    let first = node.ready(&web()).await.unwrap();
    let next = TestAuthority::at("cluster.local", (node.ca.clock)());
    let roots = next.roots();
    *node.ca.roots.lock() = Some(roots.clone());
    *node.ca.authority.lock() = Arc::new(next);
    tokio::time::sleep(Duration::from_secs(15)).await;
    let second = node.store.current(&web()).unwrap();
    assert_ne!(second.serial, first.serial);
    assert_eq!(*second.roots(), roots);
}

#[tokio::test(start_paused = true)]
async fn unreadable_roots_leave_the_last_good_ones() {
    let node = Running::new(DAY);
    node.want(&[web()]);
    node.ready(&web()).await.unwrap();
    *node.ca.roots.lock() = None;
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert!(node.store.current(&web()).is_ok());
    let failed = node.store.counters();
    assert!(
        failed.contains(&("certificate_roots_failed", 6)),
        "{failed:?}"
    );
}

#[tokio::test(start_paused = true)]
async fn stopping_abandons_what_is_under_way() {
    let node = Running::new(DAY);
    node.ca.mood(Mood::Silent);
    node.want(&[web()]);
    tokio::time::sleep(Duration::from_secs(1)).await;
    node.stop.cancel();
    node.run.await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn identities_beyond_the_bound_are_refused_and_counted_and_the_held_ones_stay() {
    let ca = Ca::new(DAY);
    let store = Certificates::new(CertificatesOptions::new(ca));
    let many: BTreeSet<SpiffeId> = (0..MAX_IDENTITIES + 3)
        .map(|n| format!("spiffe://cluster.local/ns/shop/sa/s{n:05}"))
        .map(|id| id.parse().unwrap())
        .collect();
    store.want(many.clone());
    assert_eq!(store.status().len(), MAX_IDENTITIES);
    let over = store.counters();
    assert!(over.contains(&("certificate_identities_over_bound", 3)));
    let first = many.first().unwrap();
    assert!(!matches!(
        store.current(first),
        Err(CertificateError::NotWanted(_))
    ));
}

#[tokio::test(start_paused = true)]
async fn a_certificate_from_before_the_clock_was_set_back_is_replaced() {
    let node = Running::new(DAY);
    node.want(&[web()]);
    tokio::time::sleep(HOUR).await;
    let first = node.ready(&web()).await.unwrap();
    *node.ca.set_back.lock() = HOUR * 2;
    tokio::time::sleep(MAX_SLEEP * 2).await;
    let second = node.store.current(&web()).unwrap();
    assert_ne!(second.serial, first.serial);
    assert!(second.not_before < (node.ca.clock)());
    assert!(node.ca.asked() < 5, "{}", node.ca.asked());
}
