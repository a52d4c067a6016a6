//! Retry, budget, breaker, ejection, limits, balancing: what the proxy decides, without the proxy.
//!
//! Nothing here does I/O, reads a clock or rolls its own dice: `now` is a [`Timestamp`], randomness
//! is an argument, and HTTP is known only as an [`Outcome`]. So every decision can be replayed, and
//! the simulator (`cargo xtask simulate`) runs this very code.
//!
//! The way of a request:
//! 1. [`Breakers::admit`] asks the breaker of the (destination, route);
//! 2. [`limit`] has the rate and concurrency limits;
//! 3. [`Destination::pick`] chooses an endpoint and returns an [`Attempt`];
//! 4. [`Attempt::finish`] tells how that single attempt ended, which feeds ejection and balancing;
//! 5. [`Retries::next`] decides whether there is another attempt, within the [`RetryBudget`];
//! 6. the final outcome goes to [`breaker::Permit::finish`].

pub mod backoff;
pub mod balance;
pub mod book;
pub mod breaker;
pub mod breakers;
pub mod budget;
pub mod destination;
pub mod ejection;
pub mod endpoint;
pub mod event;
pub mod fallback;
pub mod fault;
pub mod hedge;
pub mod limit;
pub mod outcome;
pub mod policy;
pub mod retry;
pub mod rolling;
mod sync;
#[cfg(test)]
#[cfg(not(loom))]
mod testing;
pub mod time;
pub mod timeout;
pub mod validate;

pub use backoff::Backoff;
pub use balance::{Algorithm, BalanceSettings};
pub use book::BreakerBook;
pub use breaker::{Breaker, BreakerSettings, BreakerState};
pub use breakers::Breakers;
pub use budget::{BudgetSettings, Purse, RetryBudget};
pub use destination::{Ask, Attempt, Destination, NoEndpoint};
pub use ejection::EjectionSettings;
pub use endpoint::{Endpoint, Member, Target};
pub use event::{Event, EventLog, EventSink};
pub use fallback::Fallback;
pub use outcome::{Code, Failure, Outcome, Unsent, Verdict};
pub use policy::Policy;
pub use retry::{Decision, Retries, RetryPolicy};
pub use time::Timestamp;
pub use timeout::Timeouts;
pub use validate::{Invalid, Validate};
