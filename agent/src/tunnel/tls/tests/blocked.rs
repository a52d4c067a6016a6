//! A socket that takes and gives little, callers that give up in between, and who is woken.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Wake, Waker};

use super::drip::Drip;
use super::*;

#[tokio::test]
async fn a_stream_that_waits_holds_no_buffer() {
    let (client, server) = both().await;
    let (mut client, mut server) = (client.into_stream().unwrap(), server.into_stream().unwrap());
    let record = seal(&mut client, ContentType::ApplicationData, &pattern(5000));
    let (some, rest) = record.split_at(HEAD + 1000);
    client.io.write_all(some).await.unwrap();
    let mut got = vec![0; 5000];
    {
        let mut read = pin!(server.read_exact(&mut got));
        let waits = std::future::poll_fn(|cx| Poll::Ready(read.as_mut().poll(cx).is_pending()));
        assert!(waits.await);
    }
    assert!(!server.incoming.holds_a_buffer(), "for a part of a record");
    client.io.write_all(rest).await.unwrap();
    within(server.read_exact(&mut got)).await.unwrap();
    assert!(got == pattern(5000));
    assert!(!server.incoming.holds_a_buffer());
}

#[tokio::test]
async fn a_peer_that_does_not_read_stops_the_writer() {
    let (client, server) = certificates();
    let (near, far) = duplex(64 * 1024);
    let (ours, theirs) = within(async {
        tokio::join!(
            connect(client.client.clone(), name(), near),
            TlsAcceptor::from(server.server.clone()).accept(far)
        )
    })
    .await;
    let (mut ours, mut theirs) = (ours.unwrap().into_stream().unwrap(), theirs.unwrap());
    let bytes = pattern(2 << 20);
    let mut taken = 0;
    std::future::poll_fn(|cx| {
        while let Poll::Ready(written) = Pin::new(&mut ours).poll_write(cx, &bytes[taken..]) {
            taken += written.unwrap();
        }
        Poll::Ready(())
    })
    .await;
    assert!(taken <= TLS_BUFFER + 64 * 1024, "{taken}");
    let mut got = vec![0; bytes.len()];
    let write = async {
        ours.write_all(&bytes[taken..]).await.unwrap();
        ours.flush().await.unwrap();
    };
    within(async { tokio::join!(write, theirs.read_exact(&mut got)) })
        .await
        .1
        .unwrap();
    assert!(got == bytes);
}

#[tokio::test]
async fn records_pass_through_a_socket_that_takes_and_gives_a_few_bytes_at_a_time() {
    for at_once in [1, 2, 3, 5, 21, 1000] {
        let (mut ours, mut theirs) = to_their_server_in_drips(at_once).await;
        for length in [1, 2, 700, 20_000] {
            let bytes = pattern(length);
            carries(&mut ours, &mut theirs, &bytes).await;
            // Its answer to this comes in between.
            theirs.get_mut().1.refresh_traffic_keys().unwrap();
            carries(&mut theirs, &mut ours, &bytes).await;
        }
    }
}

#[tokio::test]
async fn a_caller_that_gives_up_at_every_step_loses_and_repeats_nothing() {
    let (client, server) = certificates();
    let (near, far) = duplex(PIPE);
    let (ours, theirs) = within(async {
        tokio::join!(
            connect(client.client.clone(), name(), Drip::new(near, 700)),
            accept(server.server.clone(), Drip::new(far, 300))
        )
    })
    .await;
    let (ours, theirs) = (ours.unwrap(), theirs.unwrap());
    let (mut ours, mut theirs) = (ours.into_stream().unwrap(), theirs.into_stream().unwrap());
    let bytes = pattern(200_000);
    let (mut sent, mut got) = (0, Vec::new());
    let work = async {
        while got.len() < bytes.len() {
            // A future of its own for each attempt, dropped after one poll.
            if sent < bytes.len() {
                let end = bytes.len().min(sent + 30_000);
                sent += once(ours.write(&bytes[sent..end])).await.unwrap_or(0);
            }
            once(async { ours.flush().await.map(|()| 0) }).await;
            let mut some = [0; 4096];
            let length = once(theirs.read(&mut some)).await.unwrap_or(0);
            got.extend_from_slice(&some[..length]);
            tokio::task::yield_now().await;
        }
    };
    within(work).await;
    assert!(got == bytes);
}

/// What one poll brings.
async fn once(future: impl Future<Output = io::Result<usize>>) -> Option<usize> {
    let mut future = pin!(future);
    std::future::poll_fn(|cx| {
        Poll::Ready(match future.as_mut().poll(cx) {
            Poll::Ready(result) => Some(result.unwrap()),
            Poll::Pending => None,
        })
    })
    .await
}

#[derive(Default)]
struct Woken(AtomicUsize);

