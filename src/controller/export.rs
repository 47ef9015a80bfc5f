//! Writes the digests of the values that work into ConfigMaps or Secrets, for gateways that check digests themselves.
//!
//! The leader alone does. A replica that lost the lead and does not know it yet could bring a revoked value back, so each
//! write is for the version that was read, and who takes over changes the version of every object first.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use k8s_openapi::{
    ByteString,
    api::core::v1::{ConfigMap, Secret},
};
use kube::{
    Api, Client, ResourceExt,
    api::{ApiResource, DynamicObject, Patch, PatchParams, PostParams},
    core::Status,
    runtime::reflector::Store,
};
use serde_json::{Map, Value, json};
use tokio::{
    sync::{Notify, watch},
    time::{MissedTickBehavior, interval, sleep},
};
use tokio_util::sync::CancellationToken;

use super::{RequestError, request};
use crate::{
    api::ApiKey,
    domain::export::{Data, Kind, LIMIT, MOST, SECRET_TYPE, Split, export, map_name, split},
    runtime::clock::Clock,
};

/// The label by which a gateway finds all objects of an export. Its value is the name of the first.
pub const LABEL: &str = "keywright.dev/export";

/// The annotation that says which replica writes an object.
const WRITER: &str = "keywright.dev/export-writer";

/// Many keys change at once when a team is set up: one write is enough. Short, since a revocation waits for it.
const PAUSE: Duration = Duration::from_millis(200);

/// After a failure.
const RETRY: Duration = Duration::from_secs(1);

/// Between two looks at whether somebody else changed what was written.
const CHECK: Duration = Duration::from_mins(1);

/// Keeps the export as the keys are, from the moment of leadership until shutdown. `changed` says that a key is another.
pub async fn run(
    mut exporter: Exporter,
    keys: Store<ApiKey>,
    clock: Clock,
    mut leader: watch::Receiver<bool>,
    changed: Arc<Notify>,
    shutdown: CancellationToken,
) {
    // Before everything is listed, keys that work would be missing.
    let begin = async { leader.wait_for(|leads| *leads).await.is_ok() && keys.wait_until_ready().await.is_ok() };
    if shutdown.run_until_cancelled(begin).await != Some(true) {
        return;
    }
    let mut checks = interval(CHECK);
    checks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut problem = None;
    loop {
        let now = clock.exact();
        let export = export(keys.state().iter().map(AsRef::as_ref), now);
        let wanted = split(&export.entries, LIMIT, MOST);
        let mut pause = export.until.and_then(|until| Duration::try_from(until.duration_since(now)).ok());
        let failed = match exporter.write(&wanted).await {
            Ok(written) => {
                if written > 0 {
                    tracing::info!(digests = export.entries.len(), written, "exported digests");
                }
                let left_out = wanted.left_out;
                (left_out > 0).then(|| format!("{left_out} digests do not fit into {MOST} objects: use the verifier"))
            }
            // Somebody else wrote first; what they wrote is read again.
            Err(error) if error.is(|status: &Status| status.is_conflict() || status.is_already_exists()) => {
                pause = Some(PAUSE);
                None
            }
            Err(error) => {
                pause = Some(RETRY);
                Some(error.to_string())
            }
        };
        if let Some(error) = failed.as_ref().filter(|error| problem.as_ref() != Some(*error)) {
            tracing::error!(
                error,
                "digests are not exported as they should be; what was revoked may still be accepted"
            );
        }
        problem = failed;
        // What was being written is done: another replica may lead now.
        tokio::select! {
            () = shutdown.cancelled() => return,
            () = changed.notified() => sleep(PAUSE).await,
            () = sleep(pause.unwrap_or(CHECK)) => {}
            _ = checks.tick() => if let Err(error) = exporter.check().await {
                tracing::warn!(%error, "the exported digests could not be checked");
            },
        }
    }
}

