//! Where the messages of a HTTP/1 connection begin and end, seen from the raw bytes.
//!
//! hyper drops a `Content-Length` that stands beside `Transfer-Encoding` without a word, so that
//! nobody behind it can tell. This walks beside it over the same bytes, only to notice what two
//! parsers could understand differently. Whatever it does not understand itself is a violation.

/// What a parser behind us could understand differently.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Violation {
    /// A target with a fragment (RFC 9112 §3.2), which hyper cuts off without a word.
    Target,
    /// `Transfer-Encoding` and `Content-Length` in one head, in any order (RFC 9112 §6.1).
    BothLengths,
    /// Two `Content-Length` that differ, or one that is no number.
    ContentLength,
    /// A `Transfer-Encoding` that is not `chunked` alone.
    TransferEncoding,
    /// A chunk's size line that is no number, overflows or is longer than it may be.
    Chunk,
}

/// A violation, and in which request of the connection, counted from 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Found {
    /// The request.
    pub request: u64,
    /// What is wrong with it.
    pub violation: Violation,
}

/// How much of a line is looked at: enough for a name and a length. A line of these two that is
/// longer is a violation.
const LINE_BYTES: usize = 128;

/// Follows the messages that a client sends. Pure: bytes in, a verdict out. It keeps at most
/// [`LINE_BYTES`] of a line that arrives in parts, and no other state.
#[derive(Debug, Default)]
pub struct Framing {
    state: State,
    line: Vec<u8>,
    head: Head,
    request: u64,
    found: Option<Found>,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Before the first byte of a head; empty lines may come before it (RFC 9112 §2.2).
    #[default]
    Between,
    /// In the first line of a head, which has not arrived whole.
    FirstLine,
    /// In a head, after its first line.
    Head,
    /// In a body, with so many bytes to come.
    Body(u64),
    ChunkSize,
    /// In a chunk, with so many bytes to come, its line end included.
    Chunk(u64),
    Trailers,
    /// A violation was found; or the connection speaks another protocol now.
    Off,
}

/// What a head has said so far about its body.
#[derive(Debug, Default, Clone, Copy)]
struct Head {
    length: Option<u64>,
    chunked: bool,
}

impl Framing {
    /// At the beginning of a connection.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// The first violation, once there is one.
    #[must_use]
    pub fn found(&self) -> Option<Found> {
        self.found
    }

    /// Whether a head has begun and not ended.
    #[must_use]
    pub fn is_in_head(&self) -> bool {
        matches!(self.state, State::FirstLine | State::Head)
    }

    /// Number of the request that it is in, or before.
    #[must_use]
    pub fn request(&self) -> u64 {
        self.request
    }

    /// Stops looking: the connection does not speak HTTP/1 any more.
    pub fn stop(&mut self) {
        self.state = State::Off;
        self.line = Vec::new();
    }