impl Wake for Woken {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

impl Woken {
    fn times(&self) -> usize {
        self.0.swap(0, Ordering::SeqCst)
    }
}

#[tokio::test]
async fn a_reader_is_woken_by_bytes_and_by_nothing_else() {
    let (mut client, mut server) = streams().await;
    let woken = Arc::new(Woken::default());
    let waker = Waker::from(woken.clone());
    let mut cx = Context::from_waker(&waker);
    let mut bytes = [0; 100];
    let mut poll = |server: &mut Ours| {
        let mut into = ReadBuf::new(&mut bytes);
        let read = Pin::new(server).poll_read(&mut cx, &mut into);
        read.map(|read| read.map(|()| into.filled().len()).unwrap())
    };
    assert!(poll(&mut server).is_pending());
    assert_eq!(woken.times(), 0, "it spins");
    let record = seal(&mut client, ContentType::ApplicationData, b"word");
    for part in [&record[..3], &record[3..20]] {
        client.io.write_all(part).await.unwrap();
        assert_eq!(woken.times(), 1);
        assert!(poll(&mut server).is_pending());
        assert_eq!(woken.times(), 0, "it spins");
    }
    client.io.write_all(&record[20..]).await.unwrap();
    assert_eq!(woken.times(), 1);
    assert_eq!(poll(&mut server), Poll::Ready(4));
    assert!(poll(&mut server).is_pending());
    // Keys are nothing for the reader, who goes on waiting.
    client.outgoing.update_key_for_test(&mut client.keys);
    client.flush().await.unwrap();
    assert_eq!(woken.times(), 1);
    assert!(poll(&mut server).is_pending());
    drop(client);
    assert_eq!(woken.times(), 1);
}

/// Writes until no more is taken.
async fn fill(stream: &mut Ours, bytes: &[u8]) -> usize {
    let mut taken = 0;
    std::future::poll_fn(|cx| {
        while let Poll::Ready(written) = Pin::new(&mut *stream).poll_write(cx, bytes) {
            taken += written.unwrap();
        }
        Poll::Ready(())
    })
    .await;
    taken
}

/// Two of ours over a pipe that holds little.
async fn narrow() -> (Ours, Ours) {
    let (client, server) = certificates();
    let (near, far) = duplex(16 * 1024);
    let (ours, theirs) = within(async {
        tokio::join!(
            connect(client.client.clone(), name(), near),
            accept(server.server.clone(), far)
        )
    })
    .await;
    (
        ours.unwrap().into_stream().unwrap(),
        theirs.unwrap().into_stream().unwrap(),
    )
}

#[tokio::test]
async fn many_small_writes_to_a_socket_that_takes_none_are_bounded_like_large_ones() {
    let (mut ours, mut theirs) = narrow().await;
    let taken = fill(&mut ours, b"x").await;
    assert!(ours.outgoing.waiting_records() <= 1024);
    let mut got = vec![0; taken];
    let flush = async { ours.flush().await.unwrap() };
    within(async { tokio::join!(flush, theirs.read_exact(&mut got)) })
        .await
        .1
        .unwrap();
    assert!(got.iter().all(|byte| *byte == b'x'));
    assert_eq!(ours.outgoing.waiting_records(), 0);
}

#[tokio::test]
async fn a_flush_waits_for_all_that_was_written_and_a_shutdown_for_the_last_word() {
    let (mut ours, mut theirs) = narrow().await;
    let taken = fill(&mut ours, &pattern(100_000)).await;
    let waits = |poll: Poll<io::Result<()>>| Poll::Ready(poll.is_pending());
    assert!(std::future::poll_fn(|cx| waits(Pin::new(&mut ours).poll_flush(cx))).await);
    assert!(std::future::poll_fn(|cx| waits(Pin::new(&mut ours).poll_shutdown(cx))).await);
    let mut got = Vec::new();
    let end = async { ours.shutdown().await.unwrap() };
    within(async { tokio::join!(end, theirs.read_to_end(&mut got)) })
        .await
        .1
        .unwrap();
    assert_eq!(got.len(), taken);
}

#[tokio::test]
async fn requests_for_keys_while_the_socket_takes_nothing_get_one_answer_before_the_next_data() {
    let (mut client, mut server) = narrow().await;
    let mut said = fill(&mut server, &pattern(100_000)).await;
    let full = server.outgoing.waiting_records();
    for _ in 0..20 {
        client.outgoing.update_key_for_test(&mut client.keys);
        client.outgoing.update_key_for_test(&mut client.keys);
        carries(&mut client, &mut server, b"data").await;
        // It takes nothing more: one answer stands for all.
        assert_eq!(fill(&mut server, b"more").await, 0);
    }
    assert_eq!(server.outgoing.waiting_records(), full + 1);
    let mut got = vec![0; said];
    let flush = async { server.flush().await.unwrap() };
    within(async { tokio::join!(flush, client.read_exact(&mut got)) })
        .await
        .1
        .unwrap();

    said = server.write(&pattern(100_000)).await.unwrap();
    let waiting = server.outgoing.waiting_records();
    for round in 1..=5 {
        client.outgoing.update_key_for_test(&mut client.keys);
        carries(&mut client, &mut server, b"data").await;
        said += server.write(b"more").await.unwrap();
        // An answer of its own for each, since there was data between them (section 4.6.3).
        assert_eq!(server.outgoing.waiting_records(), waiting + 2 * round);
    }
    let mut got = vec![0; said];
    let flush = async { server.flush().await.unwrap() };
    within(async { tokio::join!(flush, client.read_exact(&mut got)) })
        .await
        .1
        .unwrap();
    assert!(got.ends_with(b"moremoremore"));
}

#[tokio::test]
async fn empty_slices_are_no_end_of_a_write() {
    let (mut ours, mut theirs) = pair().await;
    let mut slices = [IoSlice::new(&[]); 20];
    slices[15] = IoSlice::new(b"not ");
    slices[19] = IoSlice::new(b"lost");
    let mut ours_pinned = Pin::new(&mut ours);
    let written = std::future::poll_fn(|cx| ours_pinned.as_mut().poll_write_vectored(cx, &slices));
    assert_eq!(written.await.unwrap(), 8);
    let mut got = [0; 8];
    within(theirs.read_exact(&mut got)).await.unwrap();
    assert_eq!(&got, b"not lost");
    assert_eq!(ours.write(b"").await.unwrap(), 0);
}
