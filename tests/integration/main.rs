//! The integration tests: the real binaries on a real control plane. Each module below is a suite with a control plane of
//! its own. `tests/run` runs the suites as separate processes.

#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used, missing_docs)]

#[path = "../support/mod.rs"]
mod support;

mod access;
mod chart;
mod cli;
mod cluster;
mod faults;
mod gateways;
mod ha;
mod harness;
mod lifecycle;
mod published;
mod reveal;
mod verifier;
