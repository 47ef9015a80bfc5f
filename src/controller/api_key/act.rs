//! Carries out a [`Step`]. Only this module mints values; only it and `key_reveal::act` write the Secrets of keys.

use std::collections::BTreeMap;

use k8s_openapi::{
    ByteString,
    api::core::v1::Secret,
    apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference},
    jiff::Timestamp,
};
use kube::{Api, Client, Resource, ResourceExt, api::Patch};
use rand::rngs::SysRng;
use serde_json::{Value, json};

use super::observe::MANAGED_BY;
use crate::{
    api::{ApiKey, SecretRef, SecuritySettings},
    controller::{RequestError, add, patch_params, post_params, request, test},
    domain::{
        key::Key,
        lifecycle::{Draft, OwnedSecret, Step},
        record::{self, Record, Sealed},
        status::secret_ref,
    },
    sealing::{SealError, SealingKeyStore},
};

/// The result of a step.
#[derive(Debug)]
pub enum StepResult {
    /// The step needed no write.
    NothingToDo,
    /// The Secret was written.
    Written {
        /// The Secret after the write.
        secret: OwnedSecret,
        /// Whether it holds a new value.
        minted: bool,
    },
    /// The Secret changed since it was read. The caller reads it again.
    Conflict,
}

/// How a step reacts to writes of the Secret by other clients.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ConflictPolicy {
    /// Every other write is a conflict.
    Yield,
    /// For a rotation, only a write of the record is a conflict. Otherwise users with write access to Secrets could
    /// delay a revocation by changing labels continuously.
    Override,
}

/// The data of a Secret.
type SecretData = BTreeMap<String, ByteString>;

/// The change of the data of a Secret.
enum SecretChange {
    Metadata,
    Value(SecretData),
    Erasure,
}

/// The Secret of one ApiKey, with the clients that read and write it.
pub struct SecretTarget<'a> {
    pub(super) client: &'a Client,
    pub(super) sealing: &'a SealingKeyStore,
    pub(super) namespace: &'a str,
    pub(super) key: &'a ApiKey,
    /// The name of the Secret, and the key in its data that holds a plain value.
    pub(super) secret_ref: SecretRef,
}

impl<'a> SecretTarget<'a> {
    /// The Secret that `key` names, without a request.
    #[must_use]
    pub fn new(client: &'a Client, sealing: &'a SealingKeyStore, namespace: &'a str, key: &'a ApiKey) -> Self {
        Self { client, sealing, namespace, key, secret_ref: secret_ref(key) }
    }

    pub(super) fn secrets(&self) -> Api<Secret> {
        Api::namespaced(self.client.clone(), self.namespace)
    }

    /// Carries out a step.
    ///
    /// # Errors
    /// If the API server rejects a request or can't be reached. The write may have happened then. The next read of the
    /// Secret shows it, since record and value are written together.
    pub async fn act(&self, step: Step, policy: ConflictPolicy, now: Timestamp) -> Result<StepResult, RequestError> {
        match step {
            Step::Rest => Ok(StepResult::NothingToDo),
            Step::Mint(draft) => {
                let draft = self.settled(draft).await?;
                let (record, data) = self.mint(draft, now).await?;
                self.create(data, record).await
            }
            Step::Rotate { held, draft } => {
                let (record, data) = self.mint(draft, now).await?;
                match &held.mac {
                    Some(mac) if policy == ConflictPolicy::Override => self.override_conflict(mac, data, record).await,
                    _ => self.patch(&held, SecretChange::Value(data), record).await,
                }
            }
            Step::Amend { held, record } => self.patch(&held, SecretChange::Metadata, record).await,
            Step::Erase { held, record } => self.patch(&held, SecretChange::Erasure, record).await,
        }
    }

    /// Completes the draft of a first value with the security settings of the namespace. They are read from the API
    /// server, since settings that were applied together with the ApiKey may be missing in the index.
    async fn settled(&self, draft: Draft) -> Result<Draft, RequestError> {
        if !draft.is_first() || self.key.spec.legacy.is_some() {
            return Ok(draft);
        }
        let all: Api<SecuritySettings> = Api::namespaced(self.client.clone(), self.namespace);
        let settings = request("get SecuritySettings default", all.get_opt("default")).await?;
        Ok(draft.settled(&self.key.spec, settings.as_ref().map(|settings| &settings.spec)))
    }

