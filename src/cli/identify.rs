//! Whose value is this? For somebody who found one where it should not be.

use std::{
    fmt::Write,
    io::{IsTerminal, Read},
};

use clap::Args;
use kube::ResourceExt;
use secrecy::{ExposeSecret, SecretString};

use super::{Cluster, Failure, Reply, Result, Selection, print, refused, say, usage};
use crate::{
    api::ApiKey,
    domain::key::{Digest, is_well_formed},
};

/// More than any value has; what is longer is something else.
const LONGEST: u64 = 4096;

#[derive(Args)]
pub(super) struct IdentifyArgs {
    /// Nothing: the value is read from standard input.
    // Taken, so that it can be refused without being repeated in a message.
    #[arg(hide = true)]
    refused: Vec<String>,
}

/// Reads the value.
pub(super) fn read(args: &IdentifyArgs) -> Result<SecretString> {
    if !args.refused.is_empty() {
        return usage(
            "a value on the command line stays in the history of the shell and shows in the list of processes: \
             pipe it in (kubectl keywright identify <FILE), or paste it after starting without arguments",
        );
    }
    if std::io::stdin().is_terminal() {
        say("paste the value, and end with Return and Ctrl-D:");
    }
    let mut text = String::with_capacity(usize::try_from(LONGEST).unwrap_or_default());
    if std::io::stdin().take(LONGEST).read_to_string(&mut text).is_err() {
        return refused("standard input is not text");
    }
    let value = SecretString::from(text.trim().to_owned());
    drop(SecretString::from(text));
    if value.expose_secret().is_empty() {
        return usage("standard input is empty: pipe the value in");
    }
    Ok(value)
}

pub(super) async fn identify(cluster: &Cluster, value: &SecretString) -> Result<Reply> {
    let digest = Digest::of(value.expose_secret().as_bytes());
    if !is_well_formed(value.expose_secret()) {
        say("this has not the form of a value of Keywright; only an imported legacy key can have it");
    }
    let (sha256, id) = (digest.to_string(), digest.id());
    let selection = Selection { all_namespaces: cluster.global.namespace.is_none(), selector: None };
    let has = |key: &ApiKey| token_of(key, &sha256).is_some();
    // The API server finds a current value by its id; one in overlap is not in that field.
    let current = cluster.select(&selection, Some(&format!("status.id={id}"))).await?;
    let found = match current.into_iter().find(has) {
        Some(key) => Some(key),
        None => cluster.select(&selection, None).await?.into_iter().find(has),
    };
    let Some(key) = found else {
        return Ok(Reply::no(format!(
            "{id} belongs to no key here: it was revoked, deleted, or is not of this cluster\n"
        )));
    };
    describe(&key, &sha256).map_err(|_| Failure::Refused("out of memory".to_owned())).map(Reply::yes)
}

fn token_of(key: &ApiKey, sha256: &str) -> Option<usize> {
    key.status.as_ref()?.tokens.iter().position(|token| token.sha256 == sha256)
}

fn describe(key: &ApiKey, sha256: &str) -> Result<String, std::fmt::Error> {
    let mut text = String::new();
    let (namespace, name) = (key.namespace().unwrap_or_default(), key.name_any());
    let (creator, creator_type) = print::creator_of(key);
    let creator = print::line(&creator);
    writeln!(text, "{namespace}/{name}")?;
    writeln!(text, "Id:         key_{}", &sha256[..16])?;
    writeln!(text, "Type:       {:?}", key.spec.key_type)?;
    writeln!(text, "State:      {}", print::state_of(key))?;
    writeln!(text, "Creator:    {creator} ({creator_type})")?;
    if token_of(key, sha256) == Some(1) {
        writeln!(text, "Value:      a former one, which still works for the time of the overlap")?;
    }
    writeln!(text, "\nTo refuse it now:           kubectl keywright deactivate -n {namespace} {name}")?;
    writeln!(text, "To replace it, and refuse:  kubectl keywright rotate --revoke-previous -n {namespace} {name}")?;
    Ok(text)
}
