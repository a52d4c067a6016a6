use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use proptest::prelude::*;

use super::*;
use crate::mesh::{Membership, Mode, Sandbox, SpiffeId, TrustDomain};

fn address(last: u8) -> IpAddr {
    IpAddr::from([10, 0, 0, last])
}

fn vip(last: u8) -> IpAddr {
    IpAddr::from([10, 96, 0, last])
}

fn uid(number: u8) -> WorkloadUid {
    WorkloadUid(format!("uid-{number}").into())
}

fn workload(number: u8, addresses: &[u8], meshed: bool) -> Arc<Workload> {
    Arc::new(Workload {
        uid: uid(number),
        name: ObjectName::new("shop", &format!("pod-{number}")),
        workload: format!("pod-{number}").into(),
        version: None,
        node: format!("node-{}", number % 2).into(),
        identity: SpiffeId::new(TrustDomain::default(), "shop", "default").unwrap(),
        addresses: addresses.iter().map(|&last| address(last)).collect(),
        labels: Arc::default(),
        named_ports: BTreeMap::new(),
        probe_ports: Default::default(),
        opaque_ports: Default::default(),
        membership: if meshed {
            Membership::Meshed(Mode::Permissive)
        } else {
            Membership::Outside
        },
        readiness: crate::mesh::Readiness::Ready,
        sandbox: None::<Sandbox>,
    })
}

fn service(number: u8, vips: &[u8], ports: &[(u16, Vec<u8>)]) -> Arc<Service> {
    let endpoint = |&number: &u8| Endpoint {
        address: (address(number), 8080).into(),
        readiness: crate::mesh::Readiness::Ready,
        workload: Some(uid(number)),
    };
    Arc::new(Service {
        name: ObjectName::new("shop", &format!("service-{number}")),
        vips: vips.iter().map(|&last| vip(last)).collect(),
        ports: ports
            .iter()
            .map(|(port, endpoints)| ServicePort {
                name: "".into(),
                port: *port,
                app_protocol: None,
                opaque: false,
                endpoints: endpoints.iter().map(endpoint).collect(),
            })
            .collect(),
    })
}

fn target(address: IpAddr, port: Option<u16>) -> CaptureTarget {
    CaptureTarget { address, port }
}

#[test]
fn a_service_port_is_captured_while_one_endpoint_is_meshed() {
    let mut snapshot = Snapshot::default();
    snapshot.insert_service(service(1, &[1], &[(80, vec![1, 2]), (443, vec![2])]));
    assert_eq!(snapshot.capture_targets(), BTreeSet::new());

    snapshot.insert_workload(workload(1, &[1], true));
    snapshot.insert_workload(workload(2, &[2], false));
    let expected = BTreeSet::from([target(address(1), None), target(vip(1), Some(80))]);
    assert_eq!(snapshot.capture_targets(), expected);
    assert!(snapshot.captures(&target(vip(1), Some(80))));
    assert!(!snapshot.captures(&target(vip(1), Some(443))));

    snapshot.insert_workload(workload(1, &[1], false));
    assert_eq!(snapshot.capture_targets(), BTreeSet::new());
}

#[test]
fn services_come_before_pods_and_an_unknown_port_of_a_vip_is_unknown() {
    let mut snapshot = Snapshot::default();
    snapshot.insert_workload(workload(1, &[1], true));
    snapshot.insert_service(service(1, &[1], &[(80, vec![1])]));
    let at = |address: IpAddr, port: u16| snapshot.resolve((address, port).into());
    assert!(matches!(at(vip(1), 80), Destination::Service { port, .. } if port.port == 80));
    assert!(matches!(at(vip(1), 81), Destination::Unknown));
    assert!(matches!(at(address(1), 81), Destination::Workload(_)));
    assert!(matches!(at(address(9), 80), Destination::Unknown));
}

#[test]
fn two_services_share_one_address_by_their_ports() {
    let mut snapshot = Snapshot::default();
    snapshot.insert_service(service(1, &[1], &[(80, vec![])]));
    snapshot.insert_service(service(2, &[1], &[(443, vec![])]));
    for (port, name) in [(80, "service-1"), (443, "service-2")] {
        let found = snapshot.resolve((vip(1), port).into());
        assert!(
            matches!(found, Destination::Service { service, .. } if &*service.name.name == name)
        );
    }
    snapshot.remove_service(&ObjectName::new("shop", "service-2"));
    let found = snapshot.resolve((vip(1), 80).into());
    assert!(matches!(found, Destination::Service { .. }));
}

#[test]
fn an_address_goes_back_to_its_former_owner_when_the_later_one_leaves() {
    let mut snapshot = Snapshot::default();
    snapshot.insert_workload(workload(1, &[7], true));
    snapshot.insert_workload(workload(2, &[7], true));
    assert_eq!(snapshot.workload_at(address(7)).unwrap().uid, uid(2));
    snapshot.remove_workload(&uid(2));
    assert_eq!(snapshot.workload_at(address(7)).unwrap().uid, uid(1));
    assert!(snapshot.captures(&target(address(7), None)));
}

#[test]
fn pods_are_found_by_node() {
    let mut snapshot = Snapshot::default();
    for number in 1..=4 {
        snapshot.insert_workload(workload(number, &[number], true));
    }
    let names: Vec<_> = snapshot
        .workloads_on("node-1")
        .map(|workload| workload.uid.clone())
        .collect();
    assert_eq!(names, [uid(1), uid(3)]);
    assert_eq!(snapshot.workloads_on("elsewhere").count(), 0);
}

