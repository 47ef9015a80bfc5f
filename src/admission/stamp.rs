//! Stamps who made an object. ValidatingAdmissionPolicies of the chart hold afterwards that the stamp is right and never
//! changes, so that neither a forged annotation nor another mutating webhook gets past.

use json_patch::{AddOperation, Patch, PatchOperation, RemoveOperation, jsonptr::PointerBuf};
use kube::{
    ResourceExt,
    core::{
        DynamicObject,
        admission::{AdmissionRequest, Operation},
    },
};
use serde_json::{Value, json};

use crate::api::{CREATOR_ANNOTATION, Requester};

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

/// What has to change in an object so that it says who made it. An update keeps what the creation said.
pub(super) fn patch(request: &AdmissionRequest<DynamicObject>) -> Patch {
    let Some(object) = &request.object else { return Patch::default() };
    if request.kind.kind == "SecuritySettings" {
        return Patch::default();
    }
    if request.kind.kind == "KeyReveal" {
        let stamp = add(&["spec", "requester"], json!(requester(request)));
        return Patch(if request.operation == Operation::Create { vec![stamp] } else { vec![] });
    }
    let has = object.annotations().get(CREATOR_ANNOTATION);
    let wanted = match (&request.operation, &request.old_object) {
        (Operation::Create, _) => request.user_info.username.as_ref(),
        (_, Some(old)) => old.annotations().get(CREATOR_ANNOTATION),
        _ => has,
    };
    let path = ["metadata", "annotations", CREATOR_ANNOTATION];
    Patch(match wanted {
        _ if wanted == has => vec![],
        Some(name) if object.metadata.annotations.is_none() => {
            vec![add(&path[..2], json!({ CREATOR_ANNOTATION: name }))]
        }
        Some(name) => vec![add(&path, json!(name))],
        None => vec![PatchOperation::Remove(RemoveOperation { path: PointerBuf::from_tokens(path) })],
    })
}

fn add(path: &[&str], value: Value) -> PatchOperation {
    PatchOperation::Add(AddOperation { path: PointerBuf::from_tokens(path.iter().copied()), value })
}

#[cfg(test)]
mod tests {
    use super::*;

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

    /// The creator after the patch.
    fn stamped(operation: &str, annotations: Value, old: &Value) -> Value {
        let mut after = object(annotations.clone());
        let patch = patch(&request("ApiKey", operation, &object(annotations), old));
        json_patch::patch(&mut after, &patch).unwrap();
        after["metadata"]["annotations"][CREATOR_ANNOTATION].clone()
    }

    #[test]
    fn the_creator_is_who_asked_whatever_the_object_says() {
        for annotations in [Value::Null, json!({}), json!({"a": "b"}), json!({CREATOR_ANNOTATION: "mallory"})] {
            assert_eq!(stamped("CREATE", annotations, &Value::Null), "alice");
        }
    }

    #[test]
    fn an_update_keeps_the_creator() {
        let old = object(json!({CREATOR_ANNOTATION: "carol"}));
        for annotations in [Value::Null, json!({"a": "b"}), json!({CREATOR_ANNOTATION: "mallory"})] {
            assert_eq!(stamped("UPDATE", annotations, &old), "carol");
        }
        // An object from before there were stamps gets none later: nobody knows.
        let forged = stamped("UPDATE", json!({CREATOR_ANNOTATION: "mallory"}), &object(Value::Null));
        assert_eq!(forged, Value::Null);
    }

    #[test]
    fn a_reveal_carries_who_asks() {
        let mut asked = json!({
            "apiVersion": "keywright.dev/v1alpha1", "kind": "KeyReveal", "metadata": {"name": "x"},
            "spec": {"requester": {"username": "root", "groups": ["system:masters"]}},
        });
        let patch = patch(&request("KeyReveal", "CREATE", &asked, &Value::Null));
        json_patch::patch(&mut asked, &patch).unwrap();
        assert_eq!(asked["spec"]["requester"], json!({"username": "alice", "groups": ["devs"]}));
    }
}
