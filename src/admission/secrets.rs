//! Hears of writes to the Secrets of keys, warns of those that hurt, and has the leader look at what was written.
//!
//! The operator may neither list nor watch Secrets. Instead, the API server calls this webhook before it creates,
//! updates or deletes a Secret of type `keywright.dev/api-key`. The webhook allows every write, and the configuration
//! says `failurePolicy: Ignore`: a Secret can be written whether or not a replica answers.
//!
//! A review carries the data of the Secret. It is compared in place, is never copied, and the body is overwritten before
//! it is dropped. What leaves this module is a [`Notice`]: the name of a Secret.
//!
//! Reviews and notices can be made up by whoever reaches the port. A made-up one costs a look at a Secret whose ApiKey
//! exists, within the bounds of [`crate::runtime::news`], and tells its sender nothing: a warning is given only for a
//! record with the digest of a value that works.

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

use super::Context;
use crate::{
    api::ApiKey,
    domain::{
        lifecycle::Schedule,
        record::{Record, SECRET_TYPE},
    },
    index::Index,
    runtime::metrics::{self, Kind, Metrics, Verdict},
};

/// The path of the webhook for Secrets.
pub const PATH: &str = "/secrets";

/// The path at which the leader takes notices of other replicas: a POST of a JSON array of [`Notice`]. The answer is 204,
/// or 409 by a replica that does not lead.
pub const NOTICE_PATH: &str = "/notice";

/// How many notices one request may carry.
pub const BATCH: usize = 200;

/// [`BATCH`] notices with the longest names.
const LARGEST_BATCH: usize = BATCH * 512;

/// How many notices wait to be taken in. They are taken in as fast as names are compared.
const WAITING: usize = 4096;

/// Somebody writes to a Secret that an ApiKey claims.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Notice {
    /// The namespace of the Secret.
    pub namespace: String,
    /// The name of the Secret.
    pub secret: String,
}

/// Where notices go. Cloning shares it.
#[derive(Clone)]
pub struct News {
    index: Arc<Index>,
    leader: watch::Receiver<bool>,
    metrics: Metrics,
    sender: mpsc::Sender<Notice>,
}

impl News {
    /// The way in, and the end at which notices are received.
    #[must_use]
    pub fn new(index: Arc<Index>, leader: watch::Receiver<bool>, metrics: Metrics) -> (Self, mpsc::Receiver<Notice>) {
        let (sender, receiver) = mpsc::channel(WAITING);
        (Self { index, leader, metrics, sender }, receiver)
    }

    /// Takes in a notice. A Secret that no ApiKey claims costs nothing further.
    fn heard(&self, namespace: &str, secret: &str) {
        if self.index.claimants(namespace, secret).is_empty() {
            return;
        }
        let notice = Notice { namespace: namespace.to_owned(), secret: secret.to_owned() };
        if self.sender.try_send(notice).is_err() {
            self.metrics.noticed(metrics::Notice::Lost, 1);
        }
    }
}

/// As much of a review as is needed. Data is borrowed from the body.
#[derive(Deserialize)]
struct Review<'a> {
    #[serde(borrow)]
    request: Request<'a>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Request<'a> {
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
    metadata: Metadata,
    #[serde(rename = "type", default)]
    type_: String,
    #[serde(borrow, default)]
    data: Option<&'a RawValue>,
}

#[derive(Deserialize)]
struct Metadata {
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
    /// The digest of the value that it holds, by its record; nothing if there is no data.
    fn sha256(&self) -> Option<String> {
        let record = self.metadata.annotations.as_ref()?.record.as_ref()?;
        let record: Record = serde_json::from_str(record).ok()?;
        self.data().map(|_| record.current.sha256)
    }

    fn data(&self) -> Option<&str> {
        self.data.map(RawValue::get).filter(|data| *data != "{}")
    }
}

/// Answers the API server. Every write is allowed.
pub(super) async fn review(State(context): State<Context>, body: Bytes) -> Response {
    let started = Instant::now();
    let answer = serde_json::from_slice::<Review<'_>>(&body).map(|review| answer(&context, &review.request));
    // Copies inside the HTTP library remain out of reach.
    if let Ok(mut body) = body.try_into_mut() {
        body.as_mut().zeroize();
    }
    let (response, verdict) = match answer {
        Ok(Some(review)) => (Json(review).into_response(), Verdict::Allowed),
        Ok(None) => ((StatusCode::BAD_REQUEST, "not a Secret of an ApiKey").into_response(), Verdict::Denied),
        // The error is not repeated: it could quote the body.
        Err(_) => {
            ((StatusCode::BAD_REQUEST, "the body is no AdmissionReview of a Secret").into_response(), Verdict::Denied)
        }
    };
    context.metrics.admitted(Kind::Secret, verdict, started.elapsed());
    response
}

