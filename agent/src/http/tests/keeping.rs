//! What the pool keeps, and what a body that is sent again looks like.

use bytes::Bytes;
use http_body_util::BodyExt;

use super::*;
use crate::resilience::retry;
use crate::workers::{WorkerId, Workers};

const OK: &str = "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok";

fn get() -> Request<ReplayBody> {
    Request::builder()
        .uri("/")
        .header("host", "shop")
        .body(ReplayBody::empty())
        .unwrap()
}

async fn lease(pool: &UpstreamPool, key: &UpstreamKey) -> Lease {
    let connect = || dial(key.endpoint);
    timeout(FAR, pool.get(key, &Terms::default(), connect))
        .await
        .unwrap()
        .unwrap()
}

/// A connection that is one of these places, whenever it is had.
fn ask(
    pool: &Arc<UpstreamPool>,
    key: &UpstreamKey,
    places: &Arc<Places>,
) -> impl Future<Output = Result<Lease, SendError>> + use<> {
    let (pool, key, places) = (pool.clone(), key.clone(), places.clone());
    async move {
        let terms = Terms {
            places: Some(places),
            ..Terms::default()
        };
        pool.get(&key, &terms, || dial(key.endpoint)).await
    }
}

async fn fetch(pool: &UpstreamPool, key: &UpstreamKey) -> Bytes {
    let answer = lease(pool, key).await.send(get()).await.unwrap();
    answer.into_body().collect().await.unwrap().to_bytes()
}

#[tokio::test]
async fn pods_never_share_a_connection() {
    let upstream = Upstream::answering(OK).await;
    let pool = UpstreamPool::new(PoolLimits::default());
    let mine = key(upstream.address, Wire::Http1);
    let others = UpstreamKey {
        source: POD + 1,
        ..mine.clone()
    };
    for key in [&mine, &others, &mine, &others] {
        assert_eq!(fetch(&pool, key).await, "ok");
    }
    assert_eq!(upstream.connections(), 2);
    assert_eq!(pool.counters().reused, 2);
}

#[tokio::test]
async fn workers_never_share_a_connection_and_keep_one_limit_together() {
    let upstream = Upstream::answering(OK).await;
    let endpoint = upstream.address;
    let pool = UpstreamPool::new(PoolLimits::default());
    let workers = Workers::start(2).unwrap();
    let places = Places::new(1, 1);
    let both: Vec<_> = workers.runtimes().collect();
    for (round, worker) in [0, 1, 1, 0].into_iter().enumerate() {
        let (pool, limit) = (pool.clone(), places.clone());
        let asked = both[worker].spawn(async move {
            let key = UpstreamKey {
                worker: WorkerId::current(),
                ..key(endpoint, Wire::Http1)
            };
            let terms = Terms {
                places: Some(limit),
                ..Terms::default()
            };
            let lease = pool.get(&key, &terms, || dial(endpoint)).await.unwrap();
            let reused = lease.is_reused();
            let answer = lease.send(get()).await.unwrap();
            answer.into_body().collect().await.unwrap();
            reused
        });
        // What idles on the other worker is closed to make room, by that worker.
        let reused = timeout(FAR, asked).await.unwrap().unwrap();
        assert_eq!(reused, round == 2);
        assert_eq!(places.counts().taken, 1);
    }
    assert_eq!(upstream.connections(), 3);
}

#[tokio::test]
async fn a_connection_that_the_upstream_has_closed_is_not_used_again() {
    let upstream = Upstream::new(|mut stream| async move {
        read_head(&mut stream).await;
        stream.write_all(OK.as_bytes()).await.unwrap();
        stream.shutdown().await.unwrap();
    })
    .await;
    let pool = UpstreamPool::new(PoolLimits::default());
    let key = key(upstream.address, Wire::Http1);
    for round in 1..=3 {
        let lease = lease(&pool, &key).await;
        assert!(!lease.is_reused());
        lease.send(get()).await.unwrap();
        assert_eq!(upstream.connections(), round);
        // The kernel has to have delivered the close.
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test]
async fn a_request_that_never_left_comes_back_to_who_would_send_it_again() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (connected, accepted) = tokio::join!(TcpStream::connect(address), listener.accept());
    let socket = connected.unwrap().into_std().unwrap();
    // The same socket once more: tells when the close has arrived.
    let closed = TcpStream::from_std(socket.try_clone().unwrap()).unwrap();
    let socket = TcpStream::from_std(socket).unwrap();
    let pool = UpstreamPool::new(PoolLimits::default());
    let key = key(address, Wire::Http1);
    let connect = || async { Ok::<_, SendError>(Connected::from(socket)) };
    let lease = pool.get(&key, &Terms::default(), connect).await.unwrap();
    assert!(lease.gives_back());
    drop(accepted);
    closed.readable().await.unwrap();
    let unanswered = lease.send_or_return(get()).await.err().unwrap();
    assert!(
        matches!(
            unanswered.error,
            SendError::NeverSent(NeverSent::ClosedBeforeSent)
        ),
        "{}",
        unanswered.error
    );
    assert_eq!(unanswered.unsent.unwrap().headers()["host"], "shop");
}

