//! To accept the value of a Secret that the operator can't authenticate, such as one from a backup.

use std::{
    fmt::Write,
    io::{BufRead, IsTerminal},
};

use clap::Args;
use k8s_openapi::{ByteString, api::core::v1::Secret};
use kube::{Api, ResourceExt, api::Patch};
use serde_json::{Value, json};

use super::{Cluster, Reply, Result, change, print, refused, rights, say, usage};
use crate::{
    api::{ACCEPT_SECRET_ANNOTATION, ApiKey, Condition},
    domain::{
        key::{Digest, Key},
        record,
        rights::{Need, Right},
        status::secret_ref,
    },
};

/// The reasons of condition Ready of a key without a value in the cluster.
const WITHOUT_VALUE: [&str; 2] = ["WaitingForSecret", "SecretLost"];

#[derive(Args)]
pub(super) struct AcceptArgs {
    /// The key.
    key: String,
    /// The SHA-256 of the value to accept: 64 hex digits. Otherwise that of the value in the Secret.
    #[arg(long, value_name = "DIGEST", conflicts_with = "new_value")]
    sha256: Option<String>,
    /// Accept nothing, and mint a new value: for a key whose Secret does not come back.
    #[arg(long)]
    new_value: bool,
    /// Do not ask.
    #[arg(short, long)]
    yes: bool,
}

pub(super) async fn accept(cluster: &Cluster, args: &AcceptArgs) -> Result<Reply> {
    let wanted = args.sha256.as_deref().map(digest).transpose()?;
    let key = cluster.key(&args.key).await?;
    if key.spec.legacy.is_some() {
        return refused(format!(
            "nothing to accept: ApiKey {} is a legacy key, whose value is imported from its Secret as it is",
            args.key
        ));
    }
    let ready = key.status.as_ref().and_then(|status| status.conditions.iter().find(|c| c.type_ == "Ready"));
    if args.new_value {
        return new_value(cluster, args, ready).await;
    }
    if let Some(why) = nothing_to_accept(&key, ready) {
        return refused(format!("nothing to accept: ApiKey {} {why}", args.key));
    }
    if !rights::may(cluster, &Need::Right(Right::Restore)).await? {
        return refused(format!(
            "you lack the right to restore keys in namespace {0} (verb restore on apikeys.keywright.dev): whoever \
             administers the cluster can bind ClusterRole keywright-restore to you: kubectl create rolebinding \
             -n {0} NAME --clusterrole=keywright-restore --user=USER",
            cluster.namespace
        ));
    }
    let found = Found::read(cluster, &key).await?;
    let mut text = format!("ApiKey {}/{}\n", cluster.namespace, args.key);
    if let Some(ready) = ready {
        let _ = writeln!(text, "  {}: {}", print::line(&ready.reason), print::line(&ready.message));
    }
    text += &found.describe(&key);
    say(text.trim_end());
    let accepted = match (wanted, found.digest()) {
        (Some(wanted), Some(held)) if wanted != held => {
            return refused(format!("the Secret holds another value than sha256:{wanted}, namely sha256:{held}"));
        }
        (Some(wanted), _) => wanted,
        (None, Some(held)) => {
            confirm(args.yes, &held)?;
            held
        }
        (None, None) => {
            return refused(format!(
                "which value is it? {}: name its digest with --sha256 DIGEST, from the status of the ApiKey in the \
                 backup (status.tokens[0].sha256), for example",
                found.why_unknown()
            ));
        }
    };
    let patch = json!({"metadata": {"annotations": {ACCEPT_SECRET_ANNOTATION: format!("sha256:{accepted}")}}});
    cluster.keys().patch(&args.key, &change::patch_params(false), &Patch::Merge(patch)).await?;
    Ok(Reply::yes(format!("apikey.keywright.dev/{} accepts sha256:{accepted}\n", args.key)))
}

/// Why no value of a Secret can be accepted for a key, as a clause. The operator believes its status before any Secret, and
/// leaves a Secret of something else alone.
fn nothing_to_accept(key: &ApiKey, ready: Option<&Condition>) -> Option<String> {
    let knows = key.status.as_ref().is_some_and(|status| !status.tokens.is_empty());
    let said = || ready.map(|ready| format!("{}: {}", ready.reason, ready.message)).unwrap_or_default();
    match ready {
        Some(ready) if ready.status == "True" => Some(format!("is in order ({})", ready.reason)),
        _ if knows => Some(format!(
            "knows its value already: restore the Secret that holds that one, or mint a new one with kubectl keywright \
             rotate ({})",
            said()
        )),
        Some(ready) if ready.reason == "SecretConflict" => Some(format!("has another problem: {}", said())),
        _ => None,
    }
}

