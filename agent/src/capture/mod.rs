//! The kernel side of a node: load, attach, pin, enrol pods, admit tuples.

pub mod kernel;
mod sys;
