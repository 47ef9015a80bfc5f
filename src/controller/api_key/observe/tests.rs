#![cfg(test)]

use super::*;
use crate::{
    api::{ApiKeyStatus, CREATOR_ANNOTATION, SecretRef, Time, Token},
    test_support::key_spec as spec,
};

/// A value and its record.
struct Minted {
    value: Key,
    record: Record,
}

fn key(key_type: KeyType) -> ApiKey {
    named("k", "u", key_type)
}

fn named(name: &str, uid: &str, key_type: KeyType) -> ApiKey {
    let mut key = ApiKey::new(name, spec(key_type, &["Alerts"], &[]));
    key.metadata.namespace = Some("shop".to_owned());
    key.metadata.uid = Some(uid.to_owned());
    key
}

fn sealed(mode: RevealMode) -> Sealed {
    Sealed { mode, plain: false, claim: None, erased_at: None }
}

fn mint(key: &ApiKey, generation: i64, sealed: Option<Sealed>) -> Minted {
    let value = Key::mint(key.spec.key_type, &mut rand::rngs::SysRng).unwrap();
    let at = "2026-11-23T09:00:00Z".parse().unwrap();
    let record = Record {
        subject: Subject::of(key),
        created_at: at,
        last_rotated_at: None,
        requested_at: None,
        current: Entry { sha256: value.digest().to_string(), minted_at: at, generation },
        previous: None,
        sealed,
        labels: vec![],
        annotations: vec![],
    };
    Minted { value, record }
}

impl Minted {
    /// The Secret as an operator with these sealing keys writes it, without its owner reference.
    fn secret(&self, ring: &SealingKeys) -> Secret {
        let text = serde_json::to_string(&self.record).unwrap();
        let mac = ring.authenticate(&text).unwrap();
        let json = serde_json::json!({
            "metadata": {
                "name": self.record.subject.secret, "creationTimestamp": "2026-11-23T10:00:00Z",
                "annotations": {record::ANNOTATION: text, record::MAC_ANNOTATION: mac},
            },
            "type": record::SECRET_TYPE,
        });
        let bytes = self.value.expose().as_bytes();
        let data = match &self.record.sealed {
            None => ("key-value", bytes.to_vec()),
            Some(_) => (record::SEALED_VALUE, ring.seal(&self.record, bytes).unwrap()),
        };
        let data = [(data.0.to_owned(), ByteString(data.1))].into();
        Secret { data: Some(data), ..serde_json::from_value(json).unwrap() }
    }

    /// The ApiKey with the status that the operator writes for the value.
    fn reported(&self, key: &ApiKey) -> ApiKey {
        let entry = &self.record.current;
        let token = Token {
            id: entry.id(),
            sha256: entry.sha256.clone(),
            generation: Some(entry.generation),
            minted_at: Time(entry.minted_at),
            expires_at: None,
        };
        let place = if self.record.sealed.is_some() { record::SEALED_VALUE } else { "key-value" };
        let status = ApiKeyStatus {
            tokens: vec![token],
            created_at: Some(Time(self.record.created_at)),
            reveal: self.record.sealed.as_ref().map(Sealed::reveal),
            secret_ref: Some(SecretRef { name: "k-secret".to_owned(), key: place.to_owned() }),
            ..ApiKeyStatus::default()
        };
        ApiKey { status: Some(status), ..key.clone() }
    }
}

fn owned_by(mut secret: Secret, key: &ApiKey) -> Secret {
    let owner = serde_json::json!({
        "apiVersion": "keywright.dev/v1alpha1", "kind": "ApiKey", "name": key.name_any(), "uid": key.uid(),
        "controller": true,
    });
    secret.metadata.owner_references = Some(vec![serde_json::from_value(owner).unwrap()]);
    secret
}

fn annotated(key: &ApiKey, name: &str, value: &str) -> ApiKey {
    let mut key = key.clone();
    key.annotations_mut().insert(name.to_owned(), value.to_owned());
    key
}

/// Classifies a Secret. Returns the digest of an own Secret and whether it is intact; otherwise the reason.
fn classified(
    secret: Secret,
    key: &ApiKey,
    ring: &SealingKeys,
    policy_protects_secrets: bool,
) -> Result<(String, bool), &'static str> {
    match classify(secret, key, &TrustAnchors { ring, policy_protects_secrets }).observed {
        Observed::Ours(owned) => Ok((owned.record.current.sha256, owned.intact)),
        Observed::Foreign { reason, .. } => Err(reason),
        other => panic!("{other:?}"),
    }
}