    /// Follows the next bytes of the connection.
    pub fn advance(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            match self.state {
                State::Off => return,
                State::Body(left) => bytes = self.skip(bytes, left, State::Body, State::Between),
                State::Chunk(left) => {
                    bytes = self.skip(bytes, left, State::Chunk, State::ChunkSize)
                }
                State::Between
                | State::FirstLine
                | State::Head
                | State::ChunkSize
                | State::Trailers => {
                    let Some(end) = bytes.iter().position(|byte| *byte == b'\n') else {
                        if self.state == State::Between && bytes.iter().any(|byte| *byte != b'\r') {
                            self.state = State::FirstLine;
                        }
                        self.look_for_fragment(bytes);
                        self.keep(bytes);
                        return;
                    };
                    let (line, rest) = (&bytes[..end], &bytes[end + 1..]);
                    bytes = rest;
                    self.look_for_fragment(line);
                    if self.line.is_empty() {
                        self.line_ended(trimmed(line));
                    } else {
                        self.keep(line);
                        let line = std::mem::take(&mut self.line);
                        self.line_ended(trimmed(&line));
                        // Its room serves the next line.
                        self.line = line;
                        self.line.clear();
                    }
                }
            }
        }
    }

    fn look_for_fragment(&mut self, part: &[u8]) {
        let is_first = matches!(self.state, State::Between | State::FirstLine);
        if is_first && part.contains(&b'#') {
            self.violated(Violation::Target);
        }
    }

    /// The beginning of a line; one byte more than is looked at says that it was longer.
    fn keep(&mut self, part: &[u8]) {
        let room = (LINE_BYTES + 1).saturating_sub(self.line.len());
        self.line.extend_from_slice(&part[..part.len().min(room)]);
    }

    fn skip<'a>(
        &mut self,
        bytes: &'a [u8],
        left: u64,
        within: fn(u64) -> State,
        after: State,
    ) -> &'a [u8] {
        let skipped = usize::try_from(left).map_or(bytes.len(), |left| left.min(bytes.len()));
        self.state = match left - skipped as u64 {
            0 if after == State::Between => self.message_ended(),
            0 => after,
            left => within(left),
        };
        &bytes[skipped..]
    }

    fn message_ended(&mut self) -> State {
        self.request += 1;
        self.head = Head::default();
        State::Between
    }

    fn line_ended(&mut self, line: &[u8]) {
        match self.state {
            State::Between if line.is_empty() => {}
            // What the first line says does not decide about the body.
            State::Between | State::FirstLine => self.state = State::Head,
            State::Head if line.is_empty() => self.head_ended(),
            State::Head => self.field(line),
            State::ChunkSize => match chunk_size(line) {
                Some(0) => self.state = State::Trailers,
                Some(size) => self.state = State::Chunk(size + 2),
                None => self.violated(Violation::Chunk),
            },
            State::Trailers if line.is_empty() => self.state = self.message_ended(),
            State::Trailers | State::Body(_) | State::Chunk(_) | State::Off => {}
        }
    }

    fn head_ended(&mut self) {
        self.state = match self.head {
            Head { chunked: true, .. } => State::ChunkSize,
            Head {
                length: Some(length @ 1..),
                ..
            } => State::Body(length),
            Head { .. } => self.message_ended(),
        };
    }

    fn field(&mut self, line: &[u8]) {
        // The two names have different lengths, and no other field needs to be looked at.
        let Some((name, value)) = split(line) else {
            return;
        };
        let violation = if name.eq_ignore_ascii_case(b"content-length") {
            self.content_length(line, value)
        } else if name.eq_ignore_ascii_case(b"transfer-encoding") {
            self.transfer_encoding(line, value)
        } else {
            return;
        };
        if let Err(violation) = violation {
            self.violated(violation);
        }
    }

    fn content_length(&mut self, line: &[u8], value: &[u8]) -> Result<(), Violation> {
        if self.head.chunked {
            return Err(Violation::BothLengths);
        }
        let length = (line.len() <= LINE_BYTES)
            .then(|| number(value, 10))
            .flatten();
        match (length, self.head.length) {
            (None, _) => Err(Violation::ContentLength),
            (Some(length), Some(before)) if length != before => Err(Violation::ContentLength),
            (Some(length), _) => {
                self.head.length = Some(length);
                Ok(())
            }
        }
    }

    fn transfer_encoding(&mut self, line: &[u8], value: &[u8]) -> Result<(), Violation> {
        if self.head.length.is_some() {
            return Err(Violation::BothLengths);
        }
        if self.head.chunked || line.len() > LINE_BYTES || !value.eq_ignore_ascii_case(b"chunked") {
            return Err(Violation::TransferEncoding);
        }
        self.head.chunked = true;
        Ok(())
    }

    fn violated(&mut self, violation: Violation) {
        self.found = Some(Found {
            request: self.request,
            violation,
        });
        self.stop();
    }
}

/// Name and value of a field that could be one of the two; only spaces and tabs are trimmed from the
/// name as well, for those parsers that allow them before the colon.
fn split(line: &[u8]) -> Option<(&[u8], &[u8])> {
    if !matches!(line.first(), Some(b'c' | b'C' | b't' | b'T' | b' ' | b'\t')) {
        return None;
    }
    let colon = line.iter().position(|byte| *byte == b':')?;
    Some((line[..colon].trim_ascii(), line[colon + 1..].trim_ascii()))
}

fn trimmed(line: &[u8]) -> &[u8] {
    line.strip_suffix(b"\r").unwrap_or(line)
}

fn number(digits: &[u8], base: u32) -> Option<u64> {
    if digits.is_empty() {
        return None;
    }
    digits.iter().try_fold(0_u64, |number, byte| {
        let digit = char::from(*byte).to_digit(base)?;
        number.checked_mul(base.into())?.checked_add(digit.into())
    })
}