/// Writes one export.
pub struct Exporter {
    maps: Api<DynamicObject>,
    kind: Kind,
    namespace: String,
    name: String,
    writer: String,
    /// What is in the cluster, as this replica read or wrote it; none before that, and after anything went wrong.
    held: Option<Vec<Held>>,
}

struct Held {
    version: Option<String>,
    data: Data,
}

impl Exporter {
    /// Nothing is read or written before [`Self::write`]. `writer` is the name of this replica.
    #[must_use]
    pub fn new(client: Client, kind: Kind, namespace: &str, name: &str, writer: &str) -> Self {
        let resource = match kind {
            Kind::ConfigMap => ApiResource::erase::<ConfigMap>(&()),
            Kind::Secret => ApiResource::erase::<Secret>(&()),
        };
        Self {
            maps: Api::namespaced_with(client, namespace, &resource),
            kind,
            namespace: namespace.to_owned(),
            name: name.to_owned(),
            writer: writer.to_owned(),
            held: None,
        }
    }

    /// Makes the objects hold what is wanted. How many had to be written.
    ///
    /// # Errors
    /// If the API server can't be asked or refuses, or if an object of such a name is somebody else's.
    pub async fn write(&mut self, wanted: &Split) -> Result<usize, RequestError> {
        // Kept again only when all went well.
        let mut held = match self.held.take() {
            Some(held) => held,
            None => self.take_over(wanted.maps.len()).await?,
        };
        let none = Data::new();
        let count = wanted.maps.len().max(held.len());
        let wanted_at = |place: usize| wanted.maps.get(place).unwrap_or(&none);
        // When entries move to other objects, they arrive before they go.
        let grows = wanted.maps.len() > held.len();
        let existing = held.len();
        let places: Vec<_> = if grows { (0..count).rev().collect() } else { (0..count).collect() };
        let mut created = BTreeMap::new();
        let mut written = 0;
        for place in places {
            if place >= existing {
                created.insert(place, self.create(place, wanted_at(place)).await?);
            } else if held[place].data != *wanted_at(place) {
                held[place] = self.change(place, &held[place], wanted_at(place)).await?;
            } else {
                continue;
            }
            written += 1;
        }
        held.extend(created.into_values());
        self.held = Some(held);
        Ok(written)
    }

    /// Looks whether somebody else changed or deleted an object; the next [`Self::write`] then puts it right.
    ///
    /// # Errors
    /// If the API server can't be asked or refuses.
    pub async fn check(&mut self) -> Result<(), RequestError> {
        for (place, held) in self.held.iter().flatten().enumerate() {
            let name = map_name(&self.name, place);
            let found = request(&self.what("get", &name), self.maps.get_metadata_opt(&name)).await?;
            if found.and_then(|map| map.resource_version()) != held.version {
                tracing::warn!(namespace = self.namespace, name, "somebody changed the exported digests");
                self.held = None;
                break;
            }
        }
        Ok(())
    }

    /// Reads what there is, and makes sure that nothing that another replica has sent can still be written.
    async fn take_over(&self, needed: usize) -> Result<Vec<Held>, RequestError> {
        let mut held = Vec::new();
        while held.len() < MOST {
            let name = map_name(&self.name, held.len());
            let Some(map) = request(&self.what("get", &name), self.maps.get_opt(&name)).await? else { break };
            if map.labels().get(LABEL) != Some(&self.name) {
                if held.len() >= needed {
                    break;
                }
                return Err(RequestError::new_local(format!(
                    "{:?} {}/{name} exists but is not labelled {LABEL}={}: delete it, or let --export-digests name another",
                    self.kind, self.namespace, self.name
                )));
            }
            let patch = json!({"metadata": {
                "resourceVersion": map.resource_version(),
                "annotations": {WRITER: self.writer},
            }});
            held.push(self.patch(&name, patch).await?);
        }
        Ok(held)
    }

