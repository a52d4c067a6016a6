//! What must not reach an upstream.

use super::*;

const OK: &str = "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok";

#[tokio::test]
async fn what_two_parsers_could_understand_differently_is_refused_and_counted() {
    let upstream = Upstream::answering(OK).await;
    let cases: &[(&str, &str)] = &[
        ("content-length: 4\r\ncontent-length: 5", "content_length"),
        ("content-length: +4", "content_length"),
        ("content-length: 4, 4", "content_length"),
        (
            "content-length: 4\r\ntransfer-encoding: chunked",
            "both_lengths",
        ),
        (
            "transfer-encoding: chunked\r\ncontent-length: 4",
            "both_lengths",
        ),
        (
            "Transfer-Encoding: chunked\r\nx: y\r\nCONTENT-LENGTH:4",
            "both_lengths",
        ),
        ("transfer-encoding: gzip, chunked", "transfer_encoding"),
        (
            "transfer-encoding: chunked\r\ntransfer-encoding: chunked",
            "transfer_encoding",
        ),
        ("transfer-encoding: identity", "transfer_encoding"),
        ("transfer-encoding: \x0bchunked", "transfer_encoding"),
        ("x: folded\r\n over lines", "unparsable"),
        ("x : spaced", "unparsable"),
        ("x: carriage\rreturn", "unparsable"),
        ("x: nul\0", "unparsable"),
        ("x\0: nul", "unparsable"),
        ("host: other", "host_repeated"),
        ("expect: miracles", "expectation_unknown"),
    ];
    for (fields, reason) in cases {
        let mut proxy = Proxy::to(upstream.address, Wire::Http1).await;
        let mut client = proxy.connect().await;
        let request = format!("POST / HTTP/1.1\r\nhost: shop\r\n{fields}\r\n\r\n0\r\n\r\n");
        client.write_all(request.as_bytes()).await.unwrap();
        let (answer, ended) = read_all(&mut client).await;
        ended.unwrap_or_else(|error| panic!("{fields:?}: {error}"));
        let status = if *reason == "expectation_unknown" {
            "417"
        } else {
            "400"
        };
        assert!(
            answer.starts_with(&format!("HTTP/1.1 {status}")),
            "{fields:?}: {answer}"
        );
        drop(client);
        proxy.ended().await;
        assert_eq!(
            proxy.bad_requests(reason),
            1,
            "{fields:?}: {:?}",
            proxy.counters
        );
    }
    assert_eq!(upstream.connections(), 0);
}

#[tokio::test]
async fn a_host_must_be_there_once_and_be_one() {
    let upstream = Upstream::answering(OK).await;
    let long = format!("host: {}.shop", "a".repeat(300));
    let cases: &[(&str, &str, &str)] = &[
        ("GET / HTTP/1.1", "x: y", "host_missing"),
        (
            "GET / HTTP/1.1",
            "host: shop\r\nhost: shop",
            "host_repeated",
        ),
        ("GET / HTTP/1.1", "host: shop/path", "host_invalid"),
        ("GET / HTTP/1.1", "host: user@shop", "host_invalid"),
        ("GET / HTTP/1.1", "host: a b", "host_invalid"),
        ("GET / HTTP/1.1", "host:", "host_invalid"),
        ("GET / HTTP/1.1", "host: shop:http", "host_invalid"),
        ("GET / HTTP/1.1", &long, "host_invalid"),
        ("GET http://other/ HTTP/1.1", "host: shop", "host_mismatch"),
        (
            "CONNECT shop:80 HTTP/1.1",
            "host: shop:80",
            "connect_refused",
        ),
    ];
    for (line, fields, reason) in cases {
        let mut proxy = Proxy::to(upstream.address, Wire::Http1).await;
        let mut client = proxy.connect().await;
        let request = format!("{line}\r\n{fields}\r\n\r\n");
        client.write_all(request.as_bytes()).await.unwrap();
        let (answer, _) = read_all(&mut client).await;
        assert!(answer.starts_with("HTTP/1.1 40"), "{fields:?}: {answer}");
        assert!(
            answer.contains(&format!("x-undermesh-reason: {reason}")),
            "{fields:?}: {answer}"
        );
        drop(client);
        proxy.ended().await;
        assert_eq!(proxy.bad_requests(reason), 1, "{fields:?}");
    }
    assert_eq!(upstream.connections(), 0);
}

#[tokio::test]
async fn an_absolute_target_that_agrees_with_its_host_is_sent_on_in_origin_form() {
    let (sender, mut heard) = mpsc::unbounded_channel();
    let upstream = Upstream::new(move |mut stream| {
        let sender = sender.clone();
        async move {
            sender.send(read_head(&mut stream).await.unwrap()).unwrap();
            stream.write_all(OK.as_bytes()).await.unwrap();
            read_head(&mut stream).await;
        }
    })
    .await;
    let proxy = Proxy::to(upstream.address, Wire::Http1).await;
    let mut client = proxy.connect().await;
    let request = b"GET http://SHOP/a?b=c HTTP/1.1\r\nHost: shop\r\n\r\n";
    client.write_all(request).await.unwrap();
    let head = timeout(FAR, heard.recv()).await.unwrap().unwrap();
    assert!(head.starts_with("GET /a?b=c HTTP/1.1\r\n"), "{head}");
    assert!(head.contains("host: shop\r\n"), "{head}");
}

