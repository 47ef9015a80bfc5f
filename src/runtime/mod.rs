//! The edges of the process: arguments, wiring, election, readiness, shutdown, telemetry, metrics and the clock.

pub mod args;
pub mod clock;
pub mod health;
pub mod lease;
pub mod metrics;
pub mod operator;
pub mod telemetry;
pub mod verifier;
pub mod verifier_metrics;
