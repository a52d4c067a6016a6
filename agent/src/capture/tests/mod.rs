//! Against the real kernel: pods made of network namespaces, unmodified clients and servers.

mod enrolment;
mod exhaustion;
mod forwarding;
mod probing;
mod sockets;
mod world;