    /// Mints a value. Returns its record and the data of the Secret, which holds the value plain, sealed or both.
    async fn mint(&self, draft: Draft, now: Timestamp) -> Result<(Record, SecretData), RequestError> {
        let value = Key::mint(self.key.spec.key_type, &mut SysRng).map_err(|error| {
            RequestError::new_local(format!("the random source of the operating system failed: {error}"))
        })?;
        let record = draft.seal(self.key, value.digest(), now);
        let mut data = BTreeMap::new();
        if record.sealed.as_ref().is_none_or(|sealed| sealed.plain) {
            data.insert(self.secret_ref.key.clone(), ByteString(value.expose().as_bytes().to_vec()));
        }
        if record.sealed.as_ref().is_some_and(Sealed::is_kept) {
            let ring = self.sealing.ring().await.map_err(RequestError::new_local)?;
            let sealed = ring.seal(&record, value.expose().as_bytes());
            let sealed = sealed.map_err(|error: SealError| RequestError::new_local(error.to_string()))?;
            data.insert(record::SEALED_VALUE.to_owned(), ByteString(sealed));
        }
        Ok((record, data))
    }

    async fn create(&self, data: SecretData, record: Record) -> Result<StepResult, RequestError> {
        let template = self.key.spec.secret.clone().unwrap_or_default();
        let mut annotations = template.annotations;
        annotations.extend(record_annotations(self.sealing, &record).await?);
        let mut labels = template.labels;
        labels.entry(MANAGED_BY.0.to_owned()).or_insert_with(|| MANAGED_BY.1.to_owned());
        let mut secret = Secret {
            metadata: ObjectMeta {
                name: Some(self.secret_ref.name.clone()),
                owner_references: Some(vec![owner(self.key)]),
                labels: Some(labels),
                annotations: Some(annotations),
                ..ObjectMeta::default()
            },
            type_: Some(record::SECRET_TYPE.to_owned()),
            data: Some(data),
            ..Secret::default()
        };
        let created =
            request(&format!("create Secret {}", self.secret_ref.name), self.secrets().create(&post_params(), &secret))
                .await;
        wipe(&mut secret);
        match created {
            Ok(mut secret) => {
                wipe(&mut secret);
                Ok(StepResult::Written { secret: owned_secret(&secret, record), minted: true })
            }
            Err(error) if error.is(kube::core::Status::is_already_exists) => Ok(StepResult::Conflict),
            Err(error) => Err(error),
        }
    }

    /// Writes one merge patch that applies only to the version that was read. It contains the record and the new value,
    /// if any.
    async fn patch(
        &self,
        before: &OwnedSecret,
        change: SecretChange,
        record: Record,
    ) -> Result<StepResult, RequestError> {
        let template = self.key.spec.secret.clone().unwrap_or_default();
        let operation = format!("update Secret {}", self.secret_ref.name);
        let mut labels = merge_map(&before.record.labels, &template.labels);
        if labels.get(MANAGED_BY.0).is_none_or(Value::is_null) {
            labels.insert(MANAGED_BY.0.to_owned(), json!(MANAGED_BY.1));
        }
        let mut annotations = merge_map(&before.record.annotations, &template.annotations);
        annotations.extend(record_annotations(self.sealing, &record).await?.map(|(name, text)| (name, json!(text))));
        let mut body = json!({"metadata": {
            "resourceVersion": before.version,
            "labels": labels,
            "annotations": annotations,
        }});
        if !before.owned {
            body["metadata"]["ownerReferences"] = json!([owner(self.key)]);
        }
        let minted = matches!(change, SecretChange::Value(_));
        match change {
            SecretChange::Metadata => {}
            // All data of the previous value is removed.
            SecretChange::Value(data) => {
                body["data"] =
                    json!({ self.secret_ref.key.as_str(): null, record::SEALED_VALUE: null, record::CLAIMED: null });
                for (name, value) in data {
                    body["data"][name] = json!(value);
                }
            }
            SecretChange::Erasure => body["data"] = json!({ record::SEALED_VALUE: null, record::CLAIMED: null }),
        }
        match request(&operation, self.secrets().patch(&self.secret_ref.name, &patch_params(), &Patch::Merge(body)))
            .await
        {
            Ok(mut secret) => {
                wipe(&mut secret);
                let intact = minted || before.intact;
                Ok(StepResult::Written { secret: OwnedSecret { intact, ..owned_secret(&secret, record) }, minted })
            }
            Err(error) if error.is(|status| status.is_conflict() || status.is_not_found()) => Ok(StepResult::Conflict),
            Err(error) => Err(error),
        }
    }