const CASES: [(KeyType, Option<RevealMode>); 4] = [
    (KeyType::Team, None),
    (KeyType::SendYourData, None),
    (KeyType::Team, Some(RevealMode::OneTime)),
    (KeyType::Personal, Some(RevealMode::Sealed)),
];

#[test]
fn secret_with_an_authenticated_record_for_this_key_is_adopted_without_a_status() {
    let ring = SealingKeys::generate().unwrap();
    for (key_type, mode) in CASES {
        let key = key(key_type);
        let minted = mint(&key, 1, mode.map(sealed));
        let own = Ok((minted.record.current.sha256.clone(), true));
        assert_eq!(classified(owned_by(minted.secret(&ring), &key), &key, &ring, false), own);
        assert_eq!(classified(minted.secret(&ring), &key, &ring, false), own, "without its owner reference");
    }
}

#[test]
fn secret_without_an_authenticated_record_or_of_another_type_is_foreign() {
    let ring = SealingKeys::generate().unwrap();
    for (key_type, mode) in CASES {
        let key = key(key_type);
        let minted = mint(&key, 1, mode.map(sealed));
        let mut no_code = minted.secret(&ring);
        no_code.annotations_mut().remove(record::MAC_ANNOTATION);
        let mut changed = minted.secret(&ring);
        let text = &changed.annotations()[record::ANNOTATION];
        let text = text.replace("2026-11-23T09:00:00Z", "2026-11-23T09:00:01Z");
        changed.annotations_mut().insert(record::ANNOTATION.to_owned(), text);
        let other_operator = minted.secret(&SealingKeys::generate().unwrap());
        for secret in [no_code, changed, other_operator] {
            for secret in [owned_by(secret.clone(), &key), secret] {
                assert_eq!(classified(secret, &key, &ring, true), Err(NOT_AUTHENTIC), "{key_type:?} {mode:?}");
            }
        }
        let mut of_another_type = minted.secret(&ring);
        of_another_type.type_ = Some("Opaque".to_owned());
        assert_eq!(classified(owned_by(of_another_type, &key), &key, &ring, true), Err(CONFLICT));
    }
}

#[test]
fn record_for_another_name_namespace_or_type_is_never_adopted() {
    let ring = SealingKeys::generate().unwrap();
    let mut elsewhere = named("k", "u2", KeyType::Team);
    elsewhere.metadata.namespace = Some("bank".to_owned());
    for other in [named("other", "u2", KeyType::Team), named("k", "u2", KeyType::SendYourData), elsewhere] {
        let minted = mint(&other, 1, None);
        let restored = annotated(&key(KeyType::Team), RESTORED_BY_ANNOTATION, "velero");
        let sha256 = format!("sha256:{}", minted.record.current.sha256);
        let accepted = annotated(&restored, ACCEPT_SECRET_ANNOTATION, &sha256);
        for key in [restored, accepted] {
            let found = classified(minted.secret(&ring), &key, &ring, true);
            assert_eq!(found, Err(NOT_AUTHENTIC), "{:?}", other.metadata);
        }
    }
}

#[test]
fn status_takes_precedence_over_an_older_or_equal_record() {
    let ring = SealingKeys::generate().unwrap();
    for (key_type, mode) in CASES {
        let key = key(key_type);
        let values = [1, 2, 2, 3].map(|generation| mint(&key, generation, mode.map(sealed)));
        let reported = values[1].reported(&key);
        let known = &values[1].record.current.sha256;
        for (n, expected) in [(0, (known, false)), (1, (known, true)), (2, (known, false))] {
            let secret = owned_by(values[n].secret(&ring), &key);
            let (sha256, intact) = classified(secret, &reported, &ring, true).unwrap();
            assert_eq!((&sha256, intact), expected, "value {n} of {key_type:?} {mode:?}");
        }
        let later = owned_by(values[3].secret(&ring), &key);
        let after_a_crash = Ok((values[3].record.current.sha256.clone(), true));
        assert_eq!(classified(later, &reported, &ring, false), after_a_crash);
        // A Secret without an owner reference is foreign, so that it is never overwritten.
        assert_eq!(classified(values[0].secret(&ring), &reported, &ring, true), Err(CONFLICT));
    }
}

