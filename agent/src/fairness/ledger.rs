//! What one pod has used of its quantum, and how those it serves share it. No I/O and no clock: times and wakers in,
//! wakers out.
//!
//! Among those that wait, who was served least goes next (start-time fair queueing: Goyal, Vin and Cheng, 1996), so a
//! client that seldom asks waits for no other's backlog. What they were served is forgotten as soon as nobody waits.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::task::Waker;
use std::time::Duration;

/// What a pod may use of a worker before others have their turn: a few turns of a task. A request takes some ten turns
/// on both nodes, and may wait for a quantum of each busy pod before each of them.
pub(super) const QUANTUM: Duration = Duration::from_micros(100);

/// Work that waits for longer than this, and never for less in a whole [`OVERDUE_FOR`], is more than the share can
/// carry (the rule of CoDel, RFC 8289, with bounds of a request's scale). New requests are shed then.
const OVERDUE_AFTER: Duration = Duration::from_millis(250);

/// See [`OVERDUE_AFTER`].
const OVERDUE_FOR: Duration = Duration::from_secs(1);

/// No turn is reckoned as shorter, so that a round ends.
const SHORTEST: Duration = Duration::from_micros(1);

/// The account of one pod.
#[derive(Debug, Default)]
pub(super) struct Ledger {
    /// What the pod has used of its quantum.
    used: Duration,
    /// What tasks that were let go on and have not run yet will use, as far as can be told.
    promised: Duration,
    accounts: HashMap<u64, Account>,
    /// Accounts with parked tasks, by what they were served.
    waiting: BTreeSet<(Duration, u64)>,
    /// What the one that went last had been served before: newcomers begin there.
    floor: Duration,
    /// Counts the times that nobody waited.
    spell: u64,
    turnstile: Turnstile,
}

#[derive(Debug, Default, PartialEq, Eq)]
enum Turnstile {
    #[default]
    Still,
    Turning,
}

/// What became of a task that wants to run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Admission {
    Runs,
    /// It waits, under this number.
    Parked(u64),
}

/// The account of one share.
#[derive(Debug, Default)]
struct Account {
    /// See [`Ledger::spell`]: what was served before is forgotten.
    spell: u64,
    served: Duration,
    /// What one turn of a task takes, smoothed.
    usual: Duration,
    /// Tasks that wait, at most as many as the share has; none where one was dropped meanwhile.
    parked: VecDeque<Option<Waker>>,
    /// The number of the first of them: tasks with a smaller one were let go on.
    first: u64,
    /// How many of them there are.
    waiting: usize,
    /// Tasks that were let go on and have not run yet, and what that was reckoned to take.
    released: u32,
    promised: Duration,
    /// Since when every task that was parked waited for longer than [`OVERDUE_AFTER`].
    late_since: Option<Duration>,
}

impl Ledger {
    /// A share begins.
    pub(super) fn open(&mut self, id: u64) {
        self.accounts.insert(id, Account::default());
    }

    /// Its last task has ended.
    pub(super) fn close(&mut self, id: u64) {
        if let Some(account) = self.accounts.remove(&id) {
            self.waiting.remove(&(account.served, id));
            self.promised = self.promised.saturating_sub(account.promised);
        }
    }

    /// A task wants to run.
    pub(super) fn admit(&mut self, id: u64, waker: &Waker) -> Admission {
        let has_room = self.used + self.promised < QUANTUM;
        let Some(account) = self.accounts.get_mut(&id) else {
            return Admission::Runs;
        };
        if account.waiting == 0 {
            if has_room {
                account.late_since = None;
                return Admission::Runs;
            }
            account.begin(self.spell, self.floor);
            self.waiting.insert((account.served, id));
        }
        account.parked.push_back(Some(waker.clone()));
        account.waiting += 1;
        Admission::Parked(account.first + account.parked.len() as u64 - 1)
    }

    /// A task that was parked was woken: whether it has to wait on, as it was something else that woke it.
    pub(super) fn waits(&mut self, id: u64, ticket: u64, waker: &Waker) -> bool {
        let parked = self.accounts.get_mut(&id).and_then(|account| {
            let place = usize::try_from(ticket.checked_sub(account.first)?).ok()?;
            account.parked.get_mut(place)?.as_mut()
        });
        if let Some(parked) = parked {
            parked.clone_from(waker);
            return true;
        }
        false
    }

