//! What debug builds tell of the programs' verdicts.

use std::io::{self, Write};
use std::net::SocketAddr;
use std::sync::Mutex;

use undermesh::capture::kernel::{Family, ListenerKind};
use undermesh::mesh::Mode;
use undermesh_common::Verdict;

use crate::fixture::{Fixture, POD_V4, SERVICE_V4, accept, capture, target, wait_until};

static LOG: Mutex<Vec<u8>> = Mutex::new(Vec::new());

struct ToLog;

impl Write for ToLog {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        LOG.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_debug_build_logs_every_verdict_with_the_pod_and_the_address() {
    tracing_subscriber::fmt()
        .with_max_level(tracing::Level::DEBUG)
        .with_ansi(false)
        .with_writer(|| ToLog)
        .init();
    let fixture = Fixture::new();
    let kernel = fixture.load();
    fixture.enrol(&kernel, Mode::Strict);
    capture(&kernel, &[target(SERVICE_V4, Some(80))]);
    let listener = fixture.listen(&kernel, Family::V4, ListenerKind::Outbound);
    let _client = fixture
        .pod
        .connect(SocketAddr::from((SERVICE_V4, 80)))
        .unwrap();
    let _accepted = accept(&listener);
    for (address, verdict) in [
        (SERVICE_V4, Verdict::ConnectCaptured),
        (POD_V4, Verdict::LookupOutbound),
    ] {
        let line = format!(
            "netns {}: {} verdict {}",
            fixture.netns_cookie,
            address.to_ipv6_mapped(),
            verdict as u32
        );
        wait_until(&line, || {
            String::from_utf8_lossy(&LOG.lock().unwrap()).contains(&line)
        });
    }
}
