//! `cargo xtask lab`: two nodes to drive by hand.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use clap::{Args, Subcommand, ValueEnum};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use undermesh_lab::process::{Place, Process};
use undermesh_lab::{Agent, Authority, Lab, LabState, NodeHandle, PodHandle, Side, machine};
use undermesh_lab::{manifests, remove_stale};

use crate::cluster::{self, Servers};
use crate::{programs, report};

#[derive(Args)]
pub struct Options {
    /// Name of the lab, where more than one is up on this machine.
    #[arg(long, global = true, default_value = "lab")]
    name: String,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Build two nodes with an agent each; they stay up until `lab down`.
    Up {
        /// Kubernetes objects to use instead of the built-in ones. Pods are spread over node-a and node-b unless
        /// they name their node; a first container's `command` is run, on this machine's file system.
        #[arg(long, value_name = "DIR")]
        manifests: Option<PathBuf>,
        /// Where to write what there is, in JSON.
        #[arg(long, value_name = "FILE")]
        json: Option<PathBuf>,
        /// Without CA and agents: to compare, or to start agents by hand.
        #[arg(long)]
        without_agents: bool,
    },
    /// Run a command in a pod's network namespace and cgroup, or in a node's.
    Exec {
        /// In this node, where its agent's admin endpoint is.
        #[arg(long)]
        node: Option<String>,
        /// POD -- CMD…, or with --node just -- CMD…
        #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
        words: Vec<String>,
    },
    /// Start a node's agent, or end it: `stop` is SIGTERM, `kill` is SIGKILL.
    Agent {
        /// The node.
        node: String,
        /// What to do with its agent.
        action: Action,
    },
    /// Remove the lab, and what was left of others whose owner has died.
    Down,
}

#[derive(Clone, Copy, ValueEnum)]
enum Action {
    Start,
    Stop,
    Kill,
}

pub fn run(options: &Options) -> Result<ExitCode> {
    let name = &options.name;
    match &options.command {
        Command::Up {
            manifests,
            json,
            without_agents,
        } => {
            let state = up(name, manifests.as_deref(), *without_agents)?;
            print(&state)?;
            if let Some(file) = json {
                report::write(file, &describe(&state)?)?;
            }
        }
        Command::Exec { node, words } => return exec(name, node.as_deref(), words),
        Command::Agent { node, action } => agent(name, node, *action)?,
        Command::Down => down(name)?,
    }
    Ok(ExitCode::SUCCESS)
}

fn up(name: &str, dir: Option<&Path>, without_agents: bool) -> Result<LabState> {
    machine::require_root()?;
    if LabState::dir_of(name).exists() {
        bail!("a lab is up already: cargo xtask lab down");
    }
    let documents = dir.map(manifests::read_dir).transpose()?;
    let binaries = if without_agents {
        programs::build_traffic()?
    } else {
        programs::build()?
    };
    println!("building the nodes");
    let builder = match documents {
        Some(documents) => Lab::builder().documents(documents),
        None => cluster::builder(),
    };
    let mut builder = builder.id(name).binaries(binaries);
    if without_agents {
        builder = builder.without_agents();
    }
    let lab = builder.start()?;
    if dir.is_none() {
        Servers::start(&lab, "served by nginx in a pod of the lab")?.leave_running();
    }
    lab.keep()
}

fn down(name: &str) -> Result<()> {
    machine::require_root()?;
    let stale = remove_stale()?;
    for id in &stale {
        println!("removed {id}, which was left behind");
    }
    if !stale.is_empty() && !LabState::dir_of(name).exists() {
        return Ok(());
    }
    // Whatever `up` left, even half of it.
    Lab::remove(name)?;
    println!("{name} is down");
    Ok(())
}