async fn new_value(cluster: &Cluster, args: &AcceptArgs, ready: Option<&Condition>) -> Result<Reply> {
    let reason = ready.map(|ready| ready.reason.as_str()).unwrap_or_default();
    if reason == "SecretNotAuthentic" {
        return refused(format!(
            "ApiKey {} has a Secret: accept it, or delete it to have a new value minted",
            args.key
        ));
    }
    if !WITHOUT_VALUE.contains(&reason) {
        return refused(format!(
            "ApiKey {0} does not wait for a Secret{1}: to replace its value, use kubectl keywright rotate {0}",
            args.key,
            if reason.is_empty() {
                String::new()
            } else {
                format!(" (its condition Ready says {})", print::line(reason))
            },
        ));
    }
    change::request_value(cluster, &args.key, false).await?;
    Ok(Reply::yes(format!("apikey.keywright.dev/{} new value requested\n", args.key)))
}

fn confirm(yes: bool, digest: &str) -> Result<()> {
    if yes {
        return Ok(());
    }
    if !std::io::stdin().is_terminal() {
        return usage(format!("nobody can be asked here: say --sha256 {digest}, or --yes"));
    }
    say("\nAccept this value? Whoever has it can use the key. [y/N]");
    let mut answer = String::new();
    let read = std::io::stdin().lock().read_line(&mut answer);
    if read.is_err() || !answer.trim().eq_ignore_ascii_case("y") {
        return refused("nothing was changed");
    }
    Ok(())
}

/// Reads a digest, in the form of an annotation or of `sha256sum`. What is no digest may be a value, and is not repeated.
fn digest(text: &str) -> Result<String> {
    let hex = text.trim().strip_prefix("sha256:").unwrap_or(text.trim());
    match Digest::parse(&hex.to_ascii_lowercase()) {
        Some(digest) => Ok(digest.to_string()),
        None => usage(
            "--sha256 must be the 64 hex digits of a SHA-256, optionally after sha256:; a value itself goes nowhere",
        ),
    }
}

/// What whoever asks may see of the Secret of a key. It holds digests and never the value.
enum Found {
    /// It may not be read.
    Hidden,
    Seen(Seen),
}

#[derive(Default)]
struct Seen {
    name: String,
    /// Of the plain value.
    plain: Option<String>,
    is_sealed: bool,
    /// The record that is written in it, which proves nothing.
    record: Value,
    created: String,
}

impl Found {
    async fn read(cluster: &Cluster, key: &ApiKey) -> Result<Self> {
        let place = secret_ref(key);
        let secrets: Api<Secret> = Api::namespaced(cluster.client.clone(), &cluster.namespace);
        let mut secret = match secrets.get(&place.name).await {
            Ok(secret) => secret,
            Err(kube::Error::Api(status)) if status.is_forbidden() => return Ok(Self::Hidden),
            Err(kube::Error::Api(status)) if status.is_not_found() => {
                return refused(format!(
                    "nothing to accept: there is no Secret {0}: restore it, or mint a new value with kubectl keywright \
                     accept {1} --new-value",
                    place.name,
                    key.name_any()
                ));
            }
            Err(error) => return Err(error.into()),
        };
        if secret.type_.as_deref() != Some(record::SECRET_TYPE) {
            return refused(format!(
                "Secret {} is of type {} and not {}: the operator leaves it alone, whatever is accepted",
                place.name,
                print::line(secret.type_.as_deref().unwrap_or_default()),
                record::SECRET_TYPE
            ));
        }
        let record = secret.annotations().get(record::ANNOTATION).and_then(|json| serde_json::from_str(json).ok());
        let mut seen = Seen {
            record: record.unwrap_or_default(),
            created: print::time(secret.creation_timestamp().as_ref()),
            name: place.name.clone(),
            ..Seen::default()
        };
        for (name, ByteString(bytes)) in secret.data.iter_mut().flatten() {
            if *name == place.key && Key::parse(key.spec.key_type, bytes).is_some() {
                seen.plain = Some(Digest::of(bytes).to_string());
            }
            seen.is_sealed |= name == record::SEALED_VALUE;
            bytes.fill(0);
        }
        if seen.record.get("apiKey").and_then(Value::as_str).is_some_and(|name| name != key.name_any()) {
            say(&format!("warning: the record in Secret {} is of another ApiKey", place.name));
        }
        Ok(Self::Seen(seen))
    }

