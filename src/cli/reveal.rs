//! To see a value: a KeyReveal that is encrypted to a key of this process alone.

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

use super::{Cluster, FIELD_MANAGER, Failure, Reply, Result, policy, print, refused, say, usage};
use crate::{
    api::{ApiKey, ApiKeyRef, Condition, KeyReveal, KeyRevealSpec, KeyRevealStatus, RevealMode},
    domain::{duration, key::Digest},
};

#[derive(Args)]
pub(super) struct RevealArgs {
    /// The key.
    key: String,
    /// Write the value into a new file that only you can read, instead of to standard output.
    #[arg(short, long)]
    output: Option<PathBuf>,
    /// Encrypt to this age recipient or SSH public key instead, and print what is encrypted.
    #[arg(long, conflicts_with = "recipients_file")]
    recipient: Option<String>,
    /// As --recipient, from the first line of a file that is no comment: id_ed25519.pub, for example.
    #[arg(long)]
    recipients_file: Option<String>,
    /// How long to wait for the answer.
    #[arg(long, default_value = "30s", value_parser = parse_timeout)]
    timeout: Duration,
}

fn parse_timeout(text: &str) -> Result<Duration, String> {
    duration::parse(text).ok_or_else(|| format!("{text:?} is no duration: write one such as 30s or 2m"))
}

pub(super) async fn reveal(cluster: &Cluster, args: &RevealArgs) -> Result<Reply> {
    let key = cluster.key(&args.key).await?;
    if must_be_file(&key) && args.output.is_none() {
        return usage(format!(
            "the value of {} can be seen only once, so it has to go into a file: add --output FILE",
            args.key
        ));
    }
    let identity = x25519::Identity::generate();
    let (recipient, foreign) = match other_recipient(args)? {
        Some(recipient) => (recipient, true),
        None => (identity.to_public().to_string(), false),
    };
    // Before anything is asked for: a value that can be seen once must not come to a full disk.
    let mut target = args.output.as_deref().map(Target::create).transpose()?;
    let requests: Api<KeyReveal> = Api::namespaced(cluster.client.clone(), &cluster.namespace);
    let request = create(&requests, args, recipient).await?;
    let name = request.name_any();
    let status = match tokio::time::timeout(args.timeout, answer(&requests, &name)).await {
        Ok(answer) => answer?,
        Err(_) => match withdraw(cluster, args, &requests, request).await? {
            Withdrawn::Answered(status) => status,
            Withdrawn::Unanswered(why) => return refused(why),
            Withdrawn::Kept(why) => {
                // Its answer would be the only copy of the value, and this identity the only key to it.
                let Some(target) = target.as_mut().filter(|_| !foreign) else { return refused(why) };
                target.fill(&SecretString::from(identity.to_string().expose_secret().to_owned()))?;
                return refused(format!(
                    "{why} {} now holds the age identity that opens its answer: kubectl get keyreveal -n {} {name} \
                     -o jsonpath='{{.status.ciphertext}}' | age --decrypt -i {}",
                    target.path.display(),
                    cluster.namespace,
                    target.path.display()
                ));
            }
        },
    };
    let delivered = match granted(&status) {
        Some(condition) if condition.status == "True" => deliver(&status, &mut target, (!foreign).then_some(&identity)),
        Some(condition) => refused(format!("{}: {}", condition.reason, condition.message)),
        None => refused("the request was withdrawn before it was answered"),
    };
    // Only now: until here, the answer could be had again. Others can't read it, and it goes by itself soon: if we may
    // not delete it, that is no matter.
    let _ = requests.delete(&name, &DeleteParams::default()).await;
    delivered.map(|()| Reply::yes(""))
}

/// Hands the value of an answer over. `identity` is the key of this process, unless another is to open the answer.
fn deliver(status: &KeyRevealStatus, target: &mut Option<Target>, identity: Option<&x25519::Identity>) -> Result<()> {
    let Some(ciphertext) = &status.ciphertext else { return refused("the answer holds no value: ask again") };
    let value = match identity {
        None => SecretString::from(ciphertext.clone()),
        Some(identity) => open(identity, ciphertext, status.id.as_deref())?,
    };
    let once = status.one_time == Some(true);
    match target {
        Some(target) => match target.fill(&value) {
            Ok(()) => say(&format!("written to {}", target.path.display())),
            Err(Failure::Refused(why) | Failure::Usage(why)) if once => {
                say(&format!("error: {why}: the value can't be had again, so that it goes to standard output instead"));
                show(&value, true)?;
            }
            Err(failure) => return Err(failure),
        },
        None => show(&value, once)?,
    }
    if once {
        say("this was the only time: the cluster no longer has the value");
    }
    Ok(())
}

