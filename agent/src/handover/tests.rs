use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::fd::AsFd as _;
use std::time::Duration;

use nix::fcntl::{FcntlArg, FdFlag, fcntl};

use super::channel::{Channel, Door, is_busy};
use super::*;

#[tokio::test]
async fn a_listener_crosses_with_its_queue_and_is_closed_on_exec() {
    let (mut one, mut other) = Channel::pair().unwrap();
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let address = listener.local_addr().unwrap();
    let waiting = TcpStream::connect(address).unwrap();
    let entries = Reply::Listeners(vec![Entry::Own(Endpoint::Admin)]);
    one.send(&entries, &[listener.as_fd()]).await.unwrap();
    drop(listener);
    let (reply, mut descriptors) = other.receive::<Reply>(ANSWER).await.unwrap();
    assert!(matches!(reply, Reply::Listeners(entries) if entries.len() == 1));
    let descriptor = descriptors.pop().unwrap();
    let flags = fcntl(&descriptor, FcntlArg::F_GETFD).unwrap();
    assert!(FdFlag::from_bits_retain(flags).contains(FdFlag::FD_CLOEXEC));
    let accepted = TcpListener::from(descriptor).accept().unwrap().1;
    assert_eq!(accepted, waiting.local_addr().unwrap());
}

#[tokio::test]
async fn a_full_batch_crosses_in_one_message() {
    let (mut one, mut other) = Channel::pair().unwrap();
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let entry = Entry::Pod {
        netns_cookie: u64::MAX,
        family: WireFamily::V6,
        kind: WireKind::Outbound,
    };
    let entries = Reply::Listeners(vec![entry; BATCH]);
    one.send(&entries, &vec![listener.as_fd(); BATCH])
        .await
        .unwrap();
    let (_, descriptors) = other.receive::<Reply>(ANSWER).await.unwrap();
    assert_eq!(descriptors.len(), BATCH);
}

#[tokio::test]
async fn the_end_of_the_other_side_and_its_silence_are_told_apart() {
    let (one, mut other) = Channel::pair().unwrap();
    let silent = other.receive::<Reply>(Duration::from_millis(1)).await;
    assert!(matches!(silent, Err(HandoverError::Late)));
    drop(one);
    let gone = other.receive::<Reply>(ANSWER).await;
    assert!(matches!(gone, Err(HandoverError::Gone)));
    let gone = other.send(&Request::Accepting, &[]).await;
    assert!(matches!(gone, Err(HandoverError::Gone)));
}

#[tokio::test]
async fn a_path_where_nobody_listens_is_no_agent() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let nobody = Predecessor::greet(&path, "node-a").await;
    assert!(matches!(nobody, Err(HandoverError::Nobody { .. })));
    drop(Door::open(&path).unwrap());
    let nobody = Predecessor::greet(&path, "node-a").await;
    assert!(matches!(nobody, Err(HandoverError::Nobody { .. })));
}

#[tokio::test(start_paused = true)]
async fn an_agent_whose_queue_is_full_is_waited_for_and_not_taken_for_none() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let door = Door::open(&path).unwrap();
    let mut queued = Vec::new();
    let full = loop {
        match Channel::try_connect(&path).await {
            Ok(channel) => queued.push(channel),
            Err(error) => break error,
        }
    };
    assert!(is_busy(&full), "{full}");
    let late = Predecessor::greet(&path, "node-a").await;
    assert!(matches!(late, Err(HandoverError::Late)));

    let (_accepted, connected) = tokio::join!(
        async {
            tokio::time::sleep(ANSWER / 2).await;
            door.accept().await.unwrap()
        },
        Channel::connect(&path, ANSWER)
    );
    connected.unwrap();
}

