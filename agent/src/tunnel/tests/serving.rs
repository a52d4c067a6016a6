//! What a server answers to whom.

use std::future::poll_fn;
use std::time::Instant;

use h2::client::SendRequest;
use http::{Method, Request, StatusCode};
use rustls::pki_types::ServerName;
use tokio_rustls::TlsConnector;

use super::*;

/// A client that may say anything.
async fn raw(pod: &Pod, certificate: &WorkloadCertificate) -> SendRequest<Bytes> {
    let name = ServerName::try_from("10.0.0.1").unwrap();
    let tls = TlsConnector::from(certificate.client.clone());
    let tls = tls.connect(name, pod.dial()).await.unwrap();
    let (requests, connection) = h2::client::handshake(tls).await.unwrap();
    tokio::spawn(connection);
    requests
}

async fn ask(
    requests: &mut SendRequest<Bytes>,
    request: Request<()>,
) -> Result<StatusCode, h2::Error> {
    let mut requests = requests.clone().ready().await?;
    let (response, _send) = requests.send_request(request, false)?;
    Ok(within(response).await?.status())
}

fn connect_to(authority: &str) -> Request<()> {
    let mut request = Request::new(());
    *request.method_mut() = Method::CONNECT;
    *request.uri_mut() = authority.parse().unwrap();
    request
}

#[tokio::test]
async fn only_connect_to_an_address_of_this_pod_is_served() {
    let mesh = Mesh::new();
    let pod = Pod::new(&mesh, echo());
    let certificate = mesh.certificate(CLIENT);
    let mut requests = raw(&pod, &certificate).await;
    for (authority, status) in [
        (APP, StatusCode::OK),
        ("10.0.0.2:8080", StatusCode::BAD_REQUEST),
        ("127.0.0.1:8080", StatusCode::BAD_REQUEST),
        ("[::ffff:10.0.0.1]:8080", StatusCode::BAD_REQUEST),
        ("web.shop.svc:8080", StatusCode::BAD_REQUEST),
        ("user@10.0.0.1:8080", StatusCode::BAD_REQUEST),
        ("10.0.0.1:0", StatusCode::BAD_REQUEST),
        ("10.0.0.1:15008", StatusCode::SERVICE_UNAVAILABLE),
        ("10.0.0.1:15001", StatusCode::SERVICE_UNAVAILABLE),
        ("10.0.0.1:15000", StatusCode::SERVICE_UNAVAILABLE),
    ] {
        let answer = ask(&mut requests, connect_to(authority)).await;
        assert_eq!(answer.unwrap(), status, "{authority}");
    }
}

#[tokio::test]
async fn any_other_method_is_a_bad_request() {
    let mesh = Mesh::new();
    let pod = Pod::new(&mesh, echo());
    let certificate = mesh.certificate(CLIENT);
    let mut requests = raw(&pod, &certificate).await;
    for method in [Method::GET, Method::POST, Method::OPTIONS] {
        let request = Request::builder()
            .method(method)
            .uri("http://10.0.0.1:8080/")
            .body(())
            .unwrap();
        let answer = ask(&mut requests, request).await;
        assert_eq!(answer.unwrap(), StatusCode::BAD_REQUEST);
    }
}

#[tokio::test]
async fn a_header_list_beyond_the_limit_reaches_no_handler() {
    let mesh = Mesh::new();
    let handled = Arc::new(AtomicUsize::new(0));
    let counted = handled.clone();
    let pod = Pod::new(
        &mesh,
        service(move |_| {
            counted.fetch_add(1, Ordering::SeqCst);
            std::future::ready(())
        }),
    );
    let certificate = mesh.certificate(CLIENT);
    let mut requests = raw(&pod, &certificate).await;
    let mut request = connect_to(APP);
    for index in 0..40 {
        let name = http::HeaderName::try_from(format!("x-{index}")).unwrap();
        let value = http::HeaderValue::try_from("v".repeat(2000)).unwrap();
        request.headers_mut().insert(name, value);
    }
    let answer = ask(&mut requests, request).await;
    assert!(answer.is_err() || answer.is_ok_and(|status| status.is_client_error()));
    assert_eq!(handled.load(Ordering::SeqCst), 0);
}

