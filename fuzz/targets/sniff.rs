//! The first bytes of a connection: what was decided of fewer bytes holds for more.
#![no_main]

use libfuzzer_sys::fuzz_target;
use undermesh::http::{Sniff, sniff};

fuzz_target!(|bytes: &[u8]| {
    let mut decided = None;
    for length in 0..=bytes.len() {
        match (sniff(&bytes[..length]), &decided) {
            (Sniff::Decided(protocol), None) => decided = Some(protocol),
            (Sniff::Decided(protocol), Some(before)) => assert_eq!(&protocol, before),
            (Sniff::More, before) => assert_eq!(before, &None, "was taken back"),
        }
    }
});
