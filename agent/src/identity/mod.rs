//! SPIFFE identities: certificates, their rotation, the CA.
//!
//! The agent asks a CA for one certificate per identity that runs on its node ([`AuthorityClient`]), keeps
//! them fresh ([`Certificates`]), and hands out [`WorkloadCertificate`]s whose TLS configurations
//! are built once. The CA itself is [`authority`]. Private keys of workloads are made here and
//! never leave this process.

pub mod authority;
mod certificate;
mod client;
mod peer;
mod protocol;
mod request;
mod rotation;
mod store;
#[cfg(test)]
pub mod testing;
mod tls;

pub use certificate::{CertificateFault, WorkloadCertificate};
pub use client::{AuthorityClient, AuthorityClientOptions, ClientError};
pub use peer::{PeerError, peer_identity};
pub use request::{CsrError, SigningRequest};
pub use rotation::RotationPolicy;
pub use store::{
    CertificateError, CertificateState, CertificateStatus, Certificates, CertificatesOptions,
    Clock, IssueError, Issuer, Issuing,
};
pub use tls::{Roots, RootsError, crypto_provider};