#[tokio::test]
async fn refusals_come_as_a_typed_error_with_their_status() {
    let mesh = Mesh::new();
    let client = Client::new(&mesh);
    let refusals = [
        (Refusal::BadRequest, 400),
        (Refusal::Denied, 401),
        (Refusal::Unavailable, 503),
    ];
    for (refusal, expected) in refusals {
        let refuse = service(move |incoming| {
            incoming.refuse(refusal);
            std::future::ready(())
        });
        client.pool.close_source(1);
        let pod = Pod::new(&mesh, refuse);
        for _ in 0..2 {
            let refused = client.open(&pod).await.err().unwrap();
            assert!(matches!(refused, TunnelError::Refused { status } if status == expected));
        }
        assert_eq!(pod.dials(), 1, "a refusal is no reason for another tunnel");
    }
}

#[tokio::test]
async fn a_handler_that_goes_away_without_an_answer_is_a_reset() {
    let mesh = Mesh::new();
    let pod = Pod::new(&mesh, service(|incoming| async move { drop(incoming) }));
    let client = Client::new(&mesh);
    let error = client.open(&pod).await.err().unwrap();
    let TunnelError::Broken { reset, .. } = error else {
        panic!("{error}");
    };
    assert_eq!(reset.code, Some(h2::Reason::INTERNAL_ERROR.into()));
}

#[tokio::test]
async fn the_handler_learns_who_asks_from_the_certificate_and_the_rest_as_hearsay() {
    let mesh = Mesh::new();
    let (sender, mut seen) = tokio::sync::mpsc::unbounded_channel();
    let pod = Pod::new(
        &mesh,
        service(move |incoming| {
            let Incoming {
                peer,
                authority,
                forwarded,
                baggage,
                ..
            } = &incoming;
            let seen = (peer.clone(), *authority, forwarded.clone(), baggage.clone());
            sender.send(seen).unwrap();
            async move {
                let (_send, mut receive) = incoming.accept(Some("service.name=server")).unwrap();
                let _ = receive.data().await;
            }
        }),
    );
    let client = Client::new(&mesh);
    let source: SocketAddr = "10.0.0.2:555".parse().unwrap();
    let request = ConnectRequest {
        authority: app(),
        forwarded: Some((source, Some("web.shop.svc".into()))),
        baggage: Some("identity=spiffe://cluster.local/ns/root/sa/root".into()),
        ..ConnectRequest::new(app())
    };
    let certificate = client.certificate.lock().clone();
    let dial = || async { Ok(pod.dial()) };
    let key = key(&[SERVER]);
    let open = client.pool.open(&key, certificate, request.clone(), dial);
    let tunnelled = open.await.unwrap();
    assert_eq!(tunnelled.baggage.as_deref(), Some("service.name=server"));
    let (peer, authority, forwarded, baggage) = seen.recv().await.unwrap();
    assert_eq!((peer, authority), (id(CLIENT), app()));
    assert_eq!(forwarded.unwrap().client, source);
    assert_eq!(baggage, request.baggage);
}

#[tokio::test]
async fn bytes_sent_before_the_answer_reach_nobody_if_it_is_a_refusal() {
    let mesh = Mesh::new();
    let pod = Pod::new(
        &mesh,
        service(|incoming| async {
            tokio::time::sleep(Duration::from_millis(20)).await;
            incoming.refuse(Refusal::Denied);
        }),
    );
    let certificate = mesh.certificate(CLIENT);
    let requests = raw(&pod, &certificate).await;
    let mut requests = requests.ready().await.unwrap();
    let (response, mut send) = requests.send_request(connect_to(APP), false).unwrap();
    send.send_data(Bytes::from_static(b"early"), false).unwrap();
    assert_eq!(
        within(response).await.unwrap().status(),
        StatusCode::UNAUTHORIZED
    );
}

