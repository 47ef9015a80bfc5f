//! The rules of Keywright, pure: no Kubernetes client, no async runtime, no web framework, no clock, no environment.
//!
//! Time and randomness are arguments. Admission and reconciliation call the same functions, so that a webhook
//! that was bypassed changes nothing. `tests/architecture.rs` holds the imports of this folder to that.

pub mod catalog;
pub mod coralogix;
pub mod credential;
pub mod duration;
#[cfg(test)]
mod escalation;
pub mod export;
pub mod gates;
pub mod hex;
pub mod key;
pub mod legacy;
pub mod lifecycle;
pub mod pasted;
pub mod policy;
pub mod policy_status;
pub mod provenance;
pub mod record;
pub mod redact;
pub mod requirement;
pub mod rights;
pub mod sealing;
pub mod status;
pub mod time;
pub mod validate;
pub mod verification;
