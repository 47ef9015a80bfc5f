//! Stamps the creator of an object. ValidatingAdmissionPolicies of the chart then check that the stamp is correct and
//! never changes, so that neither a forged annotation nor another mutating webhook can change it.

use std::sync::Arc;

use json_patch::{AddOperation, Patch, PatchOperation, RemoveOperation, jsonptr::PointerBuf};
use kube::{
    ResourceExt,
    core::{
        DynamicObject,
        admission::{AdmissionRequest, Operation},
    },
};
use serde_json::{Value, json};

use crate::{
    access::{Reviewer, Unanswered},
    api::{CREATOR_ANNOTATION, RESTORED_BY_ANNOTATION, Requester},
    domain::rights::Right,
};

/// The requester of an admission request.
pub(super) fn requester<K: kube::Resource>(request: &AdmissionRequest<K>) -> Requester {
    let user = &request.user_info;
    Requester {
        username: user.username.clone().unwrap_or_default(),
        uid: user.uid.clone(),
        groups: user.groups.clone().unwrap_or_default(),
        extra: user.extra.clone().unwrap_or_default(),
    }
}

/// Returns the patch that stamps the creator. An update keeps the stamp of the creation. If a requester who may restore
/// keys creates an object with a creator, the creator is kept, and an ApiKey also gets the restorer.
///
/// # Errors
/// If the review of the right to restore fails.
pub(super) async fn patch<R: Reviewer>(
    request: &AdmissionRequest<DynamicObject>,
    reviewer: &R,
) -> Result<Patch, Unanswered> {
    let Some(object) = &request.object else { return Ok(Patch::default()) };
    if request.kind.kind == "SecuritySettings" {
        return Ok(Patch::default());
    }
    if request.kind.kind == "KeyReveal" {
        let stamp = add(&["spec", "requester"], json!(requester(request)));
        return Ok(Patch(if request.operation == Operation::Create { vec![stamp] } else { vec![] }));
    }
    let annotations = object.annotations();
    let old = request.old_object.as_ref().map(ResourceExt::annotations);
    let (creator, restored_by) = match (&request.operation, old) {
        (Operation::Create, _) => {
            let user = request.user_info.username.as_ref();
            // Also if the requester is the creator: the annotation of a restore makes the key wait for its Secret.
            let given = annotations.get(CREATOR_ANNOTATION).filter(|creator| !creator.is_empty());
            match given {
                Some(given) if may_restore(request, reviewer).await? => {
                    (Some(given), user.filter(|_| request.kind.kind == "ApiKey"))
                }
                _ => (user, None),
            }
        }
        (_, Some(old)) => (old.get(CREATOR_ANNOTATION), old.get(RESTORED_BY_ANNOTATION)),
        (_, None) => (annotations.get(CREATOR_ANNOTATION), annotations.get(RESTORED_BY_ANNOTATION)),
    };
    let wanted = [(CREATOR_ANNOTATION, creator), (RESTORED_BY_ANNOTATION, restored_by)];
    let mut operations = vec![];
    if object.metadata.annotations.is_none() && wanted.iter().any(|(_, value)| value.is_some()) {
        operations.push(add(&["metadata", "annotations"], json!({})));
    }
    for (name, value) in wanted {
        let path = ["metadata", "annotations", name];
        match value {
            _ if value == annotations.get(name) => {}
            Some(value) => operations.push(add(&path, json!(value))),
            None => operations
                .push(PatchOperation::Remove(RemoveOperation { path: PointerBuf::from_tokens(path.iter().copied()) })),
        }
    }
    Ok(Patch(operations))
}

async fn may_restore<R: Reviewer>(request: &AdmissionRequest<DynamicObject>, reviewer: &R) -> Result<bool, Unanswered> {
    let namespace = request.namespace.as_deref().unwrap_or_default().into();
    Ok(reviewer.review(&Arc::new(requester(request)), &namespace, &Right::Restore).await?.allowed)
}

