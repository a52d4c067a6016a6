//! Moving bytes between two ends of a connection.
