//! How much a stream holds unread, with and without memory.

use super::*;
use crate::tunnel::limits::{SEND_BUFFER, SHORT_WINDOW, STREAM_WINDOW};

const CHUNK: usize = 16 * 1024;
/// What an attempt that was given up may have handed over, and what lies in the pipe between both.
const SLACK: usize = CHUNK + 256 * 1024;

/// What its reader, who does not read, has it send. The clock moves on once nothing else does.
async fn sent_in_vain(send: &mut TunnelSend) -> usize {
    let mut sent = 0;
    let chunk = Bytes::from_static(&[7; CHUNK]);
    let patience = Duration::from_secs(1);
    while let Ok(done) = tokio::time::timeout(patience, send.send(chunk.clone())).await {
        done.unwrap();
        sent += CHUNK;
    }
    sent
}

fn assert_near(sent: usize, window: u32) {
    let least = window as usize;
    let most = least + SEND_BUFFER + SLACK;
    assert!((least..=most).contains(&sent), "{sent} for {window}");
}

#[tokio::test(start_paused = true)]
async fn while_memory_is_short_streams_of_both_sides_hold_no_more_than_a_small_window() {
    let mesh = Mesh::new();
    let room = Room::new();
    let held = Held::default();
    let mut pod = Pod::new(&mesh, held.service());
    Arc::get_mut(&mut pod).unwrap().bounds.room = room.clone();
    let limits = Limits {
        room: room.clone(),
        ..Limits::default()
    };
    let client = Client::with(
        &mesh,
        PoolOptions {
            limits,
            ..PoolOptions::default()
        },
    );
    let open = async || (client.open(&pod).await.unwrap(), held.take().await);

    let (mut near, (mut far, mut far_receive)) = open().await;
    assert_near(sent_in_vain(&mut near.send).await, STREAM_WINDOW);
    assert_near(sent_in_vain(&mut far).await, STREAM_WINDOW);

    room.set_short(true);
    let (mut new, (mut new_far, mut new_receive)) = open().await;
    // That both know it, both have to have said so.
    tokio::time::sleep(Duration::from_secs(1)).await;
    let small = sent_in_vain(&mut new.send).await;
    assert_near(small, SHORT_WINDOW);
    assert_near(sent_in_vain(&mut new_far).await, SHORT_WINDOW);
    // The old ones, too, once they were read.
    for (send, receive) in [
        (&mut near.send, &mut far_receive),
        (&mut far, &mut near.receive),
    ] {
        while let Ok(Some(data)) =
            tokio::time::timeout(Duration::from_secs(1), receive.data()).await
        {
            let length = data.unwrap().len();
            receive.release(length);
        }
        assert_near(sent_in_vain(send).await, SHORT_WINDOW);
    }
    assert_eq!(pod.dials(), 1, "all in one tunnel");

    room.set_short(false);
    tokio::time::sleep(Duration::from_secs(1)).await;
    let more = sent_in_vain(&mut new.send).await;
    assert_near(small + more, STREAM_WINDOW);
    // And nothing was lost.
    new.send.finish().unwrap();
    let all = within(read_all(&mut new_receive)).await.unwrap();
    assert!(all.len() >= small + more);
}

#[tokio::test(start_paused = true)]
async fn a_tunnel_that_begins_while_memory_is_short_begins_small() {
    let mesh = Mesh::new();
    let room = Room::new();
    room.set_short(true);
    let held = Held::default();
    let mut pod = Pod::new(&mesh, held.service());
    Arc::get_mut(&mut pod).unwrap().bounds.room = room;
    let client = Client::new(&mesh);
    let mut first = client.open(&pod).await.unwrap();
    let _first_far = held.take().await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_near(sent_in_vain(&mut first.send).await, SHORT_WINDOW);
}
