//! Refusals of the API server that no repetition changes, and what to do about each.

use kube::core::Status;

/// The cause of a refusal that lasts until a person changes something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    /// The object has `immutable: true`.
    Immutable,
    /// Admission plugin OwnerReferencesPermissionEnforcement demands a right that the operator lacks.
    Owner,
    /// A ResourceQuota is used up.
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
    /// The object breaks a rule of its kind.
    Invalid,
    /// Anything else that the API server calls wrong about a request.
    Other,
}

impl Refusal {
    /// The cause of a refusal; `None` for one that passes by itself: a conflict, an overloaded or failing API server.
    ///
    /// The API server gives code and reason; only the text tells apart the plugins that answer with the same code
    /// (`k8s.io/apiserver`, packages `admission` and `plugin/pkg/admission/resourcequota`).
    pub(super) fn of(status: &Status) -> Option<Self> {
        let text = status.message.as_str();
        let says = |part: &str| text.contains(part);
        let terminating = status
            .details
            .as_ref()
            .is_some_and(|details| details.causes.iter().any(|cause| cause.reason == "NamespaceTerminating"));
        match status.code {
            _ if terminating => Some(Self::Terminating),
            // The quota controller has not counted yet.
            403 if says("status unknown for quota") => None,
            // A plugin that could not find out fails with the code of a denial.
            403 if says("not yet ready to handle request") => None,
            400 | 403 | 422 if says("admission webhook") && says("denied the request") => Some(Self::Webhook),
            400 | 403 | 422 if says("ValidatingAdmissionPolicy") => Some(Self::Policy),
            403 if says("exceeded quota") || says("failed quota") => Some(Self::Quota),
            403 if says("cannot set an ownerRef") || says("cannot set blockOwnerDeletion") => Some(Self::Owner),
            403 if says(" cannot ") => Some(Self::Rights),
            422 if says("immutable") => Some(Self::Immutable),
            422 => Some(Self::Invalid),
            404 => Some(Self::Missing),
            413 => Some(Self::TooLarge),
            400 | 403 | 405 | 406 | 415 => Some(Self::Other),
            // Policies may answer with any code from 400 to 599, and mean a denial by each.
            code if (400..500).contains(&code) && says("ValidatingAdmissionPolicy") => Some(Self::Policy),
            _ => None,
        }
    }

    /// The way out, as a clause that follows the API server's words.
    pub(super) fn advice(self) -> &'static str {
        match self {
            Self::Immutable => {
                "a Secret with immutable: true can't be changed: create it again from a copy without that field, \
                 which needs the right to restore keys, or delete it and set spec.rotation.requestedAt to the current time to mint a new value"
            }
            Self::Owner => {
                "the API server runs OwnerReferencesPermissionEnforcement: set rbac.ownerReferencesPermissionEnforcement \
                 in the values of the chart"
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
            Self::Terminating => "the namespace is being deleted, and nothing can be created in it: use another",
            Self::Rights => {
                "the operator lacks this right: install the chart again, which restores its ClusterRole, or take out \
                 the authorizer's rule that denies it"
            }
            Self::Missing => "create what does not exist",
            Self::TooLarge => "shorten the labels and annotations under spec.secret",
            Self::Invalid => "change the field that the API server names",
            Self::Other => "the log of the API server has more on it",
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
    fn what_a_person_has_to_change_is_told_from_what_passes() {
        for (code, message, expected) in [
            (
                422,
                "Secret \"k-secret\" is invalid: data: Forbidden: field is immutable when `immutable` is set",
                Some(Refusal::Immutable),
            ),
            (
                403,
                "secrets \"k-secret\" is forbidden: cannot set an ownerRef on a resource you can't delete: , <nil>",
                Some(Refusal::Owner),
            ),
            (
                403,
                "secrets \"k-secret\" is forbidden: cannot set blockOwnerDeletion if an ownerReference refers to a resource you can't set finalizers on: , <nil>",
                Some(Refusal::Owner),
            ),
            (
                403,
                "secrets \"k-secret\" is forbidden: exceeded quota: few, requested: count/secrets=1, used: count/secrets=1, limited: count/secrets=1",
                Some(Refusal::Quota),
            ),
            (403, "secrets \"k-secret\" is forbidden: status unknown for quota: few, resources: count/secrets", None),
            (
                422,
                "secrets \"k-secret\" is forbidden: ValidatingAdmissionPolicy 'p' with binding 'b' denied request: no",
                Some(Refusal::Policy),
            ),
            (403, "admission webhook \"w.example.com\" denied the request: immutable", Some(Refusal::Webhook)),
            (500, "Internal error occurred: failed calling webhook \"w.example.com\": timeout", None),
            (
                403,
                "secrets is forbidden: User \"u\" cannot create resource \"secrets\" in API group \"\" in the namespace \"n\"",
                Some(Refusal::Rights),
            ),
            (404, "namespaces \"n\" not found", Some(Refusal::Missing)),
            (413, "Request entity too large: limit is 3145728", Some(Refusal::TooLarge)),
            (422, "Secret \"k-secret\" is invalid: metadata.labels: Invalid value", Some(Refusal::Invalid)),
            (400, "Secret in version \"v1\" cannot be handled", Some(Refusal::Other)),
            (401, "Unauthorized", None),
            (409, "the object has been modified", None),
            (429, "too many requests", None),
            (503, "etcdserver: no leader", None),
            (504, "request did not complete within requested timeout", None),
        ] {
            assert_eq!(Refusal::of(&status(code, message)), expected, "{code} {message}");
        }
        let mut going = status(403, "secrets \"k\" is forbidden: unable to create new content in namespace n");
        going.details = serde_json::from_value(json!({"causes": [{"reason": "NamespaceTerminating"}]})).unwrap();
        assert_eq!(Refusal::of(&going), Some(Refusal::Terminating));
    }
}
