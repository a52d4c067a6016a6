//! Blocks that cannot be decoded: RFC 7541. Each ends the connection, since both sides' tables are
//! out of step from there on (RFC 9113 §4.3).

use super::*;

/// The crate h2 names every error of a frame that it cannot read PROTOCOL_ERROR.
fn undecodable(section: &'static str, what: &'static str, field: &[u8]) -> Case {
    let block = [&raw::request()[..], field].concat();
    case(
        section,
        what,
        of_block(&block),
        Connection(COMPRESSION_ERROR),
    )
    .instead(Connection(PROTOCOL_ERROR))
}

#[tokio::test]
async fn a_block_that_cannot_be_decoded_ends_the_connection() {
    // `x` as name; a string of `length` bytes, encoded, as value.
    let encoded = |bytes: &[u8]| [&[0, 1, b'x', 0x80 | bytes.len() as u8], bytes].concat();
    hold(vec![
        undecodable(
            "RFC 7541 2.3.3",
            "an index beyond both tables",
            &[0xff, 0x50],
        ),
        undecodable(
            "RFC 7541 2.3.3",
            "a name by an index beyond both tables",
            &[0x7f, 0x50, 1, b'x'],
        ),
        undecodable(
            "RFC 7541 4.2",
            "an update of the table's size at the end",
            &[0x21],
        ),
        undecodable("RFC 7541 5.1", "an integer that overflows", &[0xff; 12]),
        undecodable(
            "RFC 7541 5.2",
            "a string that is longer than its block",
            &[0, 1, b'x', 100, b'y'],
        ),
        // Eight ones behind the five bits of `a`, 00011.
        undecodable(
            "RFC 7541 5.2",
            "padding of more than seven bits",
            &encoded(&[0x1f, 0xff]),
        ),
        undecodable("RFC 7541 5.2", "padding of zeros", &encoded(&[0x18])),
        undecodable(
            "RFC 7541 5.2",
            "the end of string within a string",
            &encoded(&[0xff; 4]),
        ),
        undecodable("RFC 7541 6.1", "index 0", &[0x80]),
    ])
    .await;
    let update = [&[0x3f, 0xe1, 0x7f], &raw::request()[..]].concat();
    let cut = raw::frame(
        raw::HEADERS,
        raw::END_STREAM | raw::END_HEADERS,
        1,
        &raw::request()[..4],
    );
    hold(vec![
        case(
            "RFC 7541 6.3",
            "a table larger than allowed",
            of_block(&update),
            Connection(COMPRESSION_ERROR),
        )
        .instead(Connection(PROTOCOL_ERROR)),
        case(
            "4.3",
            "a block that is cut",
            cut,
            Connection(COMPRESSION_ERROR),
        )
        .instead(Connection(PROTOCOL_ERROR)),
    ])
    .await;
}

#[tokio::test]
async fn every_way_to_write_a_field_is_understood() {
    let with = |field: &[u8]| of_block(&[&raw::request()[..], field].concat());
    // `www.example.com`, as RFC 7541 C.4.1 encodes it.
    let encoded = [
        0xf1, 0xe3, 0xc2, 0xe5, 0xf2, 0x3a, 0x6b, 0xa0, 0xab, 0x90, 0xf4, 0xff,
    ];
    let authority = [&[0x82, 0x86, 0x84, 0x41, 0x8c], &encoded[..]].concat();
    // Into the table, and then by its place there.
    let kept = [&[0x40, 1, b'x', 1, b'y'][..], &[0xbe]].concat();
    let shrunk = [&[0x20], &raw::request()[..]].concat();
    hold(vec![
        case("RFC 7541 6.1", "by index", with(&[0x90]), Answered(200)),
        case(
            "RFC 7541 6.2.1",
            "kept, and by its index then",
            with(&kept),
            Answered(200),
        ),
        case(
            "RFC 7541 6.2.2",
            "not kept, name by index",
            with(&[0x0f, 0x04, 1, b'x']),
            Answered(200),
        ),
        case(
            "RFC 7541 6.2.2",
            "not kept, new name",
            with(&[0, 1, b'x', 1, b'y']),
            Answered(200),
        ),
        case(
            "RFC 7541 6.2.3",
            "never kept",
            with(&[0x10, 1, b'x', 1, b'y']),
            Answered(200),
        ),
        case(
            "RFC 7541 6.3",
            "after an update of the table's size",
            of_block(&shrunk),
            Answered(200),
        ),
        case(
            "RFC 7541 5.2",
            "encoded",
            of_block(&authority),
            Answered(200),
        ),
    ])
    .await;
}
