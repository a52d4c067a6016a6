//! Streams of records at random, whole and damaged, cut at random: what is read is what was sent, as far as it goes.

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use tokio::io::{ReadHalf, WriteHalf};

use super::*;

/// Streams of each kind.
const ROUNDS: u64 = 40;

/// One side's records, and what the other is to read of them.
struct Sent {
    records: Vec<Vec<u8>>,
    plain: Vec<u8>,
    /// Of `plain`, what is in the records before each.
    before: Vec<usize>,
}

impl Sent {
    fn push(&mut self, record: Vec<u8>) {
        self.before.push(self.plain.len());
        self.records.push(record);
    }

    /// Some of every kind that a server may send, and close_notify.
    fn make(server: &mut Ours, random: &mut SmallRng) -> Self {
        let mut sent = Self {
            records: Vec::new(),
            plain: Vec::new(),
            before: Vec::new(),
        };
        for _ in 0..random.random_range(1..30) {
            match random.random_range(0..12) {
                0 => sent.push(seal(server, ContentType::ApplicationData, b"")),
                1 => sent.push(seal(server, ContentType::Alert, &[1, 90])),
                2 => sent.push(seal(server, ContentType::Handshake, &floods::TICKET)),
                3 => {
                    let (first, second) = floods::TICKET.split_at(random.random_range(1..19));
                    sent.push(seal(server, ContentType::Handshake, first));
                    sent.push(seal(server, ContentType::Handshake, second));
                }
                4 => {
                    let asks = random.random_range(0..2);
                    let update = [24, 0, 0, 1, asks];
                    sent.push(seal(server, ContentType::Handshake, &update));
                    server.outgoing.next_key_for_test(&mut server.keys);
                }
                5 => {
                    let data = pattern(random.random_range(1..300));
                    let padding = vec![0; random.random_range(0..200)];
                    let padded = [&data[..], &[23], &padding].concat();
                    sent.push(seal(server, ContentType::Unknown(0), &padded));
                    sent.plain.extend(data);
                }
                _ => {
                    let longest = [20, 500, MAX_PLAIN][random.random_range(0..20) / 9];
                    let data = pattern(random.random_range(1..=longest));
                    sent.push(seal(server, ContentType::ApplicationData, &data));
                    sent.plain.extend(data);
                }
            }
        }
        sent.push(seal(server, ContentType::Alert, &[1, 0]));
        sent
    }

    fn bytes(&self) -> Vec<u8> {
        self.records.concat()
    }

    /// Does something to it, and says how much of the plaintext may still be read.
    fn damage(&mut self, random: &mut SmallRng) -> usize {
        let at = random.random_range(0..self.records.len());
        let intact = self.before[at];
        let record = &mut self.records[at];
        match random.random_range(0..6) {
            0 => {
                let bit = random.random_range(0..record.len() * 8);
                record[bit / 8] ^= 1 << (bit % 8);
            }
            1 => {
                record.truncate(random.random_range(0..record.len()));
                self.records.truncate(at + 1);
            }
            2 => {
                self.records.remove(at);
            }
            // What follows is in its place no more: this one is still good.
            3 => {
                let again = record.clone();
                self.records.insert(at + 1, again);
                return self.before.get(at + 1).copied().unwrap_or(intact);
            }
            4 => {
                let junk = (0..random.random_range(1..100)).map(|_| random.random());
                let junk: Vec<u8> = junk.collect();
                self.records.insert(at, junk);
            }
            _ => {
                let length = random.random_range(0..200_u8);
                let mut forged = vec![random.random_range(20..25), 3, 3, 0, length];
                forged.resize(HEAD + usize::from(length), random.random());
                self.records.insert(at, forged);
            }
        }
        intact
    }
}

/// Gives the bytes in parts, and then the end.
async fn pour(mut into: WriteHalf<DuplexStream>, bytes: Vec<u8>, mut random: SmallRng) {
    // Byte by byte only where that does not take long.
    let least = if bytes.len() < 10_000 { 0 } else { 2 };
    let longest = [1, 7, 500, 40_000][random.random_range(least..4)];
    let mut rest = &bytes[..];
    while !rest.is_empty() {
        let length = random.random_range(1..=longest).min(rest.len());
        if into.write_all(&rest[..length]).await.is_err() {
            return;
        }
        rest = &rest[length..];
        tokio::task::yield_now().await;
    }
    // The reader may have gone.
    let _ = into.shutdown().await;
}

/// All that is read, and how it ended.
async fn drink(mut from: Ours, mut random: SmallRng) -> (Vec<u8>, io::Result<()>) {
    let mut got = Vec::new();
    loop {
        let mut some = vec![0; random.random_range(1..20_000)];
        match from.read(&mut some).await {
            Ok(0) => return (got, Ok(())),
            Ok(length) => got.extend_from_slice(&some[..length]),
            Err(error) => return (got, Err(error)),
        }
    }
}

/// The server's records to a client, and what it makes of them.
async fn stirred(seed: u64, damage: bool) -> (Vec<u8>, usize, (Vec<u8>, io::Result<()>)) {
    let mut random = SmallRng::seed_from_u64(seed);
    let (client, mut server) = streams().await;
    let mut sent = Sent::make(&mut server, &mut random);
    let may_be_read = if damage {
        sent.damage(&mut random)
    } else {
        sent.plain.len()
    };
    let (read, write): (ReadHalf<_>, WriteHalf<_>) = tokio::io::split(server.io);
    let chance = SmallRng::from_rng(&mut random);
    let pouring = pour(write, sent.bytes(), chance);
    let (_, got) = within(async { tokio::join!(pouring, drink(client, random)) }).await;
    drop(read);
    (sent.plain, may_be_read, got)
}

#[tokio::test]
async fn any_stream_of_records_is_read_whole_however_it_is_cut() {
    for seed in 0..ROUNDS {
        let (plain, _, (got, end)) = stirred(seed, false).await;
        assert!(got == plain, "seed {seed}");
        assert!(end.is_ok(), "seed {seed}: {end:?}");
    }
}

#[tokio::test]
async fn of_a_damaged_stream_nothing_is_read_beyond_the_damage_and_its_end_is_an_error() {
    for seed in 0..4 * ROUNDS {
        let (plain, may_be_read, (got, end)) = stirred(seed, true).await;
        assert!(got == plain[..may_be_read], "seed {seed}");
        // After close_notify nothing is looked at any more.
        let closed = may_be_read == plain.len() && end.is_ok();
        assert!(end.is_err() || closed, "seed {seed}: {end:?}");
    }
}
