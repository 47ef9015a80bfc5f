//! `identify`: finds the key of a value, such as one that leaked.

use std::{
    fmt::Write,
    io::{IsTerminal, Read},
};

use clap::Args;
use kube::ResourceExt;
use secrecy::{ExposeSecret, SecretString};

use super::{CliError, ClusterClient, Reply, Result, Selection, print, refused, report, usage};
use crate::{
    api::ApiKey,
    domain::key::{Digest, is_well_formed},
};

/// The maximum size of the input in bytes. Every value is shorter.
const MAX_INPUT_BYTES: u64 = 4096;

#[derive(Args)]
pub(super) struct IdentifyArgs {
    /// Not supported: the value is read from standard input.
    // Declared because the error of clap would repeat an unexpected argument, which may be a value.
    #[arg(hide = true)]
    arguments: Vec<String>,
}

/// Reads the value from standard input.
pub(super) fn read(args: &IdentifyArgs) -> Result<SecretString> {
    if !args.arguments.is_empty() {
        return usage(
            "the shell history and the process list show values on the command line: pipe the value in (kubectl \
             keywright identify <FILE), or run the command without arguments and paste the value",
        );
    }
    if std::io::stdin().is_terminal() {
        report("paste the value, then press Return and Ctrl-D:");
    }
    let mut text = String::with_capacity(usize::try_from(MAX_INPUT_BYTES).unwrap_or_default());
    if std::io::stdin().take(MAX_INPUT_BYTES).read_to_string(&mut text).is_err() {
        return refused("standard input is not UTF-8 text");
    }
    let value = SecretString::from(text.trim().to_owned());
    drop(SecretString::from(text));
    if value.expose_secret().is_empty() {
        return usage("standard input is empty: pipe the value in");
    }
    Ok(value)
}

pub(super) async fn identify(cluster: &ClusterClient, value: &SecretString) -> Result<Reply> {
    let digest = Digest::of(value.expose_secret().as_bytes());
    if !is_well_formed(value.expose_secret()) {
        report("warning: the value does not have the format of Keywright; only imported legacy keys have such values");
    }
    let (sha256, id) = (digest.to_string(), digest.id());
    let selection = Selection { all_namespaces: cluster.global.namespace.is_none(), selector: None };
    let has_value = |key: &ApiKey| token_of(key, &sha256).is_some();
    // Field status.id holds the id of the current value only. A value in overlap requires a list of all keys.
    let current = cluster.select(&selection, Some(&format!("status.id={id}"))).await?;
    let found = match current.into_iter().find(has_value) {
        Some(key) => Some(key),
        None => cluster.select(&selection, None).await?.into_iter().find(has_value),
    };
    let Some(key) = found else {
        return Ok(Reply::no(format!(
            "{id}: no matching key: the value was revoked, its key was deleted, or it belongs to another namespace or \
             cluster\n"
        )));
    };
    describe(&key, &sha256).map_err(|_| CliError::Refused("out of memory".to_owned())).map(Reply::yes)
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
        writeln!(text, "Value:      previous, valid until the overlap ends")?;
    }
    writeln!(text, "\nTo deactivate the key:  kubectl keywright deactivate -n {namespace} {name}")?;
    writeln!(text, "To replace the value:   kubectl keywright rotate --revoke-previous -n {namespace} {name}")?;
    Ok(text)
}
