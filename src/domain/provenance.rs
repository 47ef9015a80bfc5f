//! What tools that apply know of what they applied before, and what a change of that knowledge decides.
//!
//! A tool that applies a manifest removes the fields that it applied before and that the manifest no longer has. For
//! `kubectl apply`, those are the fields in annotation `kubectl.kubernetes.io/last-applied-configuration`; for server-side
//! apply, the fields that `metadata.managedFields` says the tool owns. A request that changes only this knowledge changes
//! what the next apply of an unchanged manifest does: where a manifest has no `active`, the knowledge that `active` was
//! applied turns a deactivated key on again. Such a request therefore needs the rights that a change of the fields needs.

use std::collections::BTreeSet;

use serde_json::Value;

use crate::api::{CREATOR_ANNOTATION, RESTORED_BY_ANNOTATION};

/// The annotation in which `kubectl apply` keeps what it applied.
pub const LAST_APPLIED: &str = "kubectl.kubernetes.io/last-applied-configuration";

/// The manager of `kubectl apply`. When kubectl changes to server-side apply, it takes over what this manager owns.
const CLIENT_SIDE_APPLY: &str = "kubectl-client-side-apply";

/// One entry of `metadata.managedFields` that is about the object itself, not about a subresource.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Owner<'a> {
    /// `manager`.
    pub manager: &'a str,
    /// `operation`: `Apply` or `Update`.
    pub operation: &'a str,
    /// `apiVersion`. An entry of a version that does not exist is dropped by the API server.
    pub version: &'a str,
    /// `fieldsV1`.
    pub fields: &'a Value,
}

/// What is known of the applies of one object.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Known<'a> {
    /// The annotation [`LAST_APPLIED`].
    pub last_applied: Option<&'a str>,
    /// The owners of its fields.
    pub owners: Vec<Owner<'a>>,
}

/// What a change of that knowledge is about.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Change {
    /// Fields of the spec other than `accessPolicyRef`, or metadata that people own.
    pub fields: bool,
    /// `spec.accessPolicyRef`.
    pub policy: bool,
    /// What the next apply would now remove.
    pub removes: Removes,
}

/// Fields that a tool that applies would remove where its manifest has none, and would not have removed before.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Removes {
    /// `spec.active`.
    pub active: bool,
    /// `spec.expiresAt`.
    pub expiry: bool,
    /// `spec.rotation`, or a field of it.
    pub rotation: bool,
}

impl Change {
    /// No change.
    pub const NOTHING: Self =
        Self { fields: false, policy: false, removes: Removes { active: false, expiry: false, rotation: false } };

    const ALL: Self =
        Self { fields: true, policy: true, removes: Removes { active: true, expiry: true, rotation: true } };

    /// Takes in one path that only one side knows. `gained` says that a tool that applies would now remove it.
    fn add(&mut self, path: &[String], gained: bool) {
        let names: Vec<_> = path.iter().map(String::as_str).collect();
        match names.as_slice() {
            // The type is required and immutable, so that no apply removes it, and every server-side apply has to name it.
            // The annotations are written by the cluster, and kept whoever owns them.
            ["spec", "type" | "." | ""]
            | ["metadata", "annotations", "." | "" | CREATOR_ANNOTATION | RESTORED_BY_ANNOTATION] => {}
            ["spec", "accessPolicyRef", ..] => self.policy = true,
            ["spec", field, ..] => {
                self.fields = true;
                self.removes.active |= gained && *field == "active";
                self.removes.expiry |= gained && *field == "expiresAt";
                self.removes.rotation |= gained && *field == "rotation";
            }
            ["metadata", "annotations" | "labels" | "ownerReferences" | "finalizers", ..] => self.fields = true,
            _ => {}
        }
    }
}

/// What the knowledge differs in.
#[must_use]
pub fn change(old: &Known<'_>, new: &Known<'_>) -> Change {
    let mut change = Change::default();
    if old.last_applied != new.last_applied {
        match (read(old.last_applied), read(new.last_applied)) {
            (Some(before), Some(after)) => compare_manifests(&before, &after, &mut change),
            // What can't be read decides nobody knows what.
            _ => change = Change::ALL,
        }
    }
    // Most owners are as they were, and need no closer look.
    let differing = |these: &[Owner<'_>], those: &[Owner<'_>]| {
        let mut owned = BTreeSet::new();
        for owner in these.iter().filter(|owner| !those.contains(owner)) {
            let own = paths_of_fields(owner.fields);
            let note = ["metadata", "annotations", LAST_APPLIED].map(str::to_owned).to_vec();
            let applies = owner.operation == "Apply" || owner.manager == CLIENT_SIDE_APPLY || own.contains(&note);
            let who = (owner.manager.to_owned(), owner.operation.to_owned(), owner.version.to_owned());
            // kubectl owns its own annotation; another owner of it is one from whom kubectl takes over.
            let own = own.into_iter().filter(|path| owner.manager != CLIENT_SIDE_APPLY || *path != note);
            owned.extend(own.map(|path| (who.clone(), applies, path)));
        }
        owned
    };
    let (before, after) = (differing(&old.owners, &new.owners), differing(&new.owners, &old.owners));
    for (_, _, path) in before.difference(&after) {
        change.add(path, false);
    }
    for (_, applies, path) in after.difference(&before) {
        change.add(path, *applies);
    }
    change
}

