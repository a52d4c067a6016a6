//! Against the real kernel: pods made of network namespaces, unmodified clients and servers.

mod enrolment;
mod sockets;
mod world;
