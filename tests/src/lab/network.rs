//! The network of a lab: two nodes on a wire, a control network beside it, and routed pods.
//!
//! Every link is made inside the lab's own namespaces, so labs cannot meet, nor touch the machine's network.

use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::net::Ipv4Addr;
use std::time::Duration;

use anyhow::Result;

use super::builder::Side;
use super::plan::{node_v4, node_v6, pod_v4, pod_v6};
use super::state::{NodeRecord, PodRecord};
use crate::netns::Netns;
use crate::wait;

/// The link between the nodes, as each has it. Nothing but what pods say to each other goes over it.
pub(super) const WIRE: &str = "wire";
/// Where the CA listens; every node reaches it over a link of its own.
pub(super) const CONTROL: Ipv4Addr = Ipv4Addr::new(172, 31, 0, 1);

/// Longest wait for links to be up.
const SETTLED: Duration = Duration::from_secs(10);

/// No waiting for duplicate addresses: there are none.
const HOST: &[(&str, &str)] = &[
    ("ipv6/conf/all/disable_ipv6", "0"),
    ("ipv6/conf/default/disable_ipv6", "0"),
    ("ipv6/conf/all/accept_dad", "0"),
    ("ipv6/conf/default/accept_dad", "0"),
];
const ROUTER: &[(&str, &str)] = &[
    ("ipv4/ip_forward", "1"),
    ("ipv6/conf/all/forwarding", "1"),
    ("ipv4/conf/all/rp_filter", "0"),
    ("ipv4/conf/default/rp_filter", "0"),
];
/// As containerd sets it for its pods.
const POD: &[(&str, &str)] = &[("ipv4/ip_unprivileged_port_start", "0")];

/// Lays the wire between the nodes and the links to the control namespace.
pub(super) fn connect_nodes(control: &Netns, nodes: &[NodeRecord]) -> Result<()> {
    control.sysctl(HOST)?;
    control.ip(&[format!("addr add {CONTROL}/32 dev lo")])?;
    for node in nodes {
        let netns = Netns::at(&node.netns);
        netns.sysctl(HOST)?;
        netns.sysctl(ROUTER)?;
    }
    if let [first, second] = nodes {
        Netns::at(&first.netns).ip(&[format!(
            "link add {WIRE} type veth peer name {WIRE} netns {}",
            second.netns.display()
        )])?;
    }
    for node in nodes {
        let index = node.index;
        let other = if index == 1 { 2 } else { 1 };
        let link = format!("to-{}", node.name);
        let network = |host: u8| Ipv4Addr::new(172, 31, index, host);
        control.ip(&[
            format!(
                "link add {link} type veth peer name control netns {}",
                node.netns.display()
            ),
            format!("addr add {}/24 dev {link}", network(1)),
            format!("link set {link} up"),
        ])?;
        Netns::at(&node.netns).ip(&[
            format!("addr add {}/24 dev control", network(2)),
            "link set control up".to_owned(),
            format!("route add {CONTROL} via {}", network(1)),
            format!("addr add {}/24 dev {WIRE}", node_v4(index)),
            format!("addr add {}/64 dev {WIRE} nodad", node_v6(index)),
            format!("link set {WIRE} up"),
            format!("route add {}/16 via {}", pod_v4(other, 0), node_v4(other)),
            format!("route add {}/64 via {}", pod_v6(other, 0), node_v6(other)),
        ])?;
    }
    Ok(())
}

/// Makes a pod's namespace and its link to the node.
pub(super) fn connect_pod(node: &NodeRecord, pod: &PodRecord) -> Result<()> {
    lay_link(node, pod)?;
    Netns::at(&node.netns).ip(&ways_to(node, pod))
}

/// Gives the addresses of a pod to another, whose link is laid: there is no moment at which nobody has them. What the
/// former had is taken away.
pub(super) fn pass_on(node: &NodeRecord, former: &PodRecord, heir: &PodRecord) -> Result<()> {
    Netns::at(&node.netns).ip(&ways_to(node, heir))?;
    disconnect_pod(node, former)
}

