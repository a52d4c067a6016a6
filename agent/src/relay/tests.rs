use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::buffers::ReadBuffer;
use super::{Borrowed, Counts, Ended, Peer, failed, relay_tcp, relay_tunnel};
use crate::tunnel::{TunnelReceive, TunnelSend};

/// A client and a server with a relay between them.
struct Relayed {
    client: TcpStream,
    server: TcpStream,
    relay: JoinHandle<(Ended, u64, u64)>,
    stop: CancellationToken,
}

async fn pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let connect = TcpStream::connect(listener.local_addr().unwrap());
    let (near, far) = tokio::join!(connect, listener.accept());
    (near.unwrap(), far.unwrap().0)
}

/// From now on closing the socket resets it, as with the sockets that capture makes.
fn abort_on_close(stream: &TcpStream) -> std::io::Result<()> {
    socket2::SockRef::from(stream).set_linger(Some(Duration::ZERO))
}

async fn relayed() -> Relayed {
    let (client, downstream) = pair().await;
    let (upstream, server) = pair().await;
    abort_on_close(&downstream).unwrap();
    abort_on_close(&upstream).unwrap();
    let stop = CancellationToken::new();
    let relay = tokio::spawn({
        let stop = stop.clone();
        async move {
            let (sent, received) = (AtomicU64::new(0), AtomicU64::new(0));
            let counts = Counts {
                to_upstream: &sent,
                to_downstream: &received,
            };
            let connection = Borrowed {
                counts,
                stop: &stop,
            };
            let ended = relay_tcp(downstream, upstream, connection).await;
            (ended, sent.into_inner(), received.into_inner())
        }
    });
    Relayed {
        client,
        server,
        relay,
        stop,
    }
}

fn is_reset(result: std::io::Result<usize>) -> bool {
    result.is_err_and(|error| error.kind() == std::io::ErrorKind::ConnectionReset)
}

#[tokio::test]
async fn bytes_arrive_unchanged_both_ways_at_once() {
    let Relayed {
        client,
        server,
        relay,
        ..
    } = relayed().await;
    let payload: Vec<u8> = (0..3_000_017u32).map(|n| (n % 251) as u8).collect();
    let exchange = |stream: TcpStream, payload: Vec<u8>| async move {
        let (mut read, mut write) = stream.into_split();
        let send = async {
            write.write_all(&payload).await.unwrap();
            write.shutdown().await.unwrap();
        };
        let mut received = Vec::new();
        let (_, read) = tokio::join!(send, read.read_to_end(&mut received));
        read.unwrap();
        received
    };
    let reversed: Vec<u8> = payload.iter().rev().copied().collect();
    let (at_client, at_server) = tokio::join!(
        exchange(client, payload.clone()),
        exchange(server, reversed.clone())
    );
    assert!(at_client == reversed && at_server == payload);
    let bytes = payload.len() as u64;
    assert_eq!(relay.await.unwrap(), (Ended::InOrder, bytes, bytes));
}

#[tokio::test]
async fn a_half_closed_connection_still_carries_the_answer() {
    let Relayed {
        mut client,
        mut server,
        relay,
        ..
    } = relayed().await;
    client.write_all(b"question").await.unwrap();
    client.shutdown().await.unwrap();
    let mut question = Vec::new();
    server.read_to_end(&mut question).await.unwrap();
    assert_eq!(question, b"question");
    server.write_all(b"answer").await.unwrap();
    drop(server);
    let mut answer = Vec::new();
    client.read_to_end(&mut answer).await.unwrap();
    assert_eq!(answer, b"answer");
    assert_eq!(relay.await.unwrap(), (Ended::InOrder, 8, 6));
}

#[tokio::test]
async fn a_reset_by_the_server_is_a_reset_at_the_client() {
    let Relayed {
        mut client,
        server,
        relay,
        ..
    } = relayed().await;
    abort_on_close(&server).unwrap();
    drop(server);
    assert!(is_reset(client.read(&mut [0; 1]).await));
    assert_eq!(relay.await.unwrap().0, Ended::Reset(Peer::Upstream));
}

#[tokio::test]
async fn bytes_sent_before_a_reset_still_arrive() {
    let Relayed {
        mut client,
        mut server,
        relay,
        ..
    } = relayed().await;
    server.write_all(b"last words").await.unwrap();
    let mut words = [0; 10];
    client.read_exact(&mut words).await.unwrap();
    abort_on_close(&server).unwrap();
    drop(server);
    assert_eq!(&words, b"last words");
    assert!(is_reset(client.read(&mut words).await));
    assert_eq!(relay.await.unwrap().0, Ended::Reset(Peer::Upstream));
}