    async fn create(&self, place: usize, data: &Data) -> Result<Held, RequestError> {
        let name = map_name(&self.name, place);
        let mut map = json!({
            "metadata": {
                "name": name,
                "labels": {LABEL: self.name},
                "annotations": {WRITER: self.writer},
            },
            "data": data.iter().map(|(id, entry)| (id.clone(), self.encode(entry))).collect::<Map<_, _>>(),
        });
        if self.kind == Kind::Secret {
            map["type"] = json!(SECRET_TYPE);
        }
        let what = self.what("create", &name);
        let map = serde_json::from_value(map).map_err(|error| RequestError::new_local(format!("{what}: {error}")))?;
        Ok(self.held(&request(&what, self.maps.create(&PostParams::default(), &map)).await?))
    }

    async fn change(&self, place: usize, held: &Held, wanted: &Data) -> Result<Held, RequestError> {
        let data = difference(&held.data, wanted, |entry| self.encode(entry));
        let patch = json!({"metadata": {"resourceVersion": held.version}, "data": data});
        self.patch(&map_name(&self.name, place), patch).await
    }

    async fn patch(&self, name: &str, patch: Value) -> Result<Held, RequestError> {
        let what = self.what("patch", name);
        let (params, patch) = (PatchParams::default(), Patch::Merge(patch));
        Ok(self.held(&request(&what, self.maps.patch(name, &params, &patch)).await?))
    }

    /// What is done to an object, for people.
    fn what(&self, verb: &str, name: &str) -> String {
        format!("{verb} {:?} {}/{name}", self.kind, self.namespace)
    }

    /// An entry as the API transports it.
    fn encode(&self, entry: &str) -> Value {
        match self.kind {
            Kind::ConfigMap => json!(entry),
            Kind::Secret => json!(ByteString(entry.as_bytes().to_vec())),
        }
    }

    fn held(&self, map: &DynamicObject) -> Held {
        let decode = |entry: &Value| match self.kind {
            Kind::ConfigMap => entry.as_str().unwrap_or_default().to_owned(),
            Kind::Secret => {
                let bytes = serde_json::from_value::<ByteString>(entry.clone()).unwrap_or_default();
                String::from_utf8_lossy(&bytes.0).into_owned()
            }
        };
        let data = map.data.get("data").and_then(Value::as_object).into_iter().flatten();
        Held { version: map.resource_version(), data: data.map(|(id, entry)| (id.clone(), decode(entry))).collect() }
    }
}

/// The merge patch that makes `held` into `wanted`; what is gone has to be said.
fn difference(held: &Data, wanted: &Data, encode: impl Fn(&str) -> Value) -> Map<String, Value> {
    let gone = held.keys().filter(|id| !wanted.contains_key(*id)).map(|id| (id.clone(), Value::Null));
    let new = wanted.iter().filter(|(id, entry)| held.get(*id) != Some(entry));
    gone.chain(new.map(|(id, entry)| (id.clone(), encode(entry)))).collect()
}

#[cfg(test)]
mod tests {
    use std::{
        future::ready,
        sync::{Mutex, PoisonError},
    };

    use axum::{
        Json, Router,
        body::Bytes,
        extract::State,
        http::{Method, StatusCode, Uri},
        response::{IntoResponse, Response},
    };

    use super::*;

    #[derive(Default)]
    struct Stored {
        maps: BTreeMap<String, Value>,
        /// What was written, in order.
        writes: Vec<String>,
        version: u64,
    }

    /// Objects by name.
    #[derive(Clone, Default)]
    struct Server(Arc<Mutex<Stored>>);

    impl Server {
        fn exporter(&self, writer: &str) -> Exporter {
            self.exporter_of(Kind::ConfigMap, writer)
        }

        fn exporter_of(&self, kind: Kind, writer: &str) -> Exporter {
            let answer = |State(server): State<Self>, method: Method, uri: Uri, body: Bytes| {
                ready(server.answer(&method, &uri, &body))
            };
            let client = Client::new(Router::new().fallback(answer).with_state(self.clone()), "gateway");
            Exporter::new(client, kind, "gateway", "digests", writer)
        }

