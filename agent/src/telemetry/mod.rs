//! Metrics, access log, connection table.
