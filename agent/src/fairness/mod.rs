//! What one pod may take from its neighbours: time on the workers ([`Fairness::turns`]), requests under way and memory
//! for bodies that may have to be sent again ([`Quota`]). Each bound is per pod and per node, since a pod is on one.

mod clock;
mod current;
mod ledger;
mod living;
mod meter;
mod quota;
mod shares;
mod turns;

pub use clock::{Clock, MachineClock};
pub use current::{Executor, is_overdue, spawn};
pub use quota::{Quota, QuotaLimits, Quotas, Reserved, Unserved};
pub use shares::{Client, Fairness, Payer};
pub use turns::Turns;
