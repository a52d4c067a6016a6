//! As much of HTTP/1.1 as a measured load needs: a GET, and answers of a known length.

use std::io;

use memchr::memmem;
use tokio::io::{AsyncRead, AsyncReadExt};

/// What clients send.
pub(super) const REQUEST: &[u8] =
    b"GET /1k HTTP/1.1\r\nHost: bench.default.svc\r\nUser-Agent: undermesh-load\r\nAccept: */*\r\n\r\n";

/// Size of the body of an answer.
pub(super) const BODY_BYTES: usize = 1024;

const HEAD: &str =
    "HTTP/1.1 200 OK\r\ncontent-type: application/octet-stream\r\ncontent-length: 1024\r\n\r\n";
const END_OF_HEAD: &[u8] = b"\r\n\r\n";
/// A longer head is an error.
const LONGEST_HEAD: usize = 16 * 1024;

/// What servers answer.
pub(super) fn answer() -> Vec<u8> {
    let mut answer = HEAD.as_bytes().to_vec();
    answer.resize(HEAD.len() + BODY_BYTES, b'x');
    answer
}

/// How many whole requests without a body `buffer` starts with, and how long they are.
pub(super) fn requests(buffer: &[u8]) -> io::Result<(usize, usize)> {
    let ends = memmem::find_iter(buffer, END_OF_HEAD);
    let (count, end) = ends.fold((0, 0), |(count, _), at| (count + 1, at + END_OF_HEAD.len()));
    if buffer.len() - end > LONGEST_HEAD {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "endless head"));
    }
    Ok((count, end))
}

/// Reads one answer to its end; `buffer` is empty before and after. Anything but 200 with the body that was
/// to be is an error.
pub(super) async fn read_answer<R: AsyncRead + Unpin>(
    read: &mut R,
    buffer: &mut Vec<u8>,
) -> io::Result<()> {
    let invalid = |text: String| io::Error::new(io::ErrorKind::InvalidData, text);
    loop {
        if read.read_buf(buffer).await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let Some(head) = memmem::find(buffer, END_OF_HEAD) else {
            if buffer.len() > LONGEST_HEAD {
                return Err(invalid("endless head".to_owned()));
            }
            continue;
        };
        let (status, length) = parse(&buffer[..head]).map_err(invalid)?;
        if status != 200 || length != BODY_BYTES {
            return Err(invalid(format!("status {status}, {length} bytes")));
        }
        let end = head + END_OF_HEAD.len() + length;
        if buffer.len() > end {
            return Err(invalid("bytes after the answer".to_owned()));
        }
        if buffer.len() == end {
            buffer.clear();
            return Ok(());
        }
    }
}

/// Status and content-length of a head.
fn parse(head: &[u8]) -> Result<(u16, usize), String> {
    let text = std::str::from_utf8(head).map_err(|error| error.to_string())?;
    let mut lines = text.split("\r\n");
    let status = lines
        .next()
        .and_then(|line| line.split(' ').nth(1)?.parse().ok())
        .ok_or_else(|| format!("no status: {text:.80}"))?;
    let length = lines
        .filter_map(|line| line.split_once(':'))
        .find(|(name, _)| name.eq_ignore_ascii_case("content-length"))
        .and_then(|(_, value)| value.trim().parse().ok())
        .ok_or_else(|| format!("no content-length: {text:.200}"))?;
    Ok((status, length))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_answer_is_read_however_it_is_cut() {
        let answer = answer();
        for cut in [1, 20, HEAD.len(), HEAD.len() + 1, answer.len()] {
            let (one, two) = answer.split_at(cut);
            let mut read = one.chain(two);
            let mut buffer = Vec::new();
            read_answer(&mut read, &mut buffer).await.unwrap();
            assert!(buffer.is_empty());
        }
        let refused = b"HTTP/1.1 503 No\r\nContent-Length: 0\r\n\r\n";
        let error = read_answer(&mut &refused[..], &mut Vec::new()).await;
        assert!(error.unwrap_err().to_string().contains("503"));
    }

    #[test]
    fn whole_requests_are_counted() {
        let mut two = REQUEST.repeat(2);
        two.extend(b"GET");
        assert_eq!(requests(&two).unwrap(), (2, 2 * REQUEST.len()));
        assert_eq!(requests(b"GET").unwrap(), (0, 0));
    }
}
