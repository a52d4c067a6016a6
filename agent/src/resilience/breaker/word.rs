//! A breaker's state in one word: `generation (32) | successes (14) | probes taken (14) | forced (2) | state (2)`.

use super::{BreakerState, Forced};

const STATE: u64 = 0b11;
const FORCED_SHIFT: u32 = 2;
const FORCED: u64 = 0b11 << FORCED_SHIFT;
const TAKEN_SHIFT: u32 = 4;
const SUCCESSES_SHIFT: u32 = 18;
const GENERATION_SHIFT: u32 = 32;
/// The most probes, and the most successes to close, that the word can count.
pub(super) const COUNT_MAX: u32 = (1 << 14) - 1;

/// The packed state. The default is closed, generation 0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Word(pub(super) u64);

impl Word {
    pub(super) const fn state(self) -> BreakerState {
        match self.0 & STATE {
            0 => BreakerState::Closed,
            1 => BreakerState::Open,
            _ => BreakerState::HalfOpen,
        }
    }

    pub(super) const fn forced(self) -> Option<Forced> {
        match (self.0 & FORCED) >> FORCED_SHIFT {
            1 => Some(Forced::Open),
            2 => Some(Forced::Closed),
            _ => None,
        }
    }

    pub(super) const fn generation(self) -> u32 {
        (self.0 >> GENERATION_SHIFT) as u32
    }

    pub(super) const fn taken(self) -> u32 {
        (self.0 >> TAKEN_SHIFT) as u32 & COUNT_MAX
    }

    pub(super) const fn successes(self) -> u32 {
        (self.0 >> SUCCESSES_SHIFT) as u32 & COUNT_MAX
    }

    /// The next generation, in another state: no place taken, no success counted, force kept.
    pub(super) const fn moved(self, state: BreakerState) -> Self {
        let generation = self.generation().wrapping_add(1) as u64;
        Self(generation << GENERATION_SHIFT | self.0 & FORCED | state as u64)
    }

    pub(super) const fn with_forced(self, forced: Option<Forced>) -> Self {
        let bits = match forced {
            None => 0,
            Some(Forced::Open) => 1,
            Some(Forced::Closed) => 2,
        };
        Self(self.0 & !FORCED | bits << FORCED_SHIFT)
    }

    pub(super) const fn with_probe_taken(self) -> Self {
        Self(self.0 + (1 << TAKEN_SHIFT))
    }

    pub(super) const fn with_probe_freed(self) -> Self {
        Self(self.0 - (1 << TAKEN_SHIFT))
    }

    pub(super) const fn with_success(self) -> Self {
        Self(self.0 + (1 << SUCCESSES_SHIFT))
    }
}