fn add(path: &[&str], value: Value) -> PatchOperation {
    PatchOperation::Add(AddOperation { path: PointerBuf::from_tokens(path.iter().copied()), value })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::access::AccessReview;

    fn request(kind: &str, operation: &str, object: &Value, old: &Value) -> AdmissionRequest<DynamicObject> {
        let gvk = json!({"group": "keywright.dev", "version": "v1alpha1", "kind": kind});
        let review = json!({
            "apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview",
            "request": {
                "uid": "1", "kind": gvk, "operation": operation, "name": "x", "namespace": "shop",
                "resource": {"group": "keywright.dev", "version": "v1alpha1", "resource": "apikeys"},
                "userInfo": {"username": "alice", "groups": ["devs"]}, "object": object, "oldObject": old,
            },
        });
        let review: kube::core::admission::AdmissionReview<DynamicObject> = serde_json::from_value(review).unwrap();
        review.try_into().unwrap()
    }

    fn object(annotations: Value) -> Value {
        let mut object = json!({"apiVersion": "keywright.dev/v1alpha1", "kind": "ApiKey", "metadata": {"name": "x"}});
        if !annotations.is_null() {
            object["metadata"]["annotations"] = annotations;
        }
        object
    }

    /// A reviewer of the right to restore: allows, denies, fails, or panics because no review is expected.
    enum Restore {
        Allowed,
        Denied,
        Unanswered,
        NotAsked,
    }

    impl Reviewer for Restore {
        async fn review(
            &self,
            requester: &Arc<Requester>,
            namespace: &Arc<str>,
            right: &Right,
        ) -> Result<AccessReview, Unanswered> {
            assert_eq!((requester.username.as_str(), &**namespace, right), ("alice", "shop", &Right::Restore));
            match self {
                Self::NotAsked => panic!("an unnecessary review"),
                Self::Unanswered => Err(Unanswered { right: right.clone() }),
                answer => Ok(AccessReview { allowed: matches!(answer, Self::Allowed), reason: String::new() }),
            }
        }
    }

    /// The creator and the restorer after the patch.
    async fn stamped_on(
        kind: &str,
        operation: &str,
        annotations: Value,
        old: &Value,
        restore: Restore,
    ) -> (Value, Value) {
        let mut after = object(annotations.clone());
        let patch = patch(&request(kind, operation, &object(annotations), old), &restore).await.unwrap();
        json_patch::patch(&mut after, &patch).unwrap();
        let of = |name: &str| after["metadata"]["annotations"][name].clone();
        (of(CREATOR_ANNOTATION), of(RESTORED_BY_ANNOTATION))
    }

    async fn stamped(operation: &str, annotations: Value, old: &Value, restore: Restore) -> (Value, Value) {
        stamped_on("ApiKey", operation, annotations, old, restore).await
    }

    #[tokio::test]
    async fn the_requester_of_a_creation_is_stamped_as_the_creator_over_forged_annotations() {
        let created = (json!("alice"), Value::Null);
        for annotations in [Value::Null, json!({}), json!({"a": "b"})] {
            assert_eq!(stamped("CREATE", annotations, &Value::Null, Restore::NotAsked).await, created);
        }
        let forged = json!({CREATOR_ANNOTATION: "mallory", RESTORED_BY_ANNOTATION: "root"});
        assert_eq!(stamped("CREATE", forged, &Value::Null, Restore::Denied).await, created);
        let empty = json!({CREATOR_ANNOTATION: "", RESTORED_BY_ANNOTATION: "root"});
        assert_eq!(stamped("CREATE", empty, &Value::Null, Restore::NotAsked).await, created);
    }

    #[tokio::test]
    async fn a_restore_keeps_the_creator_and_stamps_the_restorer() {
        for annotations in [
            json!({CREATOR_ANNOTATION: "carol"}),
            json!({CREATOR_ANNOTATION: "carol", RESTORED_BY_ANNOTATION: "an earlier one"}),
        ] {
            let restored = stamped("CREATE", annotations.clone(), &Value::Null, Restore::Allowed).await;
            assert_eq!(restored, (json!("carol"), json!("alice")));
            let policy = stamped_on("AccessPolicy", "CREATE", annotations, &Value::Null, Restore::Allowed).await;
            assert_eq!(policy, (json!("carol"), Value::Null));
        }
        // A restore of the requester's own key.
        let own = stamped("CREATE", json!({CREATOR_ANNOTATION: "alice"}), &Value::Null, Restore::Allowed).await;
        assert_eq!(own, (json!("alice"), json!("alice")));
        let object = object(json!({CREATOR_ANNOTATION: "carol"}));
        let request = request("ApiKey", "CREATE", &object, &Value::Null);
        assert!(patch(&request, &Restore::Unanswered).await.is_err(), "otherwise the creator would be lost silently");
    }

    #[tokio::test]
    async fn an_update_keeps_the_stamps_of_the_creation() {
        let old = object(json!({CREATOR_ANNOTATION: "carol", RESTORED_BY_ANNOTATION: "bob"}));
        let forged = json!({CREATOR_ANNOTATION: "mallory", RESTORED_BY_ANNOTATION: "mallory"});
        for annotations in [Value::Null, json!({"a": "b"}), forged.clone()] {
            let kept = stamped("UPDATE", annotations, &old, Restore::NotAsked).await;
            assert_eq!(kept, (json!("carol"), json!("bob")));
        }
        // An object without stamps gets none, since its creator is unknown.
        let unknown = stamped("UPDATE", forged, &object(Value::Null), Restore::NotAsked).await;
        assert_eq!(unknown, (Value::Null, Value::Null));
    }

    #[tokio::test]
    async fn a_reveal_is_stamped_with_its_requester() {
        let mut reveal = json!({
            "apiVersion": "keywright.dev/v1alpha1", "kind": "KeyReveal", "metadata": {"name": "x"},
            "spec": {"requester": {"username": "root", "groups": ["system:masters"]}},
        });
        let patch = patch(&request("KeyReveal", "CREATE", &reveal, &Value::Null), &Restore::NotAsked).await.unwrap();
        json_patch::patch(&mut reveal, &patch).unwrap();
        assert_eq!(reveal["spec"]["requester"], json!({"username": "alice", "groups": ["devs"]}));
    }
}
