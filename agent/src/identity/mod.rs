//! SPIFFE identities: certificates, their rotation, the CA.
