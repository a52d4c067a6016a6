use std::fs;
use std::path::Path;

use tempfile::TempDir;

use super::*;
use crate::mesh::{ObjectName, WorkloadUid};

const LIMIT: Duration = Duration::from_secs(20);

fn pod(name: &str, ip: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Pod\nmetadata:\n  name: {name}\n  namespace: shop\n  labels:\n    \
         undermesh.io/mesh: enabled\nstatus:\n  podIPs:\n  - ip: {ip}\n"
    )
}

fn documents(documents: &[String]) -> String {
    documents.join("---\n")
}

struct Running {
    directory: TempDir,
    source: Arc<FileSource>,
    snapshot: SharedSnapshot,
    stop: CancellationToken,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

impl Running {
    fn start(files: &[(&str, String)]) -> Self {
        Self::start_with(files, |_| ())
    }

    fn start_with(files: &[(&str, String)], set: impl FnOnce(&mut FileSourceOptions)) -> Self {
        let directory = tempfile::tempdir().unwrap();
        for (name, text) in files {
            fs::write(directory.path().join(name), text).unwrap();
        }
        let mut options = FileSourceOptions::new(directory.path(), "node-a");
        // Nothing here may depend on the periodic look, unless it says so.
        options.rescan = Duration::from_secs(3600);
        set(&mut options);
        let (snapshot, stop) = (SharedSnapshot::default(), CancellationToken::new());
        let source = FileSource::start(options, snapshot.clone(), stop.clone()).unwrap();
        Self {
            directory,
            source,
            snapshot,
            stop,
        }
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.directory.path().join(name)
    }

    /// As editors and kubelet write: a file beside, then a rename over the old one.
    fn replace(&self, name: &str, text: &str) {
        fs::write(self.path(".new"), text).unwrap();
        fs::rename(self.path(".new"), self.path(name)).unwrap();
    }

    fn errors(&self) -> Vec<String> {
        let status = self.source.status();
        status.errors.iter().map(ToString::to_string).collect()
    }

    fn pods(&self) -> Vec<String> {
        let snapshot = self.snapshot.load();
        let mut names: Vec<_> = snapshot
            .workloads()
            .map(|pod| format!("{} {}", pod.name.name, pod.addresses[0]))
            .collect();
        names.sort();
        names
    }

    async fn until(&self, what: impl Fn(&FileStatus) -> bool) {
        let mut statuses = self.source.statuses();
        let found = tokio::time::timeout(LIMIT, statuses.wait_for(|status| what(status))).await;
        assert!(found.is_ok(), "still {:?}", self.source.status());
    }

