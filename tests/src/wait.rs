//! Waiting on conditions, always with a deadline.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use crate::interrupt;

const STEP: Duration = Duration::from_millis(10);

/// Waits until `condition` gives a value. An error of `condition` is taken as "not yet", and is named when
/// the time is up; `what` completes the sentence "waited 5s for …".
pub fn until<T>(
    what: &str,
    limit: Duration,
    mut condition: impl FnMut() -> Result<Option<T>>,
) -> Result<T> {
    let start = Instant::now();
    loop {
        interrupt::check()?;
        let outcome = condition();
        if let Ok(Some(value)) = outcome {
            return Ok(value);
        }
        if start.elapsed() >= limit {
            match outcome {
                Err(error) => {
                    return Err(error.context(format!("waited {limit:?} for {what}")));
                }
                Ok(_) => bail!("waited {limit:?} for {what}"),
            }
        }
        std::thread::sleep(STEP);
    }
}

/// Waits until `condition` holds.
pub fn until_true(
    what: &str,
    limit: Duration,
    mut condition: impl FnMut() -> Result<bool>,
) -> Result<()> {
    until(what, limit, || Ok(condition()?.then_some(())))
}

/// Lets time pass, ending early with an error on Ctrl-C.
pub fn pause(duration: Duration) -> Result<()> {
    let end = Instant::now() + duration;
    while let Some(left) = end.checked_duration_since(Instant::now()) {
        interrupt::check()?;
        std::thread::sleep(left.min(Duration::from_millis(50)));
    }
    Ok(())
}
