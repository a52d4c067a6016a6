//! What the mesh does with requests when servers fail, a version is bad, or a neighbour floods: each as a run
//! whose figures are counted by the client and the servers.

mod breakers;
mod canary;
mod flood;
mod outage;
mod policy;

pub use breakers::Transition;
pub use canary::{Backend, Canary, CanaryOptions};
pub use flood::{Flood, FloodOptions, Flooder, VictimP99};
pub use outage::{Client, Outage, OutageOptions, Phase, Switch};
pub use policy::traffic_policy;

/// Is told what happens, as it happens.
pub type Tell = dyn Fn(&str);
