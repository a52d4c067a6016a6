//! What tests of this module share.

use std::sync::Arc;
use std::time::Duration;

use rand::SeedableRng;
use rand::rngs::SmallRng;

use super::balance::BalanceSettings;
use super::budget::BudgetSettings;
use super::destination::{Ask, Attempt, Destination, DestinationSettings, Source};
use super::ejection::{EjectionSettings, Movement, SourceId};
use super::endpoint::Member;
use super::event::{Event, EventLog};
use super::time::Timestamp;

/// A destination with a clock and dice.
pub(super) struct Bench {
    pub(super) destination: Arc<Destination<u32>>,
    pub(super) log: Arc<EventLog>,
    pub(super) now: Timestamp,
    pub(super) rng: SmallRng,
}

/// A destination with endpoints `0..count` in one tier, warm.
pub(super) fn bench(count: u32, balance: BalanceSettings, ejection: EjectionSettings) -> Bench {
    let log = Arc::new(EventLog::new(100_000));
    let settings = DestinationSettings {
        balance,
        ejection,
        budget: BudgetSettings::default(),
        seed: 1,
        sink: log.clone(),
    };
    let destination = Destination::new("shop/cart".into(), settings);
    destination.replace(
        &(0..count).map(Member::new).collect::<Vec<_>>(),
        Timestamp::ZERO,
    );
    Bench {
        destination,
        log,
        now: Timestamp::ZERO + Duration::from_secs(3600),
        rng: SmallRng::seed_from_u64(1),
    }
}

impl Bench {
    pub(super) fn source(&self, id: u64) -> Arc<Source<u32>> {
        self.destination.source(SourceId(id), self.now)
    }

    pub(super) fn pick(&mut self, source: &Arc<Source<u32>>, ask: &Ask<'_, u32>) -> Attempt<u32> {
        source.pick(ask, &mut self.rng, self.now).unwrap()
    }

    pub(super) fn movements(&self) -> Vec<Movement> {
        let moves = self
            .log
            .drain()
            .into_iter()
            .filter_map(|event| match event {
                Event::Ejection(moved) => Some(moved),
                Event::Breaker(_) => None,
            });
        moves.collect()
    }
}
