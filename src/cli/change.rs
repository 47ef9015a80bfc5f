//! The commands that change keys. Each change of a key is one patch of its spec, which admission checks like any other.

use std::{
    fmt::Write,
    io::{BufRead, IsTerminal},
};

use clap::Args;
use kube::{
    ResourceExt,
    api::{DeleteParams, Patch, PatchParams},
};
use serde_json::{Value, json};

use super::{CliError, ClusterClient, DryRun, FIELD_MANAGER, Reply, Result, Selection, print, refused, report, usage};
use crate::api::ApiKey;

#[derive(Args)]
pub(super) struct RotateArgs {
    /// The name of the key.
    key: String,
    /// Revoke the previous value at once, now and at each later rotation (spec.rotation.overlap: 0s).
    #[arg(long)]
    revoke_previous: bool,
}

#[derive(Args)]
pub(super) struct SwitchArgs {
    /// The names of the keys.
    #[arg(required = true)]
    keys: Vec<String>,
}

#[derive(Args)]
pub(super) struct DeleteArgs {
    /// The names of the keys.
    #[arg(required_unless_present = "selector", conflicts_with = "selector")]
    keys: Vec<String>,
    #[command(flatten)]
    selection: Selection,
    /// Report what would be deleted without deleting it.
    #[arg(long, value_enum, default_value_t)]
    dry_run: DryRun,
}

#[derive(Args)]
pub(super) struct RevokeArgs {
    #[command(flatten)]
    selection: Selection,
    /// Select the key that has a value with this id, current or in overlap: key_ and 16 hex digits.
    #[arg(long, required_unless_present = "selector", conflicts_with = "selector")]
    id: Option<String>,
    /// Show the matching keys without deactivating them.
    #[arg(long)]
    dry_run: bool,
    /// Skip the confirmation.
    #[arg(short, long)]
    yes: bool,
}

pub(super) fn patch_params(dry_run: bool) -> PatchParams {
    PatchParams { dry_run, field_manager: Some(FIELD_MANAGER.to_owned()), ..PatchParams::default() }
}

async fn patch(cluster: &ClusterClient, namespace: &str, name: &str, spec: Value) -> Result<ApiKey> {
    let patch = Patch::Merge(json!({ "spec": spec }));
    Ok(cluster.keys_in(namespace).patch(name, &patch_params(false), &patch).await?)
}

/// Requests a new value of a key.
pub(super) async fn request_value(cluster: &ClusterClient, name: &str, revoke_previous: bool) -> Result<ApiKey> {
    // In full precision, so that two requests in one second differ.
    let mut rotation = json!({ "requestedAt": cluster.clock.exact().to_string() });
    if revoke_previous {
        rotation["overlap"] = json!("0s");
    }
    patch(cluster, &cluster.namespace, name, json!({ "rotation": rotation })).await
}

pub(super) async fn rotate(cluster: &ClusterClient, args: &RotateArgs) -> Result<Reply> {
    request_value(cluster, &args.key, args.revoke_previous).await?;
    Ok(Reply::yes(format!("apikey.keywright.dev/{} rotation requested\n", args.key)))
}

pub(super) async fn switch(cluster: &ClusterClient, args: &SwitchArgs, active: bool) -> Result<Reply> {
    let done = if active { "activated" } else { "deactivated" };
    let mut results = BatchResult::new(args.keys.len(), done);
    for name in &args.keys {
        results.add(name, patch(cluster, &cluster.namespace, name, json!({ "active": active })).await.map(drop));
    }
    Ok(results.reply())
}

pub(super) async fn delete(cluster: &ClusterClient, args: &DeleteArgs) -> Result<Reply> {
    if args.selection.all_namespaces && args.selection.selector.is_none() {
        return usage("-A requires a selector, because a name can belong to a different key in each namespace");
    }
    let keys: Vec<(String, String)> = if args.selection.selector.is_some() {
        let keys = cluster.select(&args.selection, None).await?;
        keys.iter().map(|key| (key.namespace().unwrap_or_default(), key.name_any())).collect()
    } else {
        args.keys.iter().map(|name| (cluster.namespace.clone(), name.clone())).collect()
    };
    let done = match args.dry_run {
        DryRun::None => "deleted",
        DryRun::Client => "deleted (dry run)",
        DryRun::Server => "deleted (server dry run)",
    };
    let mut results = BatchResult::new(keys.len(), done);
    for (namespace, name) in &keys {
        let api = cluster.keys_in(namespace);
        let outcome = match args.dry_run {
            DryRun::Client => api.get(name).await.map(drop),
            dry_run => {
                let params = DeleteParams { dry_run: dry_run == DryRun::Server, ..DeleteParams::default() };
                api.delete(name, &params).await.map(drop)
            }
        };
        results.add(name, outcome.map_err(CliError::from));
    }
    Ok(results.reply())
}

