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
    api::{DeleteParams, PostParams},
    runtime::wait,
};
use secrecy::{ExposeSecret, SecretString};

use super::{Cluster, Failure, Reply, Result, policy, refused, say, usage};
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
    let status = request(cluster, args, recipient).await?;
    let Some(ciphertext) = status.ciphertext else { return refused("the answer holds no value: ask again") };
    let value =
        if foreign { SecretString::from(ciphertext) } else { open(&identity, &ciphertext, status.id.as_deref())? };
    match &mut target {
        Some(target) => {
            target.fill(&value)?;
            say(&format!("written to {}", target.path.display()));
        }
        None => print(&value).map_err(|error| Failure::Refused(format!("standard output: {error}")))?,
    }
    if status.one_time == Some(true) {
        say("this was the only time: the cluster no longer has the value");
    }
    Ok(Reply::yes(""))
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

/// Asks, waits for the answer, and takes the request away again.
async fn request(cluster: &Cluster, args: &RevealArgs, recipient: String) -> Result<KeyRevealStatus> {
    let requests: Api<KeyReveal> = Api::namespaced(cluster.client.clone(), &cluster.namespace);
    let spec = KeyRevealSpec { api_key_ref: ApiKeyRef { name: args.key.clone() }, recipient, requester: None };
    let mut request = KeyReveal::new("", spec);
    request.metadata.name = None;
    // Room for what the API server appends.
    request.metadata.generate_name = Some(format!("{}-", args.key.chars().take(240).collect::<String>()));
    let name = requests.create(&PostParams::default(), &request).await?.name_any();
    let answer = tokio::time::timeout(args.timeout, answer(&requests, &name)).await;
    // It holds nothing that others could read, and goes by itself soon: if we may not, that is no matter.
    let _ = requests.delete(&name, &DeleteParams::default()).await;
    let Ok(answer) = answer else {
        return refused(format!(
            "no answer after {}: is the operator running? kubectl get keyreveals shows requests",
            duration::format(args.timeout)
        ));
    };
    let answer = answer?;
    let status = answer.status.unwrap_or_default();
    match granted(&status) {
        Some(condition) if condition.status == "True" => Ok(status),
        Some(condition) => refused(format!("{}: {}", condition.reason, condition.message)),
        None => refused("the request was withdrawn before it was answered"),
    }
}

async fn answer(requests: &Api<KeyReveal>, name: &str) -> Result<KeyReveal> {
    let decided = |request: Option<&KeyReveal>| {
        request.is_none_or(|request| request.status.as_ref().is_some_and(|status| granted(status).is_some()))
    };
    match wait::await_condition(requests.clone(), name, decided).await {
        Ok(Some(request)) => return Ok(request),
        Ok(None) => return refused("the request was deleted before it was answered"),
        // Who may not watch may still be allowed to look.
        Err(_) => {}
    }
    loop {
        let request = requests.get(name).await?;
        if decided(Some(&request)) {
            return Ok(request);
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

fn print(value: &SecretString) -> std::io::Result<()> {
    let mut stdout = std::io::stdout();
    stdout.write_all(value.expose_secret().as_bytes())?;
    // A pipe gets the value and nothing else.
    if stdout.is_terminal() {
        stdout.write_all(b"\n")?;
    }
    stdout.flush()
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
