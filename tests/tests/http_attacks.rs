//! What floods of HTTP cost a bystander, and the agent.

use std::time::Duration;

use anyhow::{Context, Result};
use undermesh_lab::web::{HttpAttack, HttpAttackOptions, LoadOptions, WebOptions};
use undermesh_lab::{Lab, PodSpec, ServiceSpec, Side, wait};

const PORT: u16 = 80;
const TARGET: u16 = 8080;
const LIMIT: Duration = Duration::from_secs(60);
/// What an attack may cost the bystander, over what the same attack on the same server costs it beside the mesh. Below
/// this many milliseconds there is nothing to compare on a machine with two processors.
const MOST_SLOWDOWN: f64 = 2.0;
const NOISE_MS: f64 = 30.0;
/// A machine that does something else slows a round now and then; what an attack costs shows in every one.
const MOST_ROUNDS: usize = 3;
const MOST_MEMORY: u64 = 256 << 20;

#[test]
fn floods_of_http_leave_a_bystander_alone() -> Result<()> {
    let lab = Lab::builder()
        .pod(PodSpec::new("bystander").on(Side::A))
        .pod(PodSpec::new("attacker").on(Side::A))
        .pod(PodSpec::new("outsider").on(Side::A).outside())
        .pod(PodSpec::new("api").on(Side::B).port("http", TARGET))
        .pod(PodSpec::new("prey").on(Side::B).port("http", TARGET))
        .service(ServiceSpec::new("api").http(PORT, TARGET))
        .service(ServiceSpec::new("prey").http(PORT, TARGET))
        .start()?;
    let serve = |name: &str| lab.pod(name)?.serve_web(&WebOptions::new(name, TARGET));
    let (_api, prey) = (serve("api")?, serve("prey")?);
    let bystander = lab.pod("bystander")?;
    let load = LoadOptions::new(lab.service("api", PORT)?)
        .rate(100)
        .during(Duration::from_millis(1500));
    let agent = lab.node(Side::A)?.agent();
    let round = |kind: HttpAttack| -> Result<[f64; 2]> {
        let mut p99 = [0.0; 2];
        for (index, name) in ["outsider", "attacker"].into_iter().enumerate() {
            let before = prey.report()?.received;
            let attack = HttpAttackOptions::new(kind, lab.service("prey", PORT)?);
            let attack = lab.pod(name)?.start_http_attack(&attack)?;
            wait::pause(Duration::from_millis(300))?;
            let seen = bystander.start_load(&load)?.finish(LIMIT)?;
            let attack = attack.finish(LIMIT)?;
            assert_eq!(seen.failed(), 0, "{kind:?} from {name}: {seen:?}");
            // Frames count once a whole batch was written: one that is cut off in its first batch was an attack too.
            let attacked = attack.frames + attack.cut_off;
            assert!(attacked > 0, "{kind:?} from {name}: {attack:?}");
            p99[index] = seen.latency.p99;
            let received = prey.report()?.received - before;
            println!(
                "{kind:?} from {name}: {attack:?}, {received} received, {:?}",
                seen.latency
            );
        }
        Ok(p99)
    };
    let is_left_alone =
        |[beside, inside]: &[f64; 2]| *inside <= (beside * MOST_SLOWDOWN).max(NOISE_MS);
    for kind in HttpAttack::ALL {
        let mut rounds = Vec::new();
        while !rounds.last().is_some_and(is_left_alone) {
            assert!(
                rounds.len() < MOST_ROUNDS,
                "{kind:?}: the bystander's p99 in ms when the attack goes by the mesh, and in it: {rounds:?}"
            );
            rounds.push(round(kind)?);
        }
        let resident = agent.resident_bytes().context("the agent lives")?;
        assert!(resident < MOST_MEMORY, "{kind:?}: {resident} bytes");
    }
    Ok(())
}