/// Earlier versions of the operator wrote no generations.
#[test]
fn record_with_a_later_generation_and_an_earlier_mint_time_does_not_replace_the_status() {
    let ring = SealingKeys::generate().unwrap();
    let key = key(KeyType::Team);
    let (old, mut current) = (mint(&key, 7, None), mint(&key, 0, None));
    current.record.current.minted_at = "2026-11-24T09:00:00Z".parse().unwrap();
    let (sha256, intact) = classified(owned_by(old.secret(&ring), &key), &current.reported(&key), &ring, true).unwrap();
    assert_eq!((sha256, intact), (current.record.current.sha256, false));
}

#[test]
fn later_record_of_an_earlier_key_of_this_name_does_not_replace_the_status() {
    let ring = SealingKeys::generate().unwrap();
    let (earlier, key) = (named("k", "before", KeyType::Team), key(KeyType::Team));
    let minted = mint(&key, 1, None);
    let later = mint(&earlier, 5, None).secret(&ring);
    let reported = minted.reported(&key);
    assert!(!classified(owned_by(later.clone(), &key), &reported, &ring, true).unwrap().1);
    assert_eq!(classified(later, &reported, &ring, true), Err(CONFLICT));
}

#[test]
fn sealed_value_of_another_key_is_ignored() {
    let ring = SealingKeys::generate().unwrap();
    let (victim, other) = (named("victim", "1", KeyType::Personal), named("other", "2", KeyType::Personal));
    let own = mint(&victim, 1, Some(sealed(RevealMode::Sealed)));
    let copied = mint(&other, 1, Some(sealed(RevealMode::Sealed)));
    let mut mixed = owned_by(own.secret(&ring), &victim);
    mixed.data = copied.secret(&ring).data;
    let text =
        mixed.annotations()[record::ANNOTATION].replace(&own.record.current.sha256, &copied.record.current.sha256);
    mixed.annotations_mut().insert(record::ANNOTATION.to_owned(), text);
    let found =
        classify(mixed.clone(), &own.reported(&victim), &TrustAnchors { ring: &ring, policy_protects_secrets: true });
    assert!(found.value.is_none());
    let Observed::Ours(owned) = found.observed else { panic!("{:?}", found.observed) };
    assert_eq!((owned.record.current, owned.intact), (own.record.current, false));
    assert_eq!(classified(mixed, &victim, &ring, true), Err(NOT_AUTHENTIC), "without a status");
}

#[test]
fn restored_secret_is_adopted_only_with_the_right_to_restore() {
    let ring = SealingKeys::generate().unwrap();
    for (key_type, mode) in CASES {
        let (earlier, key) = (named("k", "before", key_type), key(key_type));
        let minted = mint(&earlier, 3, mode.map(sealed));
        let sha256 = &minted.record.current.sha256;
        let restored = Ok((sha256.clone(), true));
        let secret = || minted.secret(&ring);
        assert_eq!(classified(secret(), &key, &ring, false), Err(NOT_AUTHENTIC), "the policy does not protect Secrets");
        assert_eq!(
            classified(secret(), &key, &ring, true),
            Err(NOT_AUTHENTIC),
            "the owner may have kept the Secret of a deleted ApiKey"
        );
        let by_velero = annotated(&key, RESTORED_BY_ANNOTATION, "velero");
        assert_eq!(
            classified(secret(), &by_velero, &ring, false),
            Err(NOT_AUTHENTIC),
            "the policy does not protect Secrets"
        );
        assert_eq!(classified(secret(), &by_velero, &ring, true), restored);
        let accepted = annotated(&key, ACCEPT_SECRET_ANNOTATION, &format!("sha256:{sha256}"));
        assert_eq!(classified(secret(), &accepted, &ring, false), restored);
        let other = annotated(&key, ACCEPT_SECRET_ANNOTATION, &format!("sha256:{}", "0".repeat(64)));
        assert_eq!(classified(secret(), &other, &ring, false), Err(NOT_AUTHENTIC));
        let found = classify(secret(), &by_velero, &TrustAnchors { ring: &ring, policy_protects_secrets: true });
        let Observed::Ours(owned) = found.observed else { panic!() };
        assert_eq!((owned.record.subject, owned.record.current.generation), (Subject::of(&key), 3));
        // If the owner no longer exists, the Secret was restored if it is younger than its value.
        let dangling = owned_by(secret(), &earlier);
        assert_eq!(classified(dangling.clone(), &by_velero, &ring, true), restored);
        let mut collected = dangling;
        collected.metadata.creation_timestamp = Some(Time(minted.record.current.minted_at));
        assert_eq!(classified(collected, &by_velero, &ring, true), Err(CONFLICT));
    }
}

