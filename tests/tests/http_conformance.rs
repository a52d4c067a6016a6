//! What is no HTTP, on its way through two agents: a few cases of each kind, of which
//! `agent/src/http/tests/conformance` has all.

use anyhow::{Context, Result};
use serde_json::{Value, json};
use undermesh_lab::metrics::Metrics;
use undermesh_lab::stage::{PORT, TARGET, near_and_far};
use undermesh_lab::web::WebOptions;
use undermesh_lab::{Lab, Side, apps, machine};

/// What came back for a message.
struct Answer {
    said: Vec<u8>,
    end: String,
}

impl Answer {
    fn text(&self) -> String {
        String::from_utf8_lossy(&self.said).into_owned()
    }

    /// Type, stream and payload of the frames.
    fn frames(&self) -> Vec<(u8, u32, Vec<u8>)> {
        let mut frames = Vec::new();
        let mut rest = &self.said[..];
        while rest.len() >= 9 {
            let (head, behind) = rest.split_at(9);
            let length = u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize;
            let stream = u32::from_be_bytes([head[5], head[6], head[7], head[8]]);
            let payload = behind[..length.min(behind.len())].to_vec();
            rest = &behind[payload.len()..];
            frames.push((head[3], stream, payload));
        }
        frames
    }
}

fn send(lab: &Lab, service: &str, messages: &[Vec<u8>]) -> Result<Vec<Answer>> {
    machine::require(&[machine::PYTHON])?;
    let to = lab.service(service, PORT)?;
    let as_text = |bytes: &Vec<u8>| bytes.iter().map(|byte| char::from(*byte)).collect();
    let messages: Vec<String> = messages.iter().map(as_text).collect();
    let (host, port) = (to.ip().to_string(), to.port().to_string());
    let args = [&*host, &*port, &*json!(messages).to_string()];
    let seen = apps::python_client(&lab.pod("client")?, "raw_client", &args)?;
    let answers = seen["answers"].as_array().context("answers")?;
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let answers = answers.iter().map(|answer| Answer {
        // Latin-1: a character is a byte.
        said: text(&answer["said"])
            .chars()
            .map(|byte| byte as u8)
            .collect(),
        end: text(&answer["end"]),
    });
    Ok(answers.collect())
}

#[test]
fn what_two_parsers_could_understand_differently_reaches_no_server_and_is_counted() -> Result<()> {
    let lab = near_and_far().start()?;
    let serve = |name: &str| lab.pod(name)?.serve_web(&WebOptions::new(name, TARGET));
    let servers = [serve("near")?, serve("far")?];
    let cases = [
        (
            "content-length: 4\r\ntransfer-encoding: chunked",
            400,
            "both_lengths",
        ),
        (
            "content-length: 4\r\ncontent-length: 5",
            400,
            "content_length",
        ),
        (
            "transfer-encoding: chunked, chunked",
            400,
            "transfer_encoding",
        ),
        ("x: folded\r\n line", 400, "unparsable"),
        ("x : y", 400, "unparsable"),
        ("x: y\rz", 400, "unparsable"),
        ("host: again", 400, "host_repeated"),
        ("expect: wonders", 417, "expectation_unknown"),
    ];
    for service in ["near", "far"] {
        let message =
            |lines: &str| format!("POST / HTTP/1.1\r\nhost: shop\r\n{lines}\r\n\r\n0\r\n\r\n");
        let messages: Vec<_> = cases
            .iter()
            .map(|(lines, ..)| message(lines).into_bytes())
            .collect();
        for (answer, (lines, status, reason)) in send(&lab, service, &messages)?.iter().zip(cases) {
            let text = answer.text();
            assert!(
                text.starts_with(&format!("HTTP/1.1 {status} ")),
                "{lines:?}: {text}"
            );
            let says = format!("x-undermesh-reason: {reason}\r\n");
            assert!(text.contains(&says), "{lines:?}: {text}");
            assert_eq!(answer.end, "eof", "{lines:?}: {text}");
        }
    }
    for server in servers {
        assert_eq!(server.report()?.received, 0);
    }
    let metrics = Metrics::parse(&lab.node(Side::A)?.agent().metrics()?);
    let refused = [("reporter", "source"), ("flag", "bad_request")];
    let counted = metrics.count("undermesh_http_requests_total", &refused);
    assert_eq!(
        counted,
        2 * cases.len() as u64,
        "each is a request in the metrics"
    );
    let by_reason = metrics.by("undermesh_http_bad_requests_total", "reason");
    assert_eq!(by_reason.get("unparsable"), Some(&6.0), "{by_reason:?}");
    Ok(())
}

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";
const GOAWAY: u8 = 7;
const RST_STREAM: u8 = 3;
const PROTOCOL_ERROR: u32 = 1;

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let mut frame = (payload.len() as u32).to_be_bytes()[1..].to_vec();
    frame.extend([kind, flags]);
    frame.extend(stream.to_be_bytes());
    frame.extend(payload);
    frame
}