/// Plays the running agent up to the listeners.
async fn agent(door: &Door, listeners: &[TcpListener]) -> Channel {
    let mut channel = door.accept().await.unwrap();
    channel.check_peer().unwrap();
    let (hello, _) = channel.receive::<Request>(ANSWER).await.unwrap();
    assert!(matches!(hello, Request::Hello { versions } if versions == [VERSION]));
    let hello = Reply::Hello {
        version: VERSION,
        node: "node-a".to_owned(),
    };
    channel.send(&hello, &[]).await.unwrap();
    let (take, _) = channel.receive::<Request>(ANSWER).await.unwrap();
    assert!(matches!(take, Request::Take { .. }));
    let entries = vec![Entry::Own(Endpoint::Admin); listeners.len()];
    let descriptors: Vec<_> = listeners.iter().map(|one| one.as_fd()).collect();
    let reply = Reply::Listeners(entries);
    channel.send(&reply, &descriptors).await.unwrap();
    channel
}

#[tokio::test]
async fn a_successor_goes_on_alone_if_the_running_agent_dies_and_gives_up_if_it_does_not() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let listener = [TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap()];
    let door = Door::open(&path).unwrap();
    let successor = async {
        Predecessor::greet(&path, "node-a")
            .await
            .unwrap()
            .take(Vec::new())
            .await
    };
    let (mut channel, taken) = tokio::join!(
        async {
            let mut channel = agent(&door, &listener).await;
            channel.send(&Reply::End { total: 1 }, &[]).await.unwrap();
            channel
        },
        successor
    );
    // It takes too long for the running agent, which says so and goes on.
    let reason = "too slow".to_owned();
    let refused = Reply::Refused { reason };
    channel.send(&refused, &[]).await.unwrap();
    drop(channel);
    let error = taken.unwrap().accepting().await.unwrap_err();
    assert!(matches!(error, HandoverError::Refused(_)), "{error}");

    // It dies before the end of the list, with its socket.
    let successor = async {
        Predecessor::greet(&path, "node-a")
            .await
            .unwrap()
            .take(Vec::new())
            .await
    };
    let (_, taken) = tokio::join!(async { drop(agent(&door, &listener).await) }, successor);
    let taken = taken.unwrap();
    assert_eq!(taken.own.len(), 1);
    drop(door);
    taken.accepting().await.unwrap();
}

#[tokio::test]
async fn the_agent_of_another_node_is_not_taken_over() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let door = Door::open(&path).unwrap();
    let (_, greeted) = tokio::join!(
        async {
            let mut channel = door.accept().await.unwrap();
            let (_, _) = channel.receive::<Request>(ANSWER).await.unwrap();
            let hello = Reply::Hello {
                version: VERSION,
                node: "node-b".to_owned(),
            };
            channel.send(&hello, &[]).await.unwrap();
        },
        Predecessor::greet(&path, "node-a")
    );
    assert!(matches!(greeted, Err(HandoverError::Refused(_))));
}

#[test]
fn agents_meet_only_if_their_pins_are_the_same_directory_by_whatever_path() {
    let one = tempfile::tempdir().unwrap();
    let other = tempfile::tempdir().unwrap();
    let alias = other.path().join("alias");
    std::os::unix::fs::symlink(one.path(), &alias).unwrap();
    let socket = default_socket(one.path()).unwrap();
    assert_eq!(socket, default_socket(&alias).unwrap());
    assert_ne!(socket, default_socket(other.path()).unwrap());
    // sun_path of unix(7) has room for 108 bytes.
    let longest = format!("{SOCKETS}/hand-over-{0:x}-{0:x}", u64::MAX);
    assert!(longest.len() < 108);
}

#[tokio::test]
async fn a_message_larger_than_the_buffers_crosses_whole_and_one_beyond_the_bound_is_refused() {
    let (mut one, mut other) = Channel::pair().unwrap();
    let without = vec!["spiffe://cluster.local/ns/default/sa/reviews".to_owned(); 8_000];
    let expected = without.clone();
    let take = Request::Take { without };
    let (sent, received) = tokio::join!(one.send(&take, &[]), other.receive::<Request>(ANSWER));
    sent.unwrap();
    assert!(matches!(received, Ok((Request::Take { without }, _)) if without == expected));
    let reason = "x".repeat(600 * 1024);
    let refused = one.send(&Reply::Refused { reason }, &[]).await;
    assert!(matches!(refused, Err(HandoverError::Protocol(_))));
}
