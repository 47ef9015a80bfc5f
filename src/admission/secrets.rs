//! The webhook for writes to the Secrets of keys. It warns of harmful writes and sends notices, so that the leader
//! checks the written Secrets.
//!
//! The operator may neither list nor watch Secrets. Instead, the API server calls this webhook before it creates,
//! updates or deletes a Secret of type `keywright.dev/api-key`. The webhook allows all writes, and its configuration
//! has `failurePolicy: Ignore`, so that Secrets can be written while no replica responds.
//!
//! A review contains the data of the Secret. The webhook compares it in place, never copies it, and overwrites the body
//! before it drops it. A [`SecretNotice`] contains only the name of a Secret.
//!
//! Any client that reaches the port can forge reviews and notices. A forged one causes a check of a Secret whose ApiKey
//! exists, within the limits of [`crate::runtime::secret_notices`], and discloses nothing: a warning requires a record
//! with the digest of a working value.

use std::{collections::HashSet, sync::Arc, time::Instant};

use axum::{
    Json,
    body::Bytes,
    extract::{DefaultBodyLimit, State},
    http::StatusCode,
    response::{IntoResponse, Response},
    routing::{MethodRouter, post},
};
use k8s_openapi::jiff::Timestamp;
use kube::runtime::reflector::{ObjectRef, Store};
use secrecy::zeroize::Zeroize;
use serde::{Deserialize, Serialize};
use serde_json::{json, value::RawValue};
use tokio::sync::{mpsc, watch};

use super::AdmissionContext;
use crate::{
    api::ApiKey,
    domain::{
        lifecycle::Schedule,
        record::{Record, SECRET_TYPE},
    },
    index::Index,
    telemetry::metrics::{self, AdmissionKind, AdmissionResult, Metrics},
};

/// The path of the webhook for Secrets.
pub const PATH: &str = "/secrets";

/// The path at which the leader receives notices of other replicas: a POST of a JSON array of [`SecretNotice`]. The
/// response is 204, or 409 from a replica that does not lead.
pub const NOTICE_PATH: &str = "/notice";

/// The maximum number of notices in one request.
pub const BATCH: usize = 200;

/// The size of [`BATCH`] notices with the longest names.
const MAX_BATCH_BYTES: usize = BATCH * 512;

/// The length of the queue of notices. The receiver only compares names, so the queue is short.
const QUEUE_LENGTH: usize = 4096;

/// A write to a Secret that an ApiKey claims.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SecretNotice {
    /// The namespace of the Secret.
    pub namespace: String,
    /// The name of the Secret.
    pub secret: String,
}

/// The sender of notices.
#[derive(Clone)]
pub struct SecretNotices {
    index: Arc<Index>,
    leader: watch::Receiver<bool>,
    metrics: Metrics,
    sender: mpsc::Sender<SecretNotice>,
}

impl SecretNotices {
    /// Returns the sender and the receiver.
    #[must_use]
    pub fn new(
        index: Arc<Index>,
        leader: watch::Receiver<bool>,
        metrics: Metrics,
    ) -> (Self, mpsc::Receiver<SecretNotice>) {
        let (sender, receiver) = mpsc::channel(QUEUE_LENGTH);
        (Self { index, leader, metrics, sender }, receiver)
    }

    /// Queues a notice, if an ApiKey claims the Secret.
    fn receive(&self, namespace: &str, secret: &str) {
        if self.index.claimants(namespace, secret).is_empty() {
            return;
        }
        let notice = SecretNotice { namespace: namespace.to_owned(), secret: secret.to_owned() };
        if self.sender.try_send(notice).is_err() {
            self.metrics.noticed(metrics::NoticeResult::Lost, 1);
        }
    }
}

/// The needed part of a review. It borrows the data from the body.
#[derive(Deserialize)]
struct SecretReview<'a> {
    #[serde(borrow)]
    request: SecretReviewRequest<'a>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct SecretReviewRequest<'a> {
    uid: String,
    operation: String,
    #[serde(default)]
    namespace: String,
    #[serde(default)]
    dry_run: Option<bool>,
    #[serde(borrow, default)]
    object: Option<Written<'a>>,
    #[serde(borrow, default)]
    old_object: Option<Written<'a>>,
}

#[derive(Deserialize)]
struct Written<'a> {
    metadata: SecretMetadata,
    #[serde(rename = "type", default)]
    type_: String,
    #[serde(borrow, default)]
    data: Option<&'a RawValue>,
}

#[derive(Deserialize)]
struct SecretMetadata {
    #[serde(default)]
    name: String,
    #[serde(default)]
    annotations: Option<Annotations>,
}

#[derive(Deserialize)]
struct Annotations {
    #[serde(rename = "keywright.dev/record", default)]
    record: Option<String>,
}

