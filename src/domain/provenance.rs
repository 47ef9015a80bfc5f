//! Changes of the applied state: the fields that an apply tool (kubectl, a GitOps controller) applied before.
//!
//! An apply removes the fields that the tool applied before and that its manifest no longer has. `kubectl apply` keeps
//! the applied fields in annotation `kubectl.kubernetes.io/last-applied-configuration`, server-side apply in
//! `metadata.managedFields`. A request that changes only this state changes the effect of the next apply of an
//! unchanged manifest: if the manifest has no `active`, a state that lists `active` reactivates a deactivated key. Such
//! a request therefore needs the rights for a change of the fields.

use std::collections::BTreeSet;

use serde_json::Value;

use crate::api::{CREATOR_ANNOTATION, RESTORED_BY_ANNOTATION};

/// The annotation in which `kubectl apply` keeps the applied manifest.
pub const LAST_APPLIED: &str = "kubectl.kubernetes.io/last-applied-configuration";

/// The field manager of client-side `kubectl apply`. `kubectl apply --server-side` takes over its fields.
const CLIENT_SIDE_APPLY: &str = "kubectl-client-side-apply";

/// One entry of `metadata.managedFields` for the object itself, not for a subresource.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct FieldOwner<'a> {
    /// `manager`.
    pub manager: &'a str,
    /// `operation`: `Apply` or `Update`.
    pub operation: &'a str,
    /// `apiVersion`. The API server drops entries of an unknown version.
    pub version: &'a str,
    /// `fieldsV1`.
    pub fields: &'a Value,
}

/// The applied state of one object.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct AppliedState<'a> {
    /// The annotation [`LAST_APPLIED`].
    pub last_applied: Option<&'a str>,
    /// The field owners.
    pub owners: Vec<FieldOwner<'a>>,
}

/// The fields that a change of the applied state concerns.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ProvenanceChange {
    /// Fields of the spec other than `accessPolicyRef`, or metadata that users own.
    pub fields: bool,
    /// `spec.accessPolicyRef`.
    pub policy: bool,
    /// The fields that the next apply would now remove.
    pub removes: Removes,
}

/// The fields that an apply of a manifest without them would remove now, and would not have removed before.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Removes {
    /// `spec.active`.
    pub active: bool,
    /// `spec.expiresAt`.
    pub expiry: bool,
    /// `spec.rotation`, or a field of it.
    pub rotation: bool,
}

impl ProvenanceChange {
    /// No change.
    pub const NOTHING: Self =
        Self { fields: false, policy: false, removes: Removes { active: false, expiry: false, rotation: false } };

    const ALL: Self =
        Self { fields: true, policy: true, removes: Removes { active: true, expiry: true, rotation: true } };

