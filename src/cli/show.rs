//! `list` and `describe`: keys in readable form.

use std::fmt::Write;

use clap::{Args, Subcommand};
use kube::{Api, ResourceExt};

use super::{ClusterClient, Format, Reply, Result, Selection, print, refused, rights};
use crate::{
    api::{AccessMode, AccessPolicy, ApiKey, Evidence, PermissionCatalog},
    domain::{authorization::Contents, catalog::Catalog, rights as domain_rights, status::secret_ref},
};

#[derive(Args)]
pub(super) struct ListArgs {
    #[command(flatten)]
    selection: Selection,
    /// The format of the output.
    #[arg(short, long, value_enum)]
    output: Option<Format>,
}

#[derive(Args)]
pub(super) struct DescribeArgs {
    /// The name of the key.
    key: String,
    /// The format of the output.
    #[arg(short, long, value_enum)]
    output: Option<Format>,
}

#[derive(Subcommand)]
pub(super) enum LegacyCommand {
    /// List legacy keys.
    List(ListArgs),
    /// Show the permissions of a legacy key, so that a custom key can replace it.
    Describe(DescribeArgs),
}

pub(super) async fn list(cluster: &ClusterClient, args: &ListArgs, legacy: bool) -> Result<Reply> {
    let mut keys = cluster.select(&args.selection, None).await?;
    keys.retain(|key| !legacy || key.spec.legacy.is_some());
    if let Some(text) = print::keys(&keys, args.output, false)? {
        return Ok(Reply::yes(text));
    }
    if keys.is_empty() {
        super::report("No keys found.");
        return Ok(Reply::yes(""));
    }
    let wide = args.output == Some(Format::Wide);
    let mut head = vec!["NAME", "DISPLAY NAME", "TYPE", "CREATOR", "CREATOR TYPE", "CREATED", "STATE"];
    if args.selection.all_namespaces {
        head.insert(0, "NAMESPACE");
    }
    if legacy {
        head.push("LEGACY");
    }
    if wide {
        head.extend(["EXPIRES", "LAST USED", "ID"]);
    }
    let rows: Vec<_> = keys.iter().map(|key| row(key, args.selection.all_namespaces, legacy, wide)).collect();
    Ok(Reply::yes(print::table(&head, &rows, cluster.color)))
}

fn row(key: &ApiKey, namespace: bool, legacy: bool, wide: bool) -> Vec<String> {
    let status = key.status.as_ref();
    let (creator, creator_type) = print::creator_of(key);
    let mut row = if namespace { vec![key.namespace().unwrap_or_default()] } else { vec![] };
    row.extend([
        key.name_any(),
        key.spec.display_name.clone().unwrap_or_else(|| key.name_any()),
        format!("{:?}", key.spec.key_type),
        creator,
        creator_type.to_owned(),
        print::time(key.metadata.creation_timestamp.as_ref()),
        print::state_of(key),
    ]);
    if legacy {
        row.push(key.spec.legacy.map_or_else(String::new, |kind| format!("{kind:?}")));
    }
    if wide {
        row.push(print::text(key.spec.expires_at.as_deref()));
        row.push(print::time(status.and_then(|status| status.last_used_at.as_ref())));
        row.push(print::text(status.and_then(|status| status.id.as_deref())));
    }
    row
}

pub(super) async fn describe(cluster: &ClusterClient, args: &DescribeArgs, legacy: bool) -> Result<Reply> {
    let key = cluster.key(&args.key).await?;
    if legacy && key.spec.legacy.is_none() {
        return refused(format!("{} is not a legacy key: use kubectl keywright describe", args.key));
    }
    if let Some(text) = print::keys(std::slice::from_ref(&key), args.output, true)? {
        return Ok(Reply::yes(text));
    }
    let (sources, catalog) = cluster.catalog().await?;
    let mut text = summary(&key, cluster.color);
    contents(&mut text, &key, &catalog, &sources);
    tokens(&mut text, &key);
    policy(&mut text, cluster, &key).await?;
    conditions(&mut text, &key, cluster.color);
    Ok(Reply::yes(text))
}

