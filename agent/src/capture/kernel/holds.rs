//! Whether a cgroup holds pods. One that does must not probe: every process of theirs would be
//! taken for the kubelet.

use std::cell::LazyCell;
use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use thiserror::Error;

/// A kubelet's own cgroup is one, or a few. Of a tree with more nothing is assumed.
const MOST_CGROUPS: usize = 1_024;
/// The same for processes.
const MOST_PROCESSES: usize = 4_096;
/// What kubelets call the tree of their pods: `kubepods`, `kubepods.slice`,
/// `kubelet-kubepods.slice`.
const KUBEPODS: &str = "kubepods";

/// A sign of pods.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub(super) enum Sign {
    /// The programs are attached to it, or below it.
    #[error("the programs see no process outside it: it holds every pod")]
    Attached,
    /// The model says that a pod's cgroup is there.
    #[error("it holds the cgroup of a pod, {}", .0.display())]
    Pod(PathBuf),
    /// The tree of a kubelet's pods.
    #[error("it holds what a kubelet calls its pods' cgroups, {}", .0.display())]
    Kubepods(PathBuf),
    /// A process has the network of an enrolled pod.
    #[error("process {process} in {} has the network of an enrolled pod", .cgroup.display())]
    Process {
        /// As this process numbers it.
        process: u32,
        /// Its cgroup.
        cgroup: PathBuf,
    },
    /// It could not be looked through.
    #[error(
        "it has more than {MOST_CGROUPS} cgroups or {MOST_PROCESSES} processes: no kubelet has"
    )]
    TooLarge,
}

/// Looks for pods in a cgroup and below it. `pods` are their cgroups, as far as they are known;
/// `networks` gives the inodes of the network namespaces of enrolled pods. Processes of other
/// process namespaces, which have no number here, are not seen.
pub(super) fn sign_of_pods(
    directory: &Path,
    pods: &BTreeSet<PathBuf>,
    networks: impl FnOnce() -> BTreeSet<u64>,
) -> Option<Sign> {
    if let Some(pod) = pods.iter().find(|pod| pod.starts_with(directory)) {
        return Some(Sign::Pod(pod.clone()));
    }
    // Asked for only if there is a process.
    let networks = LazyCell::new(networks);
    let (mut cgroups, mut processes) = (0, 0);
    let mut ahead = vec![directory.to_owned()];
    while let Some(cgroup) = ahead.pop() {
        cgroups += 1;
        // One that is gone by now, or whose processes are threads of another's, names none.
        let listed = fs::read_to_string(cgroup.join("cgroup.procs")).unwrap_or_default();
        for process in listed.lines().filter_map(|line| line.parse::<u32>().ok()) {
            processes += 1;
            if cgroups > MOST_CGROUPS || processes > MOST_PROCESSES {
                return Some(Sign::TooLarge);
            }
            let network = fs::metadata(format!("/proc/{process}/ns/net"));
            if network.is_ok_and(|network| networks.contains(&network.ino())) {
                return Some(Sign::Process { process, cgroup });
            }
        }
        let below = fs::read_dir(&cgroup).into_iter().flatten().flatten();
        for entry in below.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())) {
            if entry.file_name().to_string_lossy().contains(KUBEPODS) {
                return Some(Sign::Kubepods(entry.path()));
            }
            ahead.push(entry.path());
        }
        if cgroups + ahead.len() > MOST_CGROUPS {
            return Some(Sign::TooLarge);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree(directories: &[&str]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for directory in directories {
            fs::create_dir_all(root.path().join(directory)).unwrap();
        }
        root
    }

    fn sign(root: &Path, pods: &[&str], networks: &[u64]) -> Option<Sign> {
        let pods = pods.iter().map(|pod| root.join(pod)).collect();
        let networks = networks.iter().copied().collect();
        sign_of_pods(&root.join("kubelet"), &pods, || networks)
    }

    #[test]
    fn a_kubelet_with_its_helpers_holds_no_pods() {
        let root = tree(&["kubelet/mount-helper", "kubepods/pod1"]);
        let own = std::process::id().to_string();
        fs::write(root.path().join("kubelet/cgroup.procs"), own).unwrap();
        assert_eq!(sign(root.path(), &["kubepods/pod1"], &[1]), None);
    }

    #[test]
    fn a_pod_below_is_found_by_its_cgroup_its_name_and_its_network() {
        let root = tree(&["kubelet/a/b"]);
        let path = root.path();
        let pod = path.join("kubelet/a/b");
        assert_eq!(
            sign(path, &["kubelet/a/b"], &[]),
            Some(Sign::Pod(pod.clone()))
        );
        assert_eq!(sign(path, &["kubelet2/a"], &[]), None);

        let process = std::process::id();
        fs::write(pod.join("cgroup.procs"), process.to_string()).unwrap();
        let network = fs::metadata("/proc/self/ns/net").unwrap().ino();
        assert_eq!(
            sign(path, &[], &[network]),
            Some(Sign::Process {
                process,
                cgroup: pod
            })
        );

        let slice = path.join("kubelet/kubelet-kubepods.slice");
        fs::create_dir(&slice).unwrap();
        assert_eq!(sign(path, &[], &[]), Some(Sign::Kubepods(slice)));
    }

    #[test]
    fn of_a_tree_that_is_too_large_to_be_looked_through_nothing_is_assumed() {
        let root = tree(&["kubelet"]);
        let kubelet = root.path().join("kubelet");
        for number in 0..MOST_CGROUPS - 1 {
            fs::create_dir(kubelet.join(number.to_string())).unwrap();
        }
        assert_eq!(sign(root.path(), &[], &[]), None);
        fs::create_dir(kubelet.join("one-more")).unwrap();
        assert_eq!(sign(root.path(), &[], &[]), Some(Sign::TooLarge));
        fs::remove_dir(kubelet.join("one-more")).unwrap();
        let many: String = (0..=MOST_PROCESSES).map(|_| "4294967295\n").collect();
        fs::write(kubelet.join("cgroup.procs"), many).unwrap();
        assert_eq!(sign(root.path(), &[], &[]), Some(Sign::TooLarge));
    }
}
