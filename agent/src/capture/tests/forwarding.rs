//! Pods that forward what others send.

use std::fs;
use std::sync::Arc;

use super::world::{Pod, World};
use crate::capture::{Phase, PodStatus};
use crate::mesh::Mode;

/// What a nested container brings: a second device, and forwarding.
fn forward(pod: &Pod) {
    pod.namespace.run(|| {
        fs::write("/proc/sys/net/ipv4/ip_forward", "1").unwrap();
    });
    pod.namespace
        .ip("link add behind type veth peer name nested");
    pod.namespace.ip("link set behind up");
}

fn says_so(status: &PodStatus) -> bool {
    let text = status.forwarded_traffic_not_enforced.as_deref();
    text.is_some_and(|text| text.contains("behind is up"))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pod_that_forwards_is_refused_if_it_is_strict_and_else_enrolled_with_a_word_about_it() {
    let world = World::new(2);
    let [forwards, plain] = &world.pods[..] else {
        panic!("two pods");
    };
    forward(forwards);
    let before = forwards.namespace.network();
    let running = world.start();
    running
        .capture
        .apply(Arc::new(world.snapshot(Mode::Strict)));
    let status = running.reaches(forwards, Phase::Refused).await;
    let error = status.last_error.unwrap();
    assert!(error.contains("device behind is up"), "{error}");
    assert_eq!(forwards.namespace.network(), before);
    assert!(running.capture.enrolled(&forwards.uid()).is_none());
    running.reaches(plain, Phase::Enrolled).await;
    let status = running.status(plain).unwrap();
    assert_eq!(status.forwarded_traffic_not_enforced, None);

    running
        .capture
        .apply(Arc::new(world.snapshot(Mode::Permissive)));
    let status = running.reaches(forwards, Phase::Enrolled).await;
    assert!(says_so(&status), "{status:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_strict_pod_that_begins_to_forward_stays_in_the_mesh_and_says_so() {
    let world = World::new(1);
    let running = world.enrolled(Mode::Strict).await;
    let pod = &world.pods[0];
    forward(pod);
    let found = || running.status(pod).filter(says_so);
    let status = running.until("it is found", found).await;
    assert_eq!(status.phase, Phase::Enrolled);
    let events = running.capture.counters();
    assert!(events.contains(&("forwarding_found", 1)), "{events:?}");

    // An agent that follows does not put it out either.
    running.capture.shutdown().await;
    drop(running);
    let running = world.enrolled(Mode::Strict).await;
    assert!(says_so(&running.status(pod).unwrap()));

    // It is over with the device.
    pod.namespace.ip("link del behind");
    running
        .until("it is over", || {
            let status = running.status(pod)?;
            status
                .forwarded_traffic_not_enforced
                .is_none()
                .then_some(())
        })
        .await;
}