#[tokio::test]
async fn an_answer_that_is_dropped_halfway_takes_its_connection_with_it() {
    let (sender, mut heard) = mpsc::unbounded_channel();
    let upstream = Upstream::new(move |mut stream| {
        let sender = sender.clone();
        async move {
            read_head(&mut stream).await;
            let answer = b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nhalf";
            stream.write_all(answer).await.unwrap();
            let (_, ended) = read_all(&mut stream).await;
            sender.send(ended.map_err(|error| error.kind())).unwrap();
        }
    })
    .await;
    let pool = UpstreamPool::new(PoolLimits::default());
    let key = key(upstream.address, Wire::Http1);
    drop(lease(&pool, &key).await.send(get()).await.unwrap());
    let ended = timeout(FAR, heard.recv()).await.unwrap().unwrap();
    assert_eq!(ended, Err(std::io::ErrorKind::ConnectionReset));
    assert_eq!(pool.counters().idle, 0);
}

#[tokio::test]
async fn idle_connections_are_bounded_and_expire() {
    let upstream = Upstream::answering(OK).await;
    let limits = PoolLimits {
        idle: Duration::from_millis(300),
        idle_per_key: 2,
        ..PoolLimits::default()
    };
    let pool = UpstreamPool::new(limits);
    let key = key(upstream.address, Wire::Http1);
    let mut leases = Vec::new();
    for _ in 0..4 {
        leases.push(lease(&pool, &key).await);
    }
    for lease in leases {
        let answer = lease.send(get()).await.unwrap();
        answer.into_body().collect().await.unwrap();
    }
    assert_eq!(pool.counters().idle, 2);
    assert_eq!(pool.counters().overflowed, 2);
    eventually("idle ones expire", || pool.counters().expired == 2).await;
    assert_eq!(pool.counters().idle, 0);
    eventually("nothing is left of the key", || pool.status().is_empty()).await;
}

#[tokio::test]
async fn a_connection_carries_as_many_requests_as_it_may_and_is_closed_in_order() {
    let (sender, mut heard) = mpsc::unbounded_channel();
    let upstream = Upstream::new(move |mut stream| {
        let sender = sender.clone();
        async move {
            let mut requests = 0;
            while let Some(_head) = read_head(&mut stream).await {
                requests += 1;
                stream.write_all(OK.as_bytes()).await.unwrap();
            }
            let in_order = stream.read_u8().await.unwrap_err().kind();
            sender.send((requests, in_order)).unwrap();
        }
    })
    .await;
    let pool = UpstreamPool::new(PoolLimits::default());
    let key = key(upstream.address, Wire::Http1);
    let terms = |requests| Terms {
        requests,
        ..Terms::default()
    };
    let fetch = async |most| {
        let lease = pool.get(&key, &terms(most), || dial(key.endpoint)).await;
        let answer = lease.unwrap().send(get()).await.unwrap();
        answer.into_body().collect().await.unwrap();
    };
    for _ in 0..5 {
        fetch(Some(2)).await;
    }
    assert_eq!(upstream.connections(), 3);
    let eof = std::io::ErrorKind::UnexpectedEof;
    for _ in 0..2 {
        assert_eq!(timeout(FAR, heard.recv()).await.unwrap(), Some((2, eof)));
    }
    // A limit that comes later holds for connections that stand.
    fetch(None).await;
    fetch(Some(2)).await;
    assert_eq!(timeout(FAR, heard.recv()).await.unwrap(), Some((2, eof)));
    assert_eq!(upstream.connections(), 4);
}