#[tokio::test]
async fn a_peer_that_gives_up_before_the_answer_ends_the_handler() {
    let mesh = Mesh::new();
    let running = Arc::new(AtomicUsize::new(0));
    let counted = running.clone();
    struct Running(Arc<AtomicUsize>);
    impl Drop for Running {
        fn drop(&mut self) {
            self.0.fetch_sub(1, Ordering::SeqCst);
        }
    }
    let pod = Pod::new(
        &mesh,
        service(move |incoming| {
            counted.fetch_add(1, Ordering::SeqCst);
            let running = Running(counted.clone());
            async move {
                let _kept = (incoming, running);
                std::future::pending().await
            }
        }),
    );
    let client = Arc::new(Client::new(&mesh));
    let opening = {
        let (client, pod) = (client.clone(), pod.clone());
        tokio::spawn(async move { client.open(&pod).await })
    };
    eventually(|| running.load(Ordering::SeqCst) == 1).await;
    opening.abort();
    eventually(|| running.load(Ordering::SeqCst) == 0).await;
}

#[tokio::test]
async fn a_rapid_reset_is_cut_off() {
    let mesh = Mesh::new();
    let handled = Arc::new(AtomicUsize::new(0));
    let counted = handled.clone();
    let pod = Pod::new(
        &mesh,
        service(move |incoming| {
            counted.fetch_add(1, Ordering::SeqCst);
            async move {
                let _kept = incoming;
                std::future::pending().await
            }
        }),
    );
    let certificate = mesh.certificate(CLIENT);
    let mut requests = raw(&pod, &certificate).await;
    let began = Instant::now();
    let flood = async {
        for _ in 0..100_000 {
            requests = requests.clone().ready().await?;
            let (response, mut send) = requests.send_request(connect_to(APP), false)?;
            send.send_reset(h2::Reason::CANCEL);
            drop(response);
            tokio::task::yield_now().await;
        }
        Ok::<_, h2::Error>(())
    };
    assert!(within(flood).await.is_err(), "100,000 resets went through");
    let served = pod.serving.lock().pop().unwrap();
    assert!(within(served).await.unwrap().is_err());
    // What is forgiven at once and by the second, and what was under way: a busy machine takes its seconds.
    let most = 1_500.0 + 256.0 * began.elapsed().as_secs_f64();
    let handled = u32::try_from(handled.load(Ordering::SeqCst)).unwrap();
    assert!(f64::from(handled) < most, "{handled} of {most}");
}

#[tokio::test]
async fn http_1_is_refused_in_the_handshake_and_no_protocol_at_all_is_served() {
    let mesh = Mesh::new();
    let pod = Pod::new(&mesh, echo());
    let certificate = mesh.certificate(CLIENT);
    let name = ServerName::try_from("10.0.0.1").unwrap();
    let mut config = (*certificate.client).clone();
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    let tls = TlsConnector::from(Arc::new(config.clone()));
    assert!(tls.connect(name.clone(), pod.dial()).await.is_err());

    config.alpn_protocols.clear();
    let tls = TlsConnector::from(Arc::new(config));
    let tls = tls.connect(name, pod.dial()).await.unwrap();
    let (mut requests, connection) = h2::client::handshake(tls).await.unwrap();
    tokio::spawn(connection);
    let answer = ask(&mut requests, connect_to(APP)).await.unwrap();
    assert_eq!(answer, StatusCode::OK);
}

