//! Which tunnel a new connection gets.

use tokio::time::Instant;

use super::*;

#[tokio::test]
async fn connections_one_after_the_other_share_a_tunnel() {
    let mesh = Mesh::new();
    let pod = Pod::new(&mesh, echo());
    let client = Client::new(&mesh);
    for _ in 0..10 {
        ping_pong(&mut client.open(&pod).await.unwrap()).await;
    }
    assert_eq!(pod.dials(), 1);
    assert_eq!(client.counter("reused"), 9);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_at_once_share_one_handshake() {
    let mesh = Mesh::new();
    let pod = Pod::new(&mesh, echo());
    let client = Client::new(&mesh);
    let all = futures_util::future::join_all((0..50).map(|_| client.open(&pod))).await;
    assert!(all.iter().all(Result::is_ok));
    assert_eq!(pod.dials(), 1);
}

#[tokio::test]
async fn the_stream_limit_opens_another_tunnel_and_the_tunnel_limit_refuses() {
    let mesh = Mesh::new();
    let pod = Pod::new(&mesh, echo());
    let options = PoolOptions {
        streams_per_tunnel: 2,
        tunnels_per_key: 2,
        ..PoolOptions::default()
    };
    let client = Client::with(&mesh, options);
    let mut open = Vec::new();
    for _ in 0..4 {
        open.push(client.open(&pod).await.unwrap());
    }
    assert_eq!(pod.dials(), 2);
    let refused = client.open(&pod).await.err().unwrap();
    assert!(matches!(refused, TunnelError::Saturated { bound: 2, .. }));
    assert_eq!(client.counter("saturated"), 1);

    drop(open.pop());
    assert!(client.open(&pod).await.is_ok());
}

#[tokio::test(start_paused = true)]
async fn after_a_burst_one_tunnel_is_kept_and_not_as_many_as_it_needed() {
    let mesh = Mesh::new();
    let pod = Pod::new(&mesh, echo());
    let options = PoolOptions {
        streams_per_tunnel: 2,
        ..PoolOptions::default()
    };
    let (surplus, alone) = (options.surplus, options.idle);
    let client = Client::with(&mesh, options);
    let mut open = Vec::new();
    for _ in 0..6 {
        open.push(client.open(&pod).await.unwrap());
    }
    assert_eq!((pod.dials(), client.pool.status().len()), (3, 3));

    let closed = Instant::now();
    drop(open);
    while client.pool.status().len() > 1 {
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert!(closed.elapsed() < 2 * surplus);
    }
    assert!(closed.elapsed() >= surplus);
    ping_pong(&mut client.open(&pod).await.unwrap()).await;
    assert_eq!(pod.dials(), 3, "it takes the next connection");

    tokio::time::sleep(alone - surplus).await;
    assert_eq!(client.pool.status().len(), 1);
    tokio::time::sleep(2 * surplus).await;
    assert_eq!(client.pool.status().len(), 0);
}

#[tokio::test]
async fn two_pods_of_one_identity_never_share_a_tunnel() {
    let mesh = Mesh::new();
    let pod = Pod::new(&mesh, echo());
    let client = Client::new(&mesh);
    let _first = client.open(&pod).await.unwrap();
    let mut other = key(&[SERVER]);
    other.netns_cookie = 2;
    let certificate = client.certificate.lock().clone();
    let dial = || async { Ok(pod.dial()) };
    let request = ConnectRequest::new(app());
    let second = client.pool.open(&other, certificate, request, dial).await;
    assert!(second.is_ok());
    assert_eq!(pod.dials(), 2);
}

#[tokio::test]
async fn a_full_pool_closes_what_is_idle_for_longest() {
    let mesh = Mesh::new();
    let pod = Pod::new(&mesh, echo());
    let options = PoolOptions {
        tunnels: 1,
        ..PoolOptions::default()
    };
    let client = Client::with(&mesh, options);
    let mut other = key(&[SERVER]);
    other.netns_cookie = 2;
    let open_other = || {
        let certificate = client.certificate.lock().clone();
        let request = ConnectRequest::new(app());
        let dial = || async { Ok(pod.dial()) };
        client.pool.open(&other, certificate, request, dial)
    };
    let first = client.open(&pod).await.unwrap();
    let refused = open_other().await.err().unwrap();
    assert!(matches!(refused, TunnelError::Saturated { bound: 1, .. }));
    drop(first);
    assert!(within(open_other()).await.is_ok());
    assert_eq!(client.counter("evicted"), 1);
    assert_eq!(client.pool.status().len(), 1);
}

#[tokio::test]
async fn a_dead_tunnel_is_replaced_without_an_error() {
    let mesh = Mesh::new();
    let pod = Pod::new(&mesh, echo());
    let client = Client::new(&mesh);
    ping_pong(&mut client.open(&pod).await.unwrap()).await;
    pod.crash();
    ping_pong(&mut client.open(&pod).await.unwrap()).await;
    assert_eq!(pod.dials(), 2);
}

/// A transport that can be cut without either end noticing.
struct Cuttable {
    pod: Arc<Pod>,
    cut: CancellationToken,
}

impl Cuttable {
    fn dial(&self) -> DuplexStream {
        let (near, mut middle_near) = tokio::io::duplex(256 * 1024);
        let mut middle_far = self.pod.dial();
        let cut = self.cut.clone();
        tokio::spawn(async move {
            let copy = tokio::io::copy_bidirectional(&mut middle_near, &mut middle_far);
            tokio::select! {
                _ = copy => {}
                () = cut.cancelled() => std::future::pending().await,
            }
        });
        near
    }
}

#[tokio::test(start_paused = true)]
async fn a_silent_tunnel_is_replaced_within_a_second_without_an_error() {
    let mesh = Mesh::new();
    let pod = Pod::new(&mesh, echo());
    let mut cable = Cuttable {
        pod: pod.clone(),
        cut: CancellationToken::new(),
    };
    let client = Client::new(&mesh);
    let open = async |cable: &Cuttable| {
        let certificate = client.certificate.lock().clone();
        let request = ConnectRequest::new(app());
        let dial = || async { Ok(cable.dial()) };
        let key = key(&[SERVER]);
        client.pool.open(&key, certificate, request, dial).await
    };
    ping_pong(&mut open(&cable).await.unwrap()).await;
    cable.cut.cancel();
    cable.cut = CancellationToken::new();
    let start = tokio::time::Instant::now();
    let mut replaced = open(&cable).await.unwrap();
    assert!(start.elapsed() < Duration::from_secs(1));
    assert_eq!(client.counter("replaced"), 1);
    ping_pong(&mut replaced).await;

    // A caller with less patience leaves a suspicion behind, so that the next one is served.
    cable.cut.cancel();
    cable.cut = CancellationToken::new();
    let hasty = tokio::time::timeout(Duration::from_millis(400), open(&cable)).await;
    assert!(hasty.is_err());
    let start = tokio::time::Instant::now();
    assert!(open(&cable).await.is_ok());
    assert!(start.elapsed() < Duration::from_millis(100));
}

#[tokio::test(start_paused = true)]
async fn an_app_that_takes_long_to_dial_does_not_cost_its_tunnel() {
    let mesh = Mesh::new();
    let slow = service(|incoming| async {
        tokio::time::sleep(Duration::from_secs(4)).await;
        let (mut send, mut receive) = incoming.accept(None).unwrap();
        let data = receive.data().await.unwrap().unwrap();
        send.send(data).await.unwrap();
        send.finish().unwrap();
        let _ = receive.data().await;
    });
    let pod = Pod::new(&mesh, slow);
    let client = Client::new(&mesh);
    for _ in 0..2 {
        ping_pong(&mut client.open(&pod).await.unwrap()).await;
    }
    assert_eq!((pod.dials(), client.counter("replaced")), (1, 0));
}

#[tokio::test(start_paused = true)]
async fn an_unanswered_ping_ends_the_tunnel_and_resets_its_streams() {
    let mesh = Mesh::new();
    let held = Held::default();
    let pod = Pod::new(&mesh, held.service());
    let cable = Cuttable {
        pod,
        cut: CancellationToken::new(),
    };
    let client = Client::new(&mesh);
    let certificate = client.certificate.lock().clone();
    let dial = || async { Ok(cable.dial()) };
    let key = key(&[SERVER]);
    let request = ConnectRequest::new(app());
    let open = client.pool.open(&key, certificate, request, dial);
    let mut near = open.await.unwrap();
    let mut far = held.take().await;

    // Idle for hours, but alive.
    assert!(
        tokio::time::timeout(Duration::from_secs(7200), near.receive.data())
            .await
            .is_err()
    );

    cable.cut.cancel();
    let start = tokio::time::Instant::now();
    let (near, far) = tokio::join!(near.receive.data(), far.1.data());
    assert!(near.unwrap().is_err() && far.unwrap().is_err());
    assert!(start.elapsed() <= Duration::from_secs(31));
    eventually(|| client.pool.status().is_empty()).await;
}

#[tokio::test(start_paused = true)]
async fn an_idle_tunnel_is_released_after_five_minutes_and_not_before() {
    let mesh = Mesh::new();
    let pod = Pod::new(&mesh, echo());
    let client = Client::new(&mesh);
    ping_pong(&mut client.open(&pod).await.unwrap()).await;
    tokio::time::sleep(Duration::from_secs(290)).await;
    ping_pong(&mut client.open(&pod).await.unwrap()).await;
    tokio::time::sleep(Duration::from_secs(299)).await;
    assert_eq!(client.pool.status().len(), 1);
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert!(client.pool.status().is_empty());
    let serving = pod.serving.lock().pop().unwrap();
    within(serving).await.unwrap().unwrap();
    assert_eq!(pod.dials(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_tunnel_with_a_quiet_stream_is_not_idle() {
    let mesh = Mesh::new();
    let pod = Pod::new(&mesh, echo());
    let client = Client::new(&mesh);
    let mut quiet = client.open(&pod).await.unwrap();
    tokio::time::sleep(Duration::from_secs(3 * 3600)).await;
    ping_pong(&mut quiet).await;
}

#[tokio::test]
async fn a_rotated_certificate_gets_a_new_tunnel_and_drops_no_connection() {
    let mesh = Mesh::new();
    let pod = Pod::new(&mesh, echo());
    let client = Client::new(&mesh);
    let old = client.certificate.lock().clone();
    let mut before = client.open(&pod).await.unwrap();
    *client.certificate.lock() = mesh.certificate_until(CLIENT, Duration::from_secs(7200));
    let mut after = client.open(&pod).await.unwrap();
    assert_eq!(pod.dials(), 2);
    ping_pong(&mut before).await;
    ping_pong(&mut after).await;
    // Who still holds the old certificate does not bring the old tunnel back.
    *client.certificate.lock() = old;
    let _late = client.open(&pod).await.unwrap();
    assert_eq!(pod.dials(), 2);

    drop(before);
    eventually(|| client.pool.status().len() == 1).await;
    ping_pong(&mut after).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn goaway_under_load_loses_no_new_connection() {
    let mesh = Mesh::new();
    let pod = Pod::new(&mesh, echo());
    let client = Arc::new(Client::new(&mesh));
    let done = Arc::new(AtomicUsize::new(0));
    let mut running = tokio::task::JoinSet::new();
    for _ in 0..8 {
        let (client, pod, done) = (client.clone(), pod.clone(), done.clone());
        running.spawn(async move {
            for _ in 0..100 {
                let mut tunnelled = client.open(&pod).await.unwrap();
                ping_pong(&mut tunnelled).await;
                tunnelled.send.finish().unwrap();
                assert!(read_all(&mut tunnelled.receive).await.unwrap().is_empty());
                done.fetch_add(1, Ordering::SeqCst);
            }
        });
    }
    for round in 1..=7 {
        eventually(|| done.load(Ordering::SeqCst) >= round * 100).await;
        let old = std::mem::take(&mut *pod.drain.lock());
        old.cancel();
    }
    within(async { while running.join_next().await.transpose().unwrap().is_some() {} }).await;
    assert!(pod.dials() >= 8);
}

#[tokio::test]
async fn a_peer_with_another_identity_is_refused_and_never_kept() {
    let mesh = Mesh::new();
    let pod = Pod::new(&mesh, echo());
    let client = Client::new(&mesh);
    let other = "spiffe://cluster.local/ns/shop/sa/other";
    let open = |expected: Vec<&'static str>| {
        let certificate = client.certificate.lock().clone();
        let request = ConnectRequest::new(app());
        let dial = || async { Ok(pod.dial()) };
        let (pool, key) = (client.pool.clone(), key(&expected));
        async move { pool.open(&key, certificate, request, dial).await }
    };
    let refused = open(vec![other]).await.err().unwrap();
    assert!(matches!(&refused, TunnelError::PeerIdentity { actual, .. } if *actual == id(SERVER)));
    assert!(client.pool.status().is_empty());
    assert!(open(vec![]).await.is_err());
    assert!(open(vec![other, SERVER]).await.is_ok());
}

#[tokio::test]
async fn a_peer_of_another_root_is_refused_by_either_side() {
    let (mesh, strangers) = (Mesh::new(), Mesh::new());
    let pod = Pod::new(&strangers, echo());
    let client = Client::new(&mesh);
    let refused = client.open(&pod).await.err().unwrap();
    assert!(matches!(refused, TunnelError::Tls { .. }), "{refused}");
    let serving = pod.serving.lock().pop().unwrap();
    let served = within(serving).await.unwrap();
    assert!(matches!(served, Err(TunnelError::Tls { .. })));
}

#[tokio::test]
async fn a_cancelled_leader_does_not_wedge_those_who_wait() {
    let mesh = Mesh::new();
    let pod = Pod::new(&mesh, echo());
    let client = Arc::new(Client::new(&mesh));
    let leader = {
        let client = client.clone();
        tokio::spawn(async move {
            let certificate = client.certificate.lock().clone();
            let dial = std::future::pending::<io::Result<DuplexStream>>;
            let request = ConnectRequest::new(app());
            let key = key(&[SERVER]);
            client.pool.open(&key, certificate, request, dial).await
        })
    };
    tokio::task::yield_now().await;
    let followers: Vec<_> = (0..5)
        .map(|_| {
            let (client, pod) = (client.clone(), pod.clone());
            tokio::spawn(async move { client.open(&pod).await })
        })
        .collect();
    tokio::task::yield_now().await;
    assert_eq!(pod.dials(), 0, "they wait for the leader");
    leader.abort();
    for follower in followers {
        assert!(within(follower).await.unwrap().is_ok());
    }
    assert_eq!(pod.dials(), 1);
}

#[tokio::test]
async fn a_failing_leader_fails_nobody_else() {
    let mesh = Mesh::new();
    let pod = Pod::new(&mesh, echo());
    let client = Client::new(&mesh);
    let tries = AtomicUsize::new(0);
    let open = || {
        let certificate = client.certificate.lock().clone();
        let dial = || {
            let first = tries.fetch_add(1, Ordering::SeqCst) == 0;
            let pod = &pod;
            async move {
                tokio::task::yield_now().await;
                if first {
                    Err(io::ErrorKind::ConnectionRefused.into())
                } else {
                    Ok(pod.dial())
                }
            }
        };
        let pool = client.pool.clone();
        async move {
            let request = ConnectRequest::new(app());
            pool.open(&key(&[SERVER]), certificate, request, dial).await
        }
    };
    let all = futures_util::future::join_all((0..10).map(|_| open())).await;
    let failed: Vec<_> = all.into_iter().filter_map(Result::err).collect();
    assert!(matches!(&failed[..], [TunnelError::Dial { .. }]));
    assert_eq!(tries.load(Ordering::SeqCst), 2);
}

#[tokio::test]
async fn those_who_saw_two_attempts_fail_do_not_queue_for_a_third() {
    let mesh = Mesh::new();
    let client = Client::new(&mesh);
    let tries = AtomicUsize::new(0);
    let open = || {
        let certificate = client.certificate.lock().clone();
        let dial = || {
            tries.fetch_add(1, Ordering::SeqCst);
            async {
                tokio::task::yield_now().await;
                Err::<DuplexStream, _>(io::ErrorKind::ConnectionRefused.into())
            }
        };
        let pool = client.pool.clone();
        async move {
            let request = ConnectRequest::new(app());
            pool.open(&key(&[SERVER]), certificate, request, dial).await
        }
    };
    let all = futures_util::future::join_all((0..50).map(|_| open())).await;
    assert!(all.iter().all(Result::is_err));
    assert!(tries.load(Ordering::SeqCst) <= 3);
    assert!(client.pool.status().is_empty());
}

#[tokio::test]
async fn the_end_of_a_pod_ends_its_tunnels_and_no_others() {
    let mesh = Mesh::new();
    let pod = Pod::new(&mesh, echo());
    let client = Client::new(&mesh);
    let mut gone = client.open(&pod).await.unwrap();
    client.pool.close_source(2);
    ping_pong(&mut gone).await;
    client.pool.close_source(1);
    assert!(within(gone.receive.data()).await.unwrap().is_err());
    assert!(client.pool.status().is_empty());
    let serving = pod.serving.lock().pop().unwrap();
    assert!(within(serving).await.is_ok());
}

#[tokio::test]
async fn a_pod_that_ends_during_a_handshake_leaves_no_tunnel() {
    let mesh = Mesh::new();
    let pod = Pod::new(&mesh, echo());
    let client = Client::new(&mesh);
    let certificate = client.certificate.lock().clone();
    let dial = || async {
        client.pool.close_source(1);
        Ok(pod.dial())
    };
    let key = key(&[SERVER]);
    let request = ConnectRequest::new(app());
    let open = client.pool.open(&key, certificate, request, dial);
    assert!(matches!(open.await, Err(TunnelError::SourceGone)));
    assert!(client.pool.status().is_empty());
}
