//! How much a stream may hold unread: less while memory is short.

use std::future::{Future, pending};
use std::pin::Pin;
use std::sync::LazyLock;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::sleep;

use super::limits::{SHORT_WINDOW, STREAM_WINDOW};

/// h2 takes no change before the peer has acknowledged the one before.
const TRY_AGAIN: Duration = Duration::from_millis(100);

static OF_PROCESS: LazyLock<Room> = LazyLock::new(Room::new);

/// The window of each stream that tunnels announce, for all that have a clone of it.
#[derive(Debug, Clone)]
pub struct Room(watch::Sender<u32>);

/// Tells all tunnels of the process that memory is short, or is not any more: see [`Room::set_short`].
pub fn set_short_of_memory(is_short: bool) {
    OF_PROCESS.set_short(is_short);
}

impl Room {
    /// With plenty.
    #[must_use]
    pub fn new() -> Self {
        Self(watch::Sender::new(STREAM_WINDOW))
    }

    /// While there is not enough, no stream may have more than 64 KiB unread instead of 2 MiB (RFC 9113 section 6.9.2).
    /// What is there already stays until it is read; it does not grow any more, in old tunnels and in new ones.
    pub fn set_short(&self, is_short: bool) {
        self.0.send_replace(if is_short {
            SHORT_WINDOW
        } else {
            STREAM_WINDOW
        });
    }

    /// For one tunnel, of which the peer takes streams to have all of it.
    pub(super) fn announced(&self) -> Announced {
        Announced {
            told: STREAM_WINDOW,
            next: self.next(STREAM_WINDOW, Duration::ZERO),
            room: self.clone(),
        }
    }

    /// Waits so long, and then until another window is wanted than the one that the peer was told of.
    fn next(&self, told: u32, after: Duration) -> Pin<Box<dyn Future<Output = u32> + Send>> {
        let mut wanted = self.0.subscribe();
        Box::pin(async move {
            sleep(after).await;
            let other = wanted.wait_for(|wanted| *wanted != told).await;
            match other.map(|other| *other) {
                Ok(other) => other,
                Err(_) => pending().await,
            }
        })
    }
}

/// That of the process.
impl Default for Room {
    fn default() -> Self {
        OF_PROCESS.clone()
    }
}

/// The window that the peer of one tunnel knows of.
pub(super) struct Announced {
    room: Room,
    told: u32,
    next: Pin<Box<dyn Future<Output = u32> + Send>>,
}

impl Announced {
    /// Waits for a window that the peer has to be told of.
    pub(super) fn next(&mut self) -> impl Future<Output = u32> + Send {
        self.next.as_mut()
    }

    /// The peer was told of it, or has to be told later.
    pub(super) fn settle(&mut self, window: u32, taken: Result<(), h2::Error>) {
        let after = match taken {
            Ok(()) => {
                self.told = window;
                Duration::ZERO
            }
            Err(_) => TRY_AGAIN,
        };
        self.next = self.room.next(self.told, after);
    }
}
