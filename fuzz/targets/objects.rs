//! Kubernetes objects: whatever they hold, they are taken or refused with a reason, and leave nothing when deleted.
#![no_main]

use libfuzzer_sys::fuzz_target;
use undermesh::discovery::{Change, Cluster, Object};

fuzz_target!(|bytes: &[u8]| {
    let Some((kind, json)) = bytes.split_first() else {
        return;
    };
    let object = match kind % 4 {
        0 => serde_json::from_slice(json).map(Object::Pod),
        1 => serde_json::from_slice(json).map(Object::Service),
        2 => serde_json::from_slice(json).map(Object::EndpointSlice),
        _ => serde_json::from_slice(json).map(Object::Namespace),
    };
    let Ok(object) = object else {
        return;
    };
    let mut cluster = Cluster::new("node-a");
    let key = object.key();
    cluster.apply([Change::Put(object)]);
    if let Some(rejection) = cluster.rejection(&key) {
        assert!(!rejection.field.is_empty() && !rejection.reason.is_empty());
    }
    cluster.apply([Change::Delete(key)]);
    assert_eq!(cluster.rejections().count(), 0);
    assert!(cluster.snapshot().capture_targets().is_empty());
    assert_eq!(cluster.snapshot().workloads().count(), 0);
});
