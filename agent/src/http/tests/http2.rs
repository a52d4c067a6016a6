//! HTTP/2 through the proxy, with the crate h2 on both ends.

use std::future::poll_fn;

use ::h2::client::SendRequest;
use ::h2::{Reason, RecvStream, SendStream};
use ::http::{HeaderMap, HeaderValue, Method, Response};
use bytes::Bytes;

use super::http1::stalls;
use super::*;

/// A HTTP/2 server out of a function for one stream.
async fn upstream<H, F>(handle: H) -> Upstream
where
    H: Fn(::http::Request<RecvStream>, ::h2::server::SendResponse<Bytes>) -> F
        + Clone
        + Send
        + Sync
        + 'static,
    F: Future<Output = ()> + Send + 'static,
{
    Upstream::new(move |stream| {
        let handle = handle.clone();
        async move {
            // One whose request never came may be gone before its preface.
            let Ok(mut connection) = ::h2::server::handshake(stream).await else {
                return;
            };
            while let Some(Ok((request, respond))) = connection.accept().await {
                tokio::spawn(handle(request, respond));
            }
        }
    })
    .await
}

/// Answers every request with 200 and the same body, once its own body has ended.
pub(super) async fn answering(answer: &'static [u8]) -> Upstream {
    upstream(move |request, mut respond| async move {
        let mut body = request.into_body();
        while let Some(Ok(data)) = body.data().await {
            let _ = body.flow_control().release_capacity(data.len());
        }
        if body.trailers().await.is_err() {
            return;
        }
        if let Ok(mut stream) = respond.send_response(Response::new(()), false) {
            write(&mut stream, Bytes::from_static(answer), true).await;
        }
    })
    .await
}

async fn client(proxy: &Proxy) -> SendRequest<Bytes> {
    let stream = proxy.connect().await;
    let (requests, connection) = ::h2::client::Builder::new()
        .initial_connection_window_size(1 << 20)
        .handshake(stream)
        .await
        .unwrap();
    tokio::spawn(connection);
    requests.ready().await.unwrap()
}

