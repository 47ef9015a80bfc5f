//! Applies the shipped PermissionCatalogs, and writes the result of the merge to the status of each PermissionCatalog.

use std::path::{Path, PathBuf};

use kube::{
    Api, Client, ResourceExt,
    api::{Patch, PatchParams},
    core::Status,
};

use super::{FIELD_MANAGER, RequestError, events::Events, patch_params, request, status_patch};
use crate::{
    api::{PermissionCatalog, PermissionCatalogStatus},
    clock::Clock,
    domain::{
        catalog::Report,
        status::{Note, merge_condition},
    },
};

/// Reads the shipped catalogs, one from each YAML file of the directory, ordered by file name.
///
/// # Errors
/// A message that names the file that can't be read or parsed, and the cause.
pub fn shipped(directory: &Path) -> Result<Vec<PermissionCatalog>, String> {
    let failed = |path: &Path, error: &dyn std::fmt::Display| format!("{}: {error}", path.display());
    let entries = std::fs::read_dir(directory).map_err(|error| failed(directory, &error))?;
    let mut files: Vec<_> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
    files.retain(|path| path.extension().is_some_and(|extension| extension == "yaml"));
    files.sort();
    let read = |path: &PathBuf| {
        let text = std::fs::read_to_string(path).map_err(|error| failed(path, &error))?;
        serde_saphyr::from_str(&text).map_err(|error| failed(path, &error))
    };
    files.iter().map(read).collect()
}

/// Applies the shipped catalogs and returns those that failed, for another attempt. The operator applies them instead
/// of the chart because Helm and kubectl can't apply an object in the same step as its CRD.
pub async fn install(client: &Client, shipped: Vec<PermissionCatalog>) -> Vec<PermissionCatalog> {
    let mut failed = vec![];
    for catalog in shipped {
        if let Err(error) = apply(client, &catalog).await {
            let (name, error) = (catalog.name_any(), error.explained());
            tracing::warn!(catalog = name, error, "a shipped PermissionCatalog could not be applied");
            failed.push(catalog);
        }
    }
    failed
}

async fn apply(client: &Client, catalog: &PermissionCatalog) -> Result<(), RequestError> {
    let catalogs: Api<PermissionCatalog> = Api::all(client.clone());
    let (name, params) = (catalog.name_any(), PatchParams::apply(FIELD_MANAGER).force());
    let operation = format!("apply PermissionCatalog {name}");
    request(&operation, catalogs.patch(&name, &params, &Patch::Apply(catalog))).await.map(drop)
}

/// Writes the status of one catalog if it changed, and a warning Event if its condition `Accepted` became false or has
/// another message.
///
/// # Errors
/// If the API server rejects the request or can't be reached.
pub async fn report(
    client: &Client,
    catalog: &PermissionCatalog,
    report: &Report,
    clock: &Clock,
    events: &Events,
) -> Result<(), RequestError> {
    let status = status(catalog, report, clock);
    if catalog.status.as_ref() == Some(&status) {
        return Ok(());
    }
    let accepted = status.conditions.first().cloned();
    let known = catalog.status.as_ref().and_then(|s| s.conditions.first()).map(|c| (&c.reason, &c.message));
    let note = accepted.filter(|c| c.status == "False" && known != Some((&c.reason, &c.message))).map(|c| Note {
        warning: true,
        reason: if report.conflicts.is_empty() { "Invalid" } else { "Conflict" },
        message: c.message,
    });
    let catalogs: Api<PermissionCatalog> = Api::all(client.clone());
    let (name, params) = (catalog.name_any(), patch_params());
    let patch = status_patch(catalog, catalog.status.as_ref(), &status);
    match request("update status", catalogs.patch_status(&name, &params, &patch)).await {
        Ok(_) => {
            if let Some(note) = note {
                events.note(catalog, note);
            }
            Ok(())
        }
        Err(error) if error.is(Status::is_not_found) => Ok(()),
        Err(error) => Err(error),
    }
}

fn status(catalog: &PermissionCatalog, report: &Report, clock: &Clock) -> PermissionCatalogStatus {
    let (value, reason) = match () {
        () if !report.conflicts.is_empty() => ("False", "Conflict"),
        () if !report.invalid.is_empty() => ("False", "Invalid"),
        () => ("True", "Accepted"),
    };
    let without_effect: Vec<_> = report.conflicts.iter().chain(&report.invalid).map(String::as_str).collect();
    let message = if without_effect.is_empty() {
        "every entry is in force".to_owned()
    } else {
        format!("{} entries have no effect: {}", without_effect.len(), without_effect.join("; "))
    };
    let old = catalog.status.as_ref().map_or(&[][..], |s| &s.conditions);
    let generation = catalog.metadata.generation;
    let condition = |kind, value: &str| merge_condition(old, kind, value, reason, &message, generation, clock.now());
    let mut conditions = vec![condition("Accepted", value), condition("Ready", value)];
    if value == "False" {
        conditions.push(condition("Stalled", "True"));
    }
    let count = |n: usize| Some(i64::try_from(n).unwrap_or(i64::MAX));
    PermissionCatalogStatus {
        observed_generation: generation,
        conditions,
        permissions: count(report.permissions),
        presets: count(report.presets),
    }
}
