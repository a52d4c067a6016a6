//! Bytes that tell where in which stream they belong, so that loss, repetition and mixing show.

const LINE: usize = 64;
const COUNTER: usize = 16;
const LINE_BYTES: u64 = LINE as u64;

/// A stream of lines of 64 bytes: the stream's seed and the line's number in hex, a space, the marker.
#[derive(Debug, Clone)]
pub struct Pattern {
    seed: u32,
    template: [u8; LINE],
}

impl Pattern {
    /// The longest marker, in bytes.
    pub const LONGEST_MARKER: usize = LINE - COUNTER - 4;

    /// The stream of `seed`, with `marker` (cut to 44 bytes) in every line.
    #[must_use]
    pub fn new(marker: &str, seed: u32) -> Self {
        let mut template = [b'.'; LINE];
        template[COUNTER] = b' ';
        let marker = &marker.as_bytes()[..marker.len().min(Self::LONGEST_MARKER)];
        template[COUNTER + 1..][..marker.len()].copy_from_slice(marker);
        template[LINE - 1] = b'\n';
        Self { seed, template }
    }

    /// Fills `out` with what stands at `offset` of the stream.
    pub fn fill(&self, offset: u64, out: &mut [u8]) {
        let mut number = offset / LINE_BYTES;
        let mut skip = usize::try_from(offset % LINE_BYTES).unwrap_or(0);
        let mut rest = out;
        while !rest.is_empty() {
            let line = self.line(number);
            let length = rest.len().min(LINE - skip);
            let (now, later) = rest.split_at_mut(length);
            now.copy_from_slice(&line[skip..skip + length]);
            rest = later;
            skip = 0;
            number += 1;
        }
    }

    /// Whether `bytes` are what stands at `offset`. `scratch` is overwritten.
    #[must_use]
    pub fn matches(&self, offset: u64, bytes: &[u8], scratch: &mut Vec<u8>) -> bool {
        scratch.resize(bytes.len(), 0);
        self.fill(offset, scratch);
        scratch == bytes
    }

    fn line(&self, number: u64) -> [u8; LINE] {
        const DIGITS: &[u8; 16] = b"0123456789abcdef";
        let mut line = self.template;
        let mut value = u64::from(self.seed) << 32 | number & 0xffff_ffff;
        for place in line[..COUNTER].iter_mut().rev() {
            *place = DIGITS[usize::try_from(value & 15).unwrap_or(0)];
            value >>= 4;
        }
        line
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_is_the_same_however_it_is_cut() {
        let pattern = Pattern::new("needle", 7);
        let mut whole = vec![0; 1000];
        pattern.fill(0, &mut whole);
        let mut pieces = Vec::new();
        for length in [1, 62, 1, 1, 200, 735] {
            let mut piece = vec![0; length];
            pattern.fill(pieces.len() as u64, &mut piece);
            pieces.extend(piece);
        }
        assert_eq!(whole, pieces);
        assert!(whole.starts_with(b"0000000700000000 needle"));
        assert!(pattern.matches(3, &whole[3..500], &mut Vec::new()));
        assert!(!pattern.matches(4, &whole[3..500], &mut Vec::new()));
    }

    #[test]
    fn streams_of_different_seeds_differ_in_every_line() {
        let (mut one, mut other) = ([0; 64], [0; 64]);
        Pattern::new("m", 1).fill(64, &mut one);
        Pattern::new("m", 2).fill(64, &mut other);
        assert_ne!(one, other);
    }
}
