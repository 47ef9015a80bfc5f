//! The Secret with the sealing keys: created at first use, and extended on request. Only the leader uses it.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use age::secrecy::ExposeSecret;
use k8s_openapi::{ByteString, api::core::v1::Secret};
use kube::{
    Api, Client, ResourceExt,
    api::{ObjectMeta, PostParams},
};
use tokio::{
    sync::Mutex,
    time::{Instant, timeout},
};

use super::SealingKeys;

/// The key in the Secret's data that holds the age identities.
pub const IDENTITIES: &str = "identities";

/// The key in the Secret's data that holds the record keys.
pub const RECORD_KEYS: &str = "record-keys";

/// The annotation that requests new sealing keys, by any value other than that of [`ROTATED_AT`], usually the current
/// time.
pub const ROTATE_REQUESTED_AT: &str = "keywright.dev/rotate-requested-at";

/// The annotation with the last [`ROTATE_REQUESTED_AT`] that was carried out.
pub const ROTATED_AT: &str = "keywright.dev/rotated-at";

/// How long the keys are used before the Secret is read again.
const CACHE_TTL: Duration = Duration::from_mins(1);

const TIMEOUT: Duration = Duration::from_secs(10);

/// The number of attempts when another writer changes the Secret between a read and a write.
const MAX_ATTEMPTS: u8 = 5;

/// The sealing keys and their Secret, which is neither read nor created before first use.
pub struct SealingKeyStore {
    secrets: Api<Secret>,
    name: String,
    guarded: bool,
    ring: Mutex<Option<(Instant, Arc<SealingKeys>)>>,
}

impl SealingKeyStore {
    /// Creates a store for this Secret. `guarded` says whether the ValidatingAdmissionPolicy of the chart lets only the
    /// operator and users with the right to restore write the Secrets of keys.
    #[must_use]
    pub fn new(client: Client, namespace: &str, name: &str, guarded: bool) -> Self {
        Self { secrets: Api::namespaced(client, namespace), name: name.to_owned(), guarded, ring: Mutex::default() }
    }

    /// Whether only the operator and users with the right to restore can write the Secrets of keys.
    #[must_use]
    pub fn is_guarded(&self) -> bool {
        self.guarded
    }

    /// Returns the sealing keys, as read at most a minute ago. Creates the Secret if it does not exist, and adds new
    /// keys if [`ROTATE_REQUESTED_AT`] requests them.
    ///
    /// # Errors
    /// A message, if the Secret can't be read or written, or holds no identities. Existing data is never overwritten.
    pub async fn ring(&self) -> Result<Arc<SealingKeys>, String> {
        let mut cached = self.ring.lock().await;
        if let Some((_, ring)) = cached.as_ref().filter(|(read, _)| read.elapsed() < CACHE_TTL) {
            return Ok(Arc::clone(ring));
        }
        for _ in 0..MAX_ATTEMPTS {
            if let Some(ring) = self.read_or_update().await? {
                let ring = Arc::new(ring);
                *cached = Some((Instant::now(), Arc::clone(&ring)));
                return Ok(ring);
            }
        }
        Err(format!("write the sealing keys in Secret {}: conflict with another writer; retrying", self.name))
    }

    /// Reads the keys, and creates or extends them where necessary. `None` if another writer changed the Secret
    /// meanwhile.
    async fn read_or_update(&self) -> Result<Option<SealingKeys>, String> {
        let Some(mut secret) = self.call("read", self.secrets.get_opt(&self.name)).await?.flatten() else {
            return self.create().await;
        };
        let text = |name: &str| match secret.data.as_ref().and_then(|data| data.get(name)) {
            // Not UTF-8: let parsing fail.
            Some(ByteString(bytes)) => std::str::from_utf8(bytes).unwrap_or("?"),
            None => "",
        };
        let failed = |error| format!("Secret {}: {error}", self.name);
        let mut ring = SealingKeys::parse(text(IDENTITIES), text(RECORD_KEYS)).map_err(failed)?;
        let requested = secret.annotations().get(ROTATE_REQUESTED_AT).cloned();
        match requested.filter(|requested| secret.annotations().get(ROTATED_AT) != Some(requested)) {
            Some(requested) => {
                ring.rotate().map_err(failed)?;
                secret.annotations_mut().insert(ROTATED_AT.to_owned(), requested);
            }
            // An earlier version created the Secret, without record keys.
            None if !ring.has_record_key() => ring.add_record_key().map_err(failed)?,
            None => return Ok(Some(ring)),
        }
        secret.data.get_or_insert_default().extend(data(&ring));
        // With the resourceVersion that was read, so that the write fails if the Secret changed meanwhile.
        let done = self.call("write", self.secrets.replace(&self.name, &PostParams::default(), &secret)).await?;
        if done.is_some() {
            tracing::info!(
                secret = self.name,
                "added new sealing keys; the old keys still open the values that they sealed"
            );
        }
        Ok(done.map(|_| ring))
    }

    async fn create(&self) -> Result<Option<SealingKeys>, String> {
        let ring = SealingKeys::generate().map_err(|error| error.to_string())?;
        let labels = BTreeMap::from([("app.kubernetes.io/managed-by".to_owned(), "keywright".to_owned())]);
        let secret = Secret {
            metadata: ObjectMeta { name: Some(self.name.clone()), labels: Some(labels), ..ObjectMeta::default() },
            type_: Some("Opaque".to_owned()),
            data: Some(data(&ring)),
            ..Secret::default()
        };
        let done = self.call("create", self.secrets.create(&PostParams::default(), &secret)).await?;
        if done.is_some() {
            tracing::info!(secret = self.name, "created the sealing keys: back up this Secret");
        }
        Ok(done.map(|_| ring))
    }

    /// Sends one request. `None` on a conflict with another writer. The error omits the message of the API server,
    /// which could quote keys.
    async fn call<T>(&self, verb: &str, call: impl Future<Output = kube::Result<T>>) -> Result<Option<T>, String> {
        match timeout(TIMEOUT, call).await {
            Ok(Ok(answer)) => Ok(Some(answer)),
            Ok(Err(kube::Error::Api(status))) if status.is_already_exists() || status.is_conflict() => Ok(None),
            Ok(Err(kube::Error::Api(status))) => Err(format!(
                "{verb} the sealing keys in Secret {}: rejected by the API server ({})",
                self.name, status.code
            )),
            _ => Err(format!("{verb} the sealing keys in Secret {}: the API server could not be reached", self.name)),
        }
    }
}

fn data(ring: &SealingKeys) -> BTreeMap<String, ByteString> {
    let bytes = |text: secrecy::SecretString| ByteString(text.expose_secret().as_bytes().to_vec());
    [(IDENTITIES, bytes(ring.identities_text())), (RECORD_KEYS, bytes(ring.record_keys_text()))]
        .map(|(name, bytes)| (name.to_owned(), bytes))
        .into()
}
