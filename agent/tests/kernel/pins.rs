//! What the kernel was told survives the agent.

use std::fs;
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::AsFd as _;
use std::slice;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use undermesh::capture::kernel::{
    AttachPoint, Family, Kernel, KernelError, KernelOptions, ListenerKind,
};
use undermesh::mesh::Mode;

use crate::fixture::{
    Fixture, PEER_V4, SERVICE_V4, accept, capture, counters, is_idle, target, wait_until,
};

#[test]
fn a_second_load_adopts_links_and_maps_and_loses_nothing() {
    let fixture = Fixture::new();
    let first = fixture.load();
    fixture.enrol(&first, Mode::Strict);
    capture(&first, &[target(SERVICE_V4, Some(80))]);
    let agent = fixture.listen(&first, Family::V4, ListenerKind::Outbound);
    fixture.pod.connect((SERVICE_V4, 80)).unwrap();
    let before = first.status();

    let second = fixture.load();
    let after = second.status();
    assert_eq!(before.programs.len(), after.programs.len());
    for (before, after) in before.programs.iter().zip(&after.programs) {
        assert_eq!(before.link_id, after.link_id, "{}", after.name);
        assert_eq!(before.attached, after.attached);
        if before.name != format!("lookup_{}", fixture.netns_cookie) {
            assert_ne!(before.program_id, after.program_id, "{}", after.name);
        }
    }
    assert!(after.foreign_programs.iter().all(|foreign| {
        before
            .programs
            .iter()
            .all(|own| own.program_id != foreign.program_id)
    }));
    assert_eq!(second.pods().unwrap(), [fixture.record(Mode::Strict)]);
    assert_eq!(second.lookups(), [fixture.netns_cookie]);
    assert!(second.lookup_attached(fixture.netns_cookie));
    assert_eq!(counters(&second)["connect_captured"], 1);
    drop(first);
    accept(&agent);
    fixture.pod.connect((SERVICE_V4, 80)).unwrap();
    accept(&agent);
    assert_eq!(counters(&second)["connect_captured"], 2);
    // The second knows what the first had set, and takes it away.
    capture(&second, &[]);
    let status = second.status();
    let targets = status.maps.iter().find(|map| map.name == "TARGETS");
    assert_eq!(targets.unwrap().entries, Some(0));
}

#[test]
fn without_an_agent_the_pinned_programs_refuse_for_a_strict_pod() {
    let fixture = Fixture::new();
    let kernel = fixture.load();
    fixture.enrol(&kernel, Mode::Strict);
    capture(&kernel, &[target(PEER_V4, None)]);
    let agent = fixture.listen(&kernel, Family::V4, ListenerKind::Outbound);
    let server = fixture.peer.bind(PEER_V4);
    drop(kernel);
    drop(agent);
    // A process that another test starts at this moment has a copy of the listener until it executes its program.
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(5);
    let error = loop {
        match fixture.pod.connect(server.local_addr().unwrap()) {
            Err(error) => break error,
            Ok(_) => assert!(std::time::Instant::now() < deadline, "still alive"),
        }
    };
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionRefused);
    assert!(is_idle(&server));
}

#[test]
fn no_connection_escapes_while_programs_are_replaced() {
    let fixture = Fixture::new();
    let kernel = fixture.load();
    fixture.enrol(&kernel, Mode::Strict);
    capture(&kernel, &[target(PEER_V4, None)]);
    let agent = fixture.listen(&kernel, Family::V4, ListenerKind::Outbound);
    let server = fixture.peer.bind(PEER_V4);
    let destination = server.local_addr().unwrap();
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let loads = scope.spawn(|| {
            for _ in 0..10 {
                let next = fixture.load();
                fixture.enrol(&next, Mode::Strict);
            }
            done.store(true, Ordering::Release);
        });
        let mut connections = 0;
        while !done.load(Ordering::Acquire) || connections < 100 {
            let client = fixture.pod.connect(destination).unwrap();
            assert_eq!(accept(&agent).1, client.local_addr().unwrap());
            connections += 1;
        }
        loads.join().unwrap();
    });
    assert!(is_idle(&server));
}

