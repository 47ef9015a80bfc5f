//! Writes the digests of the values that work into ConfigMaps or Secrets, for gateways that check digests themselves.
//!
//! Only the leader writes. A replica that lost the leadership without noticing could restore a revoked value. Each
//! write therefore names the version that was read, and a new leader first changes the version of every object.

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
    sync::Notify,
    time::{MissedTickBehavior, interval, sleep},
};
use tokio_util::sync::CancellationToken;

use super::{RequestError, request};
use crate::{
    api::ApiKey,
    clock::Clock,
    domain::export::{Data, ExportKind, LIMIT, MAX_OBJECTS, SECRET_TYPE, Split, export, map_name, split},
};

/// The label by which gateways select the objects of an export. Its value is the name of the first object.
pub const LABEL: &str = "keywright.dev/export";

/// The annotation that names the replica that writes an object.
const WRITER: &str = "keywright.dev/export-writer";

/// The delay between a change and its write, so that many changes at once cause one write. A revocation waits this
/// long.
const WRITE_DELAY: Duration = Duration::from_millis(200);

/// The delay after a failure.
const RETRY_DELAY: Duration = Duration::from_secs(1);

/// The interval between two checks for changes by another writer.
const CHECK_INTERVAL: Duration = Duration::from_mins(1);

/// Keeps the export equal to the state of the keys until shutdown. Call it while this replica leads. `changed` signals a change
/// of a key.
pub async fn run(
    mut exporter: DigestExporter,
    keys: Store<ApiKey>,
    clock: Clock,
    changed: Arc<Notify>,
    shutdown: CancellationToken,
) {
    // An export before the first complete list would omit keys.
    if shutdown.run_until_cancelled(keys.wait_until_ready()).await.is_none_or(|ready| ready.is_err()) {
        return;
    }
    let mut checks = interval(CHECK_INTERVAL);
    checks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut last_error = None;
    loop {
        let now = clock.exact();
        let export = export(keys.state().iter().map(AsRef::as_ref), now);
        let wanted = split(&export.entries, LIMIT, MAX_OBJECTS);
        let mut pause = export.until.and_then(|until| Duration::try_from(until.duration_since(now)).ok());
        let error = match exporter.write(&wanted).await {
            Ok(written) => {
                if written > 0 {
                    tracing::info!(digests = export.entries.len(), written, "exported digests");
                }
                let left_out = wanted.left_out;
                (left_out > 0)
                    .then(|| format!("{left_out} digests do not fit into {MAX_OBJECTS} objects: use the verifier"))
            }
            // Another writer was faster. The next write reads the objects again.
            Err(error) if error.is(|status: &Status| status.is_conflict() || status.is_already_exists()) => {
                pause = Some(WRITE_DELAY);
                None
            }
            Err(error) => {
                pause = Some(RETRY_DELAY);
                Some(error.to_string())
            }
        };
        if let Some(error) = error.as_ref().filter(|error| last_error.as_ref() != Some(*error)) {
            tracing::error!(
                error,
                "the exported digests are incomplete or outdated: gateways may accept revoked values"
            );
        }
        last_error = error;
        // A shutdown takes effect between writes, so that no write is in progress when another replica leads.
        tokio::select! {
            () = shutdown.cancelled() => return,
            () = changed.notified() => sleep(WRITE_DELAY).await,
            () = sleep(pause.unwrap_or(CHECK_INTERVAL)) => {}
            _ = checks.tick() => if let Err(error) = exporter.check().await {
                tracing::warn!(%error, "the exported digests could not be checked");
            },
        }
    }
}

/// Writes one export.
pub struct DigestExporter {
    maps: Api<DynamicObject>,
    kind: ExportKind,
    namespace: String,
    name: String,
    writer: String,
    /// The objects as this replica last read or wrote them. `None` before the first write and after an error.
    objects: Option<Vec<ExportedObject>>,
}

struct ExportedObject {
    version: Option<String>,
    data: Data,
}

impl DigestExporter {
    /// Creates an exporter without a request. `writer` is the name of this replica.
    #[must_use]
    pub fn new(client: Client, kind: ExportKind, namespace: &str, name: &str, writer: &str) -> Self {
        let resource = match kind {
            ExportKind::ConfigMap => ApiResource::erase::<ConfigMap>(&()),
            ExportKind::Secret => ApiResource::erase::<Secret>(&()),
        };
        Self {
            maps: Api::namespaced_with(client, namespace, &resource),
            kind,
            namespace: namespace.to_owned(),
            name: name.to_owned(),
            writer: writer.to_owned(),
            objects: None,
        }
    }