    /// The digest of the value in it: of the plain value, or else what the record says.
    fn digest(&self) -> Option<String> {
        let Self::Seen(seen) = self else { return None };
        seen.plain.clone().or_else(|| seen.recorded())
    }

    fn why_unknown(&self) -> String {
        match self {
            Self::Hidden => "you may not get the Secret".to_owned(),
            Self::Seen(seen) => format!("Secret {} holds neither a plain value nor a record of one", seen.name),
        }
    }

    fn describe(&self, key: &ApiKey) -> String {
        let Self::Seen(seen) = self else {
            return format!("  Secret {}: you may not get it, so that it is not checked here\n", secret_ref(key).name);
        };
        let mut text = format!("  Secret {}, created {}\n", seen.name, seen.created);
        let said = |name: &str| seen.record.pointer(name).and_then(Value::as_str).map(print::line);
        if let Some(digest) = self.digest() {
            let how = match (&seen.plain, seen.is_sealed) {
                (Some(_), _) => "computed from the plain value in it",
                (None, true) => "as its record says; the value itself is sealed, and only the operator can open it",
                (None, false) => "as its record says; the value itself is not in it",
            };
            let _ = writeln!(text, "  Value: key_{}, sha256:{digest} ({how})", &digest[..16]);
            let known = key.status.as_ref().map_or(&[][..], |status| &status.tokens);
            if let Some(current) = known.first() {
                let same = if current.sha256 == digest { "the same as" } else { "another than" };
                let _ = writeln!(text, "  It is {same} the current value of the ApiKey, {}", print::line(&current.id));
            }
        }
        if let Some(at) = said("/current/mintedAt") {
            let _ = writeln!(text, "  Minted: {at}, as its record says");
        }
        text
    }
}

impl Seen {
    /// The digest in the record, if it is one.
    fn recorded(&self) -> Option<String> {
        let text = self.record.pointer("/current/sha256").and_then(Value::as_str)?;
        digest(text).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_key_without_a_known_value_can_take_one_from_a_secret() {
        let key = |tokens: usize, reason: &str| -> ApiKey {
            let token = json!({"id": "key_0", "sha256": "00", "mintedAt": "2026-11-25T10:00:00Z"});
            let status = if reason == "Active" { "True" } else { "False" };
            serde_json::from_value(json!({
                "metadata": {"name": "k"}, "spec": {"type": "Team"},
                "status": {"tokens": vec![token; tokens], "conditions": [{"type": "Ready", "status": status,
                    "reason": reason, "message": "m", "lastTransitionTime": "2026-11-25T10:00:00Z"}]},
            }))
            .unwrap()
        };
        for (tokens, reason, word) in [
            (0, "SecretNotAuthentic", None),
            (0, "WaitingForSecret", None),
            (0, "SecretConflict", Some("another problem")),
            (1, "SecretLost", Some("knows its value")),
            (1, "SecretConflict", Some("knows its value")),
            (1, "Active", Some("in order")),
        ] {
            let key = key(tokens, reason);
            let why = nothing_to_accept(&key, key.status.as_ref().unwrap().conditions.first());
            assert_eq!(
                why.as_deref().map(|why| word.is_some_and(|word| why.contains(word))),
                word.map(|_| true),
                "{reason}"
            );
        }
        let fresh: ApiKey =
            serde_json::from_value(json!({"metadata": {"name": "k"}, "spec": {"type": "Team"}})).unwrap();
        assert_eq!(nothing_to_accept(&fresh, None), None);
    }

    #[test]
    fn a_digest_is_read_in_both_forms_and_a_value_is_not_repeated() {
        let hex = "Ab".repeat(32);
        assert_eq!(digest(&hex).unwrap(), "ab".repeat(32));
        assert_eq!(digest(&format!("sha256:{hex}")).unwrap(), "ab".repeat(32));
        for wrong in ["", "sha256:", "kwt_0000000000000000000000000000000000000000000000000", &"g".repeat(64)] {
            let Err(super::super::Failure::Usage(message)) = digest(wrong) else { panic!("{wrong:?}") };
            assert!(wrong.is_empty() || !message.contains(wrong) || wrong == "sha256:", "{message}");
        }
    }
}
