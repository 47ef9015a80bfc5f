//! What changes keys. Each change is one patch of the spec, which admission judges as it does any other.

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

use super::{Cluster, DryRun, FIELD_MANAGER, Failure, Reply, Result, Selection, print, refused, say, usage};
use crate::api::ApiKey;

#[derive(Args)]
pub(super) struct RotateArgs {
    /// The key.
    key: String,
    /// Refuse the former value at once, and at each later rotation (spec.rotation.overlap: 0s).
    #[arg(long)]
    revoke_previous: bool,
}

#[derive(Args)]
pub(super) struct SwitchArgs {
    /// The keys.
    #[arg(required = true)]
    keys: Vec<String>,
}

#[derive(Args)]
pub(super) struct DeleteArgs {
    /// The keys.
    #[arg(required_unless_present = "selector", conflicts_with = "selector")]
    keys: Vec<String>,
    #[command(flatten)]
    selection: Selection,
    /// Only say what would be deleted.
    #[arg(long, value_enum, default_value_t)]
    dry_run: DryRun,
}

#[derive(Args)]
pub(super) struct RevokeArgs {
    #[command(flatten)]
    selection: Selection,
    /// The key with this id, current or in overlap: key_ and 16 hex digits.
    #[arg(long, required_unless_present = "selector", conflicts_with = "selector")]
    id: Option<String>,
    /// Only say what would be done.
    #[arg(long)]
    dry_run: bool,
    /// Do not ask.
    #[arg(short, long)]
    yes: bool,
}

pub(super) fn patch_params(dry_run: bool) -> PatchParams {
    PatchParams { dry_run, field_manager: Some(FIELD_MANAGER.to_owned()), ..PatchParams::default() }
}

async fn patch(cluster: &Cluster, namespace: &str, name: &str, spec: Value) -> Result<ApiKey> {
    let patch = Patch::Merge(json!({ "spec": spec }));
    Ok(cluster.keys_in(namespace).patch(name, &patch_params(false), &patch).await?)
}

/// Asks for a new value of a key.
pub(super) async fn request_value(cluster: &Cluster, name: &str, revoke_previous: bool) -> Result<ApiKey> {
    // As exact as the clock: two requests in one second are two requests.
    let mut rotation = json!({ "requestedAt": cluster.clock.exact().to_string() });
    if revoke_previous {
        rotation["overlap"] = json!("0s");
    }
    patch(cluster, &cluster.namespace, name, json!({ "rotation": rotation })).await
}

pub(super) async fn rotate(cluster: &Cluster, args: &RotateArgs) -> Result<Reply> {
    request_value(cluster, &args.key, args.revoke_previous).await?;
    Ok(Reply::yes(format!("apikey.keywright.dev/{} rotation requested\n", args.key)))
}

pub(super) async fn switch(cluster: &Cluster, args: &SwitchArgs, active: bool) -> Result<Reply> {
    let done = if active { "activated" } else { "deactivated" };
    let mut tally = Tally::new(args.keys.len(), done);
    for name in &args.keys {
        tally.add(name, patch(cluster, &cluster.namespace, name, json!({ "active": active })).await.map(drop));
    }
    Ok(tally.reply())
}

pub(super) async fn delete(cluster: &Cluster, args: &DeleteArgs) -> Result<Reply> {
    if args.selection.all_namespaces && args.selection.selector.is_none() {
        return usage("-A goes with a selector: the same name is another key in each namespace");
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
    let mut tally = Tally::new(keys.len(), done);
    for (namespace, name) in &keys {
        let api = cluster.keys_in(namespace);
        let outcome = match args.dry_run {
            DryRun::Client => api.get(name).await.map(drop),
            dry_run => {
                let params = DeleteParams { dry_run: dry_run == DryRun::Server, ..DeleteParams::default() };
                api.delete(name, &params).await.map(drop)
            }
        };
        tally.add(name, outcome.map_err(Failure::from));
    }
    Ok(tally.reply())
}

pub(super) async fn revoke(cluster: &Cluster, args: &RevokeArgs) -> Result<Reply> {
    let keys = match &args.id {
        None => cluster.select(&args.selection, None).await?,
        Some(id) => {
            // A leak is urgent, and an id is of one key wherever it is: without -n, all namespaces are searched.
            let all_namespaces = args.selection.all_namespaces || cluster.global.namespace.is_none();
            let selection = Selection { all_namespaces, selector: None };
            let current = cluster.select(&selection, Some(&format!("status.id={id}"))).await?;
            let has = |key: &ApiKey| {
                key.status.as_ref().is_some_and(|status| status.tokens.iter().any(|token| token.id == *id))
            };
            if current.is_empty() {
                cluster.select(&selection, None).await?.into_iter().filter(has).collect()
            } else {
                current
            }
        }
    };
    if keys.is_empty() {
        return refused("no key matches");
    }
    let (off, on): (Vec<_>, Vec<_>) = keys.into_iter().partition(|key| key.spec.active == Some(false));
    let action = |key: &ApiKey, action: &str| {
        let id = key.status.as_ref().and_then(|status| status.id.as_deref());
        vec![
            key.namespace().unwrap_or_default(),
            key.name_any(),
            print::text(id),
            print::state_of(key),
            action.to_owned(),
        ]
    };
    let rows: Vec<_> = on
        .iter()
        .map(|key| action(key, "deactivate"))
        .chain(off.iter().map(|key| action(key, "none: it is inactive")))
        .collect();
    let plan = print::table(&["NAMESPACE", "NAME", "ID", "STATE", "ACTION"], &rows, cluster.colour);
    if args.dry_run {
        return Ok(Reply::yes(plan));
    }
    if !args.yes && !on.is_empty() {
        if !std::io::stdin().is_terminal() {
            return usage("nobody can be asked here: look at it with --dry-run, then say --yes");
        }
        say(&format!("{plan}\nDeactivate {} keys? Whatever uses them stops working at once. [y/N]", on.len()));
        let mut answer = String::new();
        let read = std::io::stdin().lock().read_line(&mut answer);
        if read.is_err() || !answer.trim().eq_ignore_ascii_case("y") {
            return refused("nothing was changed");
        }
    }
    let mut tally = Tally::new(on.len(), "deactivated");
    for key in &on {
        let (namespace, name) = (key.namespace().unwrap_or_default(), key.name_any());
        let outcome = patch(cluster, &namespace, &name, json!({ "active": false })).await.map(drop);
        tally.add(&format!("{namespace}/{name}"), outcome);
    }
    Ok(tally.reply())
}

/// What became of many keys. One that fails does not keep the others from their turn.
struct Tally {
    all: usize,
    seen: usize,
    failed: usize,
    done: &'static str,
    text: String,
}

impl Tally {
    const fn new(all: usize, done: &'static str) -> Self {
        Self { all, seen: 0, failed: 0, done, text: String::new() }
    }

    fn add(&mut self, name: &str, outcome: Result<()>) {
        self.seen += 1;
        match outcome {
            Ok(()) => drop(writeln!(self.text, "apikey.keywright.dev/{name} {}", self.done)),
            Err(Failure::Refused(message) | Failure::Usage(message)) => {
                self.failed += 1;
                say(&format!("error: {name}: {}", print::line(&message)));
            }
        }
        if self.all >= 10 && (self.seen.is_multiple_of(10) || self.seen == self.all) {
            say(&format!("{} of {}", self.seen, self.all));
        }
    }

    fn reply(self) -> Reply {
        Reply { text: self.text, yes: self.failed == 0 }
    }
}