fn must_be_file(key: &ApiKey) -> bool {
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
        // A request has one recipient: to leave out the others silently would be worse.
        (Some(_), Some(_)) => usage(format!("{file} names several recipients: a request has one")),
    }
}

/// Asks.
async fn create(requests: &Api<KeyReveal>, args: &RevealArgs, recipient: String) -> Result<KeyReveal> {
    let spec = KeyRevealSpec { api_key_ref: ApiKeyRef { name: args.key.clone() }, recipient, requester: None };
    let mut request = KeyReveal::new("", spec);
    request.metadata.name = None;
    // Room for what the API server appends.
    request.metadata.generate_name = Some(format!("{}-", args.key.chars().take(240).collect::<String>()));
    let params = PostParams { field_manager: Some(FIELD_MANAGER.to_owned()), ..PostParams::default() };
    Ok(requests.create(&params, &request).await?)
}

/// What became of a request for which no answer came in time.
enum Withdrawn {
    /// The answer came after all.
    Answered(KeyRevealStatus),
    /// It is deleted, and was not answered.
    Unanswered(String),
    /// It may still be answered, and stays.
    Kept(String),
}

/// Looks at a request once more, and deletes it unless that could lose a value.
///
/// The operator takes a value that can be seen once out of its Secret before it writes the answer: deleted between the
/// two, the request would take the last copy with it. So it stays. Any other is deleted as it was looked at, so that an
/// answer that comes at this moment is not lost either.
async fn withdraw(
    cluster: &Cluster,
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
                return Ok(Withdrawn::Unanswered(format!("{waited}: the request was deleted by somebody else")));
            }
            Err(error) => {
                let (Failure::Refused(why) | Failure::Usage(why)) = error.into();
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
        if key.as_ref().is_ok_and(must_be_file) || key.is_err() {
            return Ok(Withdrawn::Kept(format!(
                "{waited}: {why}. KeyReveal {name} stays, and may still be answered until the operator deletes it."
            )));
        }
        let this = Preconditions { uid: request.uid(), resource_version: request.resource_version() };
        let params = DeleteParams { preconditions: Some(this), ..DeleteParams::default() };
        match requests.delete(&name, &params).await {
            Err(kube::Error::Api(status)) if status.is_conflict() => {}
            // If we may not, it goes by itself.
            _ => return Ok(Withdrawn::Unanswered(format!("{waited}: {why}"))),
        }
    }
}

/// Why there is no answer, as far as the cluster says.
fn reason(request: &KeyReveal, key: Option<&ApiKey>) -> String {
    let found = |conditions: &[Condition], kind: &str| {
        let condition = conditions.iter().find(|c| c.type_ == kind && c.status != "True");
        condition.map(|c| format!("{}: {}", c.reason, c.message))
    };
    let of_request = request.status.as_ref().and_then(|status| found(&status.conditions, "Granted"));
    let of_key = || {
        let status = key?.status.as_ref()?;
        Some(format!("ApiKey {} is not ready: {}", key?.name_any(), found(&status.conditions, "Ready")?))
    };
    of_request.or_else(of_key).unwrap_or_else(|| {
        // The request has a requester, which the webhook wrote into it: some replica runs.
        if request.spec.requester.is_some() {
            "the operator's webhook admitted the request, and the replica that holds the operator's Lease has not \
             answered it yet: see its log"
        } else {
            "nobody wrote the requester into the request: the mutating webhook of Keywright is not installed"
        }
        .to_owned()
    })
}