    async fn until_generation(&self, generation: u64) {
        let mut generations = self.source.generations();
        let reached = generations.wait_for(|now| *now >= generation);
        let found = tokio::time::timeout(LIMIT, reached).await;
        assert!(found.is_ok(), "still {:?}", self.source.status());
    }
}

#[tokio::test]
async fn what_is_there_at_the_start_is_in_force_at_once() {
    let running = Running::start(&[("a.yaml", pod("a", "10.0.0.1")), ("b.txt", "x".to_owned())]);
    assert_eq!(running.pods(), ["a 10.0.0.1"]);
    let status = running.source.status();
    assert_eq!((status.generation, status.files), (1, 1));
    assert_eq!(status.noticed_by, NoticedBy::Inotify);
    let json = serde_json::to_value(&*status).unwrap();
    assert_eq!(json["objects"], serde_json::json!({"Pod": 1}));
    assert!(json["last_change"].as_str().unwrap().ends_with('Z'));
}

#[tokio::test]
async fn a_directory_that_is_not_there_is_an_error_at_the_start() {
    let options = FileSourceOptions::new("/nonexistent", "node-a");
    let error = FileSource::start(options, SharedSnapshot::default(), CancellationToken::new());
    let text = error.unwrap_err().to_string();
    assert!(
        text.starts_with("manifests cannot be read from /nonexistent: "),
        "{text}"
    );
}

#[tokio::test]
async fn changes_are_followed_written_in_place_renamed_over_added_and_removed() {
    let running = Running::start(&[("a.yaml", pod("a", "10.0.0.1"))]);
    fs::write(running.path("a.yaml"), pod("a", "10.0.0.2")).unwrap();
    running.until_generation(2).await;
    assert_eq!(running.pods(), ["a 10.0.0.2"]);

    running.replace("a.yaml", &pod("a", "10.0.0.3"));
    running.until_generation(3).await;
    assert_eq!(running.pods(), ["a 10.0.0.3"]);

    fs::write(
        running.path("b.json"),
        r#"{"apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": "b"}, "status": {"podIP": "10.0.0.4"}}"#,
    )
    .unwrap();
    running.until_generation(4).await;
    assert_eq!(running.pods(), ["a 10.0.0.3", "b 10.0.0.4"]);

    fs::remove_file(running.path("a.yaml")).unwrap();
    running.until_generation(5).await;
    assert_eq!(running.pods(), ["b 10.0.0.4"]);
}

#[tokio::test]
async fn of_two_documents_a_bad_one_is_refused_and_the_other_is_taken() {
    let first = documents(&[pod("a", "10.0.0.1"), pod("b", "10.0.0.2")]);
    let running = Running::start(&[("pods.yaml", first)]);
    running.replace(
        "pods.yaml",
        &documents(&[pod("a", "10.0.0"), pod("b", "10.0.0.3")]),
    );
    running.until_generation(2).await;
    assert_eq!(running.pods(), ["a 10.0.0.1", "b 10.0.0.3"]);
    let error = "pods.yaml:10: Pod shop/a: status.podIPs[0].ip: \"10.0.0\" is not an IP address";
    assert_eq!(running.errors(), [error]);

    running.replace(
        "pods.yaml",
        &documents(&[pod("a", "10.0.0.4"), pod("b", "10.0.0.3")]),
    );
    running.until_generation(3).await;
    assert_eq!(running.pods(), ["a 10.0.0.4", "b 10.0.0.3"]);
    assert_eq!(running.errors(), Vec::<String>::new());
}

#[tokio::test]
async fn a_file_that_is_no_yaml_keeps_what_it_said_before() {
    let running = Running::start(&[(
        "a.yaml",
        documents(&[pod("a", "10.0.0.1"), pod("b", "10.0.0.2")]),
    )]);
    running.replace(
        "a.yaml",
        &documents(&[pod("a", "10.0.0.3"), "kind: [\n".to_owned()]),
    );
    running.until(|status| status.errors_total == 1).await;
    assert_eq!(running.pods(), ["a 10.0.0.3", "b 10.0.0.2"]);
    let status = running.source.status();
    let error = &status.errors[0];
    assert_eq!(
        (error.file.as_str(), error.object.as_ref()),
        ("a.yaml", None)
    );
    assert!(error.line >= Some(11) && error.column.is_some(), "{error}");

    running.replace("a.yaml", &pod("a", "10.0.0.3"));
    running.until(|status| status.errors_total == 0).await;
    assert_eq!(running.pods(), ["a 10.0.0.3"]);
}

#[tokio::test]
async fn a_field_of_the_wrong_type_is_refused_with_its_line_and_the_last_good_stays() {
    let running = Running::start(&[("a.yaml", pod("a", "10.0.0.1"))]);
    running.replace(
        "a.yaml",
        &format!("{}spec:\n  hostNetwork: 1\n", pod("a", "10.0.0.2")),
    );
    running.until(|status| status.errors_total == 1).await;
    let error = "a.yaml:12: Pod shop/a: spec.hostNetwork: \
                 invalid type: integer `1`, expected a boolean";
    assert_eq!(running.errors(), [error]);
    assert_eq!(running.pods(), ["a 10.0.0.1"]);
}

#[tokio::test]
async fn an_object_in_two_files_is_that_of_the_first_until_it_leaves_it() {
    let running = Running::start(&[
        ("a.yaml", pod("x", "10.0.0.1")),
        ("b.yaml", pod("x", "10.0.0.2")),
    ]);
    assert_eq!(
        running.errors(),
        ["b.yaml:1: Pod shop/x: is in a.yaml already"]
    );
    assert_eq!(running.pods(), ["x 10.0.0.1"]);
    fs::remove_file(running.path("a.yaml")).unwrap();
    running.until_generation(2).await;
    assert_eq!(running.pods(), ["x 10.0.0.2"]);
    assert_eq!(running.errors(), Vec::<String>::new());

    fs::write(
        running.path("c.yaml"),
        documents(&[pod("y", "10.0.0.3"), pod("y", "10.0.0.4")]),
    )
    .unwrap();
    running.until_generation(3).await;
    assert_eq!(
        running.errors(),
        ["c.yaml:12: Pod shop/y: is in line 1 already"]
    );
}

#[tokio::test]
async fn two_pods_with_one_address_are_an_error_that_names_both() {
    let running = Running::start(&[
        ("a.yaml", pod("a", "10.0.0.1")),
        ("b.yaml", pod("b", "10.0.0.1")),
    ]);
    let error = "b.yaml:10: Pod shop/b: status.podIPs[0].ip: 10.0.0.1 is the address of Pod shop/a";
    assert_eq!(running.errors(), [error]);
    fs::remove_file(running.path("a.yaml")).unwrap();
    running.until_generation(2).await;
    assert_eq!(running.pods(), ["b 10.0.0.1"]);
}

#[tokio::test]
async fn kinds_of_others_are_ignored_and_counted() {
    let foreign = "apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: x}\n";
    let running = Running::start(&[(
        "a.yaml",
        documents(&[foreign.to_owned(), foreign.to_owned()]),
    )]);
    let status = running.source.status();
    assert_eq!(status.ignored.get("apps/v1 Deployment"), Some(&2));
    assert_eq!(status.errors_total, 0);
}

#[tokio::test]
async fn without_inotify_the_periodic_look_finds_the_change() {
    let running = Running::start_with(&[("a.yaml", pod("a", "10.0.0.1"))], |options| {
        options.rescan = Duration::from_millis(20);
    });
    // The directory is replaced: the watch is on the old one.
    let path = running.directory.path();
    let old = path.with_extension("old");
    fs::rename(path, &old).unwrap();
    running.until(|status| status.errors_total == 1).await;
    assert!(running.errors()[0].starts_with("directory: cannot be read: "));
    assert_eq!(running.pods(), ["a 10.0.0.1"]);
    fs::create_dir(path).unwrap();
    fs::write(path.join("a.yaml"), pod("a", "10.0.0.2")).unwrap();
    running.until(|status| status.errors_total == 0).await;
    running.until_generation(2).await;
    running.until(|_| running.pods() == ["a 10.0.0.2"]).await;
    fs::remove_dir_all(&old).unwrap();
}

fn load(directory: &Path, limits: Limits) -> (Snapshot, FileStatus) {
    let mut options = FileSourceOptions::new(directory, "node-a");
    options.limits = limits;
    load_once(&options).unwrap()
}

#[test]
fn what_is_beyond_a_bound_is_refused_and_said() {
    let directory = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| fs::write(directory.path().join(name), text).unwrap();
    write(
        "a.yaml",
        &documents(&[pod("a", "10.0.0.1"), pod("b", "10.0.0.2")]),
    );
    write("b.yaml", &"#".repeat(1_001));
    write("c.yaml", "");
    let limits = Limits {
        file_bytes: 1_000,
        files: 2,
        objects: 1,
    };
    let (snapshot, status) = load(directory.path(), limits);
    assert_eq!(snapshot.workloads().count(), 1);
    let errors: Vec<String> = status.errors.iter().map(ToString::to_string).collect();
    let expected = [
        "directory: has 3 files, more than 2: those after b.yaml are not read",
        "a.yaml:12: Pod shop/b: there are 1 objects already",
        "b.yaml: has 1001 bytes, more than 1000",
    ];
    assert_eq!(errors, expected);
}

#[test]
fn only_what_changed_is_read_again() {
    let directory = tempfile::tempdir().unwrap();
    let write = |name: &str, text: String| fs::write(directory.path().join(name), text).unwrap();
    for number in 0..100 {
        write(
            &format!("{number:03}.yaml"),
            pod(&format!("p-{number}"), &format!("10.0.0.{}", number + 1)),
        );
    }
    let mut watched = Directory::new(directory.path().to_owned(), "node-a", Limits::default());
    let none = BTreeSet::new();
    assert_eq!(watched.look(&none, &none).0, Outcome::Changed);
    let before = watched.cluster().snapshot().clone();
    assert_eq!(watched.look(&none, &none).0, Outcome::Unchanged);
    write("007.yaml", pod("p-7", "10.0.1.1"));
    assert_eq!(
        watched
            .look(&BTreeSet::from(["007.yaml".to_owned()]), &none)
            .0,
        Outcome::Changed
    );
    let after = watched.cluster().snapshot();
    let uid = |number: u8| WorkloadUid(format!("shop/p-{number}").into());
    let same = |number| {
        Arc::ptr_eq(
            before.workload(&uid(number)).unwrap(),
            after.workload(&uid(number)).unwrap(),
        )
    };
    assert!(!same(7) && (0..100).filter(|n| *n != 7).all(same));
}

#[test]
fn a_file_that_is_being_written_is_left_alone() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("a.yaml");
    fs::write(&path, pod("a", "10.0.0.1")).unwrap();
    let mut watched = Directory::new(directory.path().to_owned(), "node-a", Limits::default());
    let (none, busy) = (BTreeSet::new(), BTreeSet::from(["a.yaml".to_owned()]));
    watched.look(&none, &none);
    fs::write(&path, "").unwrap();
    assert_eq!(watched.look(&busy, &busy).0, Outcome::Unchanged);
    assert_eq!(watched.look(&busy, &none).0, Outcome::Changed);
    assert_eq!(watched.cluster().snapshot().workloads().count(), 0);
}