    /// Writes the objects that differ from `wanted`, and returns their number.
    ///
    /// # Errors
    /// If the API server rejects a request or can't be reached, or if an object of that name belongs to another writer.
    pub async fn write(&mut self, wanted: &Split) -> Result<usize, RequestError> {
        // Stored again only after success.
        let mut objects = match self.objects.take() {
            Some(objects) => objects,
            None => self.take_over(wanted.maps.len()).await?,
        };
        let none = Data::new();
        let count = wanted.maps.len().max(objects.len());
        let wanted_at = |index: usize| wanted.maps.get(index).unwrap_or(&none);
        // An entry that moves to another object is added there before it is removed here.
        let grows = wanted.maps.len() > objects.len();
        let existing = objects.len();
        let indices: Vec<_> = if grows { (0..count).rev().collect() } else { (0..count).collect() };
        let mut created = BTreeMap::new();
        let mut written = 0;
        for index in indices {
            if index >= existing {
                created.insert(index, self.create(index, wanted_at(index)).await?);
            } else if objects[index].data != *wanted_at(index) {
                objects[index] = self.change(index, &objects[index], wanted_at(index)).await?;
            } else {
                continue;
            }
            written += 1;
        }
        objects.extend(created.into_values());
        self.objects = Some(objects);
        Ok(written)
    }

    /// Checks whether another writer changed or deleted an object. If so, the next [`Self::write`] restores it.
    ///
    /// # Errors
    /// If the API server rejects a request or can't be reached.
    pub async fn check(&mut self) -> Result<(), RequestError> {
        for (index, object) in self.objects.iter().flatten().enumerate() {
            let name = map_name(&self.name, index);
            let found = request(&self.operation("get", &name), self.maps.get_metadata_opt(&name)).await?;
            if found.and_then(|map| map.resource_version()) != object.version {
                tracing::warn!(
                    namespace = self.namespace,
                    name,
                    "another writer changed the exported digests; they are written again"
                );
                self.objects = None;
                break;
            }
        }
        Ok(())
    }

    /// Reads the objects and changes the version of each, so that pending writes of another replica fail.
    async fn take_over(&self, needed: usize) -> Result<Vec<ExportedObject>, RequestError> {
        let mut objects = Vec::new();
        while objects.len() < MAX_OBJECTS {
            let name = map_name(&self.name, objects.len());
            let Some(map) = request(&self.operation("get", &name), self.maps.get_opt(&name)).await? else { break };
            if map.labels().get(LABEL) != Some(&self.name) {
                if objects.len() >= needed {
                    break;
                }
                return Err(RequestError::new_local(format!(
                    "{:?} {}/{name} exists without the label {LABEL}={}: delete it, or name another object in \
                     --export-digests",
                    self.kind, self.namespace, self.name
                )));
            }
            let patch = json!({"metadata": {
                "resourceVersion": map.resource_version(),
                "annotations": {WRITER: self.writer},
            }});
            objects.push(self.patch(&name, patch).await?);
        }
        Ok(objects)
    }

    async fn create(&self, index: usize, data: &Data) -> Result<ExportedObject, RequestError> {
        let name = map_name(&self.name, index);
        let mut map = json!({
            "metadata": {
                "name": name,
                "labels": {LABEL: self.name},
                "annotations": {WRITER: self.writer},
            },
            "data": data.iter().map(|(id, entry)| (id.clone(), self.encode(entry))).collect::<Map<_, _>>(),
        });
        if self.kind == ExportKind::Secret {
            map["type"] = json!(SECRET_TYPE);
        }
        let operation = self.operation("create", &name);
        let map =
            serde_json::from_value(map).map_err(|error| RequestError::new_local(format!("{operation}: {error}")))?;
        Ok(self.exported_object(&request(&operation, self.maps.create(&PostParams::default(), &map)).await?))
    }

    async fn change(
        &self,
        index: usize,
        current: &ExportedObject,
        wanted: &Data,
    ) -> Result<ExportedObject, RequestError> {
        let data = difference(&current.data, wanted, |entry| self.encode(entry));
        let patch = json!({"metadata": {"resourceVersion": current.version}, "data": data});
        self.patch(&map_name(&self.name, index), patch).await
    }

