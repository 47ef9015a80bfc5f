//! The rules of Keywright, pure: no Kubernetes client, no async runtime, no web framework, no clock, no environment.
//!
//! Time and randomness are arguments. Admission and reconciliation call the same functions, so that a webhook
//! that was bypassed changes nothing. `tests/architecture.rs` holds the imports of this folder to that.

pub mod catalog;
pub mod duration;
pub mod key;
pub mod lifecycle;
pub mod record;
pub mod redact;
pub mod status;
pub mod validate;
