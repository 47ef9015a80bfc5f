//! Writes of AccessPolicies and SecuritySettings, and of the annotations that only the webhook and restores set.

use std::collections::BTreeSet;

use super::{Authorization, Gate, KnownPolicy};
use crate::{
    api::KeyType,
    domain::{
        policy::User,
        rights::{self, Need, Right},
    },
};

/// Authorizes the annotations of an ApiKey that is created (`old` is `None`) or changed. The
/// ValidatingAdmissionPolicies of the chart check the same.
#[must_use]
pub fn stamps(requester: &str, old: Option<&Stamps<'_>>, new: &Stamps<'_>) -> Authorization {
    let mut authorization = Authorization::default();
    let kept = match old {
        Some(old) => new.creator == old.creator && new.restored_by == old.restored_by,
        None => new.creator == Some(requester) && new.restored_by.is_none(),
    };
    if !kept && (old.is_some() || new.creator.is_none() || new.restored_by != Some(requester)) {
        let message = "keywright.dev/creator and keywright.dev/restored-by are set by the webhook when the object is \
                       created, and can't be chosen or changed";
        authorization.deny(Gate::Restore, "metadata.annotations", message.to_owned());
    } else if !kept {
        let purpose = "keep the creator of an ApiKey that is restored".to_owned();
        authorization.demand(
            Gate::Restore,
            "metadata.annotations[keywright.dev/creator]",
            purpose,
            Need::Right(Right::Restore),
        );
    }
    if new.accepts.is_some() && new.accepts != old.and_then(|old| old.accepts) {
        let purpose = "accept the value of a Secret that the operator can't authenticate".to_owned();
        let field = "metadata.annotations[keywright.dev/accept-secret]";
        authorization.demand(Gate::Restore, field, purpose, Need::Right(Right::Restore));
    }
    authorization
}

/// The annotations of an ApiKey that record its origin.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stamps<'a> {
    /// [`crate::api::CREATOR_ANNOTATION`].
    pub creator: Option<&'a str>,
    /// [`crate::api::RESTORED_BY_ANNOTATION`].
    pub restored_by: Option<&'a str>,
    /// [`crate::api::ACCEPT_SECRET_ANNOTATION`].
    pub accepts: Option<&'a str>,
}

/// Authorizes the creation of a policy (`old` is `None`), its change or its deletion. `types` are the types of the keys
/// that refer to it.
#[must_use]
pub fn write_policy(requester: User<'_>, old: Option<&KnownPolicy>, types: &BTreeSet<KeyType>) -> Authorization {
    let mut authorization = Authorization::default();
    // Policies of Team keys accept more permissions than those of SendYourData keys. If keys of both types refer to the
    // policy, the stricter type decides.
    let strictest = if types.contains(&KeyType::SendYourData) { KeyType::SendYourData } else { KeyType::Team };
    let need = rights::any_permission(rights::update_policy(strictest));
    authorization.demand(Gate::Role, "spec", "write an access policy".to_owned(), need);
    if let Some(old) = old {
        authorization.require_policy_access(&old.spec, old.creator.as_deref(), requester, "spec");
    }
    authorization
}

/// Authorizes the creation, change or deletion of security settings.
#[must_use]
pub fn write_settings() -> Authorization {
    let mut authorization = Authorization::default();
    let need = Need::permission(rights::MANAGE_SETTINGS);
    authorization.demand(Gate::Role, "spec", "write the security settings".to_owned(), need);
    authorization
}
