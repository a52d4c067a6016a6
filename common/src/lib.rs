//! The ABI that the kernel programs and the agent share.
#![cfg_attr(not(test), no_std)]