/// Waits for the answer.
async fn answer(requests: &Api<KeyReveal>, name: &str) -> Result<KeyRevealStatus> {
    let decided = |request: Option<&KeyReveal>| {
        request.is_none_or(|request| request.status.as_ref().is_some_and(|status| granted(status).is_some()))
    };
    match wait::await_condition(requests.clone(), name, decided).await {
        Ok(Some(request)) => return Ok(request.status.unwrap_or_default()),
        Ok(None) => return refused("the request was deleted before it was answered"),
        // Who may not watch may still be allowed to look.
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

/// Decrypts the value, and makes sure that it is the one that it says it is.
fn open(identity: &x25519::Identity, ciphertext: &str, id: Option<&str>) -> Result<SecretString> {
    let Ok(plain) = age::decrypt(identity, ciphertext.as_bytes()) else {
        return refused("the answer is not encrypted to this request: ask again");
    };
    let digest = Digest::of(&plain);
    let Ok(value) = String::from_utf8(plain) else { return refused("the value is not text") };
    let value = SecretString::from(value);
    match id {
        Some(id) if id != digest.id() => refused("the answer holds another value than it says: ask again"),
        _ => Ok(value),
    }
}

/// Writes a value to standard output. The last copy of one goes there whatever it is.
fn show(value: &SecretString, last: bool) -> Result<()> {
    let mut stdout = std::io::stdout();
    let is_terminal = stdout.is_terminal();
    // A legacy value is whatever somebody imported.
    if is_terminal && !last && print::line(value.expose_secret()) != value.expose_secret() {
        return refused("the value holds control characters, which a terminal would obey: add --output FILE");
    }
    // A pipe gets the value and nothing else.
    let end: &[u8] = if is_terminal { b"\n" } else { b"" };
    let written = stdout.write_all(value.expose_secret().as_bytes()).and_then(|()| stdout.write_all(end));
    written.and_then(|()| stdout.flush()).map_err(|error| Failure::Refused(format!("standard output: {error}")))
}

/// A file that is created for one value, and removed if none comes.
struct Target {
    path: PathBuf,
    file: File,
    filled: bool,
}

impl Target {
    fn create(path: &Path) -> Result<Self> {
        let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path);
        match file {
            Ok(file) => Ok(Self { path: path.to_owned(), file, filled: false }),
            Err(error) => refused(format!("{}: {error}; nothing was asked for", path.display())),
        }
    }

    fn fill(&mut self, value: &SecretString) -> Result<()> {
        let written = self.file.write_all(value.expose_secret().as_bytes()).and_then(|()| self.file.sync_all());
        // What is there, even a part of it, may be the last copy.
        self.filled = true;
        written.map_err(|error| Failure::Refused(format!("{}: {error}", self.path.display())))
    }
}

impl Drop for Target {
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
    fn an_answer_opens_with_the_key_of_the_request_alone() {
        let identity = x25519::Identity::generate();
        let id = Digest::of(VALUE.as_bytes()).id();
        let ciphertext = age::encrypt_and_armor(&identity.to_public(), VALUE.as_bytes()).unwrap();
        assert_eq!(open(&identity, &ciphertext, Some(&id)).unwrap().expose_secret(), VALUE);
        assert_eq!(open(&identity, &ciphertext, None).unwrap().expose_secret(), VALUE);
        assert!(open(&identity, &ciphertext, Some("key_0000000000000000")).is_err());
        assert!(open(&x25519::Identity::generate(), &ciphertext, None).is_err());
    }

    #[test]
    fn whoever_waited_in_vain_is_told_what_the_cluster_knows() {
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
        let somebody = serde_json::json!({"username": "alice"});
        let retrying = serde_json::json!({"conditions": [condition("Granted", "Unknown", "Retrying")]});
        let none = serde_json::Value::Null;
        assert_eq!(reason(&request(retrying, somebody.clone()), Some(&key("False"))), "Retrying: m");
        let of_key = reason(&request(none.clone(), somebody.clone()), Some(&key("False")));
        assert_eq!(of_key, "ApiKey k is not ready: SecretLost: m");
        for key in [None, Some(&key("True"))] {
            assert!(reason(&request(none.clone(), somebody.clone()), key).contains("webhook admitted"));
        }
        assert!(reason(&request(none.clone(), none), None).contains("not installed"));
    }

    #[test]
    fn a_file_is_new_ones_own_and_gone_without_a_value() {
        let folder = std::env::temp_dir().join(format!("keywright-reveal-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let path = folder.join("value");
        drop(Target::create(&path).unwrap());
        assert!(!path.exists());
        let mut target = Target::create(&path).unwrap();
        target.fill(&SecretString::from(VALUE)).unwrap();
        drop(target);
        assert_eq!(std::fs::read_to_string(&path).unwrap(), VALUE);
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert!(Target::create(&path).is_err(), "never written over");
        assert_eq!(std::fs::read_to_string(&path).unwrap(), VALUE);
        std::fs::remove_dir_all(&folder).unwrap();
    }
}