    /// A task that was parked runs, or never will.
    pub(super) fn leave(&mut self, id: u64, ticket: u64) {
        let Some(account) = self.accounts.get_mut(&id) else {
            return;
        };
        match ticket.checked_sub(account.first) {
            None => {
                let reckoned = account.promised / account.released.max(1);
                account.released = account.released.saturating_sub(1);
                account.promised = account.promised.saturating_sub(reckoned);
                self.promised = self.promised.saturating_sub(reckoned);
                self.reckon(id, |served| served.saturating_sub(reckoned));
            }
            Some(place) => {
                let place = usize::try_from(place).ok();
                let parked = place.and_then(|place| account.parked.get_mut(place));
                if parked.and_then(Option::take).is_some() {
                    account.waiting -= 1;
                }
                if account.waiting == 0 {
                    account.first += account.parked.len() as u64;
                    account.parked.clear();
                    self.waiting.remove(&(account.served, id));
                }
            }
        }
    }

    /// A task that was parked has waited for so long.
    pub(super) fn waited(&mut self, id: u64, waited: Duration, now: Duration) {
        if let Some(account) = self.accounts.get_mut(&id) {
            if waited < OVERDUE_AFTER {
                account.late_since = None;
            } else {
                account.late_since.get_or_insert(now);
            }
        }
    }

    /// Whether all work of a share has been waiting for too long.
    pub(super) fn is_overdue(&self, id: u64, now: Duration) -> bool {
        let late_since = self
            .accounts
            .get(&id)
            .and_then(|account| account.late_since);
        late_since.is_some_and(|since| now.saturating_sub(since) >= OVERDUE_FOR)
    }

    /// A turn of a task took so long.
    pub(super) fn charge(&mut self, id: u64, took: Duration) {
        self.used += took;
        let (spell, floor) = (self.spell, self.floor);
        if let Some(account) = self.accounts.get_mut(&id) {
            account.usual = (account.usual * 7 + took) / 8;
            if account.waiting == 0 {
                account.begin(spell, floor);
            }
        }
        self.reckon(id, |served| served + took);
    }

    /// Changes what a share was served, and with it its place among those that wait.
    fn reckon(&mut self, id: u64, change: impl FnOnce(Duration) -> Duration) {
        if let Some(account) = self.accounts.get_mut(&id) {
            let before = account.served;
            account.served = change(before);
            if self.waiting.remove(&(before, id)) {
                self.waiting.insert((account.served, id));
            }
        }
    }

    /// Whether the turnstile has to be set in motion, as the pod has used up what it may, or nearly so.
    pub(super) fn turns(&mut self) -> bool {
        let due = self.used >= QUANTUM / 2 || !self.waiting.is_empty();
        due && std::mem::replace(&mut self.turnstile, Turnstile::Turning) == Turnstile::Still
    }

    /// The others had their turn: the pod gets its next quantum. Who may go on now; none when the turnstile stands
    /// still, as there is no use for it.
    pub(super) fn round(&mut self) -> Option<Vec<Waker>> {
        self.used = self.used.saturating_sub(QUANTUM);
        if self.waiting.is_empty() {
            self.spell += 1;
            self.floor = Duration::ZERO;
            if self.used.is_zero() {
                self.turnstile = Turnstile::Still;
                return None;
            }
        }
        let mut released = Vec::new();
        while self.used + self.promised < QUANTUM
            && let Some((served, id)) = self.waiting.pop_first()
        {
            let Some(account) = self.accounts.get_mut(&id) else {
                continue;
            };
            let reckoned = account.usual.max(SHORTEST);
            released.extend(account.release(reckoned));
            self.promised += reckoned;
            self.floor = self.floor.max(served);
            if account.waiting > 0 {
                self.waiting.insert((account.served, id));
            }
        }
        Some(released)
    }
}

impl Account {
    /// Nobody has credit for what it did not ask for before.
    fn begin(&mut self, spell: u64, floor: Duration) {
        let before = match self.spell == spell {
            true => self.served,
            false => Duration::ZERO,
        };
        self.spell = spell;
        self.served = before.max(floor);
    }

    /// Lets the first task go on that waits.
    fn release(&mut self, reckoned: Duration) -> Option<Waker> {
        while let Some(parked) = self.parked.pop_front() {
            self.first += 1;
            if parked.is_some() {
                self.waiting -= 1;
                self.released += 1;
                self.promised += reckoned;
                self.served += reckoned;
                return parked;
            }
        }
        None
    }
}