    async fn patch(&self, name: &str, patch: Value) -> Result<ExportedObject, RequestError> {
        let operation = self.operation("patch", name);
        let (params, patch) = (PatchParams::default(), Patch::Merge(patch));
        Ok(self.exported_object(&request(&operation, self.maps.patch(name, &params, &patch)).await?))
    }

    /// Describes a request in messages.
    fn operation(&self, verb: &str, name: &str) -> String {
        format!("{verb} {:?} {}/{name}", self.kind, self.namespace)
    }

    /// Encodes an entry as the API represents it.
    fn encode(&self, entry: &str) -> Value {
        match self.kind {
            ExportKind::ConfigMap => json!(entry),
            ExportKind::Secret => json!(ByteString(entry.as_bytes().to_vec())),
        }
    }

    fn exported_object(&self, map: &DynamicObject) -> ExportedObject {
        let decode = |entry: &Value| match self.kind {
            ExportKind::ConfigMap => entry.as_str().unwrap_or_default().to_owned(),
            ExportKind::Secret => {
                let bytes = serde_json::from_value::<ByteString>(entry.clone()).unwrap_or_default();
                String::from_utf8_lossy(&bytes.0).into_owned()
            }
        };
        let data = map.data.get("data").and_then(Value::as_object).into_iter().flatten();
        ExportedObject {
            version: map.resource_version(),
            data: data.map(|(id, entry)| (id.clone(), decode(entry))).collect(),
        }
    }
}

/// Returns the merge patch (RFC 7396) that turns `current` into `wanted`.
fn difference(current: &Data, wanted: &Data, encode: impl Fn(&str) -> Value) -> Map<String, Value> {
    let removed = current.keys().filter(|id| !wanted.contains_key(*id)).map(|id| (id.clone(), Value::Null));
    let changed = wanted.iter().filter(|(id, entry)| current.get(*id) != Some(entry));
    removed.chain(changed.map(|(id, entry)| (id.clone(), encode(entry)))).collect()
}

#[cfg(test)]
mod tests {

    use super::*;
    use crate::test_support::api_server::FakeApiServer;

    const MAPS: &str = "/api/v1/namespaces/gateway/configmaps";

    impl FakeApiServer {
        fn exporter(&self, writer: &str) -> DigestExporter {
            self.exporter_of(ExportKind::ConfigMap, writer)
        }

        fn exporter_of(&self, kind: ExportKind, writer: &str) -> DigestExporter {
            DigestExporter::new(self.client(), kind, "gateway", "digests", writer)
        }

        /// The data of an exported object, of either kind.
        fn data(&self, name: &str) -> Value {
            let kinds = ["configmaps", "secrets"].map(|kind| format!("/api/v1/namespaces/gateway/{kind}/{name}"));
            kinds.iter().find_map(|path| self.object(path)).unwrap()["data"].clone()
        }

        fn writes(&self) -> Vec<String> {
            std::mem::take(&mut self.stored().writes)
        }

        /// Changes an object as another writer.
        fn edit(&self, name: &str, change: impl FnOnce(&mut Value)) {
            let path = format!("{MAPS}/{name}");
            let mut map = self.object(&path).unwrap_or_else(|| json!({"metadata": {"name": name}}));
            change(&mut map);
            self.put(&path, map);
        }
    }

    fn data(entries: &[(&str, &str)]) -> Data {
        entries.iter().map(|(id, entry)| ((*id).to_owned(), (*entry).to_owned())).collect()
    }

    fn wanted(maps: &[&[(&str, &str)]]) -> Split {
        Split { maps: maps.iter().map(|map| data(map)).collect(), left_out: 0 }
    }

    #[test]
    fn difference_sets_changed_entries_and_removes_missing_ones() {
        let (before, after) =
            (data(&[("a", "1"), ("b", "1"), ("c", "1")]), data(&[("b", "2"), ("c", "1"), ("d", "1")]));
        assert_eq!(
            Value::from(difference(&before, &after, |entry| json!(entry))),
            json!({"a": null, "b": "2", "d": "1"})
        );
    }

