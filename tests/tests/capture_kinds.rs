//! Every kind of connect is captured, or left alone, as it should be.

use anyhow::Result;
use clap::ValueEnum;
use undermesh_lab::connects::{self, Extent, Kind};

#[test]
fn every_kind_of_connect_does_what_it_should_on_v4_and_v6() -> Result<()> {
    let mut kinds = Kind::value_variants().to_vec();
    // Minutes, in a debug build: it is in `cargo xtask scenario capture`.
    kinds.retain(|kind| *kind != Kind::PastTheLimit);
    let results = connects::run(None, Extent::Quick, &kinds, |result| println!("{result:?}"))?;
    let wrong: Vec<_> = results
        .iter()
        .filter(|result| result.right != result.attempts)
        .collect();
    assert!(wrong.is_empty(), "{wrong:#?}");
    assert!(results.len() > 50, "{}", results.len());
    Ok(())
}
