//! Fair shares of the workers' time between the pods of the node, and between those that a pod serves.
//!
//! All connections of all pods run on the same few threads, whose queues are first come, first served: a pod with a
//! thousand busy connections would get a thousand turns for each of its neighbour's. So every task belongs to a pod,
//! and pods take turns: deficit round robin (Shreedhar and Varghese, 1996), with what a turn costs measured in time on
//! the worker's processor, since that is what bytes, requests, accepts and handshakes all cost.
//!
//! What comes in to a pod was sent by others, and one of them must not starve the rest: it is paid by the pod, and
//! [shared](super::ledger) between the addresses that it comes from. The network delivers answers to those addresses,
//! so none is assumed for more than a SYN; and they are known before a handshake has proven who is there, which costs
//! more than all that follows.
//!
//! While one share alone is busy nothing is measured and nobody waits. A pod that has used up its quantum while others
//! are busy too has its tasks parked; its turnstile goes once through the runtime's queue, behind whatever of the
//! others is ready, and lets as many go on as the next quantum will bear. So a neighbour waits for one quantum of each
//! busy pod at most, and no time is left unused.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use pin_project_lite::pin_project;

use super::current::Running;
use super::shares::{Parked, Share};

pin_project! {
    /// A task that takes its turns with those of other shares.
    pub struct Turns<F> {
        // None only while it runs.
        share: Option<Arc<Share>>,
        #[pin]
        task: F,
        parked: Option<Parked>,
    }

    impl<F> PinnedDrop for Turns<F> {
        fn drop(this: Pin<&mut Self>) {
            let this = this.project();
            if let (Some(share), Some(parked)) = (this.share, this.parked.take()) {
                share.leave(parked);
            }
        }
    }
}

impl<F> Turns<F> {
    pub(super) fn of(share: Arc<Share>, task: F) -> Self {
        Self {
            share: Some(share),
            task,
            parked: None,
        }
    }
}

impl<F: Future> Future for Turns<F> {
    type Output = F::Output;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        let this = self.project();
        let Some(share) = this.share.as_ref() else {
            return this.task.poll(cx);
        };
        let contended = share.enter();
        let waited = this.parked.take();
        if let Some(parked) = waited
            && !share.resume(parked, cx.waker(), contended)
        {
            *this.parked = waited;
            return Poll::Pending;
        }
        if !contended {
            let _running = Running::begin(this.share);
            return this.task.poll(cx);
        }
        // Who has waited goes: its pod's quantum was counted out for it.
        if waited.is_none() {
            *this.parked = share.admit(cx.waker());
            if this.parked.is_some() {
                return Poll::Pending;
            }
        }
        let began = share.clock().begin();
        let outcome = {
            let _running = Running::begin(this.share);
            this.task.poll(cx)
        };
        if let Some(share) = this.share {
            share.charge(share.clock().took(began));
        }
        outcome
    }
}
