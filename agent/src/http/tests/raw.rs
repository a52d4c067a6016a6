//! Frames of HTTP/2 by hand, for what the crate h2 does not send.

use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::FAR;

pub const DATA: u8 = 0;
pub const HEADERS: u8 = 1;
pub const PRIORITY: u8 = 2;
pub const RST_STREAM: u8 = 3;
pub const SETTINGS: u8 = 4;
pub const PUSH_PROMISE: u8 = 5;
pub const PING: u8 = 6;
pub const GOAWAY: u8 = 7;
pub const WINDOW_UPDATE: u8 = 8;
pub const CONTINUATION: u8 = 9;

/// Of DATA and HEADERS.
pub const END_STREAM: u8 = 1;
/// Of SETTINGS and PING.
pub const ACK: u8 = 1;
pub const END_HEADERS: u8 = 4;
pub const PADDED: u8 = 8;
pub const PRIORITIZED: u8 = 32;

/// With empty SETTINGS behind it.
pub const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";

pub fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let mut frame = (payload.len() as u32).to_be_bytes()[1..].to_vec();
    frame.extend([kind, flags]);
    frame.extend(stream.to_be_bytes());
    frame.extend(payload);
    frame
}

/// Kind, stream and payload of the next frame; none at the end of the connection.
pub async fn read(stream: &mut TcpStream) -> Option<(u8, u32, Vec<u8>)> {
    let (kind, _, id, payload) = read_flags(stream).await?;
    Some((kind, id, payload))
}

/// Kind, flags, stream and payload of the next frame; none at the end of the connection.
pub async fn read_flags(stream: &mut TcpStream) -> Option<(u8, u8, u32, Vec<u8>)> {
    let mut head = [0; 9];
    timeout(FAR, stream.read_exact(&mut head))
        .await
        .unwrap()
        .ok()?;
    let length = u32::from_be_bytes([0, head[0], head[1], head[2]]);
    let mut payload = vec![0; length as usize];
    stream.read_exact(&mut payload).await.ok()?;
    let id = u32::from_be_bytes([head[5], head[6], head[7], head[8]]);
    Some((head[3], head[4], id, payload))
}

pub async fn read_until_headers(stream: &mut TcpStream) {
    let mut preface = [0; 24];
    stream.read_exact(&mut preface).await.unwrap();
    while !matches!(read(stream).await.unwrap(), (1, ..)) {}
}

/// `POST http://shop/`, in HPACK (RFC 7541).
pub fn request() -> Vec<u8> {
    let mut block = vec![0x83, 0x86, 0x84, 0x41, 4];
    block.extend(b"shop");
    block
}

pub fn field(name: &[u8], value: &[u8]) -> Vec<u8> {
    let mut field = vec![0, name.len() as u8];
    field.extend(name);
    field.push(value.len() as u8);
    field.extend(value);
    field
}

/// `:status` of a block that our own side has written, which begins with it.
pub fn status(block: &[u8]) -> u16 {
    // Updates of the table's size may stand before it (RFC 7541 §6.3).
    let at = block.iter().position(|byte| byte & 0xe0 != 0x20).unwrap();
    match block[at] {
        0x88 => 200,
        0x89 => 204,
        0x8a => 206,
        0x8b => 304,
        0x8c => 400,
        0x8d => 404,
        0x8e => 500,
        // Literal, by the name of index 8.
        0x08 | 0x18 | 0x48 => text(&block[at + 1..]).parse().unwrap(),
        other => panic!("no status: {other:#x} in {block:x?}"),
    }
}

/// A string of digits, encoded or not (RFC 7541 §5.2).
fn text(string: &[u8]) -> String {
    let encoded = string[0] & 0x80 != 0;
    let bytes = &string[1..][..usize::from(string[0] & 0x7f)];
    if !encoded {
        return String::from_utf8(bytes.to_vec()).unwrap();
    }
    let bits: Vec<u8> = bytes
        .iter()
        .flat_map(|byte| (0..8).rev().map(move |bit| byte >> bit & 1))
        .collect();
    let number = |bits: &[u8]| bits.iter().fold(0, |number, bit| number << 1 | bit);
    let mut digits = String::new();
    let mut at = 0;
    while at + 5 <= bits.len() {
        let short = number(&bits[at..at + 5]);
        if short <= 2 {
            digits.push(char::from(b'0' + short));
            at += 5;
            continue;
        }
        let Some(long) = bits.get(at..at + 6).map(number) else {
            break;
        };
        // 3 to 9 are 0x19 to 0x1f, and all ones are padding.
        if !(0x19..=0x1f).contains(&long) {
            break;
        }
        digits.push(char::from(b'3' + long - 0x19));
        at += 6;
    }
    digits
}
