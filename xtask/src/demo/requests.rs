//! What the mesh does with requests: a breaker that opens and closes, and a canary that fails.

use std::time::Duration;

use anyhow::Result;
use serde_json::{Value, json};
use undermesh_lab::Binaries;
use undermesh_lab::requests::{Canary, CanaryOptions, Outage, OutageOptions};

use crate::report::{Checks, thousandths};

/// Shows both, each in a lab of its own, and adds what had to be so to `checks`.
pub fn show(binaries: &Binaries, checks: &mut Checks) -> Result<Value> {
    let tell = |what: &str| println!("  {what}");
    println!("\nHTTP: a circuit breaker in an outage");
    let options = OutageOptions {
        outage: Duration::from_secs(3),
        after: Duration::from_secs(3),
        ..OutageOptions::default()
    };
    let outage = Outage::run(Some(binaries.clone()), &options, &tell)?;
    let went = outage.went_round();
    let went = went.map_or_else(|error| format!("{error:#}"), |()| "yes".to_owned());
    checks.equal("breaker went round", went, "yes".to_owned());
    checks.more_than("breaker rejected", outage.rejected, 0);

    println!("\nHTTP: a canary that fails");
    let options = CanaryOptions {
        before: Duration::from_secs(2),
        failing: Duration::from_secs(3),
        ..CanaryOptions::default()
    };
    let canary = Canary::run(Some(binaries.clone()), &options, &tell)?;
    checks.less_than(
        "canary: errors, in 1/1000",
        thousandths(canary.client_error_share),
        thousandths(canary.weight_share()) + 1,
    );
    checks.equal("canary: errors after", canary.errors_after, 0);
    Ok(json!({"outage": outage, "canary": canary}))
}