/// An object without the annotation was never applied.
fn read(last_applied: Option<&str>) -> Option<Value> {
    last_applied.map_or(Some(Value::Null), |text| serde_json::from_str(text).ok().filter(Value::is_object))
}

fn compare_manifests(before: &Value, after: &Value, change: &mut Change) {
    let (mut old, mut new) = (BTreeSet::new(), BTreeSet::new());
    flatten(before, &mut vec![], &mut old);
    flatten(after, &mut vec![], &mut new);
    let places =
        |of: &BTreeSet<(Vec<String>, String)>| of.iter().map(|(path, _)| path.clone()).collect::<BTreeSet<_>>();
    let had = places(&old);
    for (path, _) in old.symmetric_difference(&new) {
        change.add(path, !had.contains(path));
    }
}

/// Every value of a manifest that is no object, with its path. A list is one value, as it is for a merge patch.
fn flatten(value: &Value, path: &mut Vec<String>, found: &mut BTreeSet<(Vec<String>, String)>) {
    match value {
        Value::Object(fields) if !fields.is_empty() => {
            for (name, field) in fields {
                path.push(name.clone());
                flatten(field, path, found);
                path.pop();
            }
        }
        other => {
            found.insert((path.clone(), other.to_string()));
        }
    }
}

/// Every path of a FieldsV1, without the `f:` of its names.
fn paths_of_fields(fields: &Value) -> BTreeSet<Vec<String>> {
    fn walk(value: &Value, path: &mut Vec<String>, found: &mut BTreeSet<Vec<String>>) {
        match value {
            Value::Object(fields) if !fields.is_empty() => {
                for (name, field) in fields {
                    path.push(name.strip_prefix("f:").unwrap_or(name).to_owned());
                    walk(field, path, found);
                    path.pop();
                }
            }
            _ => {
                found.insert(path.clone());
            }
        }
    }
    let mut found = BTreeSet::new();
    walk(fields, &mut vec![], &mut found);
    found
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const FIELDS: Change = Change { fields: true, ..Change::NOTHING };
    const ACTIVE: Change = Change { removes: Removes { active: true, ..Change::NOTHING.removes }, ..FIELDS };
    const EXPIRY: Change = Change { removes: Removes { expiry: true, ..Change::NOTHING.removes }, ..FIELDS };
    const ROTATION: Change = Change { removes: Removes { rotation: true, ..Change::NOTHING.removes }, ..FIELDS };

    fn noted(before: Option<&Value>, after: Option<&Value>) -> Change {
        let texts = [before, after].map(|manifest| manifest.map(Value::to_string));
        let [old, new] = texts.each_ref().map(|text| Known { last_applied: text.as_deref(), owners: vec![] });
        change(&old, &new)
    }

    fn owned(before: &[(&str, &str, Value)], after: &[(&str, &str, Value)]) -> Change {
        fn known<'a>(owners: &'a [(&'a str, &'a str, Value)]) -> Known<'a> {
            let owner = |(manager, operation, fields): &'a (&'a str, &'a str, Value)| Owner {
                manager,
                operation,
                version: "keywright.dev/v1alpha1",
                fields,
            };
            Known { last_applied: None, owners: owners.iter().map(owner).collect() }
        }
        change(&known(before), &known(after))
    }

    #[test]
    fn what_the_annotation_gains_is_what_the_next_apply_removes() {
        let plain = json!({"kind": "ApiKey", "spec": {"type": "Team", "permissions": ["a:Read"]}});
        let with = |field: &str, value: Value| {
            let mut manifest = plain.clone();
            manifest["spec"][field] = value;
            manifest
        };
        assert_eq!(noted(Some(&plain), Some(&plain)), Change::default());
        assert_eq!(noted(Some(&plain), Some(&with("active", json!(false)))), ACTIVE);
        let expiring = with("expiresAt", json!("2027-01-01T00:00:00Z"));
        assert_eq!(noted(Some(&plain), Some(&expiring)), EXPIRY);
        // It was there before, with another value: nothing is removed that was not removed anyway.
        let later = with("expiresAt", json!("2028-01-01T00:00:00Z"));
        assert_eq!(noted(Some(&expiring), Some(&later)), FIELDS);
        assert_eq!(noted(Some(&expiring), Some(&plain)), FIELDS);
        let rotating = with("rotation", json!({"every": "1h"}));
        assert_eq!(noted(Some(&plain), Some(&rotating)), ROTATION);
        let policy = with("accessPolicyRef", json!({"name": "p"}));
        assert_eq!(noted(Some(&plain), Some(&policy)), Change { policy: true, ..Change::default() });
        assert_eq!(noted(Some(&plain), Some(&with("permissions", json!(["b:Read"])))), FIELDS);
        assert_eq!(noted(None, Some(&plain)), FIELDS);
        assert_eq!(noted(Some(&policy), None), Change { policy: true, ..FIELDS });
    }

    #[test]
    fn an_annotation_that_can_not_be_read_counts_for_everything() {
        for text in ["", "{", "[]", "\"active\""] {
            let broken = Known { last_applied: Some(text), owners: vec![] };
            assert_eq!(change(&Known::default(), &broken), Change::ALL, "{text}");
            assert_eq!(change(&broken, &Known::default()), Change::ALL, "{text}");
        }
    }

    #[test]
    fn what_an_applier_comes_to_own_is_what_its_next_apply_removes() {
        let base = json!({"f:spec": {"f:type": {}, "f:permissions": {"v:\"a:Read\"": {}}}});
        let more = json!({"f:spec": {"f:type": {}, "f:active": {}, "f:permissions": {"v:\"a:Read\"": {}}}});
        let applier = |fields: &Value| [("argocd-controller", "Apply", fields.clone())];
        assert_eq!(owned(&applier(&base), &applier(&base)), Change::default());
        assert_eq!(owned(&applier(&base), &applier(&more)), ACTIVE);
        assert_eq!(owned(&applier(&more), &applier(&base)), FIELDS);
        assert_eq!(owned(&applier(&base), &[]), FIELDS, "an owner that is gone removes nothing any more");
        // By a patch, which removes nothing later.
        let patched = |operation: &'static str, manager: &'static str| {
            [("argocd-controller", "Apply", base.clone()), (manager, operation, json!({"f:spec": {"f:active": {}}}))]
        };
        assert_eq!(owned(&applier(&base), &patched("Update", "kubectl-patch")), FIELDS);
        let taken_over = ACTIVE;
        assert_eq!(owned(&applier(&base), &patched("Update", CLIENT_SIDE_APPLY)), taken_over);
        assert_eq!(owned(&applier(&base), &patched("Apply", "kubectl-patch")), taken_over);
        assert_eq!(owned(&patched("Update", "kubectl-patch"), &patched("Apply", "kubectl-patch")), taken_over);
        // kubectl takes over from whoever owns its annotation.
        let mut noting = patched("Update", "kubectl-patch");
        noting[1].2["f:metadata"] = json!({"f:annotations": {format!("f:{LAST_APPLIED}"): {}}});
        assert_eq!(owned(&patched("Update", "kubectl-patch"), &noting), taken_over);
    }

    #[test]
    fn owning_the_policy_is_about_the_policy_and_stamps_are_about_nothing() {
        let policy = json!({"f:spec": {"f:accessPolicyRef": {".": {}, "f:name": {}}}});
        let stamped = json!({"f:metadata": {"f:annotations": {".": {}, "f:keywright.dev/creator": {}}}});
        let of_policy = Change { policy: true, ..Change::default() };
        assert_eq!(owned(&[], &[("kubectl-patch", "Update", policy.clone())]), of_policy);
        assert_eq!(owned(&[("a", "Apply", policy)], &[]), of_policy);
        assert_eq!(owned(&[], &[("a", "Apply", stamped)]), Change::default());
        for metadata in [
            json!({"f:labels": {"f:a": {}}}),
            json!({"f:annotations": {"f:keywright.dev/accept-secret": {}}}),
            json!({"f:finalizers": {".": {}, "v:\"x/y\"": {}}}),
        ] {
            assert_eq!(owned(&[], &[("a", "Apply", json!({"f:metadata": metadata}))]), FIELDS, "{metadata}");
        }
        let note = json!({"f:metadata": {"f:annotations": {format!("f:{LAST_APPLIED}"): {}}}});
        assert_eq!(owned(&[], &[(CLIENT_SIDE_APPLY, "Update", note.clone())]), Change::default());
        assert_eq!(owned(&[], &[("kubectl-patch", "Update", note)]), FIELDS);
    }
}
