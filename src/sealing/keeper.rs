//! Keeps the keyring in its Secret: makes it once, reads it, adds to it when asked. The leader alone calls this.

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

use super::Keyring;

/// The key in the Secret's data that holds the age identities.
pub const IDENTITIES: &str = "identities";

/// The key in the Secret's data that holds the record keys.
pub const RECORD_KEYS: &str = "record-keys";

/// The annotation that asks for a new identity: any value that [`ROTATED_AT`] does not have, usually the time.
pub const ROTATE_REQUESTED_AT: &str = "keywright.dev/rotate-requested-at";

/// The last request that was carried out.
pub const ROTATED_AT: &str = "keywright.dev/rotated-at";

/// How long what was read is used without another look.
const FRESH: Duration = Duration::from_mins(1);

const TIMEOUT: Duration = Duration::from_secs(10);

/// How often another writer may be faster.
const ROUNDS: u8 = 5;

/// The keyring and the Secret that it is in. Nothing is asked or made before a value is sealed or opened.
pub struct Keeper {
    secrets: Api<Secret>,
    name: String,
    guarded: bool,
    ring: Mutex<Option<(Instant, Arc<Keyring>)>>,
}

impl Keeper {
    /// Keeps the keyring in this Secret. `guarded` says whether the chart's ValidatingAdmissionPolicy lets nobody write
    /// the Secrets of keys but the operator and users with the restore right.
    #[must_use]
    pub fn new(client: Client, namespace: &str, name: &str, guarded: bool) -> Self {
        Self { secrets: Api::namespaced(client, namespace), name: name.to_owned(), guarded, ring: Mutex::default() }
    }

    /// Whether nobody else can write the Secrets of keys.
    #[must_use]
    pub fn is_guarded(&self) -> bool {
        self.guarded
    }

    /// The keyring, at most a minute old. Made if there is none; renewed if that was asked for.
    ///
    /// # Errors
    /// A sentence, if the Secret can't be read or written, or holds no identities. What is there is never overwritten.
    pub async fn ring(&self) -> Result<Arc<Keyring>, String> {
        let mut kept = self.ring.lock().await;
        if let Some((_, ring)) = kept.as_ref().filter(|(read, _)| read.elapsed() < FRESH) {
            return Ok(Arc::clone(ring));
        }
        for _ in 0..ROUNDS {
            if let Some(ring) = self.pass().await? {
                let ring = Arc::new(ring);
                *kept = Some((Instant::now(), Arc::clone(&ring)));
                return Ok(ring);
            }
        }
        Err(format!("others keep writing to the sealing keys in Secret {}", self.name))
    }

    /// One look. `None` if somebody else was faster.
    async fn pass(&self) -> Result<Option<Keyring>, String> {
        let Some(mut secret) = self.call("read", self.secrets.get_opt(&self.name)).await?.flatten() else {
            return self.make().await;
        };
        let text = |name: &str| match secret.data.as_ref().and_then(|data| data.get(name)) {
            // What is no text is no key file either.
            Some(ByteString(bytes)) => std::str::from_utf8(bytes).unwrap_or("?"),
            None => "",
        };
        let failed = |error| format!("Secret {}: {error}", self.name);
        let mut ring = Keyring::parse(text(IDENTITIES), text(RECORD_KEYS)).map_err(failed)?;
        let asked = secret.annotations().get(ROTATE_REQUESTED_AT).cloned();
        match asked.filter(|asked| secret.annotations().get(ROTATED_AT) != Some(asked)) {
            Some(asked) => {
                ring.rotate().map_err(failed)?;
                secret.annotations_mut().insert(ROTATED_AT.to_owned(), asked);
            }
            // An earlier version made it.
            None if !ring.has_record_key() => ring.add_record_key().map_err(failed)?,
            None => return Ok(Some(ring)),
        }
        secret.data.get_or_insert_default().extend(data(&ring));
        // With the resourceVersion that was read: only a keyring that nobody changed meanwhile gets a successor.
        let done = self.call("write", self.secrets.replace(&self.name, &PostParams::default(), &secret)).await?;
        if done.is_some() {
            tracing::info!(secret = self.name, "new sealing keys were added; the old ones still open what they sealed");
        }
        Ok(done.map(|_| ring))
    }

    async fn make(&self) -> Result<Option<Keyring>, String> {
        let ring = Keyring::generate().map_err(|error| error.to_string())?;
        let labels = BTreeMap::from([("app.kubernetes.io/managed-by".to_owned(), "keywright".to_owned())]);
        let secret = Secret {
            metadata: ObjectMeta { name: Some(self.name.clone()), labels: Some(labels), ..ObjectMeta::default() },
            type_: Some("Opaque".to_owned()),
            data: Some(data(&ring)),
            ..Secret::default()
        };
        let done = self.call("create", self.secrets.create(&PostParams::default(), &secret)).await?;
        if done.is_some() {
            tracing::info!(secret = self.name, "sealing keys were made: back up this Secret");
        }
        Ok(done.map(|_| ring))
    }

    /// One request. `None` if somebody else was faster. What the API server says is not repeated: it could quote.
    async fn call<T>(&self, verb: &str, call: impl Future<Output = kube::Result<T>>) -> Result<Option<T>, String> {
        match timeout(TIMEOUT, call).await {
            Ok(Ok(answer)) => Ok(Some(answer)),
            Ok(Err(kube::Error::Api(status))) if status.is_already_exists() || status.is_conflict() => Ok(None),
            Ok(Err(kube::Error::Api(status))) => {
                Err(format!("{verb} the sealing keys in Secret {}: refused ({})", self.name, status.code))
            }
            _ => Err(format!("{verb} the sealing keys in Secret {}: the API server could not be reached", self.name)),
        }
    }
}

fn data(ring: &Keyring) -> BTreeMap<String, ByteString> {
    let bytes = |text: secrecy::SecretString| ByteString(text.expose_secret().as_bytes().to_vec());
    [(IDENTITIES, bytes(ring.identities_text())), (RECORD_KEYS, bytes(ring.record_keys_text()))]
        .map(|(name, bytes)| (name.to_owned(), bytes))
        .into()
}