fn post(path: &str) -> ::http::Request<()> {
    ::http::Request::builder()
        .method(Method::POST)
        .uri(format!("http://shop{path}"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(())
        .unwrap()
}

async fn read(body: &mut RecvStream) -> Result<Vec<u8>, ::h2::Error> {
    let mut all = Vec::new();
    while let Some(data) = timeout(FAR, body.data()).await.unwrap() {
        let data = data?;
        body.flow_control().release_capacity(data.len())?;
        all.extend_from_slice(&data);
    }
    Ok(all)
}

async fn write(stream: &mut SendStream<Bytes>, mut data: Bytes, ends: bool) -> bool {
    while !data.is_empty() {
        stream.reserve_capacity(data.len());
        if stream.capacity() == 0 {
            match poll_fn(|cx| stream.poll_capacity(cx)).await {
                Some(Ok(_)) => {}
                _ => return false,
            }
        }
        let chunk = data.split_to(stream.capacity().min(data.len()));
        if stream.send_data(chunk, ends && data.is_empty()).is_err() {
            return false;
        }
    }
    true
}

fn grpc_ok() -> HeaderMap {
    HeaderMap::from_iter([(
        ::http::HeaderName::from_static("grpc-status"),
        HeaderValue::from_static("0"),
    )])
}

/// Sends back what comes, and then trailers.
async fn echo(
    request: ::http::Request<RecvStream>,
    mut respond: ::h2::server::SendResponse<Bytes>,
) {
    assert_eq!(request.uri().authority().unwrap(), "shop");
    assert_eq!(request.headers()["te"], "trailers");
    let mut body = request.into_body();
    let mut answer = respond.send_response(Response::new(()), false).unwrap();
    while let Some(Ok(data)) = body.data().await {
        body.flow_control().release_capacity(data.len()).unwrap();
        if !write(&mut answer, data, false).await {
            return;
        }
    }
    let trailers = body.trailers().await.unwrap().unwrap_or_else(grpc_ok);
    answer.send_trailers(trailers).unwrap();
}

#[tokio::test]
async fn a_unary_call_and_its_trailers_pass() {
    let upstream = upstream(echo).await;
    let proxy = Proxy::to(upstream.address, Wire::Http2).await;
    let mut requests = client(&proxy).await;
    let (answer, mut stream) = requests.send_request(post("/a"), false).unwrap();
    stream.send_data("hello".into(), true).unwrap();
    let answer = timeout(FAR, answer).await.unwrap().unwrap();
    let mut body = answer.into_body();
    assert_eq!(read(&mut body).await.unwrap(), b"hello");
    assert_eq!(body.trailers().await.unwrap().unwrap()["grpc-status"], "0");
}

#[tokio::test]
async fn trailers_of_a_request_pass() {
    let upstream = upstream(echo).await;
    let proxy = Proxy::to(upstream.address, Wire::Http2).await;
    let mut requests = client(&proxy).await;
    let (answer, mut stream) = requests.send_request(post("/a"), false).unwrap();
    stream.send_data("hello".into(), false).unwrap();
    let mut trailers = HeaderMap::new();
    trailers.insert("x-sum", HeaderValue::from_static("5"));
    stream.send_trailers(trailers).unwrap();
    let mut body = timeout(FAR, answer).await.unwrap().unwrap().into_body();
    read(&mut body).await.unwrap();
    assert_eq!(body.trailers().await.unwrap().unwrap()["x-sum"], "5");
}

#[tokio::test]
async fn a_stream_of_messages_passes_message_by_message_in_both_directions() {
    let upstream = upstream(echo).await;
    let proxy = Proxy::to(upstream.address, Wire::Http2).await;
    let mut requests = client(&proxy).await;
    let (answer, mut stream) = requests.send_request(post("/chat"), false).unwrap();
    let mut body = timeout(FAR, answer).await.unwrap().unwrap().into_body();
    for message in ["one", "two", "three"] {
        stream.send_data(message.into(), false).unwrap();
        let data = timeout(FAR, body.data()).await.unwrap().unwrap().unwrap();
        body.flow_control().release_capacity(data.len()).unwrap();
        assert_eq!(data, message);
    }
    stream.send_data(Bytes::new(), true).unwrap();
    assert!(timeout(FAR, body.data()).await.unwrap().is_none());
    assert_eq!(body.trailers().await.unwrap().unwrap()["grpc-status"], "0");
}

#[tokio::test]
async fn a_large_body_passes_whole_both_ways() {
    let upstream = upstream(echo).await;
    let proxy = Proxy::to(upstream.address, Wire::Http2).await;
    let mut requests = client(&proxy).await;
    let (answer, mut stream) = requests.send_request(post("/large"), false).unwrap();
    let sent: Bytes = (0..8_u32 << 20).map(|byte| (byte % 251) as u8).collect();
    let whole = sent.clone();
    let writing = tokio::spawn(async move { write(&mut stream, whole, true).await });
    let mut body = timeout(FAR, answer).await.unwrap().unwrap().into_body();
    assert!(read(&mut body).await.unwrap() == sent);
    assert!(writing.await.unwrap());
}

#[tokio::test]
async fn streams_of_one_client_share_one_upstream_connection() {
    let upstream = upstream(echo).await;
    let proxy = Proxy::to(upstream.address, Wire::Http2).await;
    let mut requests = client(&proxy).await;
    let mut answers = Vec::new();
    for _ in 0..50 {
        let (answer, mut stream) = requests.send_request(post("/"), false).unwrap();
        stream.send_data("x".into(), true).unwrap();
        answers.push(answer);
    }
    for answer in answers {
        let mut body = timeout(FAR, answer).await.unwrap().unwrap().into_body();
        read(&mut body).await.unwrap();
    }
    assert_eq!(upstream.connections(), 1);
}

#[tokio::test]
async fn a_stream_that_the_upstream_resets_is_reset_with_its_code() {
    let upstream = upstream(|_request, mut respond| async move {
        let mut answer = respond.send_response(Response::new(()), false).unwrap();
        answer.send_data("half".into(), false).unwrap();
        tokio::time::sleep(Duration::from_millis(50)).await;
        answer.send_reset(Reason::ENHANCE_YOUR_CALM);
    })
    .await;
    let proxy = Proxy::to(upstream.address, Wire::Http2).await;
    let mut requests = client(&proxy).await;
    let (answer, _stream) = requests.send_request(post("/"), true).unwrap();
    let mut body = timeout(FAR, answer).await.unwrap().unwrap().into_body();
    let error = read(&mut body).await.unwrap_err();
    assert_eq!(error.reason(), Some(Reason::ENHANCE_YOUR_CALM));
    assert!(error.is_remote());
}

#[tokio::test]
async fn a_lost_upstream_connection_resets_its_streams() {
    let upstream = Upstream::new(|stream| async move {
        let mut connection = ::h2::server::handshake(stream).await.unwrap();
        let (_, mut respond) = connection.accept().await.unwrap().unwrap();
        let mut answer = respond.send_response(Response::new(()), false).unwrap();
        answer.send_data("half".into(), false).unwrap();
        let _ = timeout(Duration::from_millis(100), connection.accept()).await;
    })
    .await;
    let proxy = Proxy::to(upstream.address, Wire::Http2).await;
    let mut requests = client(&proxy).await;
    let (answer, _stream) = requests.send_request(post("/"), true).unwrap();
    let mut body = timeout(FAR, answer).await.unwrap().unwrap().into_body();
    assert!(read(&mut body).await.unwrap_err().is_reset());
}

#[tokio::test]
async fn a_refused_stream_and_a_goaway_are_provably_unsent() {
    let refused = raw::frame(3, 0, 1, &7_u32.to_be_bytes());
    let went_away = raw::frame(7, 0, 0, &[0; 8]);
    for (answer, expected) in [
        (refused, NeverSent::StreamRefused),
        (went_away, NeverSent::GoingAway),
    ] {
        let upstream = Upstream::new(move |mut stream| {
            let answer = answer.clone();
            async move {
                let settings = &raw::PREFACE[24..];
                stream.write_all(settings).await.unwrap();
                raw::read_until_headers(&mut stream).await;
                stream.write_all(&answer).await.unwrap();
                let _ = stream.read_to_end(&mut Vec::new()).await;
            }
        })
        .await;
        let pool = UpstreamPool::new(PoolLimits::default());
        let key = key(upstream.address, Wire::Http2);
        let lease = pool
            .get(&key, &Terms::default(), || dial(key.endpoint))
            .await
            .unwrap();
        let request = ::http::Request::builder()
            .uri("http://shop/")
            .version(::http::Version::HTTP_2)
            .body(ReplayBody::empty())
            .unwrap();
        let sent = timeout(FAR, lease.send(request)).await.unwrap();
        let error = sent.err().unwrap();
        assert!(
            matches!(error, SendError::NeverSent(why) if why == expected),
            "{error:?}"
        );
    }
}

#[tokio::test]
async fn a_connection_opens_as_many_streams_as_it_may_and_ends_in_order_after_the_last() {
    let (sender, mut heard) = mpsc::unbounded_channel();
    let upstream = Upstream::new(move |stream| {
        let sender = sender.clone();
        async move {
            let mut connection = ::h2::server::handshake(stream).await.unwrap();
            let mut streams = 0;
            let in_order = loop {
                match connection.accept().await {
                    Some(Ok((_, mut respond))) => {
                        streams += 1;
                        let answer = ::http::Response::new(());
                        respond.send_response(answer, true).unwrap();
                    }
                    Some(Err(_)) => break false,
                    None => break true,
                }
            };
            sender.send((streams, in_order)).unwrap();
        }
    })
    .await;
    let pool = UpstreamPool::new(PoolLimits::default());
    let key = key(upstream.address, Wire::Http2);
    let terms = Terms {
        requests: Some(2),
        ..Terms::default()
    };
    let mut leases = Vec::new();
    for _ in 0..5 {
        let lease = pool.get(&key, &terms, || dial(key.endpoint)).await;
        leases.push(lease.unwrap());
    }
    for lease in leases {
        let request = ::http::Request::builder()
            .uri("http://shop/")
            .version(::http::Version::HTTP_2)
            .body(ReplayBody::empty())
            .unwrap();
        let answer = timeout(FAR, lease.send(request)).await.unwrap().unwrap();
        assert_eq!(answer.status(), 200);
    }
    for _ in 0..2 {
        assert_eq!(timeout(FAR, heard.recv()).await.unwrap(), Some((2, true)));
    }
    assert_eq!(upstream.connections(), 3);
}

#[tokio::test]
async fn a_client_that_gives_a_call_up_has_it_cancelled_upstream() {
    let (sender, mut heard) = mpsc::unbounded_channel();
    let upstream = upstream(move |_request, mut respond| {
        let sender = sender.clone();
        async move {
            sender.send(None).unwrap();
            let reason = poll_fn(|cx| respond.poll_reset(cx)).await;
            sender.send(Some(reason.unwrap())).unwrap();
        }
    })
    .await;
    let proxy = Proxy::to(upstream.address, Wire::Http2).await;
    let mut requests = client(&proxy).await;
    let (answer, mut stream) = requests.send_request(post("/"), true).unwrap();
    assert_eq!(timeout(FAR, heard.recv()).await.unwrap(), Some(None));
    stream.send_reset(Reason::CANCEL);
    drop(answer);
    let reason = timeout(FAR, heard.recv()).await.unwrap();
    assert_eq!(reason, Some(Some(Reason::CANCEL)));
}

#[tokio::test]
async fn a_reader_that_stalls_stalls_its_sender_and_nobody_else() {
    let written = Arc::new(AtomicUsize::new(0));
    let counted = written.clone();
    let upstream = upstream(move |request, mut respond| {
        let written = counted.clone();
        async move {
            let mut answer = respond.send_response(Response::new(()), false).unwrap();
            if request.uri().path() == "/small" {
                answer.send_data("small".into(), true).unwrap();
                return;
            }
            while write(&mut answer, Bytes::from_static(&[0; 16384]), false).await {
                written.fetch_add(16384, Ordering::Relaxed);
            }
        }
    })
    .await;
    let proxy = Proxy::to(upstream.address, Wire::Http2).await;
    let mut requests = client(&proxy).await;
    let (answer, _stream) = requests.send_request(post("/endless"), true).unwrap();
    let mut stalled = timeout(FAR, answer).await.unwrap().unwrap().into_body();
    let at = stalls(&written).await;
    // The client's window, our two stream buffers, and what h2 queues: no more.
    assert!(at < 2 << 20, "{at} bytes on their way");
    let (answer, _stream) = requests.send_request(post("/small"), true).unwrap();
    let mut body = timeout(FAR, answer).await.unwrap().unwrap().into_body();
    assert_eq!(read(&mut body).await.unwrap(), b"small");
    for _ in 0..200 {
        let data = timeout(FAR, stalled.data())
            .await
            .unwrap()
            .unwrap()
            .unwrap();
        stalled.flow_control().release_capacity(data.len()).unwrap();
    }
    eventually("the sender goes on", || {
        written.load(Ordering::Relaxed) > at
    })
    .await;
}

#[tokio::test]
async fn an_upstream_that_stalls_stalls_the_upload() {
    let upstream = upstream(|request, respond| async move {
        // Takes the stream and reads nothing.
        let _kept = (request, respond);
        std::future::pending::<()>().await;
    })
    .await;
    let proxy = Proxy::to(upstream.address, Wire::Http2).await;
    let mut requests = client(&proxy).await;
    let (_answer, mut stream) = requests.send_request(post("/"), false).unwrap();
    let written = Arc::new(AtomicUsize::new(0));
    let counted = written.clone();
    tokio::spawn(async move {
        while write(&mut stream, Bytes::from_static(&[0; 16384]), false).await {
            counted.fetch_add(16384, Ordering::Relaxed);
        }
    });
    let at = stalls(&written).await;
    assert!(at < 2 << 20, "{at} bytes on their way");
}

#[tokio::test]
async fn a_drain_lets_streams_end_and_takes_no_new_ones() {
    let (go, may_go) = tokio::sync::watch::channel(false);
    let upstream = upstream(move |_request, mut respond| {
        let mut may_go = may_go.clone();
        async move {
            let _ = may_go.wait_for(|go| *go).await;
            let mut answer = respond.send_response(Response::new(()), false).unwrap();
            answer.send_data("done".into(), true).unwrap();
        }
    })
    .await;
    let mut proxy = Proxy::to(upstream.address, Wire::Http2).await;
    let mut requests = client(&proxy).await;
    let (answer, _stream) = requests.send_request(post("/"), true).unwrap();
    eventually("the request is upstream", || upstream.connections() == 1).await;
    proxy.drain.cancel();
    let refused = timeout(FAR, async {
        while let Ok(ready) = requests.clone().ready().await {
            drop(ready);
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    });
    refused.await.unwrap();
    go.send_replace(true);
    let mut body = timeout(FAR, answer).await.unwrap().unwrap().into_body();
    assert_eq!(read(&mut body).await.unwrap(), b"done");
    drop(body);
    assert_eq!(proxy.ended().await.end, ServedEnd::InOrder);
}

/// Sends raw frames until the connection ends; answers how it did.
async fn flood(proxy: &mut Proxy, frames: impl Iterator<Item = Vec<u8>>) -> Served {
    let stream = proxy.connect().await;
    let (mut read, mut write) = stream.into_split();
    tokio::spawn(async move {
        let mut sink = [0; 4096];
        while let Ok(1..) = read.read(&mut sink).await {}
    });
    write.write_all(raw::PREFACE).await.unwrap();
    for frame in frames {
        if write.write_all(&frame).await.is_err() {
            break;
        }
    }
    proxy.ended().await
}

#[tokio::test]
async fn rapid_resets_end_the_connection() {
    let upstream = upstream(|_request, _respond| async {}).await;
    let mut proxy = Proxy::to(upstream.address, Wire::Http2).await;
    let frames = (0..100_000).map(|number| {
        let stream = number * 2 + 1;
        let mut frames = raw::frame(1, 0b101, stream, &raw::request());
        frames.extend(raw::frame(3, 0, stream, &8_u32.to_be_bytes()));
        frames
    });
    let served = flood(&mut proxy, frames).await;
    assert_eq!(served.end, ServedEnd::Downstream);
    assert_eq!(named(&proxy.counters.floods(), "resets"), 1);
    assert!(served.requests < 5_000, "{served:?}");
}

#[tokio::test]
async fn resets_at_leisure_end_the_connection_too() {
    let upstream = upstream(|_request, respond| async move {
        let _kept = respond;
        std::future::pending::<()>().await;
    })
    .await;
    let mut proxy = Proxy::to(upstream.address, Wire::Http2).await;
    let requests = client(&proxy).await;
    let mut sent = 0;
    // Each stream is accepted before it is reset, so h2 itself sees nothing wrong.
    while let Ok(mut ready) = requests.clone().ready().await {
        let Ok((answer, mut stream)) = ready.send_request(post("/"), true) else {
            break;
        };
        sent += 1;
        let seen = timeout(FAR, async {
            while named(&proxy.counters.by_name(), "requests") < sent {
                tokio::task::yield_now().await;
                if requests.clone().ready().await.is_err() {
                    break;
                }
            }
        });
        seen.await.unwrap();
        stream.send_reset(Reason::CANCEL);
        drop(answer);
        assert!(sent < 5_000, "never ended");
    }
    drop(requests);
    assert_eq!(proxy.ended().await.end, ServedEnd::Downstream);
    assert_eq!(named(&proxy.counters.floods(), "resets"), 1);
}

#[tokio::test]
async fn a_flood_of_continuations_ends_the_connection() {
    let upstream = upstream(echo).await;
    let mut proxy = Proxy::to(upstream.address, Wire::Http2).await;
    let head = raw::frame(1, 0, 1, &raw::request());
    let more = (0..100_000).map(|_| raw::frame(9, 0, 1, &raw::field(b"x", b"")));
    let served = flood(&mut proxy, std::iter::once(head).chain(more)).await;
    assert_eq!(served.end, ServedEnd::Downstream);
    assert_eq!(named(&proxy.counters.floods(), "continuations"), 1);
    assert_eq!(upstream.connections(), 0);
}

#[tokio::test]
async fn a_flood_of_empty_data_ends_the_connection() {
    let upstream = upstream(|request, respond| async move {
        let _kept = (request, respond);
        std::future::pending::<()>().await;
    })
    .await;
    let mut proxy = Proxy::to(upstream.address, Wire::Http2).await;
    let head = raw::frame(1, 0b100, 1, &raw::request());
    let more = (0..1_000_000).map(|_| raw::frame(0, 0, 1, b""));
    let served = flood(&mut proxy, std::iter::once(head).chain(more)).await;
    assert_eq!(served.end, ServedEnd::Downstream);
    assert_eq!(named(&proxy.counters.floods(), "empty_data"), 1);
}

#[tokio::test]
async fn a_header_bomb_is_refused_and_does_not_reach_the_service() {
    let upstream = upstream(echo).await;
    let proxy = Proxy::to(upstream.address, Wire::Http2).await;
    // One entry of 4 KB in the table, named a thousand times by one byte each (RFC 7541 §7.1.3).
    let mut block = raw::request();
    block.extend([0x40, 1, b'x', 0x7f]);
    block.extend([
        0x80 | ((3_900 - 127_u32) & 0x7f) as u8,
        ((3_900 - 127_u32) >> 7) as u8,
    ]);
    block.extend([b'a'; 3_900]);
    block.extend([0xbe; 10_000]);
    let mut stream = proxy.connect().await;
    stream.write_all(raw::PREFACE).await.unwrap();
    let frame = raw::frame(1, 0b101, 1, &block);
    stream.write_all(&frame).await.unwrap();
    // Answered with 431, or reset, or the connection with it.
    while let Some((kind, id, _)) = raw::read(&mut stream).await {
        if id == 1 {
            assert!(matches!(kind, 1 | 3));
            break;
        }
    }
    assert_eq!(named(&proxy.counters.by_name(), "requests"), 0);
    assert_eq!(upstream.connections(), 0);
}

#[tokio::test]
async fn a_host_that_differs_from_the_authority_is_refused() {
    let upstream = upstream(echo).await;
    let proxy = Proxy::to(upstream.address, Wire::Http2).await;
    let mut requests = client(&proxy).await;
    let mut request = post("/");
    request
        .headers_mut()
        .insert("host", HeaderValue::from_static("other"));
    request.headers_mut().remove("content-type");
    let (answer, _stream) = requests.send_request(request, true).unwrap();
    let answer = timeout(FAR, answer).await.unwrap().unwrap();
    assert_eq!(answer.status(), StatusCode::BAD_REQUEST);
    assert_eq!(answer.headers()["x-undermesh-reason"], "host_mismatch");
    assert_eq!(upstream.connections(), 0);
}
