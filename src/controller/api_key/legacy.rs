//! Reconciles a legacy key: one look at the Secret that the spec names, which is read and never written.

use std::time::Duration;

use k8s_openapi::{ByteString, api::core::v1::Secret, jiff::Timestamp};
use kube::{Api, Client, ResourceExt, runtime::controller::Action};

use super::{Context, Pace, policy_of};
use crate::{
    api::ApiKey,
    controller::{RequestError, request},
    domain::{
        legacy::{self, Content},
        lifecycle::{self, Observed, Schedule},
        record::SECRET_TYPE,
        status::{self, Facts, secret_ref},
        validate,
    },
};

/// Imports a key, or looks whether its Secret still holds the value.
pub(super) async fn run(key: &ApiKey, context: &Context) -> Result<Action, RequestError> {
    let now = context.clock.now();
    let uid = key.uid().unwrap_or_default();
    let namespace = key.namespace().unwrap_or_default();
    let verdict = validate::check(&key.spec, &context.index.catalog());
    let rival = context.index.rival(&namespace, key, true);
    let settings = context.index.settings(&namespace);
    let policy = policy_of(key, &namespace, context);
    let imported = key.status.as_ref().is_some_and(|status| !status.tokens.is_empty());
    let may = verdict.problems.is_empty() && rival.is_none() && !Schedule::of(&key.spec).expired(now);
    let check_at = context.checks.due_at(&uid, now);

    let mut secret = Observed::NotRead;
    let (mut obstacle, mut error) = (None, None);
    if !imported && may || imported && lifecycle::must_read(key, settings.as_deref(), now, check_at <= now) {
        match read(&context.client, &namespace, key, now, may).await {
            Ok(Ok(found)) => secret = super::claim(key, &namespace, found, context),
            Ok(Err(why)) => obstacle = Some(why),
            Err(failed) => error = Some(failed),
        }
    }
    let failure = error.as_ref().map(|error: &RequestError| error.failure("SecretReadFailed"));
    let status = status::build(&Facts {
        key,
        verdict: &verdict,
        rival: rival.as_deref(),
        secret: &secret,
        settings: settings.as_deref(),
        policy: policy.as_deref(),
        import: obstacle.as_ref(),
        failure: failure.as_ref(),
        now,
    });
    let next = lifecycle::next_wake(key, &status, settings.as_deref(), now);
    if !super::report(key, &namespace, status, false, context).await? {
        return Ok(Action::requeue(Duration::from_secs(5)));
    }
    if let Some(error) = error {
        return Err(error);
    }
    context.backoff.forget(&uid);
    if secret != Observed::NotRead {
        let pace = match Pace::of(&secret) {
            Pace::Announced => Pace::Unannounced,
            amiss => amiss,
        };
        context.checks.done(&uid, check_at, now, pace);
    }
    // Nothing announces that a Secret was made.
    let again = obstacle.and_then(|_| now.checked_add(lifecycle::patience(key, now)).ok()).unwrap_or(Timestamp::MAX);
    let next = next.unwrap_or(Timestamp::MAX).min(again).min(context.checks.due_at(&uid, now));
    let wait = Duration::try_from(next.duration_since(now)).unwrap_or_default() + Duration::from_millis(500);
    Ok(Action::requeue(wait))
}

type Found = Result<Observed, legacy::Obstacle>;

async fn read(
    client: &Client,
    namespace: &str,
    key: &ApiKey,
    now: Timestamp,
    may: bool,
) -> Result<Found, RequestError> {
    let place = secret_ref(key);
    let secrets: Api<Secret> = Api::namespaced(client.clone(), namespace);
    let found = request(&format!("get Secret {}", place.name), secrets.get_opt(&place.name)).await?;
    let Some(mut secret) = found else { return Ok(legacy::import(key, &place, Content::Missing, may, now)) };
    if secret.type_.as_deref() == Some(SECRET_TYPE) {
        // One value is one key's: a verifier could not tell which of two is meant.
        let why = "it holds a key that was minted here: name the Secret of the legacy key".to_owned();
        return Ok(Ok(Observed::Foreign { reason: "SecretConflict", why, passing: false }));
    }
    let mut content = Content::Missing;
    for (name, ByteString(bytes)) in secret.data.iter_mut().flatten() {
        if *name == place.key {
            content = Content::of(Some(bytes));
        }
        bytes.fill(0);
    }
    Ok(legacy::import(key, &place, content, may, now))
}
