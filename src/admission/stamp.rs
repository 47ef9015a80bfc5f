//! Stamps who made an object. ValidatingAdmissionPolicies of the chart hold afterwards that the stamp is right and never
//! changes, so that neither a forged annotation nor another mutating webhook gets past.

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

/// What has to change in an object so that it says who made it. An update keeps what the creation said. So does the
/// creation of an object that says it already, by somebody who may restore keys; an ApiKey then says who that was.
///
/// # Errors
/// If the cluster can't be asked who may restore keys.
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
    let has = object.annotations();
    let old = request.old_object.as_ref().map(ResourceExt::annotations);
    let (creator, restored_by) = match (&request.operation, old) {
        (Operation::Create, _) => {
            let user = request.user_info.username.as_ref();
            // Also of users who restore what is their own: the mark of a restore makes the key wait for its Secret.
            let said = has.get(CREATOR_ANNOTATION).filter(|said| !said.is_empty());
            match said {
                Some(said) if may_restore(request, reviewer).await? => {
                    (Some(said), user.filter(|_| request.kind.kind == "ApiKey"))
                }
                _ => (user, None),
            }
        }
        (_, Some(old)) => (old.get(CREATOR_ANNOTATION), old.get(RESTORED_BY_ANNOTATION)),
        (_, None) => (has.get(CREATOR_ANNOTATION), has.get(RESTORED_BY_ANNOTATION)),
    };
    let wanted = [(CREATOR_ANNOTATION, creator), (RESTORED_BY_ANNOTATION, restored_by)];
    let mut operations = vec![];
    if object.metadata.annotations.is_none() && wanted.iter().any(|(_, value)| value.is_some()) {
        operations.push(add(&["metadata", "annotations"], json!({})));
    }
    for (name, value) in wanted {
        let path = ["metadata", "annotations", name];
        match value {
            _ if value == has.get(name) => {}
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
    use crate::access::Review;

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

    /// Says of everybody that they may restore, or of nobody, or nothing at all; and fails if it is asked without need.
    enum Restore {
        Allowed,
        Denied,
        Unanswered,
        NotAsked,
    }

    impl Reviewer for Restore {
        async fn review(
            &self,
            who: &Arc<Requester>,
            namespace: &Arc<str>,
            right: &Right,
        ) -> Result<Review, Unanswered> {
            assert_eq!((who.username.as_str(), &**namespace, right), ("alice", "shop", &Right::Restore));
            match self {
                Self::NotAsked => panic!("asked without need"),
                Self::Unanswered => Err(Unanswered { right: right.clone() }),
                answer => Ok(Review { allowed: matches!(answer, Self::Allowed), reason: String::new() }),
            }
        }
    }

    /// Creator and restorer after the patch.
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
    async fn the_creator_is_who_asked_whatever_the_object_says() {
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
    async fn a_restore_keeps_the_creator_and_says_who_restored() {
        for annotations in [
            json!({CREATOR_ANNOTATION: "carol"}),
            json!({CREATOR_ANNOTATION: "carol", RESTORED_BY_ANNOTATION: "an earlier one"}),
        ] {
            let restored = stamped("CREATE", annotations.clone(), &Value::Null, Restore::Allowed).await;
            assert_eq!(restored, (json!("carol"), json!("alice")));
            let policy = stamped_on("AccessPolicy", "CREATE", annotations, &Value::Null, Restore::Allowed).await;
            assert_eq!(policy, (json!("carol"), Value::Null));
        }
        // Their own keys are restored too.
        let own = stamped("CREATE", json!({CREATOR_ANNOTATION: "alice"}), &Value::Null, Restore::Allowed).await;
        assert_eq!(own, (json!("alice"), json!("alice")));
        let object = object(json!({CREATOR_ANNOTATION: "carol"}));
        let request = request("ApiKey", "CREATE", &object, &Value::Null);
        assert!(patch(&request, &Restore::Unanswered).await.is_err(), "the creator would be lost silently");
    }

    #[tokio::test]
    async fn an_update_keeps_what_the_creation_said() {
        let old = object(json!({CREATOR_ANNOTATION: "carol", RESTORED_BY_ANNOTATION: "bob"}));
        let forged = json!({CREATOR_ANNOTATION: "mallory", RESTORED_BY_ANNOTATION: "mallory"});
        for annotations in [Value::Null, json!({"a": "b"}), forged.clone()] {
            let kept = stamped("UPDATE", annotations, &old, Restore::NotAsked).await;
            assert_eq!(kept, (json!("carol"), json!("bob")));
        }
        // An object from before there were stamps gets none later: nobody knows.
        let unknown = stamped("UPDATE", forged, &object(Value::Null), Restore::NotAsked).await;
        assert_eq!(unknown, (Value::Null, Value::Null));
    }

    #[tokio::test]
    async fn a_reveal_carries_who_asks() {
        let mut asked = json!({
            "apiVersion": "keywright.dev/v1alpha1", "kind": "KeyReveal", "metadata": {"name": "x"},
            "spec": {"requester": {"username": "root", "groups": ["system:masters"]}},
        });
        let patch = patch(&request("KeyReveal", "CREATE", &asked, &Value::Null), &Restore::NotAsked).await.unwrap();
        json_patch::patch(&mut asked, &patch).unwrap();
        assert_eq!(asked["spec"]["requester"], json!({"username": "alice", "groups": ["devs"]}));
    }
}
