//! Legacy keys. Their value is read from the Secret that the spec names. That Secret is never written.

use k8s_openapi::{ByteString, api::core::v1::Secret, jiff::Timestamp};
use kube::{Api, Client};

use super::{ApiKeyContext, Gathered, Outcome, digest_claims};
use crate::{
    api::ApiKey,
    controller::{RequestError, request},
    domain::{
        legacy::{self, LegacyContent, Obstacle},
        lifecycle::{Observed, Schedule},
        record::SECRET_TYPE,
        status::secret_ref,
    },
};

/// Imports the value of a legacy key, or checks whether the Secret still holds it.
pub(super) async fn observe(gathered: &Gathered<'_>, context: &ApiKeyContext) -> Outcome {
    let Gathered { key, namespace, now, validation, conflicting_claim, .. } = gathered;
    let imported = key.status.as_ref().is_some_and(|status| !status.tokens.is_empty());
    let allowed =
        validation.problems.is_empty() && conflicting_claim.is_none() && !Schedule::of(&key.spec).expired(*now);
    let mut outcome = Outcome::default();
    if !imported && allowed || imported && gathered.must_read() {
        match read(&context.client, namespace, key, *now, allowed).await {
            Ok(Ok(found)) => outcome.secret = digest_claims::claim_digests(key, namespace, found, context),
            Ok(Err(why)) => outcome.import = Some(why),
            Err(error) => outcome.error = Some(("SecretReadFailed", error)),
        }
    }
    outcome
}

async fn read(
    client: &Client,
    namespace: &str,
    key: &ApiKey,
    now: Timestamp,
    allowed: bool,
) -> Result<Result<Observed, Obstacle>, RequestError> {
    let secret_ref = secret_ref(key);
    let secrets: Api<Secret> = Api::namespaced(client.clone(), namespace);
    let found = request(&format!("get Secret {}", secret_ref.name), secrets.get_opt(&secret_ref.name)).await?;
    let Some(mut secret) = found else {
        return Ok(legacy::import(key, &secret_ref, LegacyContent::Missing, allowed, now));
    };
    if secret.type_.as_deref() == Some(SECRET_TYPE) {
        // A minted value belongs to the ApiKey for which it was minted.
        let why = "it holds a value that Keywright minted: create an ApiKey that names the Secret of the legacy key"
            .to_owned();
        return Ok(Ok(Observed::Foreign { reason: "SecretConflict", why, passing: false }));
    }
    let mut content = LegacyContent::Missing;
    for (name, ByteString(bytes)) in secret.data.iter_mut().flatten() {
        if *name == secret_ref.key {
            content = LegacyContent::of(Some(bytes));
        }
        bytes.fill(0);
    }
    Ok(legacy::import(key, &secret_ref, content, allowed, now))
}