#[tokio::test]
async fn a_client_that_dies_after_its_half_close_is_noticed_while_the_server_is_silent() {
    let Relayed {
        mut client,
        mut server,
        relay,
        ..
    } = relayed().await;
    client.shutdown().await.unwrap();
    assert_eq!(server.read(&mut [0; 1]).await.unwrap(), 0);
    abort_on_close(&client).unwrap();
    drop(client);
    failed(&server).await;
    assert_eq!(relay.await.unwrap().0, Ended::Reset(Peer::Downstream));
}

#[tokio::test]
async fn stopping_resets_both_ends() {
    let Relayed {
        mut client,
        mut server,
        relay,
        stop,
    } = relayed().await;
    client.write_all(b"x").await.unwrap();
    server.read_exact(&mut [0; 1]).await.unwrap();
    stop.cancel();
    assert_eq!(relay.await.unwrap().0, Ended::Stopped);
    assert!(is_reset(client.read(&mut [0; 1]).await));
    assert!(is_reset(server.read(&mut [0; 1]).await));
}

#[tokio::test]
async fn dropping_the_relay_resets_both_ends() {
    let Relayed {
        mut client,
        mut server,
        relay,
        ..
    } = relayed().await;
    client.write_all(b"x").await.unwrap();
    server.read_exact(&mut [0; 1]).await.unwrap();
    relay.abort();
    assert!(is_reset(client.read(&mut [0; 1]).await));
    assert!(is_reset(server.read(&mut [0; 1]).await));
}

#[tokio::test]
async fn a_reader_that_sleeps_stops_the_sender() {
    let Relayed { client, server, .. } = relayed().await;
    let written = AtomicU64::new(0);
    let fill = async {
        loop {
            client.writable().await.unwrap();
            if let Ok(bytes) = client.try_write(&[0; 65536]) {
                written.fetch_add(bytes as u64, Ordering::Relaxed);
            }
        }
    };
    // Not a wait for luck: the sender has to stop by itself, whatever time it is given.
    let stopped = async {
        let mut last = u64::MAX;
        while last != written.load(Ordering::Relaxed) {
            last = written.load(Ordering::Relaxed);
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    };
    tokio::select! { () = fill => {}, () = stopped => {} }
    let held = written.load(Ordering::Relaxed);
    assert!(held < 64 << 20, "{held} bytes went in and nobody read one");
    drop(server);
}

/// Writes until nothing more is taken: the other side does not read.
async fn fill(stream: &mut TcpStream) {
    let block = vec![7; 1 << 20];
    let quiet = Duration::from_millis(200);
    while tokio::time::timeout(quiet, stream.write_all(&block))
        .await
        .is_ok()
    {}
}

#[tokio::test]
async fn a_sender_that_is_gone_is_noticed_while_the_receiver_does_not_read() {
    let Relayed {
        mut client,
        mut server,
        relay,
        ..
    } = relayed().await;
    fill(&mut client).await;
    abort_on_close(&client).unwrap();
    drop(client);
    let ended = tokio::time::timeout(Duration::from_secs(10), relay).await;
    let (ended, ..) = ended.expect("the relay ends").unwrap();
    assert_eq!(ended, Ended::Reset(Peer::Downstream));
    let mut received = Vec::new();
    assert!(is_reset(server.read_to_end(&mut received).await));
}

#[tokio::test]
async fn bytes_that_come_after_a_short_read_are_seen() {
    let (mut far, near) = pair().await;
    for message in [&b"one"[..], b"two", &[7; 9000], b"four"] {
        far.write_all(message).await.unwrap();
        let mut got = Vec::new();
        while got.len() < message.len() {
            near.readable().await.unwrap();
            let mut buffer = ReadBuffer::take();
            while let Some(chunk) = buffer.read(&near).unwrap() {
                got.extend_from_slice(&chunk);
            }
        }
        assert_eq!(got, message);
    }
    // The end, which comes together with the last bytes.
    far.write_all(b"last").await.unwrap();
    drop(far);
    let mut got = Vec::new();
    loop {
        near.readable().await.unwrap();
        match ReadBuffer::take().read(&near).unwrap() {
            Some(chunk) if chunk.is_empty() => break,
            chunk => got.extend(chunk.into_iter().flatten()),
        }
    }
    assert_eq!(got, b"last");
}

/// The size of what an async function of these arguments is while it runs.
fn size_of_tunnel_relay<'a, F>(
    _: impl FnOnce(TcpStream, Peer, TunnelSend, TunnelReceive, Borrowed<'a>) -> F,
) -> usize {
    size_of::<F>()
}

fn size_of_tcp_relay<'a, F>(_: impl FnOnce(TcpStream, TcpStream, Borrowed<'a>) -> F) -> usize {
    size_of::<F>()
}

/// Every idle connection holds one of these.
#[test]
fn an_idle_connection_costs_little_memory() {
    let tunnel = size_of_tunnel_relay(relay_tunnel);
    assert!(tunnel <= 400, "{tunnel} bytes");
    let tcp = size_of_tcp_relay(relay_tcp);
    assert!(tcp <= 768, "{tcp} bytes");
}