#[test]
fn an_object_moves_from_file_to_file_without_being_gone() {
    let directory = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| fs::write(directory.path().join(name), text).unwrap();
    write("b.yaml", &pod("a", "10.0.0.1"));
    let mut watched = Directory::new(directory.path().to_owned(), "node-a", Limits::default());
    let none = BTreeSet::new();
    watched.look(&none, &none);
    write("a.yaml", &pod("a", "10.0.0.1"));
    write("b.yaml", "");
    let touched = BTreeSet::from(["a.yaml".to_owned(), "b.yaml".to_owned()]);
    assert_eq!(watched.look(&touched, &none).0, Outcome::Unchanged);
    assert_eq!(watched.status().errors_total, 0);
    assert_eq!(watched.cluster().snapshot().workloads().count(), 1);
}

#[test]
fn the_whole_of_a_service_comes_from_manifests() {
    let directory = tempfile::tempdir().unwrap();
    let service = "apiVersion: v1\nkind: Service\nmetadata: {name: web, namespace: shop}\n\
                   spec: {clusterIP: 10.96.0.1, ports: [{port: 80, targetPort: 8080}], selector: {undermesh.io/mesh: enabled}}\n";
    let config = "apiVersion: undermesh.io/v1alpha1\nkind: MeshConfig\nmetadata: {name: mesh}\n\
                  spec: {trustDomain: lab.example, connectTimeout: 500ms}\n";
    let text = documents(&[service.to_owned(), config.to_owned(), pod("a", "10.0.0.1")]);
    fs::write(directory.path().join("all.yaml"), text).unwrap();
    let (snapshot, status) = load(directory.path(), Limits::default());
    assert_eq!(status.errors, []);
    assert_eq!(
        snapshot.config().connect_timeout,
        Duration::from_millis(500)
    );
    let found = snapshot.service(&ObjectName::new("shop", "web")).unwrap();
    assert_eq!(
        found.ports[0].endpoints[0].address.to_string(),
        "10.0.0.1:8080"
    );
    assert_eq!(snapshot.capture_targets().len(), 2);
}

