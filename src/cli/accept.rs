//! `accept`: accepts the value of a Secret that the operator cannot authenticate, such as one from a backup.

use std::{
    fmt::Write,
    io::{BufRead, IsTerminal},
};

use clap::Args;
use k8s_openapi::{ByteString, api::core::v1::Secret};
use kube::{Api, ResourceExt, api::Patch};
use serde_json::{Value, json};

use super::{ClusterClient, Reply, Result, change, print, refused, report, rights, usage};
use crate::{
    api::{ACCEPT_SECRET_ANNOTATION, ApiKey, Condition},
    domain::{
        key::{Digest, Key},
        record,
        rights::{Need, Right},
        status::secret_ref,
    },
};

/// The reasons of condition `Ready` of a key whose value is not in the cluster.
const WITHOUT_VALUE: [&str; 2] = ["WaitingForSecret", "SecretLost"];

#[derive(Args)]
pub(super) struct AcceptArgs {
    /// The name of the key.
    key: String,
    /// The SHA-256 of the value to accept: 64 hex digits. The default is that of the value in the Secret.
    #[arg(long, value_name = "DIGEST", conflicts_with = "new_value")]
    sha256: Option<String>,
    /// Mint a new value instead, for a key whose Secret is not restored.
    #[arg(long)]
    new_value: bool,
    /// Skip the confirmation.
    #[arg(short, long)]
    yes: bool,
}

pub(super) async fn accept(cluster: &ClusterClient, args: &AcceptArgs) -> Result<Reply> {
    let wanted = args.sha256.as_deref().map(digest).transpose()?;
    let key = cluster.key(&args.key).await?;
    if key.spec.legacy.is_some() {
        return refused(format!(
            "nothing to accept: ApiKey {} is a legacy key, and its value is imported unchanged from its Secret",
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
            "you lack the right to restore keys in namespace {0} (verb restore on apikeys.keywright.dev): ask an \
             administrator to bind ClusterRole keywright-restore to you: kubectl create rolebinding \
             -n {0} NAME --clusterrole=keywright-restore --user=USER",
            cluster.namespace
        ));
    }
    let found = AcceptTarget::read(cluster, &key).await?;
    let mut text = format!("ApiKey {}/{}\n", cluster.namespace, args.key);
    if let Some(ready) = ready {
        let _ = writeln!(text, "  {}: {}", print::line(&ready.reason), print::line(&ready.message));
    }
    text += &found.describe(&key);
    report(text.trim_end());
    let accepted = match (wanted, found.digest()) {
        (Some(wanted), Some(held)) if wanted != held => {
            return refused(format!("the Secret holds another value: sha256:{held} instead of sha256:{wanted}"));
        }
        (Some(wanted), _) => wanted,
        (None, Some(held)) => {
            confirm(args.yes, &held)?;
            held
        }
        (None, None) => {
            return refused(format!(
                "the digest of the value is unknown: {}. Add --sha256 DIGEST, for example from the status of the \
                 ApiKey in the backup (status.tokens[0].sha256)",
                found.why_unknown()
            ));
        }
    };
    let patch = json!({"metadata": {"annotations": {ACCEPT_SECRET_ANNOTATION: format!("sha256:{accepted}")}}});
    cluster.keys().patch(&args.key, &change::patch_params(false), &Patch::Merge(patch)).await?;
    Ok(Reply::yes(format!("apikey.keywright.dev/{} accepts sha256:{accepted}\n", args.key)))
}

/// Returns, as a clause, why no value of a Secret can be accepted for a key. The status of a key has precedence over
/// its Secret, and the operator does not change a Secret that belongs to something else.
fn nothing_to_accept(key: &ApiKey, ready: Option<&Condition>) -> Option<String> {
    let has_value = key.status.as_ref().is_some_and(|status| !status.tokens.is_empty());
    let problem = || ready.map(|ready| format!("{}: {}", ready.reason, ready.message)).unwrap_or_default();
    match ready {
        Some(ready) if ready.status == "True" => Some(format!("is ready ({})", ready.reason)),
        _ if has_value => Some(format!(
            "already has a value: restore the Secret that holds it, or mint a new value with kubectl keywright rotate \
             ({})",
            problem()
        )),
        Some(ready) if ready.reason == "SecretConflict" => Some(format!("has another problem: {}", problem())),
        _ => None,
    }
}

