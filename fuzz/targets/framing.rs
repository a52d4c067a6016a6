//! The framing of HTTP/1: the verdict is the same however the bytes arrive.
#![no_main]

use libfuzzer_sys::fuzz_target;
use undermesh::http::Framing;

fuzz_target!(|input: (usize, &[u8])| {
    let (step, bytes) = input;
    let mut whole = Framing::new();
    whole.advance(bytes);
    let mut parts = Framing::new();
    for part in bytes.chunks(step % 7 + 1) {
        parts.advance(part);
    }
    assert_eq!(whole.found(), parts.found());
    assert_eq!(whole.request(), parts.request());
    assert_eq!(whole.is_in_head(), parts.is_in_head());
});
