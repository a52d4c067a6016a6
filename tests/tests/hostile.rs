//! What a process in a pod cannot do.

use anyhow::Result;
use undermesh_lab::hostile;

#[test]
fn every_attack_is_repelled_and_works_where_there_is_no_defence() -> Result<()> {
    let outcome = hostile::run(None, 1, |result| println!("{result:?}"))?;
    let through: Vec<_> = outcome
        .attacks
        .iter()
        .filter(|result| !result.repelled())
        .collect();
    assert!(through.is_empty(), "{through:#?}");
    Ok(())
}
