//! Where desired state comes from.

mod cluster;
pub mod files;
mod object;
pub mod translate;

pub use cluster::{Change, Cluster, Outcome};
pub use object::{Fault, Kind, Object, ObjectKey, Rejection, Scope};
