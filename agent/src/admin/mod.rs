//! The node-local HTTP endpoint.
