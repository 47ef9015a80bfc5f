//! Rejections by the API server that last until a user changes something, and the remedy for each.

use kube::core::Status;

/// The cause of a rejection that lasts until a user changes something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum RefusalKind {
    /// The object has `immutable: true`.
    Immutable,
    /// The admission plugin OwnerReferencesPermissionEnforcement requires a right that the operator lacks.
    Owner,
    /// A ResourceQuota is exhausted.
    Quota,
    /// A ValidatingAdmissionPolicy denies the request.
    Policy,
    /// An admission webhook denies the request.
    Webhook,
    /// The namespace is being deleted.
    Terminating,
    /// RBAC denies the request.
    Rights,
    /// The object, the namespace or the kind does not exist.
    Missing,
    /// The request is larger than the API server or etcd accepts.
    TooLarge,
    /// The object violates the validation of its kind.
    Invalid,
    /// Any other client error.
    Other,
}

impl RefusalKind {
    /// Returns the cause of a rejection. `None` if it is temporary: a conflict, or an overloaded or failing API server.
    ///
    /// Several admission plugins return the same code, so that only the message identifies them (`k8s.io/apiserver`,
    /// packages `admission` and `plugin/pkg/admission/resourcequota`).
    pub(super) fn of(status: &Status) -> Option<Self> {
        let text = status.message.as_str();
        let contains = |part: &str| text.contains(part);
        let terminating = status
            .details
            .as_ref()
            .is_some_and(|details| details.causes.iter().any(|cause| cause.reason == "NamespaceTerminating"));
        match status.code {
            _ if terminating => Some(Self::Terminating),
            // The quota controller has not computed the usage yet.
            403 if contains("status unknown for quota") => None,
            // A plugin whose caches are not synced returns the code of a denial.
            403 if contains("not yet ready to handle request") => None,
            400 | 403 | 422 if contains("admission webhook") && contains("denied the request") => Some(Self::Webhook),
            400 | 403 | 422 if contains("ValidatingAdmissionPolicy") => Some(Self::Policy),
            403 if contains("exceeded quota") || contains("failed quota") => Some(Self::Quota),
            403 if contains("cannot set an ownerRef") || contains("cannot set blockOwnerDeletion") => Some(Self::Owner),
            403 if contains(" cannot ") => Some(Self::Rights),
            422 if contains("immutable") => Some(Self::Immutable),
            422 => Some(Self::Invalid),
            404 => Some(Self::Missing),
            413 => Some(Self::TooLarge),
            400 | 403 | 405 | 406 | 415 => Some(Self::Other),
            // The reason of a ValidatingAdmissionPolicy determines the code of its denials.
            code if (400..500).contains(&code) && contains("ValidatingAdmissionPolicy") => Some(Self::Policy),
            _ => None,
        }
    }

    /// The remedy, as a clause that follows the message of the API server.
    pub(super) fn advice(self) -> &'static str {
        match self {
            Self::Immutable => {
                "a Secret with immutable: true can't be changed: create it again from a copy without that field, \
                 which needs the right to restore keys, or delete it and set spec.rotation.requestedAt to the current \
                 time to mint a new value"
            }
            Self::Owner => {
                "the API server runs OwnerReferencesPermissionEnforcement: set \
                 rbac.ownerReferencesPermissionEnforcement in the values of the chart"
            }
            Self::Quota => "raise the ResourceQuota of the namespace, or delete objects that it counts",
            Self::Policy => {
                "change the ValidatingAdmissionPolicy so that it admits the service account of the operator, or the \
                 ApiKey so that its Secret complies"
            }
            Self::Webhook => {
                "change the configuration of the webhook so that it admits the service account of the operator, or the \
                 ApiKey so that its Secret complies"
            }
            Self::Terminating => {
                "the namespace is being deleted, and no object can be created in it: use another namespace"
            }
            Self::Rights => {
                "the operator lacks this right: install the chart again, which restores its ClusterRole, or remove the \
                 rule of the authorizer that denies it"
            }
            Self::Missing => "create the missing object",
            Self::TooLarge => "shorten the labels and annotations under spec.secret",
            Self::Invalid => "change the field that the API server names",
            Self::Other => "see the log of the API server for the cause",
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn status(code: u16, message: &str) -> Status {
        serde_json::from_value(json!({"kind": "Status", "code": code, "message": message})).unwrap()
    }

    #[test]
    fn permanent_rejections_are_distinguished_from_temporary_ones_by_code_and_message() {
        for (code, message, expected) in [
            (
                422,
                "Secret \"k-secret\" is invalid: data: Forbidden: field is immutable when `immutable` is set",
                Some(RefusalKind::Immutable),
            ),
            (
                403,
                "secrets \"k-secret\" is forbidden: cannot set an ownerRef on a resource you can't delete: , <nil>",
                Some(RefusalKind::Owner),
            ),
            (
                403,
                "secrets \"k-secret\" is forbidden: cannot set blockOwnerDeletion if an ownerReference refers to a resource you can't set finalizers on: , <nil>",
                Some(RefusalKind::Owner),
            ),
            (
                403,
                "secrets \"k-secret\" is forbidden: exceeded quota: few, requested: count/secrets=1, used: count/secrets=1, limited: count/secrets=1",
                Some(RefusalKind::Quota),
            ),
            (403, "secrets \"k-secret\" is forbidden: status unknown for quota: few, resources: count/secrets", None),
            (
                422,
                "secrets \"k-secret\" is forbidden: ValidatingAdmissionPolicy 'p' with binding 'b' denied request: no",
                Some(RefusalKind::Policy),
            ),
            (403, "admission webhook \"w.example.com\" denied the request: immutable", Some(RefusalKind::Webhook)),
            (500, "Internal error occurred: failed calling webhook \"w.example.com\": timeout", None),
            (
                403,
                "secrets is forbidden: User \"u\" cannot create resource \"secrets\" in API group \"\" in the namespace \"n\"",
                Some(RefusalKind::Rights),
            ),
            (404, "namespaces \"n\" not found", Some(RefusalKind::Missing)),
            (413, "Request entity too large: limit is 3145728", Some(RefusalKind::TooLarge)),
            (422, "Secret \"k-secret\" is invalid: metadata.labels: Invalid value", Some(RefusalKind::Invalid)),
            (400, "Secret in version \"v1\" cannot be handled", Some(RefusalKind::Other)),
            (401, "Unauthorized", None),
            (409, "the object has been modified", None),
            (429, "too many requests", None),
            (503, "etcdserver: no leader", None),
            (504, "request did not complete within requested timeout", None),
        ] {
            assert_eq!(RefusalKind::of(&status(code, message)), expected, "{code} {message}");
        }
        let mut terminating = status(403, "secrets \"k\" is forbidden: unable to create new content in namespace n");
        terminating.details = serde_json::from_value(json!({"causes": [{"reason": "NamespaceTerminating"}]})).unwrap();
        assert_eq!(RefusalKind::of(&terminating), Some(RefusalKind::Terminating));
    }
}
