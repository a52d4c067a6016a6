//! Whose task runs on this thread, so that what it spawns is its share's too.

use std::cell::Cell;
use std::future::Future;
use std::sync::Arc;

use tokio::task::JoinHandle;

use super::shares::Share;
use super::turns::Turns;

thread_local! {
    static CURRENT: Cell<Option<Arc<Share>>> = const { Cell::new(None) };
}

/// Spawns a task that takes its turns with the share of the task which spawns it. Where there is none, as in the
/// control plane, it is spawned as by tokio.
pub fn spawn<F>(task: F) -> JoinHandle<F::Output>
where
    F: Future + Send + 'static,
    F::Output: Send + 'static,
{
    match current() {
        Some(share) => tokio::spawn(Turns::of(share, task)),
        None => tokio::spawn(task),
    }
}

/// Whether all work of the running task's share has been waiting for too long: it asks for more of the workers than
/// its share of them.
#[must_use]
pub fn is_overdue() -> bool {
    current().is_some_and(|share| share.is_overdue())
}

/// Spawns hyper's tasks as [`spawn`] does.
#[derive(Debug, Clone, Copy, Default)]
pub struct Executor;

impl<F> hyper::rt::Executor<F> for Executor
where
    F: Future + Send + 'static,
    F::Output: Send + 'static,
{
    fn execute(&self, task: F) {
        spawn(task);
    }
}

/// None while the thread ends: what is dropped then spawns nothing that would run.
pub(super) fn current() -> Option<Arc<Share>> {
    let looked = CURRENT.try_with(|current| {
        let share = current.take();
        current.set(share.clone());
        share
    });
    looked.ok().flatten()
}

/// A share's task runs on this thread until this is dropped. The share itself moves, so that a turn costs no count of
/// its references.
pub(super) struct Running<'a> {
    home: &'a mut Option<Arc<Share>>,
    before: Option<Arc<Share>>,
}

impl<'a> Running<'a> {
    pub(super) fn begin(home: &'a mut Option<Arc<Share>>) -> Self {
        let before = CURRENT.replace(home.take());
        Self { home, before }
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        *self.home = CURRENT.replace(self.before.take());
    }
}