#[tokio::test]
async fn a_violation_in_a_later_request_leaves_the_earlier_ones_answered() {
    let upstream = Upstream::answering(OK).await;
    let proxy = Proxy::to(upstream.address, Wire::Http1).await;
    let mut client = proxy.connect().await;
    let good = "GET / HTTP/1.1\r\nhost: shop\r\n\r\n";
    let bad = "POST / HTTP/1.1\r\nhost: shop\r\ntransfer-encoding: chunked\r\n\
               content-length: 3\r\n\r\n0\r\n\r\n";
    let requests = format!("{good}{bad}{good}");
    client.write_all(requests.as_bytes()).await.unwrap();
    let (answers, _) = read_all(&mut client).await;
    let statuses: Vec<_> = answers
        .split("HTTP/1.1 ")
        .skip(1)
        .map(|answer| &answer[..3])
        .collect();
    assert_eq!(statuses, ["200", "400"], "{answers}");
    assert_eq!(proxy.bad_requests("both_lengths"), 1);
}

#[tokio::test]
async fn bad_chunks_end_the_request_and_reset_the_upstream() {
    for chunk in [
        "zz\r\nab",
        "-1\r\n",
        "fffffffffffffffff\r\n",
        "2\r\nabc\r\n0\r\n\r\n",
    ] {
        let (sender, mut heard) = mpsc::unbounded_channel();
        let upstream = Upstream::new(move |mut stream| {
            let sender = sender.clone();
            async move {
                let (_, ended) = read_all(&mut stream).await;
                sender.send(ended.map_err(|error| error.kind())).unwrap();
            }
        })
        .await;
        let mut proxy = Proxy::to(upstream.address, Wire::Http1).await;
        let mut client = proxy.connect().await;
        let request =
            format!("POST / HTTP/1.1\r\nhost: shop\r\ntransfer-encoding: chunked\r\n\r\n{chunk}");
        client.write_all(request.as_bytes()).await.unwrap();
        let (answer, _) = read_all(&mut client).await;
        assert!(!answer.starts_with("HTTP/1.1 2"), "{chunk:?}: {answer}");
        proxy.ended().await;
        // The upstream was reached or not; if it was, it did not see an end.
        if upstream.connections() > 0 {
            let ended = timeout(FAR, heard.recv()).await.unwrap().unwrap();
            assert_eq!(ended, Err(std::io::ErrorKind::ConnectionReset), "{chunk:?}");
        }
    }
}

#[tokio::test]
async fn a_head_beyond_the_bounds_is_refused_with_431() {
    let upstream = Upstream::answering(OK).await;
    let limits = ServerLimits {
        header_bytes: 16 * 1024,
        ..ServerLimits::default()
    };
    let large = format!("x: {}\r\n", "a".repeat(20_000));
    let many: String = (0..100)
        .map(|number| format!("x-{number}: y\r\n"))
        .collect();
    for fields in [large, many] {
        let mut proxy = Proxy::bounded(upstream.address, Wire::Http1, limits.clone()).await;
        let mut client = proxy.connect().await;
        let request = format!("GET / HTTP/1.1\r\nhost: shop\r\n{fields}\r\n");
        client.write_all(request.as_bytes()).await.unwrap();
        let (answer, _) = read_all(&mut client).await;
        assert!(answer.starts_with("HTTP/1.1 431"), "{answer}");
        drop(client);
        proxy.ended().await;
        assert_eq!(proxy.bad_requests("head_too_large"), 1);
    }
    assert_eq!(upstream.connections(), 0);
}

#[tokio::test]
async fn a_head_that_trickles_in_ends_the_connection() {
    let limits = ServerLimits {
        header_timeout: Duration::from_millis(300),
        ..ServerLimits::default()
    };
    let upstream = Upstream::answering(OK).await;
    let mut proxy = Proxy::bounded(upstream.address, Wire::Http1, limits).await;
    let mut client = proxy.connect().await;
    let trickle = async {
        for byte in b"GET / HTTP/1.1\r\nhost: shop\r\nx: "
            .iter()
            .chain([b'a'; 500].iter())
        {
            if client.write_all(&[*byte]).await.is_err() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        panic!("never ended");
    };
    let served = tokio::select! {
        served = proxy.ended() => served,
        () = trickle => proxy.ended().await,
    };
    assert_eq!(served.end, ServedEnd::SlowHead);
    assert_eq!(named(&proxy.counters.by_name(), "slow_heads"), 1);
    assert_eq!(upstream.connections(), 0);
}

#[tokio::test]
async fn a_connection_that_says_nothing_is_idle_and_no_slow_head() {
    let limits = ServerLimits {
        header_timeout: Duration::from_millis(50),
        idle: Duration::from_millis(300),
        ..ServerLimits::default()
    };
    let upstream = Upstream::answering(OK).await;
    let mut proxy = Proxy::bounded(upstream.address, Wire::Http1, limits).await;
    let mut client = proxy.connect().await;
    let (_, ended) = read_all(&mut client).await;
    ended.unwrap();
    drop(client);
    assert_eq!(proxy.ended().await.end, ServedEnd::Idle);
}