#[tokio::test]
async fn a_connection_idles_for_as_long_as_its_last_request_said() {
    let answering = Upstream::answering(OK).await;
    let streaming = Upstream::new(|stream| async move {
        let mut connection = ::h2::server::handshake(stream).await.unwrap();
        while let Some(Ok((_, mut respond))) = connection.accept().await {
            let answer = ::http::Response::new(());
            respond.send_response(answer, true).unwrap();
        }
    })
    .await;
    for (address, wire) in [
        (answering.address, Wire::Http1),
        (streaming.address, Wire::Http2),
    ] {
        let upstreams = Upstreams::new(wire, PoolLimits::default());
        let idle_after = async |idle| {
            let terms = Terms {
                idle,
                ..Terms::default()
            };
            let lease = upstreams.get(&terms, || dial(address)).await.unwrap();
            let answer = lease.send(get()).await.unwrap();
            answer.into_body().collect().await.unwrap();
        };
        let is_kept = |later| {
            upstreams.sweep(tokio::time::Instant::now() + later);
            !upstreams.is_unused()
        };
        let hour = Duration::from_secs(3600);
        idle_after(Some(hour)).await;
        eventually("it idles", || !upstreams.is_unused()).await;
        assert!(is_kept(hour / 2), "{wire:?}: for as long as it may");
        idle_after(None).await;
        eventually("it is kept as usual", || !is_kept(hour / 2)).await;
        idle_after(Some(Duration::from_millis(10))).await;
        eventually("it is kept no longer", || {
            !is_kept(Duration::from_millis(10))
        })
        .await;
    }
}

#[tokio::test]
async fn streams_of_another_pod_wait_until_the_connection_is_left_and_then_share_one() {
    let upstream = Upstream::new(|stream| async move {
        let mut connection = ::h2::server::handshake(stream).await.unwrap();
        while let Some(Ok((_, mut respond))) = connection.accept().await {
            let answer = ::http::Response::new(());
            respond.send_response(answer, true).unwrap();
        }
    })
    .await;
    let pool = UpstreamPool::new(PoolLimits::default());
    let mine = key(upstream.address, Wire::Http2);
    let others = UpstreamKey {
        source: POD + 1,
        ..mine.clone()
    };
    let places = Places::new(1, 2);
    let ask = |key: UpstreamKey| ask(&pool, &key, &places);
    let first = ask(mine.clone()).await.unwrap();
    let second = ask(mine.clone()).await.unwrap();
    let mut waiting = Vec::new();
    for number in 1..=2 {
        waiting.push(tokio::spawn(ask(others.clone())));
        eventually("it waits", || places.counts().waiting == number).await;
    }
    let refused = ask(others.clone()).await.err().unwrap();
    let expected = SendError::Crowded(Crowded::Pending);
    assert_eq!(refused.to_string(), expected.to_string());
    assert_eq!(refused.outcome(), crate::resilience::Outcome::Shed);
    drop(first);
    assert_eq!(places.counts().waiting, 2);
    drop(second);
    for turn in waiting {
        let lease = timeout(FAR, turn).await.unwrap().unwrap().unwrap();
        drop(lease);
    }
    assert_eq!((upstream.connections(), places.counts().taken), (2, 1));
}

#[tokio::test]
async fn who_gives_up_waiting_leaves_its_turn_to_the_next() {
    let upstream = Upstream::answering(OK).await;
    let pool = UpstreamPool::new(PoolLimits::default());
    let key = key(upstream.address, Wire::Http1);
    let places = Places::new(1, 1);
    let ask = || ask(&pool, &key, &places);
    let first = ask().await.unwrap();
    let impatient = tokio::spawn(ask());
    eventually("it waits", || places.counts().waiting == 1).await;
    impatient.abort();
    eventually("it is gone", || places.counts().waiting == 0).await;
    let patient = tokio::spawn(ask());
    eventually("another waits", || places.counts().waiting == 1).await;
    let answer = first.send(get()).await.unwrap();
    answer.into_body().collect().await.unwrap();
    let second = timeout(FAR, patient).await.unwrap().unwrap().unwrap();
    assert!(second.is_reused());
    assert_eq!((upstream.connections(), places.counts().taken), (1, 1));
    drop(second);
    assert_eq!(places.counts().taken, 0);
}

