//! HTTP/1 through the proxy, byte by byte.

use super::*;

const GET: &[u8] = b"GET / HTTP/1.1\r\nhost: shop\r\n\r\n";
const OK: &str = "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok";

#[tokio::test]
async fn requests_of_one_connection_share_one_upstream_connection() {
    let upstream = Upstream::answering(OK).await;
    let proxy = Proxy::to(upstream.address, Wire::Http1).await;
    let mut client = proxy.connect().await;
    for _ in 0..3 {
        client.write_all(GET).await.unwrap();
        let head = read_head(&mut client).await.unwrap();
        assert!(head.starts_with("HTTP/1.1 200 OK\r\n"), "{head}");
        assert_eq!(read_text(&mut client, 2).await, "ok");
    }
    assert_eq!(upstream.connections(), 1);
    assert_eq!(proxy.pool.counters().reused, 2);
}

#[tokio::test]
async fn pipelined_requests_are_answered_in_their_order() {
    let upstream = Upstream::new(|mut stream| async move {
        while let Some(head) = read_head(&mut stream).await {
            let path = head.split(' ').nth(1).unwrap();
            let length = path.len();
            let answer = format!("HTTP/1.1 200 OK\r\ncontent-length: {length}\r\n\r\n{path}");
            stream.write_all(answer.as_bytes()).await.unwrap();
        }
    })
    .await;
    let proxy = Proxy::to(upstream.address, Wire::Http1).await;
    let mut client = proxy.connect().await;
    let requests: String = (0..20)
        .map(|number| format!("GET /{number:02} HTTP/1.1\r\nhost: shop\r\n\r\n"))
        .collect();
    client.write_all(requests.as_bytes()).await.unwrap();
    for number in 0..20 {
        read_head(&mut client).await.unwrap();
        assert_eq!(read_text(&mut client, 3).await, format!("/{number:02}"));
    }
}

#[tokio::test]
async fn chunked_bodies_and_their_trailers_pass_both_ways() {
    let (sender, mut heard) = mpsc::unbounded_channel();
    let upstream = Upstream::new(move |mut stream| {
        let sender = sender.clone();
        async move {
            let head = read_head(&mut stream).await.unwrap();
            let mut body = String::new();
            while !body.ends_with("x-sum: 9\r\n\r\n") {
                body.push(stream.read_u8().await.unwrap().into());
            }
            sender.send((head, body)).unwrap();
            let answer = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\ntrailer: x-end\r\n\r\n\
                          3\r\nabc\r\n0\r\nx-end: yes\r\n\r\n";
            stream.write_all(answer.as_bytes()).await.unwrap();
            read_head(&mut stream).await;
        }
    })
    .await;
    let proxy = Proxy::to(upstream.address, Wire::Http1).await;
    let mut client = proxy.connect().await;
    let request = "POST / HTTP/1.1\r\nhost: shop\r\ntransfer-encoding: chunked\r\nte: trailers\r\n\
                   connection: te\r\ntrailer: x-sum\r\n\r\n4\r\nwiki\r\n5\r\npedia\r\n0\r\nx-sum: 9\r\n\r\n";
    client.write_all(request.as_bytes()).await.unwrap();
    let (head, body) = timeout(FAR, heard.recv()).await.unwrap().unwrap();
    assert!(head.contains("transfer-encoding: chunked"), "{head}");
    assert!(head.contains("te: trailers"), "{head}");
    assert!(body.contains("wiki") && body.contains("pedia"), "{body}");
    let head = read_head(&mut client).await.unwrap();
    assert!(head.contains("transfer-encoding: chunked"), "{head}");
    let whole = "3\r\nabc\r\n0\r\nx-end: yes\r\n\r\n";
    assert_eq!(read_text(&mut client, whole.len()).await, whole);
}