async fn new_value(cluster: &ClusterClient, args: &AcceptArgs, ready: Option<&Condition>) -> Result<Reply> {
    let reason = ready.map(|ready| ready.reason.as_str()).unwrap_or_default();
    if reason == "SecretNotAuthentic" {
        return refused(format!(
            "ApiKey {} has a Secret: accept its value, or delete the Secret to mint a new value",
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
                format!(" (the reason of its condition Ready is {})", print::line(reason))
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
        return usage(format!(
            "standard input is not a terminal, so you cannot confirm: add --sha256 {digest} or --yes"
        ));
    }
    report("\nAccept this value? Anyone who has it can use the key. [y/N]");
    let mut answer = String::new();
    let read = std::io::stdin().lock().read_line(&mut answer);
    if read.is_err() || !answer.trim().eq_ignore_ascii_case("y") {
        return refused("nothing was changed");
    }
    Ok(())
}

/// Parses a digest in the form of the annotation or of `sha256sum`. The error does not repeat the text, which may be a
/// value.
fn digest(text: &str) -> Result<String> {
    let hex = text.trim().strip_prefix("sha256:").unwrap_or(text.trim());
    match Digest::parse(&hex.to_ascii_lowercase()) {
        Some(digest) => Ok(digest.to_string()),
        None => usage(
            "--sha256 must be the 64 hex digits of a SHA-256, optionally after sha256:; do not pass the value itself",
        ),
    }
}

/// The Secret of a key as far as the user may read it: digests, never the value.
enum AcceptTarget {
    /// The user may not get the Secret.
    Forbidden,
    Readable(SecretSummary),
}

#[derive(Default)]
struct SecretSummary {
    name: String,
    /// The digest of the plain value.
    plain: Option<String>,
    is_sealed: bool,
    /// The record in the annotation, not authenticated.
    record: Value,
    created: String,
}

impl AcceptTarget {
    async fn read(cluster: &ClusterClient, key: &ApiKey) -> Result<Self> {
        let reference = secret_ref(key);
        let secrets: Api<Secret> = Api::namespaced(cluster.client.clone(), &cluster.namespace);
        let mut secret = match secrets.get(&reference.name).await {
            Ok(secret) => secret,
            Err(kube::Error::Api(status)) if status.is_forbidden() => return Ok(Self::Forbidden),
            Err(kube::Error::Api(status)) if status.is_not_found() => {
                return refused(format!(
                    "nothing to accept: Secret {0} does not exist: restore it, or mint a new value with kubectl \
                     keywright accept {1} --new-value",
                    reference.name,
                    key.name_any()
                ));
            }
            Err(error) => return Err(error.into()),
        };
        if secret.type_.as_deref() != Some(record::SECRET_TYPE) {
            return refused(format!(
                "the operator accepts no value from Secret {}, because its type is {} and not {}: restore the \
                 Secret of this key",
                reference.name,
                print::line(secret.type_.as_deref().unwrap_or_default()),
                record::SECRET_TYPE
            ));
        }
        let record = secret.annotations().get(record::ANNOTATION).and_then(|json| serde_json::from_str(json).ok());
        let mut summary = SecretSummary {
            record: record.unwrap_or_default(),
            created: print::time(secret.creation_timestamp().as_ref()),
            name: reference.name.clone(),
            ..SecretSummary::default()
        };
        for (name, ByteString(bytes)) in secret.data.iter_mut().flatten() {
            if *name == reference.key && Key::parse(key.spec.key_type, bytes).is_some() {
                summary.plain = Some(Digest::of(bytes).to_string());
            }
            summary.is_sealed |= name == record::SEALED_VALUE;
            bytes.fill(0);
        }
        if summary.record.get("apiKey").and_then(Value::as_str).is_some_and(|name| name != key.name_any()) {
            report(&format!("warning: the record in Secret {} names another ApiKey", reference.name));
        }
        Ok(Self::Readable(summary))
    }

    /// The digest of the plain value, or else the one in the record.
    fn digest(&self) -> Option<String> {
        let Self::Readable(summary) = self else { return None };
        summary.plain.clone().or_else(|| summary.recorded())
    }

    fn why_unknown(&self) -> String {
        match self {
            Self::Forbidden => "you may not get the Secret".to_owned(),
            Self::Readable(summary) => {
                format!("Secret {} holds neither a plain value nor a record of a value", summary.name)
            }
        }
    }

    fn describe(&self, key: &ApiKey) -> String {
        let Self::Readable(summary) = self else {
            return format!("  Secret {}: not checked, because you may not get it\n", secret_ref(key).name);
        };
        let mut text = format!("  Secret {}, created {}\n", summary.name, summary.created);
        let recorded = |pointer: &str| summary.record.pointer(pointer).and_then(Value::as_str).map(print::line);
        if let Some(digest) = self.digest() {
            let how = match (&summary.plain, summary.is_sealed) {
                (Some(_), _) => "computed from the plain value in it",
                (None, true) => "according to its record; the value is sealed, and only the operator can open it",
                (None, false) => "according to its record; the value is not in the Secret",
            };
            let _ = writeln!(text, "  Value: key_{}, sha256:{digest} ({how})", &digest[..16]);
            let tokens = key.status.as_ref().map_or(&[][..], |status| &status.tokens);
            if let Some(current) = tokens.first() {
                let relation = if current.sha256 == digest { "is" } else { "is not" };
                let _ = writeln!(text, "  It {relation} the current value of the ApiKey, {}", print::line(&current.id));
            }
        }
        if let Some(at) = recorded("/current/mintedAt") {
            let _ = writeln!(text, "  Minted: {at}, according to its record");
        }
        text
    }
}

impl SecretSummary {
    /// The digest in the record, if it is well-formed.
    fn recorded(&self) -> Option<String> {
        let text = self.record.pointer("/current/sha256").and_then(Value::as_str)?;
        digest(text).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_with_a_value_or_with_another_problem_has_nothing_to_accept() {
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
            (1, "SecretLost", Some("already has a value")),
            (1, "SecretConflict", Some("already has a value")),
            (1, "Active", Some("is ready")),
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
    fn digest_parses_both_forms_and_does_not_repeat_a_value_in_its_error() {
        let hex = "Ab".repeat(32);
        assert_eq!(digest(&hex).unwrap(), "ab".repeat(32));
        assert_eq!(digest(&format!("sha256:{hex}")).unwrap(), "ab".repeat(32));
        for wrong in ["", "sha256:", "kwt_0000000000000000000000000000000000000000000000000", &"g".repeat(64)] {
            let Err(super::super::CliError::Usage(message)) = digest(wrong) else { panic!("{wrong:?}") };
            assert!(wrong.is_empty() || !message.contains(wrong) || wrong == "sha256:", "{message}");
        }
    }
}