/// Size of a chunk (RFC 9112 §7.1); extensions are skipped, as hyper skips them.
fn chunk_size(line: &[u8]) -> Option<u64> {
    let end = line
        .iter()
        .position(|byte| *byte == b';')
        .unwrap_or(line.len());
    let size = number(line[..end].trim_ascii_end(), 16)?;
    // Room for the line end that follows the chunk.
    (size <= u64::MAX - 2).then_some(size)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is found, and how many requests were passed before.
    fn walk(bytes: &[u8], part: usize) -> (Option<Violation>, u64) {
        let mut framing = Framing::new();
        for part in bytes.chunks(part) {
            framing.advance(part);
        }
        let violation = framing.found().map(|found| found.violation);
        (violation, framing.request())
    }

    /// The same in one piece, byte by byte, and in threes.
    fn found(bytes: &str) -> (Option<Violation>, u64) {
        let whole = walk(bytes.as_bytes(), bytes.len().max(1));
        for part in [1, 3, 7] {
            assert_eq!(walk(bytes.as_bytes(), part), whole, "in parts of {part}");
        }
        whole
    }

    #[test]
    fn a_first_line_is_no_field_however_it_arrives() {
        let request = "Transfer-Encoding: chunked\r\nHost: a\r\n\r\nno chunk\r\n\r\n";
        assert_eq!(found(request), (None, 2));
    }

    #[test]
    fn messages_of_every_kind_are_followed_to_their_end() {
        let requests = "GET / HTTP/1.1\r\nHost: a\r\n\r\n\
            \r\nPOST / HTTP/1.1\r\nContent-Length: 12\r\nContent-Length: 12\r\n\r\nGET / HTTP/1\
            POST / HTTP/1.1\r\nTransfer-Encoding: Chunked\r\n\r\n\
            4;note=\"x\"\r\n\r\n\r\n\r\n1A \r\nContent-Length: 1\r\nabcdefg\r\n0\r\nx-sum: 1\r\n\r\n\
            HEAD / HTTP/1.1\r\nContent-Length: 0\r\n\r\n";
        assert_eq!(found(requests), (None, 4));
    }

    #[test]
    fn both_lengths_are_found_in_any_order_case_and_part() {
        let orders = [
            "Content-Length: 4\r\nTransfer-Encoding: chunked",
            "Transfer-Encoding: chunked\r\nX: y\r\nContent-Length: 4",
            "TRANSFER-ENCODING:chunked\r\ncontent-length:\t4",
            "transfer-encoding: chunked\r\ncontent-length : 4",
            "transfer-encoding: chunked\ncontent-length: 4",
        ];
        for order in orders {
            let before = "GET / HTTP/1.1\r\n\r\n";
            let bytes = format!("{before}POST / HTTP/1.1\r\n{order}\r\n\r\n");
            assert_eq!(found(&bytes), (Some(Violation::BothLengths), 1), "{order}");
        }
    }

    #[test]
    fn lengths_and_codings_that_are_none_are_found() {
        let long = format!("transfer-encoding: {}chunked", " ".repeat(LINE_BYTES));
        let cases = [
            (
                "content-length: 4\r\ncontent-length: 5",
                Violation::ContentLength,
            ),
            ("content-length: 4,4", Violation::ContentLength),
            ("content-length: 0x4", Violation::ContentLength),
            ("content-length:", Violation::ContentLength),
            (
                "content-length: 99999999999999999999",
                Violation::ContentLength,
            ),
            (
                "transfer-encoding: gzip, chunked",
                Violation::TransferEncoding,
            ),
            (
                "transfer-encoding: chunked\r\ntransfer-encoding: chunked",
                Violation::TransferEncoding,
            ),
            ("transfer-encoding: xchunked", Violation::TransferEncoding),
            (&*long, Violation::TransferEncoding),
        ];
        for (fields, violation) in cases {
            let bytes = format!("POST / HTTP/1.1\r\n{fields}\r\n\r\n");
            assert_eq!(found(&bytes).0, Some(violation), "{fields}");
        }
    }

    #[test]
    fn chunks_whose_size_is_no_number_are_found() {
        for size in [
            "",
            "g",
            "-1",
            "0x4",
            "ffffffffffffffff",
            "1ffffffffffffffff",
            " 4",
        ] {
            let bytes = format!("POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n{size}\r\n");
            assert_eq!(found(&bytes).0, Some(Violation::Chunk), "{size:?}");
        }
    }

    #[test]
    fn a_head_is_under_way_from_its_first_byte_to_its_empty_line() {
        let mut framing = Framing::new();
        framing.advance(b"\r\n");
        assert!(!framing.is_in_head());
        framing.advance(b"G");
        assert!(framing.is_in_head());
        framing.advance(b"ET / HTTP/1.1\r\nhost: a\r\n\r");
        assert!(framing.is_in_head());
        framing.advance(b"\n");
        assert!(!framing.is_in_head());
    }

    #[test]
    fn a_line_costs_no_more_than_is_looked_at() {
        let mut framing = Framing::new();
        framing.advance(b"GET / HTTP/1.1\r\ncookie: ");
        for _ in 0..1000 {
            framing.advance(&[b'a'; 1000]);
        }
        assert!(framing.line.capacity() <= 4 * LINE_BYTES);
    }

    proptest::proptest! {
        #[test]
        fn nothing_makes_it_panic_and_parts_change_nothing(
            bytes in proptest::collection::vec(proptest::sample::select(
                b"GET / HTTP/1.1\r\n:0124abcContent-LengthTransfer-Encodingchunked; \t\0".to_vec()), 0..400),
            part in 1_usize..20,
        ) {
            proptest::prop_assert_eq!(walk(&bytes, part), walk(&bytes, bytes.len().max(1)));
        }
    }
}