#[tokio::test]
async fn a_client_that_expects_100_gets_it_from_the_upstream_and_no_sooner() {
    let (sender, mut heard) = mpsc::unbounded_channel();
    let (go, may_go) = mpsc::channel::<()>(1);
    let may_go = Arc::new(tokio::sync::Mutex::new(may_go));
    let upstream = Upstream::new(move |mut stream| {
        let (sender, may_go) = (sender.clone(), may_go.clone());
        async move {
            let head = read_head(&mut stream).await.unwrap();
            sender.send(head).unwrap();
            may_go.lock().await.recv().await;
            let go = b"HTTP/1.1 100 Continue\r\n\r\n";
            stream.write_all(go).await.unwrap();
            sender.send(read_text(&mut stream, 4).await).unwrap();
            stream.write_all(OK.as_bytes()).await.unwrap();
            read_head(&mut stream).await;
        }
    })
    .await;
    let proxy = Proxy::to(upstream.address, Wire::Http1).await;
    let mut client = proxy.connect().await;
    let request =
        b"PUT / HTTP/1.1\r\nhost: shop\r\nexpect: 100-continue\r\ncontent-length: 4\r\n\r\n";
    client.write_all(request).await.unwrap();
    let head = timeout(FAR, heard.recv()).await.unwrap().unwrap();
    assert!(head.contains("expect: 100-continue"), "{head}");
    let early = timeout(Duration::from_millis(100), client.read_u8()).await;
    assert!(early.is_err(), "answered before the upstream did");
    go.send(()).await.unwrap();
    assert_eq!(
        read_head(&mut client).await.unwrap(),
        "HTTP/1.1 100 Continue\r\n\r\n"
    );
    client.write_all(b"body").await.unwrap();
    assert_eq!(timeout(FAR, heard.recv()).await.unwrap().unwrap(), "body");
    let head = read_head(&mut client).await.unwrap();
    assert!(head.starts_with("HTTP/1.1 200"), "{head}");
}

#[tokio::test]
async fn an_upstream_that_refuses_the_body_answers_without_a_100() {
    let refusal = "HTTP/1.1 413 Too Large\r\ncontent-length: 0\r\n\r\n";
    let upstream = Upstream::answering(refusal).await;
    let proxy = Proxy::to(upstream.address, Wire::Http1).await;
    let mut client = proxy.connect().await;
    let request =
        b"PUT / HTTP/1.1\r\nhost: shop\r\nexpect: 100-continue\r\ncontent-length: 4\r\n\r\n";
    client.write_all(request).await.unwrap();
    let head = read_head(&mut client).await.unwrap();
    assert!(head.starts_with("HTTP/1.1 413"), "{head}");
}

#[tokio::test]
async fn an_upstream_that_ignores_expect_gets_the_body_all_the_same() {
    let upstream = Upstream::new(|mut stream| async move {
        read_head(&mut stream).await.unwrap();
        assert_eq!(read_text(&mut stream, 4).await, "body");
        stream.write_all(OK.as_bytes()).await.unwrap();
        read_head(&mut stream).await;
    })
    .await;
    let proxy = Proxy::to(upstream.address, Wire::Http1).await;
    let mut client = proxy.connect().await;
    let request =
        b"PUT / HTTP/1.1\r\nhost: shop\r\nexpect: 100-continue\r\ncontent-length: 4\r\n\r\nbody";
    client.write_all(request).await.unwrap();
    let mut head = read_head(&mut client).await.unwrap();
    if head.starts_with("HTTP/1.1 100") {
        head = read_head(&mut client).await.unwrap();
    }
    assert!(head.starts_with("HTTP/1.1 200"), "{head}");
}

#[tokio::test]
async fn answers_without_a_body_keep_their_length_and_the_connection() {
    let upstream = Upstream::new(|mut stream| async move {
        while let Some(head) = read_head(&mut stream).await {
            let answer: &[u8] = match head.split(' ').next().unwrap() {
                "HEAD" => b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n",
                "GET" => {
                    b"HTTP/1.1 304 Not Modified\r\ncontent-length: 1000\r\netag: \"1\"\r\n\r\n"
                }
                _ => b"HTTP/1.1 204 No Content\r\n\r\n",
            };
            stream.write_all(answer).await.unwrap();
        }
    })
    .await;
    let proxy = Proxy::to(upstream.address, Wire::Http1).await;
    let mut client = proxy.connect().await;
    for (method, status, length) in [
        ("HEAD", "200", Some("1000")),
        // What a body would be like that is not there may be left out (RFC 9110 §15.4.5).
        ("GET", "304", None),
        ("DELETE", "204", None),
    ] {
        let request = format!("{method} / HTTP/1.1\r\nhost: shop\r\n\r\n");
        client.write_all(request.as_bytes()).await.unwrap();
        let head = read_head(&mut client).await.unwrap();
        assert!(head.starts_with(&format!("HTTP/1.1 {status}")), "{head}");
        let given = head
            .lines()
            .find_map(|line| line.strip_prefix("content-length: "));
        assert_eq!(given, length, "{head}");
        assert!(!head.contains("chunked"), "{head}");
    }
    assert_eq!(upstream.connections(), 1);
}