#[test]
fn a_lookup_instance_of_a_deleted_namespace_says_so() {
    let fixture = Fixture::new();
    let kernel = fixture.load();
    fixture.enrol(&kernel, Mode::Strict);
    let cookie = fixture.netns_cookie;
    let (pod, peer, pins, cgroup) = (fixture.pod, fixture.peer, fixture.pins, fixture.cgroup);
    drop(pod);
    wait_until("the namespace is gone", || !kernel.lookup_attached(cookie));
    let status = kernel.status();
    let lookup = status.programs.last().unwrap();
    assert_eq!(lookup.attached, AttachPoint::Detached);
    assert_eq!(kernel.lookups(), [cookie]);
    kernel.detach_lookup(cookie).unwrap();
    assert!(kernel.lookups().is_empty());
    drop((peer, pins, cgroup));
}

#[test]
fn the_status_tells_whether_the_agents_own_sockets_are_seen() {
    let fixture = Fixture::new();
    let seen = |kernel: &Kernel| {
        let features = kernel.status().features;
        let feature = features
            .iter()
            .find(|feature| feature.name == "own_sockets_seen");
        feature.unwrap().used
    };
    assert!(seen(&fixture.load()));
    // A cgroup beside this process.
    let mut options = fixture.options();
    options.cgroup.push("elsewhere");
    fs::create_dir(&options.cgroup).unwrap();
    let kernel = Kernel::load(&options);
    let answer = kernel.as_ref().map(seen);
    drop(kernel.as_ref().map(Kernel::uninstall));
    fs::remove_dir(&options.cgroup).unwrap();
    assert!(!answer.unwrap());
}

#[test]
fn pins_elsewhere_than_on_a_bpffs_are_an_error_that_says_so() {
    let fixture = Fixture::new();
    let folder = tempfile::tempdir().unwrap();
    let options = KernelOptions {
        pins: folder.path().join("pins"),
        ..fixture.options()
    };
    let error = Kernel::load(&options).err().unwrap();
    assert!(matches!(error, KernelError::NotBpffs { .. }), "{error}");
}

#[test]
fn pins_of_another_layout_are_shown_and_cleared_when_asked() {
    let fixture = Fixture::new();
    let kernel = fixture.load();
    let former = fixture.pins.path.join("00000000deadbeef");
    let foreign = fixture.pins.path.join("somebody_else");
    fs::create_dir(&former).unwrap();
    fs::create_dir(&foreign).unwrap();
    assert_eq!(kernel.status().former_layouts, slice::from_ref(&former));
    assert_eq!(
        kernel.clear_former_layouts().unwrap(),
        slice::from_ref(&former)
    );
    assert!(!former.exists());
    assert!(foreign.exists());
    assert!(kernel.status().former_layouts.is_empty());
}

/// Makes what a kernel side has pinned that of an agent of another layout.
fn call_former(fixture: &Fixture, kernel: &Kernel) -> std::path::PathBuf {
    let former = fixture.pins.path.join("00000000deadbeef");
    fs::rename(kernel.status().pins, &former).unwrap();
    former
}

