//! The inputs of a reconciliation of an ApiKey.

use jiff::Timestamp;

use super::{authorization::KnownPolicy, legacy::Obstacle, lifecycle::Observed, status::Failure, validate::Validation};
use crate::api::{ApiKey, SecuritySettingsSpec};

/// The inputs of [`super::lifecycle::step`] and [`super::status::build`].
#[derive(Clone, Copy, Debug)]
pub struct Inputs<'a> {
    /// The ApiKey, with the status of the previous reconciliation.
    pub key: &'a ApiKey,
    /// The result of the validation of its spec against the catalog.
    pub validation: &'a Validation,
    /// The name of an older ApiKey that claims the same Secret.
    pub conflicting_claim: Option<&'a str>,
    /// The Secret: as it was read for the step, and as it is after the step for the status.
    pub secret: &'a Observed,
    /// The security settings of the namespace.
    pub settings: Option<&'a SecuritySettingsSpec>,
    /// The access policy that the ApiKey refers to, if it exists.
    pub policy: Option<&'a KnownPolicy>,
    /// The reason why a legacy key can't be imported.
    pub import: Option<&'a Obstacle>,
    /// A request of this reconciliation that failed.
    pub failure: Option<&'a Failure>,
    /// The time.
    pub now: Timestamp,
}

impl<'a> Inputs<'a> {
    /// Inputs without the optional parts.
    #[must_use]
    pub const fn new(key: &'a ApiKey, validation: &'a Validation, secret: &'a Observed, now: Timestamp) -> Self {
        Self {
            key,
            validation,
            conflicting_claim: None,
            secret,
            settings: None,
            policy: None,
            import: None,
            failure: None,
            now,
        }
    }
}