pub(super) async fn revoke(cluster: &ClusterClient, args: &RevokeArgs) -> Result<Reply> {
    let keys = match &args.id {
        None => cluster.select(&args.selection, None).await?,
        Some(id) => {
            // An id is unique in the cluster: without -n, search all namespaces.
            let all_namespaces = args.selection.all_namespaces || cluster.global.namespace.is_none();
            let selection = Selection { all_namespaces, selector: None };
            let current = cluster.select(&selection, Some(&format!("status.id={id}"))).await?;
            let has_id = |key: &ApiKey| {
                key.status.as_ref().is_some_and(|status| status.tokens.iter().any(|token| token.id == *id))
            };
            if current.is_empty() {
                cluster.select(&selection, None).await?.into_iter().filter(has_id).collect()
            } else {
                current
            }
        }
    };
    if keys.is_empty() {
        return refused("no key matches");
    }
    let (inactive, active): (Vec<_>, Vec<_>) = keys.into_iter().partition(|key| key.spec.active == Some(false));
    let row = |key: &ApiKey, action: &str| {
        let id = key.status.as_ref().and_then(|status| status.id.as_deref());
        vec![
            key.namespace().unwrap_or_default(),
            key.name_any(),
            print::text(id),
            print::state_of(key),
            action.to_owned(),
        ]
    };
    let rows: Vec<_> = active
        .iter()
        .map(|key| row(key, "deactivate"))
        .chain(inactive.iter().map(|key| row(key, "none: already inactive")))
        .collect();
    let plan = print::table(&["NAMESPACE", "NAME", "ID", "STATE", "ACTION"], &rows, cluster.color);
    if args.dry_run {
        return Ok(Reply::yes(plan));
    }
    if !args.yes && !active.is_empty() {
        if !std::io::stdin().is_terminal() {
            return usage(
                "standard input is not a terminal, so you cannot confirm: check the keys with --dry-run, then add \
                 --yes",
            );
        }
        report(&format!("{plan}\nDeactivate {} keys? Their clients are rejected at once. [y/N]", active.len()));
        let mut answer = String::new();
        let read = std::io::stdin().lock().read_line(&mut answer);
        if read.is_err() || !answer.trim().eq_ignore_ascii_case("y") {
            return refused("nothing was changed");
        }
    }
    let mut results = BatchResult::new(active.len(), "deactivated");
    for key in &active {
        let (namespace, name) = (key.namespace().unwrap_or_default(), key.name_any());
        let outcome = patch(cluster, &namespace, &name, json!({ "active": false })).await.map(drop);
        results.add(&format!("{namespace}/{name}"), outcome);
    }
    Ok(results.reply())
}

/// The results of one operation on several keys. A failure does not stop the operation on the remaining keys.
struct BatchResult {
    total: usize,
    completed: usize,
    failed: usize,
    done: &'static str,
    text: String,
}

impl BatchResult {
    const fn new(total: usize, done: &'static str) -> Self {
        Self { total, completed: 0, failed: 0, done, text: String::new() }
    }

    fn add(&mut self, name: &str, outcome: Result<()>) {
        self.completed += 1;
        match outcome {
            Ok(()) => drop(writeln!(self.text, "apikey.keywright.dev/{name} {}", self.done)),
            Err(CliError::Refused(message) | CliError::Usage(message)) => {
                self.failed += 1;
                report(&format!("error: {name}: {}", print::line(&message)));
            }
        }
        if self.total >= 10 && (self.completed.is_multiple_of(10) || self.completed == self.total) {
            report(&format!("{} of {}", self.completed, self.total));
        }
    }

    fn reply(self) -> Reply {
        Reply { text: self.text, yes: self.failed == 0 }
    }
}