    /// Adds a path that only one of the two states has. `gained` means that an apply could now remove the field.
    fn add(&mut self, path: &[String], gained: bool) {
        let names: Vec<_> = path.iter().map(String::as_str).collect();
        match names.as_slice() {
            // No apply can remove the type, which is required and immutable. The webhook maintains the two annotations,
            // whichever manager owns them.
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

/// Compares two applied states.
#[must_use]
pub fn change(old: &AppliedState<'_>, new: &AppliedState<'_>) -> ProvenanceChange {
    let mut change = ProvenanceChange::default();
    if old.last_applied != new.last_applied {
        match (read(old.last_applied), read(new.last_applied)) {
            (Some(before), Some(after)) => compare_manifests(&before, &after, &mut change),
            // The effect of an annotation that can't be parsed is unknown.
            _ => change = ProvenanceChange::ALL,
        }
    }
    // Unchanged owners, the majority, are skipped.
    let differing = |these: &[FieldOwner<'_>], those: &[FieldOwner<'_>]| {
        let mut owned = BTreeSet::new();
        for owner in these.iter().filter(|owner| !those.contains(owner)) {
            let own = paths_of_fields(owner.fields);
            let annotation = ["metadata", "annotations", LAST_APPLIED].map(str::to_owned).to_vec();
            let applies = owner.operation == "Apply" || owner.manager == CLIENT_SIDE_APPLY || own.contains(&annotation);
            let id = (owner.manager.to_owned(), owner.operation.to_owned(), owner.version.to_owned());
            // kubectl takes over the fields of any other manager that owns its annotation.
            let own = own.into_iter().filter(|path| owner.manager != CLIENT_SIDE_APPLY || *path != annotation);
            owned.extend(own.map(|path| (id.clone(), applies, path)));
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

/// Parses the annotation. An absent annotation is `Null`: the object was never applied.
fn read(last_applied: Option<&str>) -> Option<Value> {
    last_applied.map_or(Some(Value::Null), |text| serde_json::from_str(text).ok().filter(Value::is_object))
}

fn compare_manifests(before: &Value, after: &Value, change: &mut ProvenanceChange) {
    let (mut old, mut new) = (BTreeSet::new(), BTreeSet::new());
    flatten(before, &mut vec![], &mut old);
    flatten(after, &mut vec![], &mut new);
    let paths = |of: &BTreeSet<(Vec<String>, String)>| of.iter().map(|(path, _)| path.clone()).collect::<BTreeSet<_>>();
    let old_paths = paths(&old);
    for (path, _) in old.symmetric_difference(&new) {
        change.add(path, !old_paths.contains(path));
    }
}

/// Collects every value of a manifest that is not an object, with its path. A list is one value, as in a merge patch.
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

/// The paths of a FieldsV1, without the prefixes `f:`.
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

    const FIELDS: ProvenanceChange = ProvenanceChange { fields: true, ..ProvenanceChange::NOTHING };
    const ACTIVE: ProvenanceChange =
        ProvenanceChange { removes: Removes { active: true, ..ProvenanceChange::NOTHING.removes }, ..FIELDS };
    const EXPIRY: ProvenanceChange =
        ProvenanceChange { removes: Removes { expiry: true, ..ProvenanceChange::NOTHING.removes }, ..FIELDS };
    const ROTATION: ProvenanceChange =
        ProvenanceChange { removes: Removes { rotation: true, ..ProvenanceChange::NOTHING.removes }, ..FIELDS };

    fn by_annotation(before: Option<&Value>, after: Option<&Value>) -> ProvenanceChange {
        let texts = [before, after].map(|manifest| manifest.map(Value::to_string));
        let [old, new] = texts.each_ref().map(|text| AppliedState { last_applied: text.as_deref(), owners: vec![] });
        change(&old, &new)
    }

    fn by_owners(before: &[(&str, &str, Value)], after: &[(&str, &str, Value)]) -> ProvenanceChange {
        fn known<'a>(owners: &'a [(&'a str, &'a str, Value)]) -> AppliedState<'a> {
            let owner = |(manager, operation, fields): &'a (&'a str, &'a str, Value)| FieldOwner {
                manager,
                operation,
                version: "keywright.dev/v1alpha1",
                fields,
            };
            AppliedState { last_applied: None, owners: owners.iter().map(owner).collect() }
        }
        change(&known(before), &known(after))
    }

    #[test]
    fn a_field_added_to_the_annotation_is_removed_by_the_next_apply() {
        let plain = json!({"kind": "ApiKey", "spec": {"type": "Team", "permissions": ["a:Read"]}});
        let with = |field: &str, value: Value| {
            let mut manifest = plain.clone();
            manifest["spec"][field] = value;
            manifest
        };
        assert_eq!(by_annotation(Some(&plain), Some(&plain)), ProvenanceChange::default());
        assert_eq!(by_annotation(Some(&plain), Some(&with("active", json!(false)))), ACTIVE);
        let expiring = with("expiresAt", json!("2027-01-01T00:00:00Z"));
        assert_eq!(by_annotation(Some(&plain), Some(&expiring)), EXPIRY);
        // The field was in the annotation before with another value, so the next apply would have removed it anyway.
        let later = with("expiresAt", json!("2028-01-01T00:00:00Z"));
        assert_eq!(by_annotation(Some(&expiring), Some(&later)), FIELDS);
        assert_eq!(by_annotation(Some(&expiring), Some(&plain)), FIELDS);
        let rotating = with("rotation", json!({"every": "1h"}));
        assert_eq!(by_annotation(Some(&plain), Some(&rotating)), ROTATION);
        let policy = with("accessPolicyRef", json!({"name": "p"}));
        assert_eq!(
            by_annotation(Some(&plain), Some(&policy)),
            ProvenanceChange { policy: true, ..ProvenanceChange::default() }
        );
        assert_eq!(by_annotation(Some(&plain), Some(&with("permissions", json!(["b:Read"])))), FIELDS);
        assert_eq!(by_annotation(None, Some(&plain)), FIELDS);
        assert_eq!(by_annotation(Some(&policy), None), ProvenanceChange { policy: true, ..FIELDS });
    }

    #[test]
    fn an_invalid_annotation_counts_as_a_change_of_every_field() {
        for text in ["", "{", "[]", "\"active\""] {
            let broken = AppliedState { last_applied: Some(text), owners: vec![] };
            assert_eq!(change(&AppliedState::default(), &broken), ProvenanceChange::ALL, "{text}");
            assert_eq!(change(&broken, &AppliedState::default()), ProvenanceChange::ALL, "{text}");
        }
    }

    #[test]
    fn a_field_that_an_apply_manager_gains_is_removed_by_its_next_apply() {
        let base = json!({"f:spec": {"f:type": {}, "f:permissions": {"v:\"a:Read\"": {}}}});
        let more = json!({"f:spec": {"f:type": {}, "f:active": {}, "f:permissions": {"v:\"a:Read\"": {}}}});
        let applier = |fields: &Value| [("argocd-controller", "Apply", fields.clone())];
        assert_eq!(by_owners(&applier(&base), &applier(&base)), ProvenanceChange::default());
        assert_eq!(by_owners(&applier(&base), &applier(&more)), ACTIVE);
        assert_eq!(by_owners(&applier(&more), &applier(&base)), FIELDS);
        assert_eq!(by_owners(&applier(&base), &[]), FIELDS, "a removed owner removes no fields");
        // An owner by a patch removes no fields later.
        let patched = |operation: &'static str, manager: &'static str| {
            [("argocd-controller", "Apply", base.clone()), (manager, operation, json!({"f:spec": {"f:active": {}}}))]
        };
        assert_eq!(by_owners(&applier(&base), &patched("Update", "kubectl-patch")), FIELDS);
        let taken_over = ACTIVE;
        assert_eq!(by_owners(&applier(&base), &patched("Update", CLIENT_SIDE_APPLY)), taken_over);
        assert_eq!(by_owners(&applier(&base), &patched("Apply", "kubectl-patch")), taken_over);
        assert_eq!(by_owners(&patched("Update", "kubectl-patch"), &patched("Apply", "kubectl-patch")), taken_over);
        // kubectl takes over the fields of the manager that owns its annotation.
        let mut with_annotation = patched("Update", "kubectl-patch");
        with_annotation[1].2["f:metadata"] = json!({"f:annotations": {format!("f:{LAST_APPLIED}"): {}}});
        assert_eq!(by_owners(&patched("Update", "kubectl-patch"), &with_annotation), taken_over);
    }

    #[test]
    fn owners_of_the_policy_ref_change_the_policy_and_owners_of_stamps_change_nothing() {
        let policy = json!({"f:spec": {"f:accessPolicyRef": {".": {}, "f:name": {}}}});
        let stamped = json!({"f:metadata": {"f:annotations": {".": {}, "f:keywright.dev/creator": {}}}});
        let of_policy = ProvenanceChange { policy: true, ..ProvenanceChange::default() };
        assert_eq!(by_owners(&[], &[("kubectl-patch", "Update", policy.clone())]), of_policy);
        assert_eq!(by_owners(&[("a", "Apply", policy)], &[]), of_policy);
        assert_eq!(by_owners(&[], &[("a", "Apply", stamped)]), ProvenanceChange::default());
        for metadata in [
            json!({"f:labels": {"f:a": {}}}),
            json!({"f:annotations": {"f:keywright.dev/accept-secret": {}}}),
            json!({"f:finalizers": {".": {}, "v:\"x/y\"": {}}}),
        ] {
            assert_eq!(by_owners(&[], &[("a", "Apply", json!({"f:metadata": metadata}))]), FIELDS, "{metadata}");
        }
        let annotation = json!({"f:metadata": {"f:annotations": {format!("f:{LAST_APPLIED}"): {}}}});
        assert_eq!(by_owners(&[], &[(CLIENT_SIDE_APPLY, "Update", annotation.clone())]), ProvenanceChange::default());
        assert_eq!(by_owners(&[], &[("kubectl-patch", "Update", annotation)]), FIELDS);
    }
}
