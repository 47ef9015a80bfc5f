//! Carries out one [`Step`]: the only place that writes a Secret, and the only one that holds a new value.

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
    api::{ApiKey, SecuritySettings},
    controller::{RequestError, add, patch_params, post_params, request, test},
    domain::{
        key::Key,
        lifecycle::{Held, Step},
        record::{self, Record, Sealed},
        status::secret_ref,
    },
    sealing::{Keeper, SealError},
};

/// What became of a step.
#[derive(Debug)]
pub enum Acted {
    /// There was nothing to do.
    Rested,
    /// The Secret is now like this. `minted` is true if it holds a new value.
    Wrote {
        /// The Secret.
        held: Held,
        /// Whether the value is new.
        minted: bool,
    },
    /// The Secret is not as it was thought to be: look again.
    Changed,
}

/// How a step meets writes of others to the Secret.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Manner {
    /// It gives way to each of them.
    Careful,
    /// A rotation gives way only to a write of the record. Everybody with write access to Secrets can change their labels,
    /// and must not be able to hold up a revocation by doing so all the time.
    Insistent,
}

/// Carries out a step.
///
/// # Errors
/// If the API server can't be asked or refuses. Whether the write happened is then open: the next look at the Secret
/// tells, since record and value are written together.
pub async fn act(
    client: &Client,
    sealing: &Keeper,
    namespace: &str,
    key: &ApiKey,
    step: Step,
    manner: Manner,
    now: Timestamp,
) -> Result<Acted, RequestError> {
    match step {
        Step::Rest => Ok(Acted::Rested),
        Step::Mint(draft) => {
            let draft = if draft.is_first() && key.spec.legacy.is_none() {
                // Asked for and not remembered: settings that were applied together with this key count for it.
                let all: Api<SecuritySettings> = Api::namespaced(client.clone(), namespace);
                let settings = request("get SecuritySettings default", all.get_opt("default")).await?;
                draft.settled(&key.spec, settings.as_ref().map(|settings| &settings.spec))
            } else {
                draft
            };
            let value = mint(key)?;
            let record = draft.seal(key, value.digest(), now);
            let data = data(sealing, key, &value, &record).await?;
            create(client, sealing, namespace, key, data, record).await
        }
        Step::Rotate { held, draft } => {
            let value = mint(key)?;
            let record = draft.seal(key, value.digest(), now);
            let data = data(sealing, key, &value, &record).await?;
            match &held.mac {
                Some(mac) if manner == Manner::Insistent => {
                    insist(client, sealing, namespace, key, mac, data, record).await
                }
                _ => patch(client, sealing, namespace, key, &held, Change::Value(data), record).await,
            }
        }
        Step::Amend { held, record } => patch(client, sealing, namespace, key, &held, Change::Metadata, record).await,
        Step::Erase { held, record } => patch(client, sealing, namespace, key, &held, Change::Erasure, record).await,
    }
}

/// What a Secret holds of a value: plain, sealed or both, as its record says.
async fn data(
    sealing: &Keeper,
    key: &ApiKey,
    value: &Key,
    record: &Record,
) -> Result<BTreeMap<String, ByteString>, RequestError> {
    let mut data = BTreeMap::new();
    let failed = |error: SealError| RequestError::new_local(error.to_string());
    if record.sealed.as_ref().is_none_or(|sealed| sealed.plain) {
        data.insert(secret_ref(key).key, ByteString(value.expose().as_bytes().to_vec()));
    }
    if record.sealed.as_ref().is_some_and(Sealed::is_kept) {
        let ring = sealing.ring().await.map_err(RequestError::new_local)?;
        let sealed = ring.seal(record, value.expose().as_bytes()).map_err(failed)?;
        data.insert(record::SEALED_VALUE.to_owned(), ByteString(sealed));
    }
    Ok(data)
}

/// What a patch does to the data of a Secret.
enum Change {
    Metadata,
    Value(BTreeMap<String, ByteString>),
    Erasure,
}

fn mint(key: &ApiKey) -> Result<Key, RequestError> {
    Key::mint(key.spec.key_type, &mut SysRng)
        .map_err(|error| RequestError { status: None, message: format!("the system's random source failed: {error}") })
}

async fn create(
    client: &Client,
    sealing: &Keeper,
    namespace: &str,
    key: &ApiKey,
    data: BTreeMap<String, ByteString>,
    record: Record,
) -> Result<Acted, RequestError> {
    let place = secret_ref(key);
    let template = key.spec.secret.clone().unwrap_or_default();
    let mut annotations = template.annotations;
    annotations.extend(written(sealing, &record).await?);
    let mut labels = template.labels;
    labels.entry(MANAGED_BY.0.to_owned()).or_insert_with(|| MANAGED_BY.1.to_owned());
    let mut secret = Secret {
        metadata: ObjectMeta {
            name: Some(place.name.clone()),
            owner_references: Some(vec![owner(key)]),
            labels: Some(labels),
            annotations: Some(annotations),
            ..ObjectMeta::default()
        },
        type_: Some(record::SECRET_TYPE.to_owned()),
        data: Some(data),
        ..Secret::default()
    };
    let secrets: Api<Secret> = Api::namespaced(client.clone(), namespace);
    let created = request(&format!("create Secret {}", place.name), secrets.create(&post_params(), &secret)).await;
    wipe(&mut secret);
    match created {
        Ok(mut secret) => {
            wipe(&mut secret);
            Ok(Acted::Wrote { held: held(&secret, record), minted: true })
        }
        Err(error) if error.is(kube::core::Status::is_already_exists) => Ok(Acted::Changed),
        Err(error) => Err(error),
    }
}