/// Mallory deletes an ApiKey and keeps its Secret, and Alice creates an ApiKey of that name.
#[test]
fn secret_that_another_user_kept_after_deleting_its_key_is_foreign() {
    let ring = SealingKeys::generate().unwrap();
    for (key_type, mode) in CASES {
        let of = |user: &str| {
            let mut key = annotated(&named("k", user, key_type), CREATOR_ANNOTATION, user);
            key.spec.user = (key_type == KeyType::Personal).then(|| user.to_owned());
            key
        };
        let left = mint(&of("mallory"), 1, mode.map(sealed)).secret(&ring);
        assert_eq!(classified(left.clone(), &of("alice"), &ring, true), Err(NOT_AUTHENTIC));
        let restored = annotated(&of("alice"), RESTORED_BY_ANNOTATION, "velero");
        assert_eq!(
            classified(left, &restored, &ring, true),
            Err(NOT_AUTHENTIC),
            "although alice's ApiKey was restored"
        );
    }
}

#[test]
fn secret_of_another_operator_is_adopted_only_if_its_plain_value_was_accepted() {
    let (ring, other) = (SealingKeys::generate().unwrap(), SealingKeys::generate().unwrap());
    for (key_type, mode) in CASES {
        let key = key(key_type);
        let minted = mint(&key, 3, mode.map(sealed));
        let sha256 = &minted.record.current.sha256;
        let accepted = annotated(&key, ACCEPT_SECRET_ANNOTATION, &format!("sha256:{sha256}"));
        let secret = minted.secret(&other);
        // This operator can't open a value that another operator sealed, so the digest is not proven.
        let expected = if mode.is_none() { Ok((sha256.clone(), true)) } else { Err(NOT_AUTHENTIC) };
        assert_eq!(classified(secret.clone(), &accepted, &ring, false), expected);
        let another = mint(&key, 3, mode.map(sealed)).secret(&other);
        assert_eq!(classified(another, &accepted, &ring, true), Err(NOT_AUTHENTIC), "changed after it was accepted");
        let restored = annotated(&key, RESTORED_BY_ANNOTATION, "velero");
        assert_eq!(classified(secret, &restored, &ring, true), Err(NOT_AUTHENTIC), "restored and not accepted");
    }
}

#[test]
fn generation_of_an_unauthenticated_record_is_ignored() {
    let ring = SealingKeys::generate().unwrap();
    let key = key(KeyType::Team);
    let minted = mint(&key, i64::MAX, None);
    let sha256 = &minted.record.current.sha256;
    let accepted = annotated(&key, ACCEPT_SECRET_ANNOTATION, &format!("sha256:{sha256}"));
    let secret = minted.secret(&SealingKeys::generate().unwrap());
    let found = classify(secret, &accepted, &TrustAnchors { ring: &ring, policy_protects_secrets: true });
    let Observed::Ours(owned) = found.observed else { panic!("{:?}", found.observed) };
    assert_eq!(owned.record.current.generation, 1);
}

#[test]
fn plain_value_of_a_personal_key_is_ignored() {
    let ring = SealingKeys::generate().unwrap();
    let key = key(KeyType::Personal);
    let mut minted = mint(&key, 1, None);
    let sha256 = minted.record.current.sha256.clone();
    let accepted = annotated(&key, ACCEPT_SECRET_ANNOTATION, &format!("sha256:{sha256}"));
    assert_eq!(
        classified(minted.secret(&SealingKeys::generate().unwrap()), &accepted, &ring, true),
        Err(NOT_AUTHENTIC)
    );
    minted.record.sealed = Some(sealed(RevealMode::Sealed));
    let mut secret = minted.secret(&ring);
    let plain = ByteString(minted.value.expose().as_bytes().to_vec());
    secret.data = Some([("key-value".to_owned(), plain)].into());
    let found = classify(secret, &minted.reported(&key), &TrustAnchors { ring: &ring, policy_protects_secrets: true });
    assert!(found.value.is_none());
}
