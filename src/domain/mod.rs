//! The rules of Keywright, as pure functions: no Kubernetes client, no async runtime, no web framework, no clock, no
//! environment.
//!
//! Time and random values are arguments. Admission and reconciliation call the same functions, so that a bypass of the
//! webhook does not bypass the rules. `tests/architecture` checks the imports of this folder.

pub mod authorization;
pub mod catalog;
pub mod coralogix;
pub mod credential;
pub mod duration;
#[cfg(test)]
mod escalation;
pub mod export;
pub mod hex;
pub mod inputs;
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
