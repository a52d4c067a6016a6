//! Where desired state comes from.
//!
//! A source ([`files`]) brings objects as Kubernetes has them. [`translate`] checks each for itself,
//! [`Cluster`] puts them together, and what comes out is the [`Snapshot`](crate::mesh::Snapshot)
//! that everything else reads. [`crds`] are the definitions of our own kinds.

mod cluster;
pub mod crds;
pub mod files;
mod object;
pub mod translate;

pub use cluster::{Change, Cluster, Outcome};
pub use object::{Fault, Kind, Object, ObjectKey, Rejection, Scope};