fn policy(spec: &str) -> String {
    format!(
        "apiVersion: undermesh.io/v1alpha1\nkind: TrafficPolicy\nmetadata:\n  name: cart\n  \
         namespace: shop\nspec:\n  targetRefs:\n  - kind: Service\n    name: cart\n{spec}"
    )
}

#[tokio::test]
async fn a_policy_is_in_force_from_its_file_and_a_bad_version_leaves_the_last_good_one() {
    let service = "apiVersion: v1\nkind: Service\nmetadata: {name: cart, namespace: shop}\n\
                   spec: {clusterIP: 10.96.0.1, ports: [{port: 80}]}\n";
    let good = policy("  breaker:\n    probes: 7\n");
    let running = Running::start(&[("cart.yaml", documents(&[service.to_owned(), good]))]);
    let probes = || {
        let snapshot = running.snapshot.load();
        let policy = snapshot.policy_of_service(&ObjectName::new("shop", "cart"), 80);
        policy.settings.breaker.probes
    };
    assert_eq!(probes(), 7);
    for (spec, error) in [
        (
            "  fault:\n    delay:\n      time: 1s\n      percentage: 200\n",
            "cart.yaml:18: TrafficPolicy shop/cart: spec.fault.delay.percentage: 200 is not a \
             percentage: must be from 0 to 100",
        ),
        (
            "  timeouts:\n    request: 5\n",
            "cart.yaml:16: TrafficPolicy shop/cart: spec.timeouts.request: \"5\" is not a duration: \
             numbers with units h, m, s, ms, like \"1s\" or \"1m30s\"",
        ),
        (
            "  breaker:\n    probes: 0\n",
            "cart.yaml:16: TrafficPolicy shop/cart: spec.breaker.probes: must be from 1 to 1000, \
             is 0",
        ),
    ] {
        let bad = documents(&[service.to_owned(), policy(spec)]);
        running.replace("cart.yaml", &bad);
        running
            .until(|status| status.errors.iter().any(|one| one.to_string() == error))
            .await;
        assert_eq!(probes(), 7);
    }
    let better = documents(&[service.to_owned(), policy("  breaker:\n    probes: 8\n")]);
    running.replace("cart.yaml", &better);
    running.until(|status| status.errors_total == 0).await;
    assert_eq!(probes(), 8);
}
