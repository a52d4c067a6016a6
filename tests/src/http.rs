//! A GET over HTTP/1.0 from inside a network namespace: enough for the agents' admin endpoints.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};

use crate::netns::Netns;

const LIMIT: Duration = Duration::from_secs(5);
/// A longer answer is an error, not memory.
const LONGEST_ANSWER: u64 = 256 << 20;

/// An answer.
#[derive(Debug, Clone)]
pub struct Answer {
    /// Status code.
    pub status: u16,
    /// Body.
    pub body: String,
}

impl Answer {
    /// The body, if the status is 2xx.
    pub fn success(self) -> Result<String> {
        if !(200..300).contains(&self.status) {
            bail!("status {}: {}", self.status, self.body.trim());
        }
        Ok(self.body)
    }
}

/// GET `path` from `address`, from inside `netns`, with `accept` as the header of that name.
pub fn get(netns: &Netns, address: SocketAddr, path: &str, accept: &str) -> Result<Answer> {
    let request = format!(
        "GET {path} HTTP/1.0\r\nHost: {address}\r\nAccept: {accept}\r\nConnection: close\r\n\r\n"
    );
    netns
        .enter(move || {
            let mut stream = TcpStream::connect_timeout(&address, LIMIT)?;
            stream.set_read_timeout(Some(LIMIT))?;
            stream.write_all(request.as_bytes())?;
            let mut answer = Vec::new();
            stream.take(LONGEST_ANSWER).read_to_end(&mut answer)?;
            parse(&answer)
        })
        .with_context(|| format!("GET http://{address}{path}"))
}

fn parse(answer: &[u8]) -> Result<Answer> {
    let text = String::from_utf8_lossy(answer);
    let (head, body) = text
        .split_once("\r\n\r\n")
        .ok_or_else(|| anyhow!("no HTTP answer: {text:.80}"))?;
    let status = head
        .split(' ')
        .nth(1)
        .and_then(|code| code.parse().ok())
        .ok_or_else(|| anyhow!("no status line: {head:.80}"))?;
    Ok(Answer {
        status,
        body: body.to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_split_into_status_and_body() {
        let answer = parse(b"HTTP/1.0 503 Service Unavailable\r\nA: b\r\n\r\nnot yet\n").unwrap();
        assert_eq!(answer.status, 503);
        assert_eq!(answer.body, "not yet\n");
        assert!(answer.success().is_err());
    }
}