#[tokio::test]
async fn a_client_without_a_certificate_is_refused() {
    let mesh = Mesh::new();
    let pod = Pod::new(&mesh, echo());
    let config = rustls::ClientConfig::builder_with_provider(crate::identity::crypto_provider())
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(mesh.roots.store().clone())
        .with_no_client_auth();
    let name = ServerName::try_from("10.0.0.1").unwrap();
    let tls = TlsConnector::from(Arc::new(config)).connect(name, pod.dial());
    let _ = tls.await;
    let served = pod.serving.lock().pop().unwrap();
    let served = within(served).await.unwrap();
    assert!(matches!(served, Err(TunnelError::Tls { .. })));
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_never_finishes_its_handshake_is_dropped_in_time() {
    let mesh = Mesh::new();
    let pod = Pod::new(&mesh, echo());
    let _mute = pod.dial();
    let served = pod.serving.lock().pop().unwrap();
    let start = tokio::time::Instant::now();
    let served = within(served).await.unwrap();
    assert!(matches!(
        served,
        Err(TunnelError::Timeout {
            stage: Stage::Handshake,
            ..
        })
    ));
    assert!(start.elapsed() <= Duration::from_secs(5));
}

#[tokio::test(start_paused = true)]
async fn a_drain_lets_streams_end_in_order_and_resets_what_stays() {
    let mesh = Mesh::new();
    let held = Held::default();
    let pod = Pod::new(&mesh, held.service());
    let client = Client::new(&mesh);
    let mut ends = client.open(&pod).await.unwrap();
    let mut ends_far = held.take().await;
    let mut stays = client.open(&pod).await.unwrap();
    let _stays_far = held.take().await;
    pod.drain.lock().cancel();
    tokio::time::sleep(Duration::from_secs(10)).await;
    ends_far
        .0
        .send(Bytes::from_static(b"last words"))
        .await
        .unwrap();
    ends_far.0.finish().unwrap();
    assert_eq!(read_all(&mut ends.receive).await.unwrap(), b"last words");

    let start = tokio::time::Instant::now();
    let reset = stays.receive.data().await.unwrap().unwrap_err();
    assert_eq!(reset.by, ResetBy::Tunnel);
    assert!(start.elapsed() <= Duration::from_secs(21));
    let served = pod.serving.lock().pop().unwrap();
    assert!(within(served).await.is_ok());
}

#[tokio::test(start_paused = true)]
async fn a_client_that_keeps_an_idle_tunnel_is_sent_away() {
    let mesh = Mesh::new();
    let pod = Pod::new(&mesh, echo());
    let certificate = mesh.certificate(CLIENT);
    let mut requests = raw(&pod, &certificate).await;
    ask(&mut requests, connect_to(APP)).await.unwrap();
    let served = pod.serving.lock().pop().unwrap();
    let bound = Duration::from_secs(1300);
    let served = tokio::time::timeout(bound, served).await.unwrap();
    assert!(served.unwrap().is_ok());
}

/// A connection by a raw client, and our server's end of it.
async fn raw_pair() -> (h2::SendStream<Bytes>, (TunnelSend, TunnelReceive), Arc<Pod>) {
    let mesh = Mesh::new();
    let held = Held::default();
    let pod = Pod::new(&mesh, held.service());
    let requests = raw(&pod, &mesh.certificate(CLIENT)).await;
    let mut requests = requests.ready().await.unwrap();
    let (response, send) = requests.send_request(connect_to(APP), false).unwrap();
    within(response).await.unwrap();
    (send, held.take().await, pod)
}

#[tokio::test]
async fn a_reset_before_the_end_is_never_an_end_whatever_its_code() {
    for code in [h2::Reason::NO_ERROR, h2::Reason::CANCEL] {
        let (mut send, mut far, _pod) = raw_pair().await;
        send.send_data(Bytes::from_static(b"half"), false).unwrap();
        assert!(within(far.1.data()).await.unwrap().is_ok());
        send.send_reset(code);
        let reset = within(far.1.data()).await.unwrap().unwrap_err();
        assert_eq!((reset.by, reset.code), (ResetBy::Peer, Some(code.into())));
    }
}

#[tokio::test]
async fn a_reset_after_the_end_takes_nothing_from_what_came_before() {
    let (mut send, mut far, _pod) = raw_pair().await;
    send.send_data(Bytes::from_static(b"all"), true).unwrap();
    // Written before the reset, which would drop it from the queue.
    let first = within(far.1.data()).await.unwrap().unwrap();
    assert_eq!(&first[..], b"all");
    send.send_reset(h2::Reason::NO_ERROR);
    assert_eq!(
        within(poll_fn(|cx| far.0.poll_broken(cx))).await.by,
        ResetBy::Peer
    );
    assert!(within(far.1.data()).await.is_none());
}
