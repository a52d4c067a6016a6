//! The kernel programs against the real kernel. These tests need root, and fail without it.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod arrival;
mod capture;
mod dodge;
mod fixture;
mod instructions;
#[cfg(debug_assertions)]
mod log;
mod native;
mod pins;
mod probes;