/// A pod's namespace, and a link to it with the addresses of both ends, to which nothing leads yet.
pub(super) fn lay_link(node: &NodeRecord, pod: &PodRecord) -> Result<()> {
    let netns = Netns::create(&pod.netns)?;
    netns.sysctl(POD)?;
    if is_dual_stack(pod) {
        netns.sysctl(HOST)?;
    } else {
        netns.sysctl(&[
            ("ipv6/conf/all/disable_ipv6", "1"),
            ("ipv6/conf/default/disable_ipv6", "1"),
        ])?;
    }
    let link = link_of(pod);
    let (v4, gateway4) = (pod_v4(node.index, pod.index), pod_v4(node.index, 1));
    let (v6, gateway6) = (pod_v6(node.index, pod.index), pod_v6(node.index, 1));
    let mut outside = vec![
        format!(
            "link add {link} type veth peer name eth0 netns {}",
            pod.netns.display()
        ),
        format!("addr add {gateway4}/32 dev {link}"),
        format!("link set {link} up"),
    ];
    let mut inside = vec![
        format!("addr add {v4}/32 dev eth0"),
        "link set eth0 up".to_owned(),
        format!("route add {gateway4}/32 dev eth0"),
        format!("route add default via {gateway4} dev eth0"),
    ];
    if is_dual_stack(pod) {
        outside.push(format!("addr add {gateway6}/128 dev {link} nodad"));
        inside.extend([
            format!("addr add {v6}/128 dev eth0 nodad"),
            format!("route add {gateway6}/128 dev eth0"),
            format!("route add ::/0 via {gateway6} dev eth0"),
        ]);
    }
    Netns::at(&node.netns).ip(&outside)?;
    netns.ip(&inside)
}

/// The node's routes to a pod, in place of those to whoever has its addresses.
fn ways_to(node: &NodeRecord, pod: &PodRecord) -> Vec<String> {
    let link = link_of(pod);
    let mut ways = vec![format!(
        "route replace {}/32 dev {link}",
        pod_v4(node.index, pod.index)
    )];
    if is_dual_stack(pod) {
        ways.push(format!(
            "route replace {}/128 dev {link}",
            pod_v6(node.index, pod.index)
        ));
    }
    ways
}

fn is_dual_stack(pod: &PodRecord) -> bool {
    pod.ips.len() > 1
}

/// Waits until every IPv6 address may be used. The kernel says that a new link is up as late as a
/// second afterwards, and until then its addresses are tentative and answer nobody: a CNI plugin
/// waits for the same.
pub(super) fn settle(netns: &Netns) -> Result<()> {
    let what = format!("the addresses of {}", netns.path().display());
    wait::until_true(&what, SETTLED, || {
        netns.enter(|| {
            let addresses = std::fs::read_to_string("/proc/thread-self/net/if_inet6")?;
            Ok(!addresses.lines().any(is_tentative))
        })
    })
}

/// Whether a line of if_inet6 (address, index, prefix, scope, flags, name) has IFA_F_TENTATIVE.
fn is_tentative(line: &str) -> bool {
    line.split_whitespace()
        .nth(4)
        .and_then(|flags| u32::from_str_radix(flags, 16).ok())
        .is_some_and(|flags| flags & 0x40 != 0)
}

/// Takes a pod's link away, and lets go of its namespace.
pub(super) fn disconnect_pod(node: &NodeRecord, pod: &PodRecord) -> Result<()> {
    Netns::at(&node.netns).ip(&[format!("link del {}", link_of(pod))])?;
    Netns::at(&pod.netns).remove()
}

/// Two pods may have one address for a moment, and so one index.
fn link_of(pod: &PodRecord) -> String {
    let mut hasher = DefaultHasher::new();
    pod.netns.hash(&mut hasher);
    // No longer than the kernel's 15 characters.
    format!("p{}-{:08x}", pod.index, hasher.finish() & 0xffff_ffff)
}

/// The node of that side, as it will be.
pub(super) fn plan_node(dir: &std::path::Path, cgroup: &std::path::Path, side: Side) -> NodeRecord {
    NodeRecord {
        name: side.node().to_owned(),
        index: side.index(),
        netns: dir.join("netns").join(side.node()),
        cgroup: cgroup.join(side.node()),
        dir: dir.join(side.node()),
        address: node_v4(side.index()).into(),
    }
}
