//! The failure table's cells in which no agent ends by itself.

use anyhow::{Context, Result, ensure};
use undermesh_lab::cells::{self, Mode};
use undermesh_lab::{Lab, PodSpec, Side};

#[test]
fn each_cell_is_as_the_table_has_it_for_strict_pods() -> Result<()> {
    check(Mode::Strict)
}

#[test]
fn each_cell_is_as_the_table_has_it_for_permissive_pods() -> Result<()> {
    check(Mode::Permissive)
}

fn check(mode: Mode) -> Result<()> {
    let results = cells::run(None, mode, 10, |result| println!("{result:?}"))?;
    let wrong: Vec<_> = results
        .iter()
        .filter(|result| !result.wrong.is_empty())
        .collect();
    ensure!(wrong.is_empty(), "{wrong:#?}");
    ensure!(results.len() == 6, "{}", results.len());
    Ok(())
}

#[test]
fn a_pod_whose_rules_translate_addresses_counts_as_one_that_forwards_and_one_that_filters_does_not()
-> Result<()> {
    let lab = Lab::builder()
        .pod(PodSpec::new("translates").on(Side::A).strict())
        .pod(PodSpec::new("filters").on(Side::A).strict())
        .without_agents()
        .start()?;
    for (name, rules) in [
        (
            "translates",
            "table ip t { chain in { type nat hook prerouting priority dstnat;
             tcp dport 99 dnat to 10.242.0.2:80
             }
             }",
        ),
        (
            "filters",
            "table ip t { chain in { type filter hook input priority filter;
             tcp dport 99 drop
             }
             chain none { type nat hook prerouting priority dstnat; }
             }",
        ),
    ] {
        let netns = lab.pod(name)?.place().netns;
        netns.sysctl(&[("ipv4/ip_forward", "1")])?;
        netns.feed(&["nft", "-f", "-"], rules)?;
    }
    lab.start_mesh()?;
    lab.wait_enrolled(&lab.pod("filters")?)?;
    let pods = lab.node(Side::A)?.agent().admin("/pods")?;
    let all = pods.as_array().context("/pods is no list")?;
    let status = all.iter().find(|one| one["name"] == "default/translates");
    let status = status.context("no such pod")?;
    ensure!(status["phase"] == "refused", "{status}");
    let reason = status["last_error"].as_str().unwrap_or_default();
    ensure!(reason.contains("nftables translates addresses"), "{status}");
    Ok(())
}