#[tokio::test]
async fn a_client_of_http_1_0_gets_a_body_that_ends_with_the_connection() {
    let answer = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n";
    let upstream = Upstream::answering(answer).await;
    let mut proxy = Proxy::to(upstream.address, Wire::Http1).await;
    let mut client = proxy.connect().await;
    client.write_all(b"GET / HTTP/1.0\r\n\r\n").await.unwrap();
    let (answer, ended) = read_all(&mut client).await;
    ended.unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    assert!(head.starts_with("HTTP/1.0 200"), "{head}");
    assert!(!head.contains("chunked"), "{head}");
    assert_eq!(body, "abc");
    drop(client);
    assert_eq!(proxy.ended().await.end, ServedEnd::InOrder);
}

#[tokio::test]
async fn an_upgrade_passes_both_protocols_bytes_in_both_directions() {
    let upstream = Upstream::new(|mut stream| async move {
        let head = read_head(&mut stream).await.unwrap();
        assert!(head.contains("upgrade: websocket"), "{head}");
        assert!(head.contains("connection: upgrade"), "{head}");
        // The first bytes of the new protocol come with the answer.
        let answer = b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\n\
                       upgrade: websocket\r\nsec-websocket-accept: x\r\n\r\nhello";
        stream.write_all(answer).await.unwrap();
        let said = read_text(&mut stream, 9).await;
        stream
            .write_all(said.to_uppercase().as_bytes())
            .await
            .unwrap();
        let (rest, ended) = read_all(&mut stream).await;
        ended.unwrap();
        stream
            .write_all(format!("bye {rest}").as_bytes())
            .await
            .unwrap();
    })
    .await;
    let mut proxy = Proxy::to(upstream.address, Wire::Http1).await;
    let mut client = proxy.connect().await;
    let request = b"GET /chat HTTP/1.1\r\nhost: shop\r\nconnection: keep-alive, Upgrade\r\n\
                    upgrade: websocket\r\n\r\nimpatient";
    client.write_all(request).await.unwrap();
    let head = read_head(&mut client).await.unwrap();
    assert!(head.starts_with("HTTP/1.1 101"), "{head}");
    assert!(head.contains("sec-websocket-accept: x"), "{head}");
    assert_eq!(read_text(&mut client, 14).await, "helloIMPATIENT");
    client.write_all(b"last").await.unwrap();
    client.shutdown().await.unwrap();
    let (rest, ended) = read_all(&mut client).await;
    ended.unwrap();
    assert_eq!(rest, "bye last");
    let served = proxy.ended().await;
    assert_eq!(
        served.end,
        ServedEnd::Switched(crate::relay::Ended::InOrder)
    );
}

#[tokio::test]
async fn a_body_that_breaks_off_upstream_resets_the_client() {
    let answers = [
        "HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nhalf",
        "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n4\r\nhalf\r\n",
    ];
    for answer in answers {
        let upstream = Upstream::new(move |mut stream| async move {
            read_head(&mut stream).await;
            stream.write_all(answer.as_bytes()).await.unwrap();
            stream.shutdown().await.unwrap();
        })
        .await;
        let mut proxy = Proxy::to(upstream.address, Wire::Http1).await;
        let mut client = proxy.connect().await;
        client.write_all(GET).await.unwrap();
        let (_, ended) = read_all(&mut client).await;
        assert_eq!(
            ended.unwrap_err().kind(),
            std::io::ErrorKind::ConnectionReset
        );
        assert_eq!(proxy.ended().await.end, ServedEnd::Upstream);
    }
}