#[test]
fn no_connection_escapes_while_programs_of_another_layout_are_replaced() {
    let fixture = Fixture::new();
    let former = fixture.load();
    fixture.enrol(&former, Mode::Strict);
    capture(&former, &[target(PEER_V4, None)]);
    let agent = fixture.listen(&former, Family::V4, ListenerKind::Outbound);
    let links = |kernel: &Kernel| -> Vec<u32> {
        let programs = kernel.status().programs;
        programs.iter().map(|program| program.link_id).collect()
    };
    let before = links(&former);
    let server = fixture.peer.bind(PEER_V4);
    let destination = server.local_addr().unwrap();
    let done = AtomicBool::new(false);
    let directory = call_former(&fixture, &former);
    let next = fixture.load();
    thread::scope(|scope| {
        let replaced = scope.spawn(|| {
            assert!(next.is_staged());
            fixture.enrol(&next, Mode::Strict);
            capture(&next, &[target(PEER_V4, None)]);
            let cookie = fixture.netns_cookie;
            let slot = fixture.slot(Family::V4, ListenerKind::Outbound);
            next.set_listener(slot, agent.as_fd()).unwrap();
            assert!(next.lookup_attached(cookie));
            next.replace_former().unwrap();
            assert!(!next.is_staged());
            let cleared = next.clear_former_layouts().unwrap();
            assert_eq!(cleared, slice::from_ref(&directory));
            done.store(true, Ordering::Release);
        });
        let mut connections = 0;
        while !done.load(Ordering::Acquire) || connections < 100 {
            let client = fixture.pod.connect(destination).unwrap();
            assert_eq!(accept(&agent).1, client.local_addr().unwrap());
            connections += 1;
        }
        replaced.join().unwrap();
    });
    assert!(is_idle(&server));
    // The links are the same, so there was no moment without a program in one.
    assert_eq!(links(&next), before);
    assert!(counters(&next)["connect_captured"] > 0);
    assert!(!directory.exists());
}

#[test]
fn programs_of_another_layout_refuse_until_they_are_replaced_and_the_new_ones_from_then_on() {
    let fixture = Fixture::new();
    let former = fixture.load();
    fixture.enrol(&former, Mode::Strict);
    capture(&former, &[target(PEER_V4, None)]);
    call_former(&fixture, &former);
    let server = fixture.peer.bind(PEER_V4);
    let refused = || {
        let error = fixture.pod.connect(server.local_addr().unwrap());
        let kind = error.unwrap_err().kind();
        assert_eq!(kind, std::io::ErrorKind::ConnectionRefused);
        assert!(is_idle(&server));
    };
    // An agent that dies before it had laid the pod changes nothing.
    drop(fixture.load());
    refused();
    let next = fixture.load();
    assert!(next.is_staged());
    refused();
    fixture.enrol(&next, Mode::Strict);
    capture(&next, &[target(PEER_V4, None)]);
    next.replace_former().unwrap();
    refused();
    assert_eq!(counters(&next)["connect_agent_gone_refused"], 1);
}

#[test]
fn targets_change_by_their_difference_and_are_bounded_by_name() {
    let fixture = Fixture::new();
    let kernel = fixture.load();
    let many = |from: u32, to: u32| -> std::collections::BTreeSet<_> {
        (from..to)
            .map(|number| target(IpAddr::from(Ipv4Addr::from(number)), None))
            .collect()
    };
    let entries = || {
        let status = kernel.status();
        let targets = status.maps.iter().find(|map| map.name == "TARGETS");
        targets.unwrap().entries.unwrap()
    };
    kernel.set_targets(&many(1, 1001)).unwrap();
    kernel.set_targets(&many(501, 1101)).unwrap();
    assert_eq!(entries(), 600);
    let bound = undermesh_common::bounds::TARGETS;
    let error = kernel.set_targets(&many(1, bound + 2)).unwrap_err();
    assert_eq!(
        error.to_string(),
        format!("map TARGETS is full: it holds at most {bound} entries")
    );
    assert_eq!(entries(), 600);
}

#[test]
fn uninstalling_leaves_no_program_and_no_pin() {
    let fixture = Fixture::new();
    let kernel = fixture.load();
    fixture.enrol(&kernel, Mode::Strict);
    capture(&kernel, &[target(PEER_V4, None)]);
    let server = fixture.peer.bind(PEER_V4);
    fixture
        .pod
        .connect(server.local_addr().unwrap())
        .unwrap_err();
    kernel.uninstall().unwrap();
    fixture.pod.connect(server.local_addr().unwrap()).unwrap();
    accept(&server);
    // A bpffs has files of its own at its root.
    let directories = fs::read_dir(&fixture.pins.path)
        .unwrap()
        .filter(|entry| entry.as_ref().unwrap().path().is_dir());
    assert_eq!(directories.count(), 0);
}
