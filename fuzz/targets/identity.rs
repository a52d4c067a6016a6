//! SPIFFE ids: what is read is written the same, and a duration has a unit.
#![no_main]

use libfuzzer_sys::fuzz_target;
use undermesh::mesh::{SpiffeId, parse_duration};

fuzz_target!(|text: &str| {
    if let Ok(id) = text.parse::<SpiffeId>() {
        assert_eq!(id.to_string(), text);
    }
    if parse_duration(text).is_some() {
        assert!(
            text.ends_with(|end: char| end.is_ascii_lowercase()),
            "{text}"
        );
    }
});
