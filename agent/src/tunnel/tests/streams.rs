//! What a connection through a tunnel may rely on.

use std::future::poll_fn;

use super::*;
use crate::tunnel::limits::{SEND_BUFFER, STREAM_WINDOW};

/// Both ends of one connection.
pub(super) async fn pair() -> (Tunnelled, (TunnelSend, TunnelReceive), (Client, Arc<Pod>)) {
    let mesh = Mesh::new();
    let held = Held::default();
    let pod = Pod::new(&mesh, held.service());
    let client = Client::new(&mesh);
    let near = client.open(&pod).await.unwrap();
    let far = held.take().await;
    (near, far, (client, pod))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bytes_come_back_unchanged_both_ways_at_once_over_loopback() {
    let mesh = Mesh::new();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let certificate = mesh.certificate(SERVER);
    let serving = tokio::spawn(async move {
        let (stream, _) = listener.accept().await.unwrap();
        let local = "127.0.0.1:15008".parse().unwrap();
        serve(stream, certificate, local, echo(), CancellationToken::new()).await
    });

    let client = Client::new(&mesh);
    let certificate = client.certificate.lock().clone();
    let request = ConnectRequest::new("127.0.0.1:8080".parse().unwrap());
    let dial = || tokio::net::TcpStream::connect(("127.0.0.1", port));
    let tunnelled = client
        .pool
        .open(&key(&[SERVER]), certificate, request, dial)
        .await
        .unwrap();
    let Tunnelled {
        mut send,
        mut receive,
        peer,
        ..
    } = tunnelled;
    assert_eq!(peer, id(SERVER));

    let sent = pattern(3 << 20, 7);
    let bytes = Bytes::from(sent.clone());
    let sending = async move {
        send.send(bytes).await.unwrap();
        send.finish().unwrap();
    };
    let ((), received) = within(async { tokio::join!(sending, read_all(&mut receive)) }).await;
    assert!(received.unwrap() == sent);

    drop((receive, client));
    within(serving).await.unwrap().unwrap();
}

#[tokio::test]
async fn the_client_may_end_first() {
    let (mut near, mut far, _kept) = pair().await;
    near.send
        .send(Bytes::from_static(b"request"))
        .await
        .unwrap();
    near.send.finish().unwrap();
    assert_eq!(within(read_all(&mut far.1)).await.unwrap(), b"request");

    far.0.send(Bytes::from_static(b"answer")).await.unwrap();
    far.0.finish().unwrap();
    assert_eq!(
        within(read_all(&mut near.receive)).await.unwrap(),
        b"answer"
    );
}

#[tokio::test]
async fn the_server_may_end_first() {
    let (mut near, mut far, _kept) = pair().await;
    far.0.send(Bytes::from_static(b"banner")).await.unwrap();
    far.0.finish().unwrap();
    assert_eq!(
        within(read_all(&mut near.receive)).await.unwrap(),
        b"banner"
    );

    near.send.send(Bytes::from_static(b"late")).await.unwrap();
    near.send.finish().unwrap();
    assert_eq!(within(read_all(&mut far.1)).await.unwrap(), b"late");
}

#[tokio::test]
async fn what_was_sent_before_an_orderly_end_arrives_though_the_sender_dropped_everything() {
    let (mut near, mut far, _kept) = pair().await;
    far.0.finish().unwrap();
    assert!(within(near.receive.data()).await.is_none());
    let sent = pattern(200 * 1024, 3);
    near.send.send(Bytes::from(sent.clone())).await.unwrap();
    near.send.finish().unwrap();
    drop(near);
    assert!(within(read_all(&mut far.1)).await.unwrap() == sent);
}

#[tokio::test]
async fn a_sender_dropped_before_its_end_is_a_reset_and_never_an_end() {
    let (near, mut far, _kept) = pair().await;
    let Tunnelled {
        mut send,
        receive: _receive,
        ..
    } = near;
    send.send(Bytes::from_static(b"half")).await.unwrap();
    drop(send);
    let reset = within(read_all(&mut far.1)).await.unwrap_err();
    assert_eq!(reset.by, ResetBy::Peer);
    assert_eq!(reset.code, Some(h2::Reason::CONNECT_ERROR.into()));
}

#[tokio::test]
async fn a_receiver_dropped_before_the_end_stops_the_sender() {
    let (near, mut far, _kept) = pair().await;
    let Tunnelled {
        send: mut near_send,
        receive,
        ..
    } = near;
    near_send.finish().unwrap();
    assert!(within(far.1.data()).await.is_none());
    drop((near_send, receive));
    let reset = within(poll_fn(|cx| far.0.poll_broken(cx))).await;
    assert_eq!(reset.by, ResetBy::Peer);
    assert!(far.0.send(Bytes::from_static(b"x")).await.is_err());
}

#[tokio::test]
async fn a_reset_by_the_server_is_seen_as_one_with_its_reason() {
    let (mut near, mut far, _kept) = pair().await;
    far.0.send(Bytes::from_static(b"half")).await.unwrap();
    far.0.reset(ResetReason::Internal);
    let reset = within(read_all(&mut near.receive)).await.unwrap_err();
    assert_eq!(reset.code, Some(h2::Reason::INTERNAL_ERROR.into()));
    let refused = near.send.send(Bytes::from_static(b"x")).await.unwrap_err();
    assert_eq!(refused.code, Some(h2::Reason::INTERNAL_ERROR.into()));
}

#[tokio::test]
async fn the_loss_of_the_tunnel_is_a_reset_on_the_other_side() {
    let (mut near, mut far, (_client, pod)) = pair().await;
    near.send.send(Bytes::from_static(b"x")).await.unwrap();
    pod.crash();
    let reset = within(read_all(&mut near.receive)).await.unwrap_err();
    assert_eq!(reset.by, ResetBy::Tunnel);
    assert!(within(read_all(&mut far.1)).await.is_err());
}

#[tokio::test(start_paused = true)]
async fn a_reader_that_does_not_read_holds_a_bounded_number_of_bytes() {
    let (mut near, mut far, _kept) = pair().await;
    let chunk = Bytes::from(pattern(64 * 1024, 5));
    let mut taken = 0;
    let patience = Duration::from_secs(5);
    while let Ok(sent) = tokio::time::timeout(patience, near.send.send(chunk.clone())).await {
        sent.unwrap();
        taken += chunk.len();
    }
    assert_eq!(taken, STREAM_WINDOW as usize);

    // Reading alone gives no room …
    let first = far.1.data().await.unwrap().unwrap();
    let mut read = first.len();
    while read < STREAM_WINDOW as usize {
        read += within(far.1.data()).await.unwrap().unwrap().len();
    }
    let more = tokio::time::timeout(patience, near.send.send(chunk.clone())).await;
    assert!(more.is_err(), "more than a window without a release");
    // … release does.
    far.1.release(read);
    within(near.send.send(chunk)).await.unwrap();
    assert!(within(far.1.data()).await.unwrap().is_ok());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn stalled_readers_do_not_stop_their_neighbour() {
    let mesh = Mesh::new();
    let held = Held::default();
    let pod = Pod::new(&mesh, held.service());
    let client = Client::new(&mesh);
    let mut stalled = Vec::new();
    let mut open = Vec::new();
    for _ in 0..40 {
        open.push(client.open(&pod).await.unwrap());
        stalled.push(held.take().await);
    }
    let mut neighbour = client.open(&pod).await.unwrap();
    let mut far = held.take().await;
    assert_eq!(pod.dials(), 1, "all in one tunnel");

    // Every one of them fills what it may.
    let flood = Bytes::from(pattern(STREAM_WINDOW as usize + 2 * SEND_BUFFER, 9));
    let mut flooding = tokio::task::JoinSet::new();
    for mut tunnelled in open {
        let flood = flood.clone();
        flooding.spawn(async move {
            let _ = tunnelled.send.send(flood).await;
            tunnelled
        });
    }
    eventually(|| client.pool.status()[0].stalled == 40).await;

    let sent = pattern(1 << 20, 11);
    let bytes = Bytes::from(sent.clone());
    let sending = async {
        neighbour.send.send(bytes).await.unwrap();
        neighbour.send.finish().unwrap();
    };
    let ((), received) = within(async { tokio::join!(sending, read_all(&mut far.1)) }).await;
    assert!(received.unwrap() == sent);

    // New connections avoid a tunnel with stalled streams, for peers with smaller windows.
    let _other = client.open(&pod).await.unwrap();
    assert_eq!(pod.dials(), 2);
    drop(stalled);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_connections_through_few_tunnels_keep_their_bytes_apart() {
    let mesh = Mesh::new();
    let pod = Pod::new(&mesh, echo());
    let client = Arc::new(Client::new(&mesh));
    let mut running = tokio::task::JoinSet::new();
    for seed in 0..250_u64 {
        let (client, pod) = (client.clone(), pod.clone());
        running.spawn(async move {
            let Tunnelled {
                mut send,
                mut receive,
                ..
            } = client.open(&pod).await.unwrap();
            let sent = pattern(10_000, seed);
            send.send(Bytes::from(sent.clone())).await.unwrap();
            send.finish().unwrap();
            assert!(read_all(&mut receive).await.unwrap() == sent);
        });
    }
    within(async { while running.join_next().await.transpose().unwrap().is_some() {} }).await;
    assert!(pod.dials() <= 3, "{} tunnels", pod.dials());
}
