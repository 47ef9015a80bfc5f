//! `reveal`: requests a value by a KeyReveal whose answer is encrypted to an identity of this process.

use std::{
    fs::{File, OpenOptions},
    io::{IsTerminal, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    time::Duration,
};

use age::x25519;
use clap::Args;
use kube::{
    Api, ResourceExt,
    api::{DeleteParams, PostParams, Preconditions},
    runtime::wait,
};
use secrecy::{ExposeSecret, SecretString};

use super::{CliError, ClusterClient, FIELD_MANAGER, Reply, Result, policy, print, refused, report, usage};
use crate::{
    api::{ApiKey, ApiKeyRef, Condition, KeyReveal, KeyRevealSpec, KeyRevealStatus, RevealMode},
    domain::{duration, key::Digest},
};

#[derive(Args)]
pub(super) struct RevealArgs {
    /// The name of the key.
    key: String,
    /// Write the value to a new file that only you can read instead of to standard output.
    #[arg(short, long)]
    output: Option<PathBuf>,
    /// Encrypt to this age recipient or SSH public key instead, and print the ciphertext.
    #[arg(long, conflicts_with = "recipients_file")]
    recipient: Option<String>,
    /// Read the recipient from a file that contains exactly one besides comments, such as id_ed25519.pub.
    #[arg(long)]
    recipients_file: Option<String>,
    /// The maximum time to wait for the answer.
    #[arg(long, default_value = "30s", value_parser = parse_timeout)]
    timeout: Duration,
}

fn parse_timeout(text: &str) -> Result<Duration, String> {
    duration::parse(text).ok_or_else(|| format!("{text:?} is not a duration: use the form 30s or 2m"))
}

pub(super) async fn reveal(cluster: &ClusterClient, args: &RevealArgs) -> Result<Reply> {
    let key = cluster.key(&args.key).await?;
    if is_one_time(&key) && args.output.is_none() {
        return usage(format!(
            "the value of {} can be revealed only once and must go to a file: add --output FILE",
            args.key
        ));
    }
    let identity = x25519::Identity::generate();
    let (recipient, is_external) = match other_recipient(args)? {
        Some(recipient) => (recipient, true),
        None => (identity.to_public().to_string(), false),
    };
    // Created before the request, so that no one-time value is taken if the file cannot be created.
    let mut target = args.output.as_deref().map(RevealTarget::create).transpose()?;
    let requests: Api<KeyReveal> = Api::namespaced(cluster.client.clone(), &cluster.namespace);
    let request = create(&requests, args, recipient).await?;
    let name = request.name_any();
    let status = match tokio::time::timeout(args.timeout, wait_for_answer(&requests, &name)).await {
        Ok(answer) => answer?,
        Err(_) => match withdraw(cluster, args, &requests, request).await? {
            Withdrawn::Answered(status) => status,
            Withdrawn::Unanswered(why) => return refused(why),
            Withdrawn::Kept(why) => {
                // The answer would be the only copy of the value, and only this identity decrypts it.
                let Some(target) = target.as_mut().filter(|_| !is_external) else { return refused(why) };
                target.fill(&SecretString::from(identity.to_string().expose_secret().to_owned()))?;
                return refused(format!(
                    "{why} {} now holds the age identity that decrypts its answer: kubectl get keyreveal -n {} {name} \
                     -o jsonpath='{{.status.ciphertext}}' | age --decrypt -i {}",
                    target.path.display(),
                    cluster.namespace,
                    target.path.display()
                ));
            }
        },
    };
    let delivered = match granted(&status) {
        Some(condition) if condition.status == "True" => {
            deliver(&status, &mut target, (!is_external).then_some(&identity))
        }
        Some(condition) => refused(format!("{}: {}", condition.reason, condition.message)),
        None => refused("the request was deleted before it was answered"),
    };
    // Deleted last, because the answer can be read again until the value is delivered. A failure is ignored: only the
    // recipient can decrypt the answer, and the operator deletes the request later.
    let _ = requests.delete(&name, &DeleteParams::default()).await;
    delivered.map(|()| Reply::yes(""))
}

/// Writes the value of an answer to the file or to standard output. Without `identity`, writes the ciphertext.
fn deliver(
    status: &KeyRevealStatus,
    target: &mut Option<RevealTarget>,
    identity: Option<&x25519::Identity>,
) -> Result<()> {
    let Some(ciphertext) = &status.ciphertext else {
        return refused("the answer holds no value: run the command again");
    };
    let value = match identity {
        None => SecretString::from(ciphertext.clone()),
        Some(identity) => open(identity, ciphertext, status.id.as_deref())?,
    };
    let one_time = status.one_time == Some(true);
    match target {
        Some(target) => match target.fill(&value) {
            Ok(()) => report(&format!("the value was written to {}", target.path.display())),
            Err(CliError::Refused(why) | CliError::Usage(why)) if one_time => {
                report(&format!(
                    "error: {why}: the value cannot be revealed again, so it is written to standard output"
                ));
                show(&value, true)?;
            }
            Err(failure) => return Err(failure),
        },
        None => show(&value, one_time)?,
    }
    if one_time {
        report("the value cannot be revealed again: the cluster no longer has it");
    }
    Ok(())
}

fn is_one_time(key: &ApiKey) -> bool {
    let reveal = key.status.as_ref().and_then(|status| status.reveal.as_ref());
    reveal.is_some_and(|reveal| reveal.mode == RevealMode::OneTime)
}

fn other_recipient(args: &RevealArgs) -> Result<Option<String>> {
    let Some(file) = &args.recipients_file else { return Ok(args.recipient.clone()) };
    let text = policy::read(file)?;
    let mut lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
    match (lines.next(), lines.next()) {
        (Some(line), None) => Ok(Some(line.to_owned())),
        (None, _) => usage(format!("{file} names no recipient")),
        // A request has one recipient. The others must not be dropped silently.
        (Some(_), Some(_)) => usage(format!("{file} names several recipients, but a request has only one")),
    }
}

async fn create(requests: &Api<KeyReveal>, args: &RevealArgs, recipient: String) -> Result<KeyReveal> {
    let spec = KeyRevealSpec { api_key_ref: ApiKeyRef { name: args.key.clone() }, recipient, requester: None };
    let mut request = KeyReveal::new("", spec);
    request.metadata.name = None;
    // Leaves room for the suffix that the API server appends (at most 253 characters in total).
    request.metadata.generate_name = Some(format!("{}-", args.key.chars().take(240).collect::<String>()));
    let params = PostParams { field_manager: Some(FIELD_MANAGER.to_owned()), ..PostParams::default() };
    Ok(requests.create(&params, &request).await?)
}

/// The result of [`withdraw`].
enum Withdrawn {
    /// The answer arrived after the timeout.
    Answered(KeyRevealStatus),
    /// The request is deleted and was not answered, for this reason.
    Unanswered(String),
    /// The request stays and may still be answered. The text says why there is no answer yet.
    Kept(String),
}

/// Reads a request again after the timeout, and deletes it unless this could lose a value.
///
/// Before the operator writes an answer, it replaces a one-time value in its Secret by a copy that only the answer can
/// deliver. To delete the request in between would lose the value, so the request stays. Other requests are deleted
/// with the resourceVersion that was read, so that an answer that arrives meanwhile is not lost.
async fn withdraw(
    cluster: &ClusterClient,
    args: &RevealArgs,
    requests: &Api<KeyReveal>,
    mut request: KeyReveal,
) -> Result<Withdrawn> {
    let name = request.name_any();
    let waited = format!("no answer after {}", duration::format(args.timeout));
    loop {
        match requests.get_opt(&name).await {
            Ok(Some(found)) => request = found,
            Ok(None) => {
                return Ok(Withdrawn::Unanswered(format!("{waited}: another client deleted the request")));
            }
            Err(error) => {
                let (CliError::Refused(why) | CliError::Usage(why)) = error.into();
                return Ok(Withdrawn::Kept(format!(
                    "{waited}: {why}. KeyReveal {name} stays, and may still be answered."
                )));
            }
        }
        if let Some(status) = request.status.take_if(|status| granted(status).is_some()) {
            return Ok(Withdrawn::Answered(status));
        }
        let key = cluster.key(&args.key).await;
        let why = reason(&request, key.as_ref().ok());
        if key.as_ref().is_ok_and(is_one_time) || key.is_err() {
            return Ok(Withdrawn::Kept(format!(
                "{waited}: {why}. KeyReveal {name} stays, and may still be answered until the operator deletes it."
            )));
        }
        let preconditions = Preconditions { uid: request.uid(), resource_version: request.resource_version() };
        let params = DeleteParams { preconditions: Some(preconditions), ..DeleteParams::default() };
        match requests.delete(&name, &params).await {
            Err(kube::Error::Api(status)) if status.is_conflict() => {}
            // After a failure, the operator deletes the request later.
            _ => return Ok(Withdrawn::Unanswered(format!("{waited}: {why}"))),
        }
    }
}

/// Returns the reason that the cluster reports for a missing answer.
fn reason(request: &KeyReveal, key: Option<&ApiKey>) -> String {
    let problem = |conditions: &[Condition], kind: &str| {
        let condition = conditions.iter().find(|c| c.type_ == kind && c.status != "True");
        condition.map(|c| format!("{}: {}", c.reason, c.message))
    };
    let of_request = request.status.as_ref().and_then(|status| problem(&status.conditions, "Granted"));
    let of_key = || {
        let status = key?.status.as_ref()?;
        Some(format!("ApiKey {} is not ready: {}", key?.name_any(), problem(&status.conditions, "Ready")?))
    };
    of_request.or_else(of_key).unwrap_or_else(|| {
        // The webhook wrote the requester, so a replica of the operator runs.
        if request.spec.requester.is_some() {
            "the operator's webhook admitted the request, and the replica that holds the operator's Lease has not \
             answered it yet: see its log"
        } else {
            "spec.requester of the request is empty: the mutating webhook of Keywright is not installed"
        }
        .to_owned()
    })
}

/// Waits until the operator has granted or denied the request.
async fn wait_for_answer(requests: &Api<KeyReveal>, name: &str) -> Result<KeyRevealStatus> {
    let decided = |request: Option<&KeyReveal>| {
        request.is_none_or(|request| request.status.as_ref().is_some_and(|status| granted(status).is_some()))
    };
    match wait::await_condition(requests.clone(), name, decided).await {
        Ok(Some(request)) => return Ok(request.status.unwrap_or_default()),
        Ok(None) => return refused("the request was deleted before it was answered"),
        // A user who may not watch KeyReveals may still be allowed to get one.
        Err(_) => {}
    }
    loop {
        let request = requests.get(name).await?;
        if decided(Some(&request)) {
            return Ok(request.status.unwrap_or_default());
        }
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
}

fn granted(status: &KeyRevealStatus) -> Option<&Condition> {
    status.conditions.iter().find(|condition| condition.type_ == "Granted" && condition.status != "Unknown")
}

/// Decrypts the value, and compares its digest with `id`.
fn open(identity: &x25519::Identity, ciphertext: &str, id: Option<&str>) -> Result<SecretString> {
    let Ok(plain) = age::decrypt(identity, ciphertext.as_bytes()) else {
        return refused("the answer is not encrypted to the identity of this request: run the command again");
    };
    let digest = Digest::of(&plain);
    let Ok(value) = String::from_utf8(plain) else { return refused("the value is not UTF-8 text") };
    let value = SecretString::from(value);
    match id {
        Some(id) if id != digest.id() => {
            refused("the value in the answer does not match its id: run the command again")
        }
        _ => Ok(value),
    }
}

/// Writes a value to standard output. The last copy of a value is written even if it holds control characters.
fn show(value: &SecretString, is_last_copy: bool) -> Result<()> {
    let mut stdout = std::io::stdout();
    let is_terminal = stdout.is_terminal();
    // A legacy value can hold any characters.
    if is_terminal && !is_last_copy && print::line(value.expose_secret()) != value.expose_secret() {
        return refused("the value holds control characters, which a terminal would interpret: add --output FILE");
    }
    // A pipe receives the value without a newline.
    let end: &[u8] = if is_terminal { b"\n" } else { b"" };
    let written = stdout.write_all(value.expose_secret().as_bytes()).and_then(|()| stdout.write_all(end));
    written.and_then(|()| stdout.flush()).map_err(|error| CliError::Refused(format!("standard output: {error}")))
}

/// A file that is created for one value, and removed on drop if it received none.
struct RevealTarget {
    path: PathBuf,
    file: File,
    filled: bool,
}

impl RevealTarget {
    fn create(path: &Path) -> Result<Self> {
        let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path);
        match file {
            Ok(file) => Ok(Self { path: path.to_owned(), file, filled: false }),
            Err(error) => refused(format!("{}: {error}; the value was not requested", path.display())),
        }
    }

    fn fill(&mut self, value: &SecretString) -> Result<()> {
        let written = self.file.write_all(value.expose_secret().as_bytes()).and_then(|()| self.file.sync_all());
        // Also after a failed write: the content may be the last copy of the value.
        self.filled = true;
        written.map_err(|error| CliError::Refused(format!("{}: {error}", self.path.display())))
    }
}

impl Drop for RevealTarget {
    fn drop(&mut self) {
        if !self.filled {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    const VALUE: &str = "kwt_value";

    #[test]
    fn open_requires_the_identity_of_the_request_and_the_matching_id() {
        let identity = x25519::Identity::generate();
        let id = Digest::of(VALUE.as_bytes()).id();
        let ciphertext = age::encrypt_and_armor(&identity.to_public(), VALUE.as_bytes()).unwrap();
        assert_eq!(open(&identity, &ciphertext, Some(&id)).unwrap().expose_secret(), VALUE);
        assert_eq!(open(&identity, &ciphertext, None).unwrap().expose_secret(), VALUE);
        assert!(open(&identity, &ciphertext, Some("key_0000000000000000")).is_err());
        assert!(open(&x25519::Identity::generate(), &ciphertext, None).is_err());
    }

    #[test]
    fn reason_comes_from_the_request_then_from_the_key_then_from_the_webhook() {
        let request = |status: serde_json::Value, requester: serde_json::Value| -> KeyReveal {
            serde_json::from_value(serde_json::json!({
                "metadata": {"name": "r"},
                "spec": {"apiKeyRef": {"name": "k"}, "recipient": "age1", "requester": requester}, "status": status,
            }))
            .unwrap()
        };
        let condition = |kind: &str, status: &str, reason: &str| {
            serde_json::json!({"type": kind, "status": status, "reason": reason, "message": "m",
                "lastTransitionTime": "2026-11-25T10:00:00Z"})
        };
        let key = |ready: &str| -> ApiKey {
            serde_json::from_value(serde_json::json!({
                "metadata": {"name": "k"}, "spec": {"type": "Team"},
                "status": {"conditions": [condition("Ready", ready, "SecretLost")]},
            }))
            .unwrap()
        };
        let alice = serde_json::json!({"username": "alice"});
        let retrying = serde_json::json!({"conditions": [condition("Granted", "Unknown", "Retrying")]});
        let none = serde_json::Value::Null;
        assert_eq!(reason(&request(retrying, alice.clone()), Some(&key("False"))), "Retrying: m");
        let of_key = reason(&request(none.clone(), alice.clone()), Some(&key("False")));
        assert_eq!(of_key, "ApiKey k is not ready: SecretLost: m");
        for key in [None, Some(&key("True"))] {
            assert!(reason(&request(none.clone(), alice.clone()), key).contains("webhook admitted"));
        }
        assert!(reason(&request(none.clone(), none), None).contains("not installed"));
    }

    #[test]
    fn a_target_is_a_new_private_file_and_is_removed_without_a_value() {
        let folder = std::env::temp_dir().join(format!("keywright-reveal-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let path = folder.join("value");
        drop(RevealTarget::create(&path).unwrap());
        assert!(!path.exists());
        let mut target = RevealTarget::create(&path).unwrap();
        target.fill(&SecretString::from(VALUE)).unwrap();
        drop(target);
        assert_eq!(std::fs::read_to_string(&path).unwrap(), VALUE);
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert!(RevealTarget::create(&path).is_err(), "an existing file is not overwritten");
        assert_eq!(std::fs::read_to_string(&path).unwrap(), VALUE);
        std::fs::remove_dir_all(&folder).unwrap();
    }
}