impl Written<'_> {
    /// The digest of the value by the record. `None` if there is no data.
    fn sha256(&self) -> Option<String> {
        let record = self.metadata.annotations.as_ref()?.record.as_ref()?;
        let record: Record = serde_json::from_str(record).ok()?;
        self.data().map(|_| record.current.sha256)
    }

    fn data(&self) -> Option<&str> {
        self.data.map(RawValue::get).filter(|data| *data != "{}")
    }
}

/// Responds to the API server. All writes are allowed.
pub(super) async fn review(State(context): State<AdmissionContext>, body: Bytes) -> Response {
    let started = Instant::now();
    let answer = serde_json::from_slice::<SecretReview<'_>>(&body).map(|review| answer(&context, &review.request));
    // Copies inside the HTTP library can't be overwritten.
    if let Ok(mut body) = body.try_into_mut() {
        body.as_mut().zeroize();
    }
    let (response, verdict) = match answer {
        Ok(Some(review)) => (Json(review).into_response(), AdmissionResult::Allowed),
        Ok(None) => ((StatusCode::BAD_REQUEST, "not a Secret of an ApiKey").into_response(), AdmissionResult::Denied),
        // Without the error, which could quote the body.
        Err(_) => (
            (StatusCode::BAD_REQUEST, "the body is not an AdmissionReview of a Secret").into_response(),
            AdmissionResult::Denied,
        ),
    };
    context.metrics.admitted(AdmissionKind::Secret, verdict, started.elapsed());
    response
}

/// The response. `None` if the review is about another object.
fn answer(context: &AdmissionContext, request: &SecretReviewRequest<'_>) -> Option<serde_json::Value> {
    let written = [&request.object, &request.old_object];
    let secret = written.into_iter().flatten().find(|secret| secret.type_ == SECRET_TYPE)?;
    // The API server sets the name before it calls webhooks, also for generateName.
    let (namespace, name) = (&request.namespace, &secret.metadata.name);
    let cluster = ClusterKeys { index: &context.index, keys: &context.keys, now: context.clock.now() };
    let warnings: Vec<_> = cluster.warning(request, name).into_iter().collect();
    if request.dry_run != Some(true) {
        context.notices.receive(namespace, name);
    }
    Some(json!({
        "apiVersion": "admission.k8s.io/v1",
        "kind": "AdmissionReview",
        "response": {"uid": request.uid, "allowed": true, "warnings": warnings},
    }))
}

/// The ApiKeys, for warnings.
struct ClusterKeys<'a> {
    index: &'a Index,
    keys: &'a Store<ApiKey>,
    now: Timestamp,
}

impl ClusterKeys<'_> {
    /// The warning for a write that removes a value in use.
    fn warning(&self, request: &SecretReviewRequest<'_>, name: &str) -> Option<String> {
        let old = request.old_object.as_ref()?;
        let consequence = match (request.operation.as_str(), &request.object) {
            ("DELETE", _) => "workloads can no longer read it. Restore the Secret from a backup",
            ("UPDATE", Some(new)) if new.data() != old.data() => {
                "the operator accepts no other value. Restore the value"
            }
            _ => return None,
        };
        let sha256 = old.sha256()?;
        let key = |key: String| self.keys.get(&ObjectRef::new(&key).within(&request.namespace));
        let claimants = self.index.claimants(&request.namespace, name);
        let key = claimants.into_iter().filter_map(key).find(|key| is_in_use(key, &sha256, self.now))?;
        let key = key.metadata.name.as_deref().unwrap_or_default();
        Some(format!(
            "Secret {name} holds the value of ApiKey {key}, which is in use: {consequence}, or set \
             spec.rotation.requestedAt of the ApiKey to the current time to mint a new value."
        ))
    }
}

/// Whether the value with this digest works at `now`.
fn is_in_use(key: &ApiKey, sha256: &str, now: Timestamp) -> bool {
    let schedule = Schedule::of(&key.spec);
    let tokens = key.status.iter().flat_map(|status| &status.tokens);
    let mut live = tokens.filter(|token| token.expires_at.as_ref().is_none_or(|end| now < end.0));
    key.metadata.deletion_timestamp.is_none()
        && schedule.active
        && !schedule.expired(now)
        && live.any(|token| token.sha256 == sha256)
}

/// The route for notices of other replicas.
pub(super) fn notices() -> MethodRouter<AdmissionContext> {
    post(receive_batch).layer(DefaultBodyLimit::max(MAX_BATCH_BYTES))
}

async fn receive_batch(State(context): State<AdmissionContext>, Json(notices): Json<Vec<SecretNotice>>) -> StatusCode {
    // A replica that does not lead rejects notices instead of forwarding them, so that they never circulate.
    if !*context.notices.leader.borrow() {
        return StatusCode::CONFLICT;
    }
    let distinct: HashSet<_> = notices.into_iter().take(BATCH).collect();
    for notice in distinct {
        context.notices.receive(&notice.namespace, &notice.secret);
    }
    StatusCode::NO_CONTENT
}

#[cfg(test)]
mod tests {
    use kube::runtime::{reflector::store::Writer, watcher::Event};