#[test]
fn broken_frames_end_a_stream_or_a_connection_with_the_code_for_it() -> Result<()> {
    let lab = near_and_far().start()?;
    let serve = |name: &str| lab.pod(name)?.serve_web(&WebOptions::new(name, TARGET));
    let servers = [serve("near")?, serve("far")?];
    // GET http://shop/
    let request: &[u8] = b"\x82\x86\x84\x41\x04shop";
    let with = |field: &[u8]| frame(1, 5, 1, &[request, field].concat());
    let connection = |code: u32| (GOAWAY, code);
    let stream = |code: u32| (RST_STREAM, code);
    let cases = [
        (
            "DATA on an idle stream",
            frame(0, 1, 1, b"x"),
            connection(PROTOCOL_ERROR),
        ),
        (
            "a stream of even number",
            frame(1, 5, 2, request),
            connection(PROTOCOL_ERROR),
        ),
        (
            "a window beyond 2^31-1",
            frame(8, 0, 0, &0x7fff_ffff_u32.to_be_bytes()),
            connection(3),
        ),
        (
            "DATA above 2^14 octets",
            [frame(1, 4, 1, request), frame(0, 0, 1, &[0; 16_385])].concat(),
            connection(6),
        ),
        (
            "CONTINUATION alone",
            frame(9, 4, 1, request),
            connection(PROTOCOL_ERROR),
        ),
        (
            "te: gzip",
            with(b"\0\x02te\x04gzip"),
            stream(PROTOCOL_ERROR),
        ),
        (
            "connection",
            with(b"\0\x0aconnection\x05close"),
            stream(PROTOCOL_ERROR),
        ),
        ("two :path", with(b"\x84"), stream(PROTOCOL_ERROR)),
        (
            "no :path",
            frame(1, 5, 1, b"\x82\x86\x41\x04shop"),
            stream(PROTOCOL_ERROR),
        ),
    ];
    for service in ["near", "far"] {
        let messages: Vec<_> = cases
            .iter()
            .map(|(_, frames, _)| [PREFACE, frames].concat())
            .collect();
        for (answer, (what, _, (kind, code))) in send(&lab, service, &messages)?.iter().zip(&cases)
        {
            let frames = answer.frames();
            let seen = frames
                .iter()
                .find(|(kind, ..)| matches!(*kind, GOAWAY | RST_STREAM | 1));
            let (seen, _, payload) = seen.with_context(|| format!("{what}: {frames:?}"))?;
            assert_eq!(seen, kind, "{service}: {what}: {frames:?}");
            // GOAWAY names the last stream first.
            let at = if *kind == GOAWAY { 4 } else { 0 };
            assert_eq!(payload[at..at + 4], code.to_be_bytes(), "{service}: {what}");
            assert_eq!(
                answer.end == "open",
                *kind == RST_STREAM,
                "{service}: {what}: {}",
                answer.end
            );
        }
    }
    for server in servers {
        assert_eq!(server.report()?.received, 0);
    }
    Ok(())
}
