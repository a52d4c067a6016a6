//! Short forms of the scenarios of `cargo xtask scenario`.

use std::time::Duration;

use anyhow::Result;
use undermesh_lab::requests::{Canary, CanaryOptions, Outage, OutageOptions, Switch};

fn tell(what: &str) {
    println!("{what}");
}

#[test]
fn a_breaker_opens_in_an_outage_and_closes_after_it() -> Result<()> {
    let options = OutageOptions {
        outage: Duration::from_secs(3),
        after: Duration::from_secs(4),
        ..OutageOptions::default()
    };
    let outage = Outage::run(None, &options, &tell)?;
    outage.went_round()?;
    assert!(outage.rejected > 0, "{outage:#?}");
    assert!(
        outage.outage.upstream_received <= outage.most_received(),
        "{outage:#?}"
    );
    assert!(outage.recover_ms < 2_000, "{outage:#?}");
    Ok(())
}

#[test]
fn the_retry_budget_holds_on_the_wire_without_a_breaker() -> Result<()> {
    let options = OutageOptions {
        breaker: Switch::Off,
        before: Duration::from_secs(1),
        outage: Duration::from_secs(8),
        after: Duration::from_secs(3),
        ..OutageOptions::default()
    };
    let outage = Outage::run(None, &options, &tell)?;
    assert!(outage.transitions.is_empty(), "{outage:#?}");
    assert!(
        outage.outage.upstream_received > outage.outage.sent,
        "nothing was repeated: {outage:#?}"
    );
    assert!(
        outage.outage.upstream_received <= outage.most_received(),
        "{outage:#?}"
    );
    Ok(())
}

#[test]
fn a_failing_canary_is_contained() -> Result<()> {
    let options = CanaryOptions {
        before: Duration::from_secs(2),
        failing: Duration::from_secs(4),
        ..CanaryOptions::default()
    };
    let canary = Canary::run(None, &options, &tell)?;
    assert!(
        canary.client_error_share <= canary.weight_share(),
        "{canary:#?}"
    );
    assert_eq!(canary.errors_after, 0, "{canary:#?}");
    assert!(canary.contained_ms < 3_000, "{canary:#?}");
    Ok(())
}