#[tokio::test]
async fn a_reset_upstream_ends_a_body_without_length_by_a_reset_too() {
    let upstream = Upstream::new(|mut stream| async move {
        read_head(&mut stream).await;
        let answer = b"HTTP/1.0 200 OK\r\n\r\nuntil the end";
        stream.write_all(answer).await.unwrap();
        tokio::time::sleep(Duration::from_millis(50)).await;
        SockRef::from(&stream)
            .set_linger(Some(Duration::ZERO))
            .unwrap();
    })
    .await;
    let proxy = Proxy::to(upstream.address, Wire::Http1).await;
    let mut client = proxy.connect().await;
    client.write_all(GET).await.unwrap();
    let (_, ended) = read_all(&mut client).await;
    assert_eq!(
        ended.unwrap_err().kind(),
        std::io::ErrorKind::ConnectionReset
    );
}

#[tokio::test]
async fn a_client_that_breaks_off_its_upload_resets_the_upstream() {
    let (sender, mut heard) = mpsc::unbounded_channel();
    let upstream = Upstream::new(move |mut stream| {
        let sender = sender.clone();
        async move {
            read_head(&mut stream).await;
            assert_eq!(read_text(&mut stream, 4).await, "half");
            sender.send(None).unwrap();
            let (_, ended) = read_all(&mut stream).await;
            sender
                .send(Some(ended.map_err(|error| error.kind())))
                .unwrap();
        }
    })
    .await;
    let proxy = Proxy::to(upstream.address, Wire::Http1).await;
    let mut client = proxy.connect().await;
    let request = b"POST / HTTP/1.1\r\nhost: shop\r\ncontent-length: 100\r\n\r\nhalf";
    client.write_all(request).await.unwrap();
    assert_eq!(timeout(FAR, heard.recv()).await.unwrap(), Some(None));
    drop(client);
    let reset = Some(Err(std::io::ErrorKind::ConnectionReset));
    assert_eq!(timeout(FAR, heard.recv()).await.unwrap(), Some(reset));
}

#[tokio::test]
async fn an_answer_that_begins_before_the_request_ends_does_not_wait_for_it() {
    let upstream = Upstream::new(|mut stream| async move {
        read_head(&mut stream).await;
        let head = b"HTTP/1.1 200 OK\r\ncontent-length: 8\r\n\r\n";
        stream.write_all(head).await.unwrap();
        // An echo, four bytes at a time.
        for _ in 0..2 {
            let part = read_text(&mut stream, 4).await;
            stream.write_all(part.as_bytes()).await.unwrap();
        }
        read_head(&mut stream).await;
    })
    .await;
    let proxy = Proxy::to(upstream.address, Wire::Http1).await;
    let mut client = proxy.connect().await;
    let head = b"POST / HTTP/1.1\r\nhost: shop\r\ncontent-length: 8\r\n\r\n";
    client.write_all(head).await.unwrap();
    read_head(&mut client).await.unwrap();
    for part in ["ping", "pong"] {
        client.write_all(part.as_bytes()).await.unwrap();
        assert_eq!(read_text(&mut client, 4).await, part);
    }
}

#[tokio::test]
async fn a_client_that_does_not_read_stalls_the_upstream() {
    const ENDLESS: usize = 1 << 40;
    let written = Arc::new(AtomicUsize::new(0));
    let counted = written.clone();
    let upstream = Upstream::new(move |mut stream| {
        let written = counted.clone();
        async move {
            read_head(&mut stream).await;
            let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {ENDLESS}\r\n\r\n");
            stream.write_all(head.as_bytes()).await.unwrap();
            while stream.write_all(&[0; 65536]).await.is_ok() {
                written.fetch_add(65536, Ordering::Relaxed);
            }
        }
    })
    .await;
    let proxy = Proxy::to(upstream.address, Wire::Http1).await;
    let mut client = proxy.connect().await;
    client.write_all(GET).await.unwrap();
    read_head(&mut client).await.unwrap();
    let stalled_at = stalls(&written).await;
    // The sockets' own buffers of four ends, and little more.
    assert!(stalled_at < 32 << 20, "{stalled_at} bytes on their way");
    // It goes on once the client reads.
    let mut sink = vec![0; 1 << 20];
    for _ in 0..64 {
        client.read_exact(&mut sink).await.unwrap();
    }
    eventually("the upstream writes on", || {
        written.load(Ordering::Relaxed) > stalled_at
    })
    .await;
}