#[tokio::test]
async fn opaque_connections_and_requests_wait_in_one_line_in_turn() {
    let upstream = Upstream::answering(OK).await;
    let pool = UpstreamPool::new(PoolLimits::default());
    let key = key(upstream.address, Wire::Http1);
    let places = Places::new(1, 3);
    let ask = || ask(&pool, &key, &places);
    let opaque = || {
        let places = places.clone();
        tokio::spawn(async move { places.take().await })
    };
    let opaque_first = places.take().await.unwrap();
    let request = tokio::spawn(ask());
    eventually("a request waits", || places.counts().waiting == 1).await;
    let opaque_second = opaque();
    eventually("an opaque one waits", || places.counts().waiting == 2).await;
    let last = tokio::spawn(ask());
    eventually("the last waits", || places.counts().waiting == 3).await;
    assert_eq!(places.take().await.unwrap_err(), Crowded::Pending);
    assert_eq!(places.counts().refused, 1);

    drop(opaque_first);
    let lease = timeout(FAR, request).await.unwrap().unwrap().unwrap();
    assert_eq!((places.counts().taken, places.counts().waiting), (1, 2));
    // The last could use the connection, but it is not its turn.
    let answer = lease.send(get()).await.unwrap();
    answer.into_body().collect().await.unwrap();
    let opaque_second = timeout(FAR, opaque_second).await.unwrap().unwrap();
    assert_eq!((places.counts().taken, places.counts().waiting), (1, 1));
    assert!(!last.is_finished());
    drop(opaque_second);
    let lease = timeout(FAR, last).await.unwrap().unwrap().unwrap();
    assert!(!lease.is_reused());
    assert_eq!((upstream.connections(), places.counts().taken), (2, 1));
    assert_eq!(places.counts().in_vain, 0);
}

#[tokio::test]
async fn an_opaque_connection_gets_the_place_of_one_that_idles_and_else_waits_in_vain() {
    let upstream = Upstream::answering(OK).await;
    let pool = UpstreamPool::new(PoolLimits::default());
    let key = key(upstream.address, Wire::Http1);
    let places = Places::new(1, 1);
    let terms = Terms {
        places: Some(places.clone()),
        ..Terms::default()
    };
    let lease = pool.get(&key, &terms, || dial(key.endpoint)).await.unwrap();
    lease
        .send(get())
        .await
        .unwrap()
        .into_body()
        .collect()
        .await
        .unwrap();
    eventually("it idles", || pool.counters().idle == 1).await;
    let held = timeout(FAR, places.take()).await.unwrap().unwrap();
    assert_eq!((pool.counters().idle, places.counts().taken), (0, 1));

    let impatient = tokio::spawn({
        let places = places.clone();
        async move { places.take().await }
    });
    eventually("another waits", || places.counts().waiting == 1).await;
    impatient.abort();
    eventually("it gave up", || places.counts().in_vain == 1).await;
    drop(held);
    assert_eq!(places.counts().taken, 0);
}

#[tokio::test]
async fn a_pod_that_is_gone_loses_its_connections_at_once() {
    let (sender, mut heard) = mpsc::unbounded_channel();
    let upstream = Upstream::new(move |mut stream| {
        let sender = sender.clone();
        async move {
            read_head(&mut stream).await;
            stream.write_all(OK.as_bytes()).await.unwrap();
            let (_, ended) = read_all(&mut stream).await;
            sender.send(ended.is_err()).unwrap();
        }
    })
    .await;
    let pool = UpstreamPool::new(PoolLimits::default());
    let key = key(upstream.address, Wire::Http1);
    fetch(&pool, &key).await;
    pool.close_source(POD);
    assert!(timeout(FAR, heard.recv()).await.unwrap().unwrap());
    assert_eq!(pool.counters().idle, 0);
}

#[tokio::test]
async fn an_endpoint_that_leaves_has_its_idle_connections_closed_in_order() {
    let (sender, mut heard) = mpsc::unbounded_channel();
    let upstream = Upstream::new(move |mut stream| {
        let sender = sender.clone();
        async move {
            read_head(&mut stream).await;
            stream.write_all(OK.as_bytes()).await.unwrap();
            let (_, ended) = read_all(&mut stream).await;
            sender.send(ended.is_ok()).unwrap();
        }
    })
    .await;
    let pool = UpstreamPool::new(PoolLimits::default());
    let key = key(upstream.address, Wire::Http1);
    fetch(&pool, &key).await;
    pool.close_endpoint(upstream.address);
    assert!(timeout(FAR, heard.recv()).await.unwrap().unwrap());
}

