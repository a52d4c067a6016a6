//! Whose turn it is: deficit round robin (Shreedhar and Varghese 1996) over sources, by cost, so
//! that one pod's flood waits behind itself. Runs where the queue is; bounded per source and in all.

use std::collections::{HashMap, VecDeque};
use std::hash::Hash;

use super::super::validate::{Faults, Validate};

/// Bounds and pace of a fair queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FairSettings {
    /// What a source may spend per turn, in units of cost (bytes, or 1 per accept). Range 1 to
    /// 2³⁰, default 65,536.
    pub quantum: u32,
    /// The most items of one source; one more is refused. Range 1 to 1,000,000, default 256.
    pub per_source: usize,
    /// The most items in all. At the limit a source that has more than its fair share waiting is
    /// refused; one that has less takes the place of the newest item of the longest queue.
    /// Range 1 to 10,000,000, default 4,096.
    pub total: usize,
}

impl Default for FairSettings {
    fn default() -> Self {
        Self {
            quantum: 65_536,
            per_source: 256,
            total: 4096,
        }
    }
}

impl Validate for FairSettings {
    fn check(&self, at: &str, faults: &mut Faults) {
        faults.range(self.quantum, 1, 1 << 30, at, "quantum");
        faults.range(self.per_source, 1, 1_000_000, at, "perSource");
        faults.range(self.total, 1, 10_000_000, at, "total");
    }
}

/// An item is not queued.
#[derive(Debug, PartialEq, Eq)]
pub struct Refused<K, I> {
    /// Whose it was: the one that pushed, or the one with the longest queue.
    pub source: K,
    /// The item.
    pub item: I,
}

/// Queues by source, served in turn.
#[derive(Debug)]
pub struct FairQueue<K, I> {
    settings: FairSettings,
    flows: HashMap<K, Flow<I>>,
    turns: VecDeque<K>,
    len: usize,
    refused: u64,
}

#[derive(Debug)]
struct Flow<I> {
    items: VecDeque<(u32, I)>,
    deficit: u64,
    /// Whether this turn's quantum was given already.
    served: bool,
}

impl<K: Clone + Eq + Hash, I> FairQueue<K, I> {
    /// No queue yet.
    pub fn new(settings: FairSettings) -> Self {
        Self {
            settings,
            flows: HashMap::new(),
            turns: VecDeque::new(),
            len: 0,
            refused: 0,
        }
    }

    /// Queues an item of a cost.
    ///
    /// # Errors
    /// [`Refused`] with the item that has no place: this one, or, when all places are taken and this
    /// source holds less than others, the newest of the longest queue. Counted.
    pub fn push(&mut self, source: K, cost: u32, item: I) -> Result<(), Refused<K, I>> {
        let waiting = self.flows.get(&source).map_or(0, |flow| flow.items.len());
        if waiting >= self.settings.per_source {
            self.refused += 1;
            return Err(Refused { source, item });
        }
        let mut displaced = None;
        if self.len >= self.settings.total {
            self.refused += 1;
            // Linear in the number of sources, and only when all is full.
            let longest = self
                .flows
                .iter()
                .max_by_key(|(_, flow)| flow.items.len())
                .map(|(key, flow)| (key.clone(), flow.items.len()));
            match longest {
                Some((key, length)) if length > waiting + 1 => displaced = self.drop_newest(key),
                _ => return Err(Refused { source, item }),
            }
        }
        let flow = self.flows.entry(source.clone()).or_insert_with(|| {
            self.turns.push_back(source);
            Flow {
                items: VecDeque::new(),
                deficit: 0,
                served: false,
            }
        });
        flow.items.push_back((cost, item));
        self.len += 1;
        displaced.map_or(Ok(()), Err)
    }

