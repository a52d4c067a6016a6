//! What clients saw and servers received.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::traffic::Latency;

/// Different keys in one table of a report; more count under `other`.
const MOST_KEYS: usize = 64;

/// What a server received.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct WebReport {
    /// Requests.
    pub received: u64,
    /// Of these, how many said that they were a second or later attempt.
    pub repeated: u64,
    /// Answers by status; `cut` for requests without one.
    pub by_status: BTreeMap<String, u64>,
    /// Connections accepted.
    pub connections: u64,
    /// Bytes of request bodies.
    pub body_bytes: u64,
}

/// A tenth of a second.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Tick {
    /// Requests that were answered 2xx.
    pub ok: u64,
    /// Requests that were not.
    pub failed: u64,
}

/// What clients saw.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct LoadReport {
    /// Requests that were sent.
    pub sent: u64,
    /// Those that were answered 2xx, with the whole body.
    pub ok: u64,
    /// Those that were not, by status and `x-undermesh-reason`, or by what broke.
    pub by_reason: BTreeMap<String, u64>,
    /// 2xx answers by the server's name.
    pub by_server: BTreeMap<String, u64>,
    /// Answers by status.
    pub by_status: BTreeMap<String, u64>,
    /// Requests that were due and not sent, since all connections were busy.
    pub unsent: u64,
    /// From when a request was due to the last byte of a 2xx answer.
    pub latency: Latency,
    /// By when the requests were due, in steps of [`LoadReport::TICK`] from the start.
    pub ticks: Vec<Tick>,
    /// Connections opened.
    pub connections: u64,
    /// Whether it is over.
    pub finished: bool,
}

impl LoadReport {
    /// Length of a [`Tick`].
    pub const TICK: std::time::Duration = std::time::Duration::from_millis(100);

    /// Requests that were sent and not answered 2xx.
    #[must_use]
    pub fn failed(&self) -> u64 {
        self.by_reason.values().sum()
    }
}

/// Counts under `key`, in a table that cannot grow for ever.
pub(super) fn count(table: &mut BTreeMap<String, u64>, key: &str) {
    if let Some(value) = table.get_mut(key) {
        *value += 1;
        return;
    }
    let key = if table.len() < MOST_KEYS {
        key
    } else {
        "other"
    };
    *table.entry(key.to_owned()).or_default() += 1;
}