    use super::*;
    use crate::{
        api::{ApiKeyStatus, KeyType, Time, Token},
        test_support::key_spec as spec,
    };

    const NOW: &str = "2026-11-25T12:00:00Z";

    fn at(time: &str) -> Time {
        Time(time.parse().unwrap())
    }

    /// ApiKey `k` of namespace `shop` with this digest, after `edit`.
    fn key(sha256: &str, edit: impl FnOnce(&mut ApiKey)) -> ApiKey {
        let mut key = ApiKey::new("k", spec(KeyType::Team, &["Alerts"], &[]));
        key.metadata.namespace = Some("shop".to_owned());
        let minted_at = at("2026-11-01T00:00:00Z");
        let token =
            Token { id: String::new(), sha256: sha256.to_owned(), generation: None, minted_at, expires_at: None };
        key.status = Some(ApiKeyStatus { tokens: vec![token], ..ApiKeyStatus::default() });
        edit(&mut key);
        key
    }

    /// The warning for a request while `key` is the only ApiKey.
    fn warning(key: ApiKey, request: &serde_json::Value) -> Option<String> {
        let index = Index::default();
        let mut writer = Writer::<ApiKey>::default();
        let event = Event::Apply(key);
        index.apply_key(&event);
        writer.apply_watcher_event(&event);
        let body = json!({"request": request}).to_string();
        let review: SecretReview<'_> = serde_json::from_str(&body).unwrap();
        let keys = writer.as_reader();
        let cluster = ClusterKeys { index: &index, keys: &keys, now: NOW.parse().unwrap() };
        let secret = review.request.old_object.as_ref().or(review.request.object.as_ref()).unwrap();
        cluster.warning(&review.request, &secret.metadata.name)
    }

    fn secret(sha256: &str, data: &serde_json::Value) -> serde_json::Value {
        let record = json!({
            "apiKey": "k", "createdAt": "2026-11-01T00:00:00Z",
            "current": {"sha256": sha256, "mintedAt": "2026-11-01T00:00:00Z"},
        });
        json!({
            "metadata": {
                "name": "k-secret", "managedFields": [{"fieldsV1": {"f:data": {}}}],
                "annotations": {"keywright.dev/record": record.to_string(), "other": "a \"quote\""},
            },
            "type": SECRET_TYPE, "data": data,
        })
    }

    fn deletion(sha256: &str) -> serde_json::Value {
        let old = secret(sha256, &json!({"key-value": "a3d0X3Nob3A="}));
        json!({"uid": "1", "operation": "DELETE", "namespace": "shop", "object": null, "oldObject": old})
    }

    #[test]
    fn deletion_and_replacement_of_a_value_in_use_cause_a_warning() {
        let deleted = warning(key("aa", |_| {}), &deletion("aa")).unwrap();
        assert!(deleted.starts_with("Secret k-secret holds the value of ApiKey k, which is in use"), "{deleted}");
        assert!(!deleted.contains("a3d0X3Nob3A="), "{deleted}");
        let mut changed = deletion("aa");
        changed["operation"] = json!("UPDATE");
        changed["object"] = secret("aa", &json!({"key-value": "b3RoZXI="}));
        assert!(warning(key("aa", |_| {}), &changed).unwrap().contains("accepts no other value"));
        changed["object"] = secret("bb", &json!({"key-value": "a3d0X3Nob3A="}));
        assert_eq!(warning(key("aa", |_| {}), &changed), None, "the data is unchanged");
    }

    #[test]
    fn deletion_of_a_value_that_is_not_in_use_causes_no_warning() {
        type Edit = fn(&mut ApiKey);
        let cases: [(&str, Edit); 5] = [
            ("inactive", |key| key.spec.active = Some(false)),
            ("expired", |key| key.spec.expires_at = Some(NOW.to_owned())),
            ("replaced", |key| key.status.as_mut().unwrap().tokens[0].expires_at = Some(at(NOW))),
            ("being deleted", |key| key.metadata.deletion_timestamp = Some(at(NOW))),
            ("not minted", |key| key.status = None),
        ];
        for (case, edit) in cases {
            assert_eq!(warning(key("aa", edit), &deletion("aa")), None, "{case}");
        }
        let mut empty = deletion("aa");
        empty["oldObject"]["data"] = json!({});
        assert_eq!(warning(key("aa", |_| {}), &empty), None, "the Secret has no value");
    }

    /// Any client that reaches the port can forge reviews.
    #[test]
    fn a_forged_review_without_a_known_digest_causes_no_warning() {
        let mut elsewhere = deletion("aa");
        elsewhere["namespace"] = json!("other");
        let mut unrecorded = deletion("aa");
        unrecorded["oldObject"]["metadata"]["annotations"] = json!(null);
        for forged in [deletion("bb"), deletion(""), elsewhere, unrecorded] {
            assert_eq!(warning(key("aa", |_| {}), &forged), None, "{forged}");
        }
    }
}
