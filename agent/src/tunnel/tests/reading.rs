//! A connection through a tunnel as a byte stream.

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::streams::pair;
use super::*;
use crate::tunnel::limits::{SEND_BUFFER, STREAM_WINDOW};

fn near(tunnelled: Tunnelled) -> TunnelIo {
    TunnelIo::new(tunnelled.send, tunnelled.receive)
}

#[tokio::test]
async fn a_stream_is_read_and_written_to_its_ends() {
    let (tunnelled, (mut send, mut receive), _kept) = pair().await;
    let mut io = near(tunnelled);
    within(io.write_all(b"request")).await.unwrap();
    within(io.shutdown()).await.unwrap();
    assert_eq!(within(read_all(&mut receive)).await.unwrap(), b"request");
    send.send(Bytes::from_static(b"answer")).await.unwrap();
    send.finish().unwrap();
    let mut answer = Vec::new();
    within(io.read_to_end(&mut answer)).await.unwrap();
    assert_eq!(answer, b"answer");
}

#[tokio::test]
async fn a_reset_reads_as_an_error_and_not_as_an_end() {
    let (tunnelled, (mut send, _receive), _kept) = pair().await;
    let mut io = near(tunnelled);
    send.send(Bytes::from_static(b"half")).await.unwrap();
    let mut half = [0; 4];
    within(io.read_exact(&mut half)).await.unwrap();
    send.reset(ResetReason::Connection);
    let error = within(io.read_u8()).await.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
}

#[tokio::test]
async fn dropped_without_a_shutdown_it_resets_the_peer() {
    let (tunnelled, (_send, mut receive), _kept) = pair().await;
    let mut io = near(tunnelled);
    within(io.write_all(b"half")).await.unwrap();
    // Sent before the reset, which would throw it away.
    let half = within(receive.data()).await.unwrap().unwrap();
    assert_eq!(half, "half");
    drop(io);
    assert!(within(read_all(&mut receive)).await.is_err());
}

#[tokio::test]
async fn what_is_not_read_leaves_the_peer_no_room_for_more() {
    let (tunnelled, (mut send, _receive), _kept) = pair().await;
    let mut io = near(tunnelled);
    let total = 4 * STREAM_WINDOW as usize;
    let sent = Arc::new(AtomicUsize::new(0));
    let counted = sent.clone();
    let sending = tokio::spawn(async move {
        for _ in 0..total / 4096 {
            send.send(Bytes::from_static(&[7; 4096])).await.unwrap();
            counted.fetch_add(4096, Ordering::SeqCst);
        }
        send.finish().unwrap();
    });
    // Looking at the first bytes takes none.
    assert!(!within(io.peek()).await.unwrap().is_empty());
    let mut before = usize::MAX;
    while before != sent.load(Ordering::SeqCst) {
        before = sent.load(Ordering::SeqCst);
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    assert!(before <= STREAM_WINDOW as usize + SEND_BUFFER, "{before}");
    let mut all = Vec::new();
    within(io.read_to_end(&mut all)).await.unwrap();
    assert_eq!(all.len(), total);
    sending.await.unwrap();
}

#[tokio::test]
async fn a_writer_whose_peer_does_not_read_waits() {
    let (tunnelled, (_send, mut receive), _kept) = pair().await;
    let mut io = near(tunnelled);
    let total = 4 * STREAM_WINDOW as usize;
    let written = Arc::new(AtomicUsize::new(0));
    let counted = written.clone();
    let writing = tokio::spawn(async move {
        for _ in 0..total / 4096 {
            io.write_all(&[7; 4096]).await.unwrap();
            counted.fetch_add(4096, Ordering::SeqCst);
        }
        io.shutdown().await.unwrap();
        io
    });
    let mut before = usize::MAX;
    while before != written.load(Ordering::SeqCst) {
        before = written.load(Ordering::SeqCst);
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    assert!(before <= STREAM_WINDOW as usize + SEND_BUFFER, "{before}");
    assert_eq!(within(read_all(&mut receive)).await.unwrap().len(), total);
    drop(writing.await.unwrap());
}

#[tokio::test]
async fn peeking_gathers_what_came_in_parts_and_reading_begins_with_it() {
    let (tunnelled, (mut send, _receive), _kept) = pair().await;
    let mut io = near(tunnelled);
    send.send(Bytes::from_static(b"GET")).await.unwrap();
    assert_eq!(within(io.peek()).await.unwrap(), b"GET");
    send.send(Bytes::from_static(b" / ")).await.unwrap();
    assert!(within(io.peek_more()).await.unwrap());
    assert_eq!(within(io.peek()).await.unwrap(), b"GET / ");
    send.finish().unwrap();
    assert!(!within(io.peek_more()).await.unwrap());
    let mut all = Vec::new();
    within(io.read_to_end(&mut all)).await.unwrap();
    assert_eq!(all, b"GET / ");
}