fn exec(name: &str, node: Option<&str>, words: &[String]) -> Result<ExitCode> {
    machine::require_root()?;
    let state = LabState::load(name)?;
    let (place, words): (Place, &[String]) = match (node, words) {
        (Some(node), words) => (NodeHandle::open(&state, node)?.place(), words),
        (None, [pod, words @ ..]) => (PodHandle::open(&state, pod)?.place(), words),
        (None, []) => bail!("which pod?"),
    };
    let words = words.strip_prefix(&["--".to_owned()]).unwrap_or(words);
    let (program, arguments) = words.split_first().context("which command?")?;
    // Ctrl-C is the command's; what it ends with is ours.
    let status = place.command(program).args(arguments).status()?;
    let code = status.code().and_then(|code| u8::try_from(code).ok());
    Ok(code.map_or(ExitCode::FAILURE, ExitCode::from))
}

fn agent(name: &str, node: &str, action: Action) -> Result<()> {
    machine::require_root()?;
    let state = LabState::load(name)?;
    let agent = NodeHandle::open(&state, node)?.agent();
    match action {
        Action::Start => {
            let mut process: Process = agent.spawn(&[], &[])?;
            let ready = agent.wait_ready(&mut process);
            process.leave_running();
            ready?;
            println!("the agent of {node} is ready: {}", agent.log().display());
        }
        Action::Stop => agent.end(Signal::SIGTERM)?,
        Action::Kill => agent.end(Signal::SIGKILL)?,
    }
    Ok(())
}

/// The shape that other programs rely on.
fn describe(state: &LabState) -> Result<Value> {
    let mut nodes = Vec::new();
    for node in &state.nodes {
        let agent = NodeHandle::open(state, &node.name)?.agent();
        nodes.push(json!({
            "name": node.name,
            "netns": node.netns,
            "agent_pid": agent.pid()?,
            "admin": Agent::admin_address(),
            "metrics": agent.metrics_address(),
        }));
    }
    let pods: Vec<Value> = state
        .pods
        .iter()
        .map(|pod| {
            json!({
                "name": pod.name,
                "namespace": pod.namespace,
                "node": pod.node,
                "netns": pod.netns,
                "ips": pod.ips,
                "identity": pod.identity(&state.trust_domain),
                "mode": pod.mode,
            })
        })
        .collect();
    let services: Vec<Value> = state
        .services
        .iter()
        .map(|service| {
            json!({
                "name": service.name,
                "namespace": service.namespace,
                "vip": service.vips.first(),
                "ports": service.ports,
            })
        })
        .collect();
    Ok(json!({
        "nodes": nodes,
        "pods": pods,
        "services": services,
        "ca": {"address": state.ca, "root_file": Authority::of(state).root_file()},
    }))
}

fn print(state: &LabState) -> Result<()> {
    println!();
    for node in &state.nodes {
        let agent = NodeHandle::open(state, &node.name)?.agent();
        let pid = agent.pid()?.map_or("-".to_owned(), |pid| pid.to_string());
        println!(
            "{}  agent {pid}, admin http://{} (in the node), metrics http://{}, log {}",
            node.name,
            Agent::admin_address(),
            agent.metrics_address(),
            agent.log().display()
        );
        for pod in state.pods.iter().filter(|pod| pod.node == node.name) {
            let ips: Vec<String> = pod.ips.iter().map(ToString::to_string).collect();
            println!("  pod {:<14} {:<10} {}", pod.name, pod.mode, ips.join(", "));
        }
    }
    for service in &state.services {
        let vips: Vec<String> = service.vips.iter().map(ToString::to_string).collect();
        println!(
            "service {:<12} {:?} at {}",
            service.name,
            service.ports,
            vips.join(", ")
        );
    }
    let (pod, service) = (state.pods.first(), state.services.first());
    if let (Some(pod), Some(service)) = (pod, service)
        && let (Some(vip), Some(port)) = (service.vips.first(), service.ports.first())
    {
        println!(
            "\ntry  cargo xtask lab exec {} -- curl -s http://{vip}:{port}/name",
            pod.name
        );
    }
    let (node, admin) = (Side::A.node(), Agent::admin_address());
    println!(
        "     cargo xtask lab exec --node {node} -- curl -s -H 'Accept: text/plain' http://{admin}/connections"
    );
    println!("     cargo xtask lab down");
    Ok(())
}