/// Writes one line of a description.
fn field(text: &mut String, name: &str, value: &str) {
    let _ = writeln!(text, "{:<15}{}", format!("{name}:"), print::line(value));
}

fn summary(key: &ApiKey, color: bool) -> String {
    let mut text = String::new();
    let (spec, status) = (&key.spec, key.status.as_ref());
    let (creator, creator_type) = print::creator_of(key);
    field(&mut text, "Name", &key.name_any());
    field(&mut text, "Namespace", &key.namespace().unwrap_or_default());
    field(&mut text, "Display Name", &spec.display_name.clone().unwrap_or_else(|| key.name_any()));
    field(&mut text, "Type", &format!("{:?}", spec.key_type));
    if let Some(user) = &spec.user {
        field(&mut text, "User", user);
    }
    if let Some(kind) = spec.legacy {
        field(
            &mut text,
            "Legacy",
            &format!("{kind:?}; kubectl keywright migrate writes a custom key that replaces it"),
        );
    }
    let _ = writeln!(text, "{:<15}{}", "State:", print::paint(&print::state_of(key), color));
    field(&mut text, "Id", &print::text(status.and_then(|status| status.id.as_deref())));
    field(&mut text, "Creator", &format!("{creator} ({creator_type})"));
    field(&mut text, "Created", &print::time(key.metadata.creation_timestamp.as_ref()));
    field(&mut text, "Expires", &print::text(spec.expires_at.as_deref()));
    field(&mut text, "Last Used", &print::time(status.and_then(|status| status.last_used_at.as_ref())));
    if let Some(rotation) = &spec.rotation {
        let every = rotation.every.as_deref().map_or_else(|| "on request".to_owned(), |every| format!("every {every}"));
        let overlap = rotation.overlap.as_deref().map_or_else(String::new, |overlap| format!(", overlap {overlap}"));
        let next = print::time(status.and_then(|status| status.next_rotation_at.as_ref()));
        field(&mut text, "Rotation", &format!("{every}{overlap}; next: {next}"));
    }
    let secret = secret_ref(key);
    field(&mut text, "Secret", &format!("{}, key {}", secret.name, secret.key));
    if let Some(reveal) = status.and_then(|status| status.reveal.as_ref()) {
        let by = reveal.by.as_deref().map_or_else(String::new, |by| format!(" by {by}"));
        let at = reveal.at.as_ref().map_or_else(String::new, |at| format!(" at {}", at.0));
        field(&mut text, "Value", &format!("{:?}, {:?}{by}{at}", reveal.mode, reveal.state));
    }
    text
}

/// Writes the presets and permissions of a key with their origin and evidence.
fn contents(text: &mut String, key: &ApiKey, catalog: &Catalog, sources: &[PermissionCatalog]) {
    let presets: Vec<_> = if let Some(status) = key.status.as_ref().filter(|status| !status.presets.is_empty()) {
        status.presets.clone()
    } else {
        key.spec.presets.clone()
    };
    let _ = writeln!(text, "Presets:{}", if presets.is_empty() { "       <none>" } else { "" });
    for name in &presets {
        let known = sources.iter().flat_map(|source| &source.spec.presets);
        let known = known.into_iter().find(|preset| preset.name.eq_ignore_ascii_case(name));
        let mark = match known {
            Some(preset) => {
                let evidence = preset.evidence.map_or_else(|| "unmarked".to_owned(), |mark| format!("{mark:?}"));
                let complete = preset.completeness.map_or_else(String::new, |mark| format!(", complete: {mark:?}"));
                format!("evidence: {evidence}{complete}")
            }
            None => "not in the catalog".to_owned(),
        };
        let _ = writeln!(text, "  {}  ({mark})", print::line(name));
    }
    let effective = Contents::in_force(&key.spec, key.status.as_ref(), catalog).effective(catalog);
    let _ = writeln!(text, "Permissions ({} in all):", effective.len());
    for name in &effective {
        let source = source_of(name, key, &presets, sources);
        let _ = writeln!(text, "  {}  ({})", print::line(name), print::line(&source));
    }
}