#[test]
fn an_older_snapshot_does_not_see_later_changes() {
    let mut snapshot = Snapshot::default();
    snapshot.insert_workload(workload(1, &[1], true));
    let older = snapshot.clone();
    snapshot.remove_workload(&uid(1));
    snapshot.insert_workload(workload(2, &[2], true));
    assert!(older.workload(&uid(1)).is_some() && older.workload(&uid(2)).is_none());
    let changes = snapshot.target_changes_since(&older);
    assert_eq!(changes.added, BTreeSet::from([target(address(2), None)]));
    assert_eq!(changes.removed, BTreeSet::from([target(address(1), None)]));
    assert!(snapshot.target_changes_since(&snapshot.clone()).is_empty());
}

#[derive(Debug, Clone)]
enum Step {
    PutWorkload(u8, Vec<u8>, bool),
    RemoveWorkload(u8),
    PutService(u8, Vec<u8>, Vec<(u16, Vec<u8>)>),
    RemoveService(u8),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let few =
        || prop::collection::btree_set(0u8..6, 0..3).prop_map(|set| set.into_iter().collect());
    let ports = prop::collection::btree_map(80u16..83, few(), 0..3)
        .prop_map(|map| map.into_iter().collect());
    let step = prop_oneof![
        (0u8..6, few(), any::<bool>()).prop_map(|(n, a, m)| Step::PutWorkload(n, a, m)),
        (0u8..6).prop_map(Step::RemoveWorkload),
        (0u8..4, few(), ports).prop_map(|(n, v, p)| Step::PutService(n, v, p)),
        (0u8..4).prop_map(Step::RemoveService),
    ];
    prop::collection::vec(step, 0..40)
}

/// Capture targets as their definition says, from nothing but the objects.
fn targets_by_definition(snapshot: &Snapshot) -> BTreeSet<CaptureTarget> {
    let pods = snapshot
        .workloads()
        .filter(|workload| workload.is_meshed())
        .flat_map(|workload| workload.addresses.iter().map(|&a| target(a, None)));
    let services = snapshot.services().flat_map(|service| {
        let meshed = |port: &&ServicePort| {
            port.endpoints.iter().any(|endpoint| {
                let uid = endpoint.workload.as_ref().unwrap();
                snapshot.workload(uid).is_some_and(|one| one.is_meshed())
            })
        };
        service.ports.iter().filter(meshed).flat_map(|port| {
            let port = Some(port.port);
            service.vips.iter().map(move |&vip| target(vip, port))
        })
    });
    pods.chain(services).collect()
}

proptest! {
    #[test]
    fn a_sequence_of_changes_equals_a_rebuild_from_scratch(steps in steps()) {
        let mut snapshot = Snapshot::default();
        let mut workloads: Vec<Arc<Workload>> = Vec::new();
        let mut services: Vec<Arc<Service>> = Vec::new();
        for step in steps {
            let before = snapshot.clone();
            match step {
                Step::PutWorkload(number, addresses, meshed) => {
                    let new = workload(number, &addresses, meshed);
                    if !workloads.contains(&new) {
                        workloads.retain(|old| old.uid != new.uid);
                        workloads.push(new.clone());
                    }
                    snapshot.insert_workload(new);
                }
                Step::RemoveWorkload(number) => {
                    workloads.retain(|old| old.uid != uid(number));
                    snapshot.remove_workload(&uid(number));
                }
                Step::PutService(number, vips, ports) => {
                    let new = service(number, &vips, &ports);
                    if !services.contains(&new) {
                        services.retain(|old| old.name != new.name);
                        services.push(new.clone());
                    }
                    snapshot.insert_service(new);
                }
                Step::RemoveService(number) => {
                    let name = ObjectName::new("shop", &format!("service-{number}"));
                    services.retain(|old| old.name != name);
                    snapshot.remove_service(&name);
                }
            }

            let mut rebuilt = Snapshot::default();
            workloads.iter().for_each(|one| rebuilt.insert_workload(one.clone()));
            services.iter().for_each(|one| rebuilt.insert_service(one.clone()));
            prop_assert_eq!(&snapshot.workloads, &rebuilt.workloads);
            prop_assert_eq!(&snapshot.services, &rebuilt.services);
            prop_assert_eq!(&snapshot.by_node, &rebuilt.by_node);
            prop_assert_eq!(&snapshot.by_endpoint, &rebuilt.by_endpoint);
            prop_assert_eq!(snapshot.capture_targets(), rebuilt.capture_targets());
            prop_assert_eq!(snapshot.capture_targets(), targets_by_definition(&snapshot));
            for last in 0..6 {
                prop_assert_eq!(snapshot.workload_at(address(last)), rebuilt.workload_at(address(last)));
                for port in 79..84 {
                    let at = |snapshot: &Snapshot| format!("{:?}", snapshot.resolve((vip(last), port).into()));
                    prop_assert_eq!(at(&snapshot), at(&rebuilt));
                }
            }

            let changes = snapshot.target_changes_since(&before);
            let mut followed = before.capture_targets();
            for gone in &changes.removed {
                prop_assert!(followed.remove(gone));
            }
            for new in &changes.added {
                prop_assert!(followed.insert(*new));
            }
            prop_assert_eq!(followed, snapshot.capture_targets());
        }
    }
}