        fn answer(&self, method: &Method, uri: &Uri, body: &[u8]) -> Response {
            let mut stored = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            let Stored { maps, writes, version } = &mut *stored;
            let body: Value = serde_json::from_slice(body).unwrap_or_default();
            let path = uri.path().strip_prefix("/api/v1/namespaces/gateway/").unwrap();
            let name = path.trim_start_matches("configmaps").trim_start_matches("secrets").trim_start_matches('/');
            let name = if name.is_empty() { body["metadata"]["name"].as_str().unwrap() } else { name }.to_owned();
            let refuse = |code: u16, reason: &str| {
                let status = Status::failure(reason, reason).with_code(code);
                (StatusCode::from_u16(code).unwrap(), Json(status)).into_response()
            };
            let stored = maps.get(&name).cloned();
            let changed = match (method.as_str(), stored) {
                ("GET", Some(stored)) => return Json(stored).into_response(),
                ("POST", Some(_)) => return refuse(409, "AlreadyExists"),
                ("POST", None) => body,
                ("PATCH", Some(stored)) => {
                    let version = &body["metadata"]["resourceVersion"];
                    assert!(version.is_string(), "a write for any version");
                    if *version != stored["metadata"]["resourceVersion"] {
                        return refuse(409, "Conflict");
                    }
                    let mut changed = stored.clone();
                    json_patch::merge(&mut changed, &body);
                    if changed == stored {
                        return Json(stored).into_response();
                    }
                    changed
                }
                _ => return refuse(404, "NotFound"),
            };
            writes.push(name.clone());
            *version += 1;
            let mut changed = changed;
            changed["metadata"]["resourceVersion"] = json!(version.to_string());
            maps.insert(name, changed.clone());
            Json(changed).into_response()
        }

        fn data(&self, name: &str) -> Value {
            self.0.lock().unwrap().maps[name]["data"].clone()
        }

        fn writes(&self) -> Vec<String> {
            std::mem::take(&mut self.0.lock().unwrap().writes)
        }

        /// What somebody else does.
        fn edit(&self, name: &str, change: impl FnOnce(&mut Value)) {
            let mut server = self.0.lock().unwrap();
            let map = server.maps.entry(name.to_owned()).or_insert_with(|| json!({"metadata": {"name": name}}));
            map["metadata"]["resourceVersion"] = json!("edited");
            change(map);
        }
    }

    fn data(entries: &[(&str, &str)]) -> Data {
        entries.iter().map(|(id, entry)| ((*id).to_owned(), (*entry).to_owned())).collect()
    }

    fn wanted(maps: &[&[(&str, &str)]]) -> Split {
        Split { maps: maps.iter().map(|map| data(map)).collect(), left_out: 0 }
    }

    #[test]
    fn a_patch_says_what_changed_and_what_is_gone() {
        let (before, after) =
            (data(&[("a", "1"), ("b", "1"), ("c", "1")]), data(&[("b", "2"), ("c", "1"), ("d", "1")]));
        assert_eq!(
            Value::from(difference(&before, &after, |entry| json!(entry))),
            json!({"a": null, "b": "2", "d": "1"})
        );
    }