    #[tokio::test]
    async fn only_changed_objects_are_written_and_entries_are_added_before_they_are_removed() {
        let server = FakeApiServer::default();
        let mut exporter = server.exporter("one");
        assert_eq!(exporter.write(&wanted(&[&[("a", "1"), ("b", "1")]])).await.unwrap(), 1);
        assert_eq!(server.data("digests"), json!({"a": "1", "b": "1"}));
        let labels = server.object(&format!("{MAPS}/digests")).unwrap()["metadata"]["labels"].clone();
        assert_eq!(labels, json!({LABEL: "digests"}));
        assert_eq!(exporter.write(&wanted(&[&[("a", "1"), ("b", "1")]])).await.unwrap(), 0);
        assert_eq!(server.writes(), ["digests"]);

        exporter.write(&wanted(&[&[("a", "1")], &[("b", "1")]])).await.unwrap();
        assert_eq!(server.writes(), ["digests-2", "digests"]);
        exporter.write(&wanted(&[&[("a", "1")], &[("b", "2")]])).await.unwrap();
        assert_eq!(server.writes(), ["digests-2"]);
        exporter.write(&wanted(&[&[("a", "1"), ("b", "2")]])).await.unwrap();
        assert_eq!(server.writes(), ["digests", "digests-2"]);
        assert_eq!(server.data("digests-2"), json!({}), "an object that is no longer needed has entries");
        exporter.write(&wanted(&[&[("a", "1"), ("b", "2")]])).await.unwrap();
        assert_eq!(server.writes(), [""; 0]);
    }

    #[tokio::test]
    async fn former_leader_cannot_restore_a_revoked_value() {
        let server = FakeApiServer::default();
        let (mut old, mut new) = (server.exporter("old"), server.exporter("new"));
        old.write(&wanted(&[&[("a", "1")]])).await.unwrap();
        // The new leader has no entry to change, but it changes the version, so that writes of the old leader fail.
        new.write(&wanted(&[&[("a", "1")]])).await.unwrap();
        let error = old.write(&wanted(&[&[("a", "1"), ("revoked", "1")]])).await.unwrap_err();
        assert!(error.is(|status: &Status| status.is_conflict()), "{error}");
        assert_eq!(server.data("digests"), json!({"a": "1"}));
        server.writes();
        new.write(&wanted(&[&[]])).await.unwrap();
        assert_eq!((server.data("digests"), server.writes()), (json!({}), vec!["digests".to_owned()]));
    }

    #[tokio::test]
    async fn changes_by_another_writer_are_detected_by_check_and_reverted() {
        let server = FakeApiServer::default();
        let mut exporter = server.exporter("one");
        let all = wanted(&[&[("a", "1")]]);
        exporter.write(&all).await.unwrap();
        server.edit("digests", |map| map["data"]["forged"] = json!("1"));
        exporter.write(&all).await.unwrap();
        assert_eq!(server.data("digests"), json!({"a": "1", "forged": "1"}), "the change was detected without a check");
        exporter.check().await.unwrap();
        exporter.write(&all).await.unwrap();
        assert_eq!(server.data("digests"), json!({"a": "1"}));

        server.stored().objects.clear();
        exporter.check().await.unwrap();
        exporter.write(&all).await.unwrap();
        assert_eq!(server.data("digests"), json!({"a": "1"}));
    }

    #[tokio::test]
    async fn config_map_without_the_label_is_never_written() {
        let server = FakeApiServer::default();
        server.edit("digests", |map| map["data"] = json!({"other": "1"}));
        let error = server.exporter("one").write(&wanted(&[&[("a", "1")]])).await.unwrap_err().to_string();
        assert!(error.contains("ConfigMap gateway/digests exists without the label keywright.dev/export=digests"));
        assert_eq!(server.data("digests"), json!({"other": "1"}));
    }

    #[tokio::test]
    async fn secrets_hold_the_same_entries_and_have_their_own_type() {
        let server = FakeApiServer::default();
        let mut exporter = server.exporter_of(ExportKind::Secret, "one");
        exporter.write(&wanted(&[&[("a", "1"), ("b", "1")]])).await.unwrap();
        assert_eq!(server.data("digests"), json!({"a": "MQ==", "b": "MQ=="}));
        assert_eq!(
            server.object("/api/v1/namespaces/gateway/secrets/digests").unwrap()["type"],
            "keywright.dev/digests"
        );
        // The next leader reads and changes them.
        let mut next = server.exporter_of(ExportKind::Secret, "two");
        server.writes();
        next.write(&wanted(&[&[("b", "2")]])).await.unwrap();
        assert_eq!(server.writes(), ["digests"; 2]);
        assert_eq!(server.data("digests"), json!({"b": "Mg=="}));
    }
}
