//! `Host` and `:authority`: what passes is an authority to a parser that is not ours, with nobody's name before it.
#![no_main]

use http::uri::Authority;
use libfuzzer_sys::fuzz_target;
use undermesh::http::check_authority;

fuzz_target!(|bytes: &[u8]| {
    if check_authority(bytes) {
        let authority = Authority::try_from(bytes);
        let fine = |authority: Authority| !authority.as_str().contains('@');
        assert!(authority.is_ok_and(fine), "{bytes:?} passed");
    }
});