    #[tokio::test]
    async fn only_what_changed_is_written_and_entries_arrive_before_they_go() {
        let server = Server::default();
        let mut exporter = server.exporter("one");
        assert_eq!(exporter.write(&wanted(&[&[("a", "1"), ("b", "1")]])).await.unwrap(), 1);
        assert_eq!(server.data("digests"), json!({"a": "1", "b": "1"}));
        let labels = server.0.lock().unwrap().maps["digests"]["metadata"]["labels"].clone();
        assert_eq!(labels, json!({LABEL: "digests"}));
        assert_eq!(exporter.write(&wanted(&[&[("a", "1"), ("b", "1")]])).await.unwrap(), 0);
        assert_eq!(server.writes(), ["digests"]);

        exporter.write(&wanted(&[&[("a", "1")], &[("b", "1")]])).await.unwrap();
        assert_eq!(server.writes(), ["digests-2", "digests"]);
        exporter.write(&wanted(&[&[("a", "1")], &[("b", "2")]])).await.unwrap();
        assert_eq!(server.writes(), ["digests-2"]);
        exporter.write(&wanted(&[&[("a", "1"), ("b", "2")]])).await.unwrap();
        assert_eq!(server.writes(), ["digests", "digests-2"]);
        assert_eq!(server.data("digests-2"), json!({}), "what is not needed is emptied");
        exporter.write(&wanted(&[&[("a", "1"), ("b", "2")]])).await.unwrap();
        assert_eq!(server.writes(), [""; 0]);
    }

    #[tokio::test]
    async fn who_lost_the_lead_brings_nothing_back() {
        let server = Server::default();
        let (mut old, mut new) = (server.exporter("old"), server.exporter("new"));
        old.write(&wanted(&[&[("a", "1")]])).await.unwrap();
        // The successor finds nothing to change, and yet nothing that the old leader has read can be written over now.
        new.write(&wanted(&[&[("a", "1")]])).await.unwrap();
        let late = old.write(&wanted(&[&[("a", "1"), ("revoked", "1")]])).await.unwrap_err();
        assert!(late.is(|status: &Status| status.is_conflict()), "{late}");
        assert_eq!(server.data("digests"), json!({"a": "1"}));
        server.writes();
        new.write(&wanted(&[&[]])).await.unwrap();
        assert_eq!((server.data("digests"), server.writes()), (json!({}), vec!["digests".to_owned()]));
    }

    #[tokio::test]
    async fn what_somebody_else_did_is_found_and_put_right() {
        let server = Server::default();
        let mut exporter = server.exporter("one");
        let all = wanted(&[&[("a", "1")]]);
        exporter.write(&all).await.unwrap();
        server.edit("digests", |map| map["data"]["forged"] = json!("1"));
        exporter.write(&all).await.unwrap();
        assert_eq!(server.data("digests"), json!({"a": "1", "forged": "1"}), "nothing asked yet");
        exporter.check().await.unwrap();
        exporter.write(&all).await.unwrap();
        assert_eq!(server.data("digests"), json!({"a": "1"}));

        server.0.lock().unwrap().maps.clear();
        exporter.check().await.unwrap();
        exporter.write(&all).await.unwrap();
        assert_eq!(server.data("digests"), json!({"a": "1"}));
    }

    #[tokio::test]
    async fn a_config_map_of_somebody_else_is_left_alone() {
        let server = Server::default();
        server.edit("digests", |map| map["data"] = json!({"theirs": "1"}));
        let refused = server.exporter("one").write(&wanted(&[&[("a", "1")]])).await.unwrap_err().to_string();
        assert!(refused.contains("ConfigMap gateway/digests exists but is not labelled keywright.dev/export=digests"));
        assert_eq!(server.data("digests"), json!({"theirs": "1"}));
    }

    #[tokio::test]
    async fn secrets_hold_the_same_and_are_of_a_type_that_means_nothing_else() {
        let server = Server::default();
        let mut exporter = server.exporter_of(Kind::Secret, "one");
        exporter.write(&wanted(&[&[("a", "1"), ("b", "1")]])).await.unwrap();
        assert_eq!(server.data("digests"), json!({"a": "MQ==", "b": "MQ=="}));
        assert_eq!(server.0.lock().unwrap().maps["digests"]["type"], "keywright.dev/digests");
        // Read by the next leader, and changed.
        let mut next = server.exporter_of(Kind::Secret, "two");
        server.writes();
        next.write(&wanted(&[&[("b", "2")]])).await.unwrap();
        assert_eq!(server.writes(), ["digests"; 2]);
        assert_eq!(server.data("digests"), json!({"b": "Mg=="}));
    }
}
