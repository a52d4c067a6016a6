//! What the programs ask of the kernel, for `/kernel`.
//!
//! All of it is required: a kernel that lacks any refuses a program at load, and the verifier's
//! answer, which is the error, names it. So what is listed as used is proven by the programs that
//! run. 6.1, the oldest kernel that is supported, has it all.

use super::FeatureStatus;

/// A feature, and the helpers of `enum bpf_func_id` (include/uapi/linux/bpf.h) by which programs
/// ask for it: none where it is asked for by a hook, a link or a field of a context.
struct Required {
    name: &'static str,
    reason: &'static str,
    #[cfg_attr(not(test), allow(dead_code))]
    helpers: &'static [i32],
}

const REQUIRED: [Required; 14] = [
    Required {
        name: "netns_cookie",
        reason: "tells pods apart in the connect (kernel 5.7), sock_ops and setsockopt (5.15) programs",
        helpers: &[122],
    },
    Required {
        name: "socket_cookie",
        reason: "tells in the sock_ops program whose an admitted tuple is",
        helpers: &[46],
    },
    Required {
        name: "socket_mark",
        reason: "the connect and sock_ops programs set SO_MARK and keep the app's bits (kernel 5.8)",
        helpers: &[49, 57],
    },
    Required {
        name: "socket_storage",
        reason: "the agent declares its sockets, and notes outlive what an app does to a mark (kernel 5.2)",
        helpers: &[107, 108],
    },
    Required {
        name: "setsockopt_hook",
        reason: "a captured socket keeps its mark, whatever its app writes (kernel 5.3)",
        helpers: &[],
    },
    Required {
        name: "connect_return_value",
        reason: "the connect programs refuse with ECONNREFUSED (kernel 5.18)",
        helpers: &[187],
    },
    Required {
        name: "ancestor_cgroup",
        reason: "the connect programs know the kubelet by its cgroup (kernel 5.6)",
        helpers: &[123],
    },
    Required {
        name: "maps",
        reason: "hash maps that grow as they are filled, for each CPU too",
        helpers: &[1, 2, 3],
    },
    Required {
        name: "listener_lookup",
        reason: "the connect programs ask whether the agent's listener is there (kernel 5.9)",
        helpers: &[1, 86],
    },
    Required {
        name: "lookup_assign",
        reason: "the lookup programs hand SYNs to the agent's listeners (kernel 5.9)",
        helpers: &[124],
    },
    Required {
        name: "lookup_ingress_interface",
        reason: "the lookup programs tell lo from the wire (kernel 5.17)",
        helpers: &[],
    },
    Required {
        name: "close_callback",
        reason: "the sock_ops program takes admitted connections back when they are closed",
        helpers: &[59],
    },
    Required {
        name: "monotonic_time",
        reason: "the sock_ops program times native connections",
        helpers: &[5],
    },
    Required {
        name: "links",
        reason: "programs are pinned, replaced without a moment between, and detached (kernel 5.9)",
        helpers: &[],
    },
];

/// What could be used and is not.
const UNUSED: [FeatureStatus; 1] = [FeatureStatus {
    name: "connect_preorder",
    used: false,
    reason: "other programs at the cgroup run in the order in which they were attached (kernel 6.15)",
}];

/// All of them.
pub(super) fn all() -> impl Iterator<Item = FeatureStatus> {
    let required = REQUIRED.iter().map(|feature| FeatureStatus {
        name: feature.name,
        used: true,
        reason: feature.reason,
    });
    required.chain(UNUSED)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use object::{Object as _, ObjectSection as _, SectionKind};

    use super::*;
    use crate::capture::kernel::object::OBJECT;

    /// Those of the log that debug builds write: of a ring buffer.
    const OF_THE_LOG: [i32; 3] = [131, 132, 133];
    /// `BPF_JMP | BPF_CALL` (include/uapi/linux/bpf.h).
    const CALL: u8 = 0x85;

    /// Helpers that the shipped programs call: calls with neither register named are.
    fn called() -> BTreeSet<i32> {
        let object = object::File::parse(OBJECT).unwrap();
        let programs = object
            .sections()
            .filter(|one| one.kind() == SectionKind::Text);
        let code: Vec<u8> = programs
            .flat_map(|one| one.data().unwrap().to_vec())
            .collect();
        let instructions = code.chunks_exact(8);
        instructions
            .filter(|one| one[0] == CALL && one[1] == 0)
            .map(|one| i32::from_le_bytes(one[4..].try_into().unwrap()))
            .filter(|helper| !OF_THE_LOG.contains(helper))
            .collect()
    }

    #[test]
    fn every_helper_that_a_program_calls_is_of_a_feature_that_is_shown_and_none_else_is() {
        let shown = REQUIRED.iter().flat_map(|feature| feature.helpers);
        assert_eq!(called(), shown.copied().collect());
    }

    #[test]
    fn each_feature_is_shown_once() {
        let names: Vec<_> = all().map(|feature| feature.name).collect();
        let distinct: BTreeSet<_> = names.iter().collect();
        assert_eq!(distinct.len(), names.len());
    }
}
