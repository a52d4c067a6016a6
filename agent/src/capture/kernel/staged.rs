//! A change of layout: the programs of the former layout stay in force until all that the new ones
//! need is there, and are then replaced in their links.
//!
//! Both at once would not do. A program knows the agent's own sockets and the admitted connections
//! by the maps of its layout, and takes those of the other layout for a pod's or for a stranger's.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::{AsFd as _, OwnedFd};

use super::{Kernel, KernelError, attach_to_cgroup, attach_to_netns};
use crate::capture::sys::AttachType;

/// Programs that are loaded and wait. At most one for each pod, and those of the cgroup.
#[derive(Default)]
pub(super) struct Staged {
    /// Name, pin, hook, program.
    pub cgroup: Vec<(&'static str, &'static str, AttachType, OwnedFd)>,
    /// Program and network namespace of each pod, by its cookie.
    pub lookups: BTreeMap<u64, (OwnedFd, OwnedFd)>,
}

impl Kernel {
    /// Whether the programs wait for [`Kernel::replace_former`], with those of another layout in force.
    #[must_use]
    pub fn is_staged(&self) -> bool {
        self.staged.lock().is_some()
    }

    /// Puts the programs in force in place of those of another layout, link by link. Call it when
    /// pods, destinations and listeners are in the maps, and no other agent accepts.
    ///
    /// Marks that the one layout's connect hook has set are good for the other's, so a connection that
    /// is opened meanwhile is captured by the one or by the other. After an error it may be called
    /// again.
    pub fn replace_former(&self) -> Result<(), KernelError> {
        let mut staged = self.staged.lock();
        let Some(programs) = staged.as_ref() else {
            return Ok(());
        };
        let root = &self.options.cgroup;
        let cgroup = File::open(root).map_err(KernelError::file("open cgroup", root))?;
        // First what receives: a connection that is captured must arrive.
        for (&cookie, (program, netns)) in &programs.lookups {
            match attach_to_netns(&self.pins, netns.as_fd(), cookie, program.as_fd()) {
                Ok(()) => {}
                // Its pod may have gone meanwhile; one that has not is repaired.
                Err(error) => tracing::warn!(%error, cookie, "a program is not replaced"),
            }
        }
        for (name, pin, kind, program) in &programs.cgroup {
            attach_to_cgroup(&self.pins, &cgroup, (name, pin, *kind, program))?;
        }
        *staged = None;
        drop(staged);
        self.look_how_far()
    }
}