/// Where a counter stands once it has not moved for a while.
pub(super) async fn stalls(counter: &AtomicUsize) -> usize {
    timeout(FAR, async {
        let mut before = usize::MAX;
        loop {
            tokio::time::sleep(Duration::from_millis(300)).await;
            let now = counter.load(Ordering::Relaxed);
            if now == before && now > 0 {
                return now;
            }
            before = now;
        }
    })
    .await
    .unwrap()
}

#[tokio::test]
async fn a_drain_answers_the_request_under_way_and_closes_in_order() {
    let (go, may_go) = tokio::sync::watch::channel(false);
    let upstream = Upstream::new(move |mut stream| {
        let mut may_go = may_go.clone();
        async move {
            read_head(&mut stream).await;
            let _ = may_go.wait_for(|go| *go).await;
            stream.write_all(OK.as_bytes()).await.unwrap();
            read_head(&mut stream).await;
        }
    })
    .await;
    let mut proxy = Proxy::to(upstream.address, Wire::Http1).await;
    let mut client = proxy.connect().await;
    client.write_all(GET).await.unwrap();
    eventually("the request is upstream", || upstream.connections() == 1).await;
    proxy.drain.cancel();
    go.send_replace(true);
    let (answer, ended) = read_all(&mut client).await;
    ended.unwrap();
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    assert!(answer.contains("connection: close"), "{answer}");
    assert!(answer.ends_with("ok"), "{answer}");
    drop(client);
    assert_eq!(proxy.ended().await.end, ServedEnd::InOrder);
}

#[tokio::test]
async fn a_stop_resets_the_client_at_once() {
    let upstream = Upstream::answering(OK).await;
    let mut proxy = Proxy::to(upstream.address, Wire::Http1).await;
    let mut client = proxy.connect().await;
    client.write_all(GET).await.unwrap();
    read_head(&mut client).await.unwrap();
    read_text(&mut client, 2).await;
    proxy.stop.cancel();
    let (_, ended) = read_all(&mut client).await;
    assert!(ended.is_err());
    assert_eq!(proxy.ended().await.end, ServedEnd::Stopped);
}

#[tokio::test]
async fn an_idle_connection_is_closed_in_order_and_a_busy_one_is_not() {
    let limits = ServerLimits {
        idle: Duration::from_millis(200),
        ..ServerLimits::default()
    };
    let upstream = Upstream::new(|mut stream| async move {
        read_head(&mut stream).await;
        tokio::time::sleep(Duration::from_millis(500)).await;
        stream.write_all(OK.as_bytes()).await.unwrap();
        read_head(&mut stream).await;
    })
    .await;
    let mut proxy = Proxy::bounded(upstream.address, Wire::Http1, limits).await;
    let mut client = proxy.connect().await;
    client.write_all(GET).await.unwrap();
    let (answer, ended) = read_all(&mut client).await;
    ended.unwrap();
    assert!(answer.ends_with("ok"), "{answer}");
    drop(client);
    assert_eq!(proxy.ended().await.end, ServedEnd::Idle);
    assert_eq!(named(&proxy.counters.by_name(), "idle_closed"), 1);
}

#[tokio::test]
async fn a_connection_ends_with_its_last_allowed_request() {
    let limits = ServerLimits {
        requests: Some(2),
        ..ServerLimits::default()
    };
    let upstream = Upstream::answering(OK).await;
    let mut proxy = Proxy::bounded(upstream.address, Wire::Http1, limits).await;
    let mut client = proxy.connect().await;
    client.write_all(GET).await.unwrap();
    let head = read_head(&mut client).await.unwrap();
    assert!(!head.contains("connection: close"), "{head}");
    read_text(&mut client, 2).await;
    client.write_all(GET).await.unwrap();
    let (answer, ended) = read_all(&mut client).await;
    ended.unwrap();
    assert!(answer.contains("connection: close"), "{answer}");
    drop(client);
    assert_eq!(proxy.ended().await.requests, 2);
}