#[tokio::test]
async fn a_malformed_answer_and_a_lost_one_are_told_apart() {
    for (answer, expected) in [("garbage\r\n\r\n", "Malformed"), ("", "Reset")] {
        let upstream = Upstream::new(move |mut stream| async move {
            read_head(&mut stream).await;
            stream.write_all(answer.as_bytes()).await.unwrap();
        })
        .await;
        let pool = UpstreamPool::new(PoolLimits::default());
        let key = key(upstream.address, Wire::Http1);
        let error = lease(&pool, &key).await.send(get()).await.err().unwrap();
        assert!(format!("{error:?}").starts_with(expected), "{error:?}");
    }
}

/// A body as it comes from a client's connection.
async fn incoming(chunks: &'static [&'static str]) -> (Incoming, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (sender, mut requests) = mpsc::unbounded_channel::<Request<Incoming>>();
    tokio::spawn(async move {
        let (stream, _) = listener.accept().await.unwrap();
        let counters = Arc::new(HttpCounters::default());
        let context = ServerContext {
            limits: &ServerLimits::default(),
            counters: &counters,
            bytes: Arc::new(ByteCount::default()),
            requester: None,
        };
        let service = move |request| {
            sender.send(request).unwrap();
            std::future::pending()
        };
        let never = CancellationToken::new();
        serve_http(stream.into(), Wire::Http1, context, service, &never, &never).await;
    });
    let mut client = TcpStream::connect(address).await.unwrap();
    let head = b"POST / HTTP/1.1\r\nhost: shop\r\ntransfer-encoding: chunked\r\n\r\n";
    client.write_all(head).await.unwrap();
    for chunk in chunks {
        let chunk = format!("{:x}\r\n{chunk}\r\n", chunk.len());
        client.write_all(chunk.as_bytes()).await.unwrap();
    }
    let request = timeout(FAR, requests.recv()).await.unwrap().unwrap();
    (request.into_body(), client)
}

#[tokio::test]
async fn a_body_is_sent_again_byte_by_byte_also_if_it_was_taken_in_part() {
    let (body, mut client) = incoming(&["first ", "second "]).await;
    let replay = Replay::new(body, 1024);
    let mut attempt = replay.attempt();
    let mut seen = Vec::new();
    while seen.len() < 6 {
        let frame = timeout(FAR, attempt.frame()).await.unwrap().unwrap();
        seen.extend_from_slice(&frame.unwrap().into_data().unwrap());
    }
    assert_eq!(replay.nature(), retry::Body::Buffered);
    assert!(!replay.is_whole());
    let again = replay.attempt();
    // The earlier attempt gets no more of it.
    let error = attempt.frame().await.unwrap().unwrap_err();
    assert!(matches!(error, BodyError::Superseded));
    client.write_all(b"5\r\nthird\r\n0\r\n\r\n").await.unwrap();
    let whole = timeout(FAR, again.collect()).await.unwrap().unwrap();
    assert_eq!(whole.to_bytes(), "first second third");
    assert!(replay.is_whole());
    let third = replay.attempt().collect().await.unwrap();
    assert_eq!(third.to_bytes(), "first second third");
}

#[tokio::test]
async fn a_body_that_outgrows_its_room_streams_on_and_is_not_sent_again() {
    let (body, mut client) = incoming(&["0123456789"]).await;
    let replay = Replay::new(body, 15);
    let mut attempt = replay.attempt();
    let first = timeout(FAR, attempt.frame()).await.unwrap().unwrap();
    assert_eq!(first.unwrap().into_data().unwrap(), "0123456789");
    assert_eq!(replay.nature(), retry::Body::Buffered);
    client.write_all(b"6\r\nabcdef\r\n0\r\n\r\n").await.unwrap();
    let rest = timeout(FAR, attempt.collect()).await.unwrap().unwrap();
    assert_eq!(rest.to_bytes(), "abcdef");
    assert_eq!(replay.nature(), retry::Body::Streaming);
    let error = replay.attempt().frame().await.unwrap().unwrap_err();
    assert!(matches!(error, BodyError::NotKept));
}