/// The review with the answer; nothing if it is about something else.
fn answer(context: &Context, request: &Request<'_>) -> Option<serde_json::Value> {
    let written = [&request.object, &request.old_object];
    let secret = written.into_iter().flatten().find(|secret| secret.type_ == SECRET_TYPE)?;
    // Objects have their names when webhooks are called, those with generateName too.
    let (namespace, name) = (&request.namespace, &secret.metadata.name);
    let cluster = Cluster { index: &context.index, keys: &context.keys, now: context.clock.now() };
    let warnings: Vec<_> = cluster.warning(request, name).into_iter().collect();
    if request.dry_run != Some(true) {
        context.news.heard(namespace, name);
    }
    Some(json!({
        "apiVersion": "admission.k8s.io/v1",
        "kind": "AdmissionReview",
        "response": {"uid": request.uid, "allowed": true, "warnings": warnings},
    }))
}

/// What warnings are judged by.
struct Cluster<'a> {
    index: &'a Index,
    keys: &'a Store<ApiKey>,
    now: Timestamp,
}

impl Cluster<'_> {
    /// The warning for a write that takes away a value that is in use.
    fn warning(&self, request: &Request<'_>, name: &str) -> Option<String> {
        let old = request.old_object.as_ref()?;
        let consequence = match (request.operation.as_str(), &request.object) {
            ("DELETE", _) => "workloads can't read it any more. Create the Secret again from a backup",
            ("UPDATE", Some(new)) if new.data() != old.data() => {
                "the operator accepts no other value here. Put the value back"
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
             spec.rotation.requestedAt of the ApiKey to the current time to have a new value minted."
        ))
    }
}

/// Whether a value of this digest passes at `now`.
fn is_in_use(key: &ApiKey, sha256: &str, now: Timestamp) -> bool {
    let schedule = Schedule::of(&key.spec);
    let tokens = key.status.iter().flat_map(|status| &status.tokens);
    let mut live = tokens.filter(|token| token.expires_at.as_ref().is_none_or(|end| now < end.0));
    key.metadata.deletion_timestamp.is_none()
        && schedule.active
        && !schedule.expired(now)
        && live.any(|token| token.sha256 == sha256)
}

/// Takes notices of other replicas.
pub(super) fn notices() -> MethodRouter<Context> {
    post(take).layer(DefaultBodyLimit::max(LARGEST_BATCH))
}

async fn take(State(context): State<Context>, Json(notices): Json<Vec<Notice>>) -> StatusCode {
    // A notice goes from one replica to another once, so that none goes in circles.
    if !*context.news.leader.borrow() {
        return StatusCode::CONFLICT;
    }
    let distinct: HashSet<_> = notices.into_iter().take(BATCH).collect();
    for notice in distinct {
        context.news.heard(&notice.namespace, &notice.secret);
    }
    StatusCode::NO_CONTENT
}

#[cfg(test)]
mod tests {
    use kube::runtime::{reflector::store::Writer, watcher::Event};

    use super::*;
    use crate::{
        api::{ApiKeyStatus, KeyType, Time, Token},
        domain::validate::tests::spec,
    };

    const NOW: &str = "2026-11-25T12:00:00Z";

    fn at(time: &str) -> Time {
        Time(time.parse().unwrap())
    }

    /// ApiKey `k` of namespace `shop` with this digest, and what was made of `edit`.
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

    /// The warning that an API server gets which knows `key`.
    fn warning(key: ApiKey, request: &serde_json::Value) -> Option<String> {
        let index = Index::default();
        let mut writer = Writer::<ApiKey>::default();
        let event = Event::Apply(key);
        index.apply_key(&event);
        writer.apply_watcher_event(&event);
        let body = json!({"request": request}).to_string();
        let review: Review<'_> = serde_json::from_str(&body).unwrap();
        let keys = writer.as_reader();
        let cluster = Cluster { index: &index, keys: &keys, now: NOW.parse().unwrap() };
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
    fn who_takes_away_a_value_that_is_in_use_is_warned() {
        let deleted = warning(key("aa", |_| {}), &deletion("aa")).unwrap();
        assert!(deleted.starts_with("Secret k-secret holds the value of ApiKey k, which is in use"), "{deleted}");
        assert!(!deleted.contains("a3d0X3Nob3A="), "{deleted}");
        let mut changed = deletion("aa");
        changed["operation"] = json!("UPDATE");
        changed["object"] = secret("aa", &json!({"key-value": "b3RoZXI="}));
        assert!(warning(key("aa", |_| {}), &changed).unwrap().contains("accepts no other value"));
        changed["object"] = secret("bb", &json!({"key-value": "a3d0X3Nob3A="}));
        assert_eq!(warning(key("aa", |_| {}), &changed), None, "the data is as it was");
    }

    #[test]
    fn nobody_is_warned_of_a_value_that_is_not_in_use() {
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
        assert_eq!(warning(key("aa", |_| {}), &empty), None, "there is no value in it");
    }

    /// Whoever reaches the port can make reviews up.
    #[test]
    fn a_made_up_review_tells_nothing_to_whoever_does_not_know_the_digest() {
        let mut elsewhere = deletion("aa");
        elsewhere["namespace"] = json!("other");
        let mut unrecorded = deletion("aa");
        unrecorded["oldObject"]["metadata"]["annotations"] = json!(null);
        for made_up in [deletion("bb"), deletion(""), elsewhere, unrecorded] {
            assert_eq!(warning(key("aa", |_| {}), &made_up), None, "{made_up}");
        }
    }
}