    /// Replaces the value and the record whose message authentication code is `mac`, regardless of other changes of the
    /// Secret. A later [`Self::patch`] writes labels and annotations.
    async fn override_conflict(&self, mac: &str, data: SecretData, record: Record) -> Result<StepResult, RequestError> {
        let name = &self.secret_ref.name;
        let annotation = |name| ["metadata", "annotations", name];
        let mut operations = vec![test(&annotation(record::MAC_ANNOTATION), json!(mac))];
        operations.extend(
            record_annotations(self.sealing, &record)
                .await?
                .iter()
                .map(|(name, text)| add(&annotation(name), json!(text))),
        );
        operations.push(add(&["data"], json!(data)));
        let patch: Patch<()> = Patch::Json(json_patch::Patch(operations));
        let mut secret =
            request(&format!("update Secret {name}"), self.secrets().patch(name, &patch_params(), &patch)).await?;
        wipe(&mut secret);
        Ok(StepResult::Written { secret: owned_secret(&secret, record), minted: true })
    }
}

/// Returns the merge patch (RFC 7396) of labels or annotations. It removes those of `before` that `wanted` lacks.
fn merge_map(before: &[String], wanted: &BTreeMap<String, String>) -> serde_json::Map<String, Value> {
    let removed = before.iter().filter(|key| !wanted.contains_key(*key)).map(|key| (key.clone(), Value::Null));
    removed.chain(wanted.iter().map(|(key, value)| (key.clone(), json!(value)))).collect()
}

fn owned_secret(secret: &Secret, record: Record) -> OwnedSecret {
    OwnedSecret {
        version: secret.resource_version().unwrap_or_default(),
        written: Some(record.clone()),
        mac: secret.annotations().get(record::MAC_ANNOTATION).cloned(),
        record,
        intact: true,
        owned: true,
        in_order: true,
    }
}

/// Returns the owner reference by which garbage collection deletes the Secret with its ApiKey. No finalizer is needed.
fn owner(key: &ApiKey) -> OwnerReference {
    OwnerReference {
        api_version: ApiKey::api_version(&()).into_owned(),
        kind: ApiKey::kind(&()).into_owned(),
        name: key.name_any(),
        uid: key.uid().unwrap_or_default(),
        controller: Some(true),
        block_owner_deletion: Some(true),
    }
}

/// Overwrites the values in a Secret before it is dropped. Copies in the HTTP client are not overwritten.
fn wipe(secret: &mut Secret) {
    for ByteString(bytes) in secret.data.iter_mut().flat_map(BTreeMap::values_mut) {
        bytes.fill(0);
    }
}

/// Returns the annotations that hold a record and its message authentication code.
///
/// # Errors
/// If the record keys can't be read.
pub async fn record_annotations(
    sealing: &SealingKeyStore,
    record: &Record,
) -> Result<[(String, String); 2], RequestError> {
    let ring = sealing.ring().await.map_err(RequestError::new_local)?;
    let text = serde_json::to_string(record).unwrap_or_default();
    let mac = ring.authenticate(&text).map_err(|error| RequestError::new_local(error.to_string()))?;
    Ok([(record::ANNOTATION.to_owned(), text), (record::MAC_ANNOTATION.to_owned(), mac)])
}