/// One merge patch that only applies to the version that was read. It carries the new value, if there is one, and
/// the record in the same write.
async fn patch(
    client: &Client,
    sealing: &Keeper,
    namespace: &str,
    key: &ApiKey,
    before: &Held,
    change: Change,
    record: Record,
) -> Result<Acted, RequestError> {
    let place = secret_ref(key);
    let template = key.spec.secret.clone().unwrap_or_default();
    let secrets: Api<Secret> = Api::namespaced(client.clone(), namespace);
    let what = format!("update Secret {}", place.name);
    let mut labels = merge_map(&before.record.labels, &template.labels);
    if labels.get(MANAGED_BY.0).is_none_or(Value::is_null) {
        labels.insert(MANAGED_BY.0.to_owned(), json!(MANAGED_BY.1));
    }
    let mut annotations = merge_map(&before.record.annotations, &template.annotations);
    annotations.extend(written(sealing, &record).await?.map(|(name, text)| (name, json!(text))));
    let mut body = json!({"metadata": {
        "resourceVersion": before.version,
        "labels": labels,
        "annotations": annotations,
    }});
    if !before.owned {
        body["metadata"]["ownerReferences"] = json!([owner(key)]);
    }
    let minted = matches!(change, Change::Value(_));
    match change {
        Change::Metadata => {}
        // What the value before left behind goes with it.
        Change::Value(data) => {
            body["data"] = json!({ place.key.as_str(): null, record::SEALED_VALUE: null, record::CLAIMED: null });
            for (name, value) in data {
                body["data"][name] = json!(value);
            }
        }
        Change::Erasure => body["data"] = json!({ record::SEALED_VALUE: null, record::CLAIMED: null }),
    }
    match request(&what, secrets.patch(&place.name, &patch_params(), &Patch::Merge(body))).await {
        Ok(mut secret) => {
            wipe(&mut secret);
            let intact = minted || before.intact;
            Ok(Acted::Wrote { held: Held { intact, ..held(&secret, record) }, minted })
        }
        Err(error) if error.is(|status| status.is_conflict() || status.is_not_found()) => Ok(Acted::Changed),
        Err(error) => Err(error),
    }
}

/// A new value and its record in place of those whose message authentication code this is, whatever else changed in the
/// Secret. Labels and annotations are left to a later [`patch`].
async fn insist(
    client: &Client,
    sealing: &Keeper,
    namespace: &str,
    key: &ApiKey,
    mac: &str,
    data: BTreeMap<String, ByteString>,
    record: Record,
) -> Result<Acted, RequestError> {
    let name = secret_ref(key).name;
    let place = |annotation| ["metadata", "annotations", annotation];
    let mut operations = vec![test(&place(record::MAC_ANNOTATION), json!(mac))];
    operations.extend(written(sealing, &record).await?.iter().map(|(name, text)| add(&place(name), json!(text))));
    operations.push(add(&["data"], json!(data)));
    let secrets: Api<Secret> = Api::namespaced(client.clone(), namespace);
    let patch: Patch<()> = Patch::Json(json_patch::Patch(operations));
    let mut secret = request(&format!("update Secret {name}"), secrets.patch(&name, &patch_params(), &patch)).await?;
    wipe(&mut secret);
    Ok(Acted::Wrote { held: held(&secret, record), minted: true })
}

/// The labels or annotations of the template; those that the template no longer has are taken out.
fn merge_map(before: &[String], wanted: &BTreeMap<String, String>) -> serde_json::Map<String, Value> {
    let gone = before.iter().filter(|key| !wanted.contains_key(*key)).map(|key| (key.clone(), Value::Null));
    gone.chain(wanted.iter().map(|(key, value)| (key.clone(), json!(value)))).collect()
}

fn held(secret: &Secret, record: Record) -> Held {
    Held {
        version: secret.resource_version().unwrap_or_default(),
        written: Some(record.clone()),
        mac: secret.annotations().get(record::MAC_ANNOTATION).cloned(),
        record,
        intact: true,
        owned: true,
        in_order: true,
    }
}

/// Garbage collection deletes the Secret with its ApiKey, so that nothing needs a finalizer and nothing can get stuck.
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

/// Overwrites the values in a Secret that is about to be dropped. Copies inside the HTTP client remain out of reach.
fn wipe(secret: &mut Secret) {
    for ByteString(bytes) in secret.data.iter_mut().flat_map(BTreeMap::values_mut) {
        bytes.fill(0);
    }
}

/// The annotations that hold a record and its message authentication code.
///
/// # Errors
/// If the record keys can't be read.
pub async fn written(sealing: &Keeper, record: &Record) -> Result<[(String, String); 2], RequestError> {
    let ring = sealing.ring().await.map_err(RequestError::new_local)?;
    let text = serde_json::to_string(record).unwrap_or_default();
    let mac = ring.authenticate(&text).map_err(|error| RequestError::new_local(error.to_string()))?;
    Ok([(record::ANNOTATION.to_owned(), text), (record::MAC_ANNOTATION.to_owned(), mac)])
}