    /// The next item, and whose it is.
    pub fn pop(&mut self) -> Option<(K, I)> {
        loop {
            let source = self.turns.front()?.clone();
            let flow = self.flows.get_mut(&source)?;
            if !flow.served {
                flow.served = true;
                flow.deficit += u64::from(self.settings.quantum);
            }
            let Some((cost, _)) = flow.items.front() else {
                self.end(&source);
                continue;
            };
            let cost = u64::from(*cost);
            if cost > flow.deficit {
                flow.served = false;
                self.turns.rotate_left(1);
                continue;
            }
            flow.deficit -= cost;
            let item = flow.items.pop_front().map(|(_, item)| item);
            if flow.items.is_empty() {
                self.end(&source);
            }
            self.len -= 1;
            return item.map(|item| (source, item));
        }
    }

    /// Takes out all items of a source that is gone.
    pub fn remove(&mut self, source: &K) -> Vec<I> {
        let Some(flow) = self.flows.remove(source) else {
            return Vec::new();
        };
        self.turns.retain(|turn| turn != source);
        self.len -= flow.items.len();
        flow.items.into_iter().map(|(_, item)| item).collect()
    }

    /// Items that wait.
    pub const fn len(&self) -> usize {
        self.len
    }

    /// Whether nothing waits.
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Items refused since the start.
    pub const fn refused(&self) -> u64 {
        self.refused
    }

    /// A source with nothing left keeps no credit.
    fn end(&mut self, source: &K) {
        self.flows.remove(source);
        self.turns.pop_front();
    }

    fn drop_newest(&mut self, source: K) -> Option<Refused<K, I>> {
        let (_, item) = self.flows.get_mut(&source)?.items.pop_back()?;
        self.len -= 1;
        Some(Refused { source, item })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_waits_behind_itself() {
        let mut queue = FairQueue::new(FairSettings {
            quantum: 1,
            ..FairSettings::default()
        });
        for n in 0..200 {
            queue.push("loud", 1, n).unwrap();
        }
        for n in 0..3 {
            queue.push("quiet", 1, n).unwrap();
        }
        let first: Vec<&str> = (0..6)
            .filter_map(|_| queue.pop())
            .map(|(source, _)| source)
            .collect();
        assert_eq!(first.iter().filter(|source| **source == "quiet").count(), 3);
    }

    #[test]
    fn turns_are_fair_by_cost_not_by_count() {
        let settings = FairSettings {
            quantum: 1000,
            per_source: 10_000,
            total: 100_000,
        };
        let mut queue = FairQueue::new(settings);
        for n in 0..1000 {
            queue.push("large", 1500, n).unwrap();
            queue.push("small", 100, n).unwrap();
        }
        let (mut large, mut small) = (0u32, 0u32);
        while large + small < 100_000 {
            match queue.pop().unwrap() {
                ("large", _) => large += 1500,
                _ => small += 100,
            }
        }
        assert!(large.abs_diff(small) <= 3000, "{large} and {small}");
    }

    #[test]
    fn a_full_queue_takes_from_the_longest() {
        let mut queue = FairQueue::new(FairSettings {
            quantum: 1,
            per_source: 10,
            total: 10,
        });
        for n in 0..10 {
            queue.push("loud", 1, n).unwrap();
        }
        assert_eq!(
            queue.push("loud", 1, 10),
            Err(Refused {
                source: "loud",
                item: 10
            })
        );
        assert_eq!(
            queue.push("quiet", 1, 0),
            Err(Refused {
                source: "loud",
                item: 9
            })
        );
        assert_eq!(queue.len(), 10);
        assert_eq!(queue.refused(), 2);
        assert_eq!(queue.remove(&"loud").len(), 9);
        assert_eq!(queue.pop(), Some(("quiet", 0)));
        assert!(queue.is_empty() && queue.pop().is_none());
    }

    #[test]
    fn an_item_that_costs_many_turns_still_comes() {
        let mut queue = FairQueue::new(FairSettings {
            quantum: 10,
            ..FairSettings::default()
        });
        queue.push("a", 1000, ()).unwrap();
        assert!(queue.pop().is_some());
    }
}
