//! A client that talks HTTP to an app through the destination's side, over loopback.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use http::StatusCode;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use super::*;
use crate::inbound::gate::Open;
use crate::telemetry::testing::{total, workload};
use crate::telemetry::{Direction, Party, Telemetry};

const FAR: Duration = Duration::from_secs(20);
const GET: &[u8] = b"GET /a HTTP/1.1\r\nhost: shop\r\n\r\n";
const OK: &[u8] = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok";
const REQUESTS: &str = "undermesh_http_requests_total";

/// Dials an app on loopback, and counts.
struct Dialler {
    app: SocketAddr,
    dials: Arc<AtomicUsize>,
}

impl Redial for Dialler {
    async fn redial(&self) -> Result<TcpStream, String> {
        self.dials.fetch_add(1, Ordering::Relaxed);
        let socket = TcpStream::connect(self.app).await;
        socket.map_err(|error| error.to_string())
    }
}

struct Conversation {
    client: TcpStream,
    dials: Arc<AtomicUsize>,
    telemetry: Arc<Telemetry>,
    task: JoinHandle<Result<Served, SendError>>,
}

impl Conversation {
    async fn by(app: SocketAddr, gate: Arc<dyn RequestGate>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (client, accepted) = tokio::join!(TcpStream::connect(address), listener.accept());
        let (downstream, peer) = accepted.unwrap();
        socket2::SockRef::from(&downstream)
            .set_linger(Some(Duration::ZERO))
            .unwrap();
        let telemetry = Telemetry::new();
        let source = workload("web", "10.0.0.1");
        let requester = telemetry.requester(
            Direction::Inbound,
            Party::of(&source, "10.0.0.1:1".parse().unwrap()),
            app,
            1,
        );
        let dials = Arc::new(AtomicUsize::new(0));
        let visit = Visit {
            redial: Dialler {
                app,
                dials: dials.clone(),
            },
            caller: Caller {
                identity: Some(source.identity.clone()),
                address: peer,
            },
            app,
            workload: workload("cart", "10.0.0.2"),
            security: Security::MutualTls,
            requester,
            gate,
            upstreams: upstreams(Wire::Http1),
        };
        let first = TcpStream::connect(app).await.unwrap();
        let task = tokio::spawn(async move {
            let (drain, gone) = (CancellationToken::new(), CancellationToken::new());
            let stops = Stops {
                drain: &drain,
                gone: &gone,
            };
            let service = HttpService::default();
            let bytes = Arc::default();
            let client = downstream.into();
            serve(&service, visit, Wire::Http1, client, first, bytes, stops).await
        });
        Self {
            client: client.unwrap(),
            dials,
            telemetry,
            task,
        }
    }

    async fn answer(&mut self, length: usize) -> String {
        let mut answer = vec![0; length];
        timeout(FAR, self.client.read_exact(&mut answer))
            .await
            .unwrap()
            .unwrap();
        String::from_utf8(answer).unwrap()
    }

    fn counted(&self, parts: &[&str]) -> u64 {
        total(&self.telemetry.scrape().unwrap(), REQUESTS, parts)
    }
}

/// An app that speaks from a script, once per connection.
async fn app<H, F>(handle: H) -> SocketAddr
where
    H: Fn(TcpStream) -> F + Send + 'static,
    F: Future<Output = ()> + Send + 'static,
{
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(handle(stream));
        }
    });
    address
}

async fn head(stream: &mut TcpStream) -> Option<String> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.ok()?);
    }
    String::from_utf8(head).ok()
}

async fn keeps_alive(mut stream: TcpStream) {
    while head(&mut stream).await.is_some() {
        if stream.write_all(OK).await.is_err() {
            return;
        }
    }
}

#[tokio::test]
async fn requests_use_the_connection_that_was_made_and_are_counted_at_the_destination() {
    let mut served = Conversation::by(app(keeps_alive).await, Arc::new(Open)).await;
    for _ in 0..3 {
        served.client.write_all(GET).await.unwrap();
        let answer = served.answer(OK.len()).await;
        assert!(answer.ends_with("ok"), "{answer}");
    }
    assert_eq!(served.dials.load(Ordering::Relaxed), 0);
    served.client.shutdown().await.unwrap();
    let ended = timeout(FAR, &mut served.task).await.unwrap().unwrap();
    assert_eq!(ended.unwrap().requests, 3);
    let labels = [
        "reporter=\"destination\"",
        "status=\"200\"",
        "source_workload=\"web\"",
        "destination_workload=\"cart\"",
    ];
    assert_eq!(served.counted(&labels), 3);
}