/// Returns the origin of a permission of a key.
fn source_of(name: &str, key: &ApiKey, presets: &[String], sources: &[PermissionCatalog]) -> String {
    if key.spec.permissions.iter().any(|own| own.eq_ignore_ascii_case(name)) {
        return "requested".to_owned();
    }
    let has = |list: &[String]| list.iter().any(|one| one.eq_ignore_ascii_case(name));
    if key.spec.legacy.is_some() {
        return "legacy role".to_owned();
    }
    let of_key = |preset: &&crate::api::CatalogPreset| {
        presets.iter().any(|own| own.eq_ignore_ascii_case(&preset.name)) && has(&preset.permissions)
    };
    let mut found: Vec<String> = vec![];
    for preset in sources.iter().flat_map(|source| &source.spec.presets).filter(of_key) {
        let inferred = preset.evidence == Some(Evidence::Inferred) || has(&preset.inferred);
        let mark = match preset.evidence {
            _ if inferred => "inferred",
            Some(Evidence::Unknown) => "unknown",
            Some(_) => "documented",
            None => "unmarked",
        };
        let line = format!("{}: {mark}", preset.name);
        if !found.contains(&line) {
            found.push(line);
        }
    }
    if found.is_empty() { "in force".to_owned() } else { found.join(", ") }
}

fn tokens(text: &mut String, key: &ApiKey) {
    let tokens = key.status.as_ref().map_or(&[][..], |status| &status.tokens);
    if tokens.is_empty() {
        return;
    }
    let rows: Vec<_> = tokens
        .iter()
        .enumerate()
        .map(|(index, token)| {
            vec![
                format!("  {}", token.id),
                if index == 0 { "current".to_owned() } else { "overlap".to_owned() },
                print::time(Some(&token.minted_at)),
                print::time(token.expires_at.as_ref()),
            ]
        })
        .collect();
    text.push_str("Values:\n");
    text.push_str(&print::table(&["  ID", "STATE", "MINTED", "VALID UNTIL"], &rows, false));
}

async fn policy(text: &mut String, cluster: &ClusterClient, key: &ApiKey) -> Result<()> {
    let Some(reference) = &key.spec.access_policy_ref else {
        field(text, "Access Policy", "<none>");
        return Ok(());
    };
    let names = domain_rights::read_policy(key.spec.key_type);
    if !rights::may(cluster, &domain_rights::any_permission(names)).await? {
        let why = format!("{} (its content requires the permission {})", reference.name, names.join(" or "));
        field(text, "Access Policy", &why);
        return Ok(());
    }
    let policies: Api<AccessPolicy> = Api::namespaced(cluster.client.clone(), &key.namespace().unwrap_or_default());
    let Some(policy) = policies.get_opt(&reference.name).await? else {
        field(text, "Access Policy", &format!("{} (does not exist, so that no user may view the key)", reference.name));
        return Ok(());
    };
    field(text, "Access Policy", &format!("{} ({:?})", reference.name, policy.spec.mode));
    if policy.spec.mode == AccessMode::Advanced {
        for rule in &policy.spec.rules {
            let of_policy = rule.policy_access.unwrap_or(rule.access);
            let groups = print::line(&rule.groups.join(", "));
            let _ = writeln!(text, "  {groups}: {:?}, the policy itself: {of_policy:?}", rule.access);
        }
        if let Some(general) = policy.spec.general_access {
            let of_policy = policy.spec.general_policy_access.unwrap_or(general);
            let _ = writeln!(text, "  all other users: {general:?}, the policy itself: {of_policy:?}");
        }
    }
    Ok(())
}

fn conditions(text: &mut String, key: &ApiKey, color: bool) {
    let conditions = key.status.as_ref().map_or(&[][..], |status| &status.conditions);
    if conditions.is_empty() {
        field(text, "Conditions", "<none yet: the operator has not processed the key>");
        return;
    }
    let rows: Vec<_> = conditions
        .iter()
        .map(|condition| {
            vec![
                format!("  {}", condition.type_),
                condition.status.clone(),
                condition.reason.clone(),
                condition.message.clone(),
            ]
        })
        .collect();
    text.push_str("Conditions:\n");
    text.push_str(&print::table(&["  TYPE", "STATUS", "REASON", "MESSAGE"], &rows, color));
}