#[tokio::test]
async fn an_app_that_closes_between_requests_is_dialled_again() {
    let app = app(|mut stream| async move {
        head(&mut stream).await;
        let _ = stream.write_all(OK).await;
    })
    .await;
    let mut served = Conversation::by(app, Arc::new(Open)).await;
    for _ in 0..3 {
        served.client.write_all(GET).await.unwrap();
        assert!(served.answer(OK.len()).await.ends_with("ok"));
        // The app's close has to arrive.
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(served.dials.load(Ordering::Relaxed), 2);
}

#[tokio::test]
async fn an_app_that_cannot_be_reached_again_is_said_to_be_so() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        drop(listener);
        head(&mut stream).await;
        let _ = stream.write_all(OK).await;
    });
    let mut served = Conversation::by(address, Arc::new(Open)).await;
    served.client.write_all(GET).await.unwrap();
    served.answer(OK.len()).await;
    tokio::time::sleep(Duration::from_millis(50)).await;
    served.client.write_all(GET).await.unwrap();
    let answer = timeout(FAR, head(&mut served.client))
        .await
        .unwrap()
        .unwrap();
    assert!(answer.starts_with("HTTP/1.1 503"), "{answer}");
    assert!(
        answer.contains("x-undermesh-reason: connect_failed"),
        "{answer}"
    );
    assert_eq!(
        served.counted(&["flag=\"connect_failed\"", "status=\"503\""]),
        1
    );
}

#[tokio::test]
async fn an_app_that_breaks_off_resets_its_client() {
    for said in [
        &b""[..],
        b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nhalf",
    ] {
        let app = app(move |mut stream| async move {
            head(&mut stream).await;
            let _ = stream.write_all(said).await;
        })
        .await;
        let mut served = Conversation::by(app, Arc::new(Open)).await;
        served.client.write_all(GET).await.unwrap();
        let mut seen = Vec::new();
        let read = served.client.read_to_end(&mut seen);
        let error = timeout(FAR, read).await.unwrap().unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
        timeout(FAR, &mut served.task)
            .await
            .unwrap()
            .unwrap()
            .unwrap();
        assert_eq!(served.counted(&["flag=\"upstream_reset\""]), 1);
    }
}

/// Admits nobody but one path.
struct Only(&'static str);

impl RequestGate for Only {
    fn admit(&self, head: &request::Parts, caller: &Caller) -> Result<(), Refused> {
        assert!(caller.identity.is_some());
        if head.uri.path() == self.0 {
            return Ok(());
        }
        Err(Refused {
            status: StatusCode::FORBIDDEN,
            flag: ResponseFlag::Denied,
        })
    }
}

#[tokio::test]
async fn a_request_that_the_gate_refuses_does_not_reach_the_app() {
    let asked = Arc::new(AtomicUsize::new(0));
    let counted = asked.clone();
    let app = app(move |mut stream| {
        let asked = counted.clone();
        async move {
            while head(&mut stream).await.is_some() {
                asked.fetch_add(1, Ordering::Relaxed);
                let _ = stream.write_all(OK).await;
            }
        }
    })
    .await;
    let mut served = Conversation::by(app, Arc::new(Only("/public"))).await;
    served.client.write_all(GET).await.unwrap();
    let answer = head(&mut served.client).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 403"), "{answer}");
    assert!(answer.contains("x-undermesh-reason: denied"), "{answer}");
    served.answer("denied\n".len()).await;
    // The connection goes on.
    let public = b"GET /public HTTP/1.1\r\nhost: shop\r\n\r\n";
    served.client.write_all(public).await.unwrap();
    assert!(served.answer(OK.len()).await.ends_with("ok"));
    assert_eq!(asked.load(Ordering::Relaxed), 1);
    assert_eq!(served.counted(&["flag=\"denied\"", "status=\"403\""]), 1);
}
