//! Each file of `examples/` has the result that its comment states.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::ensure;
use serde_json::Value;
use tokio::sync::Mutex;

use super::{Team, condition};
use crate::support::{TIMEOUT, eventually, repository};

/// Serializes the tests that apply the PermissionCatalog of the examples, which is cluster-scoped.
static CATALOG: Mutex<()> = Mutex::const_new(());

fn files(folder: &str) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(repository().join(folder)).unwrap().map(|entry| entry.unwrap().path());
    let mut files: Vec<_> =
        entries.filter(|path| path.extension().is_some_and(|extension| extension == "yaml")).collect();
    files.sort();
    assert!(files.len() > 5, "{folder}: {files:?}");
    files
}

fn name(path: &Path) -> &str {
    path.file_name().unwrap().to_str().unwrap()
}

/// Applies all examples. The webhook may reject a key until it observes the key's catalog, so this retries.
async fn apply(team: &Team, options: &[&str]) {
    for file in files("examples") {
        let args = [&["apply", "-f", file.to_str().unwrap()], options].concat();
        if name(&file) == "payments-refunds.yaml" {
            eventually("the webhook observes the catalog", TIMEOUT, async || team.try_kubectl(&args)).await;
        } else {
            let output = team.kubectl(&args);
            assert!(!output.contains("Warning"), "{}: {output}", file.display());
        }
    }
}

/// Waits until all keys are Ready, and returns them by name.
async fn wait_until_ready(team: &Team) -> BTreeMap<String, Value> {
    let keys = team
        .wait_for("all examples are Ready", async || {
            let keys: Value = serde_json::from_str(&team.try_kubectl(&["get", "apikeys", "-o", "json"])?)?;
            for key in keys["items"].as_array().unwrap() {
                let ready = condition(key, "Ready").is_some_and(|ready| {
                    ready["status"] == "True" && ready["observedGeneration"] == key["metadata"]["generation"]
                });
                ensure!(ready, "{}: {:#}", key["metadata"]["name"], key["status"]);
            }
            Ok(keys)
        })
        .await;
    let keys = keys["items"].as_array().unwrap().iter();
    keys.map(|key| (key["metadata"]["name"].as_str().unwrap().to_owned(), key.clone())).collect()
}

async fn assert_examples_are_ready_and_stable(options: &[&str]) {
    let _guard = CATALOG.lock().await;
    let team = Team::new().await;
    apply(&team, options).await;
    let first = wait_until_ready(&team).await;
    let written =
        files("examples").iter().filter(|f| std::fs::read_to_string(f).unwrap().contains("kind: ApiKey")).count();
    assert_eq!(first.len(), written, "one ApiKey per file: {:?}", first.keys());
    for (name, key) in &first {
        let active = key["spec"]["active"] != false;
        assert_eq!(key["status"]["state"], if active { "Active" } else { "Inactive" }, "{name}");
        let secret_ref = &key["status"]["secretRef"];
        let secret = team.get(&format!("secret/{}", secret_ref["name"].as_str().unwrap()));
        assert!(secret["data"][secret_ref["key"].as_str().unwrap()].is_string(), "{name}: {secret_ref}");
    }

    // Applying the same files again changes nothing, and kubectl diff shows no difference.
    apply(&team, options).await;
    let diff: Vec<_> =
        files("examples").iter().flat_map(|file| ["-f".to_owned(), file.display().to_string()]).collect();
    let diff: Vec<_> =
        ["diff"].into_iter().chain(diff.iter().map(String::as_str)).chain(options.iter().copied()).collect();
    assert_eq!(team.kubectl(&diff), "", "kubectl diff must show no difference");
    let second = wait_until_ready(&team).await;
    for (name, key) in &first {
        let version = |key: &Value| (key["metadata"]["generation"].clone(), key["metadata"]["resourceVersion"].clone());
        assert_eq!(version(key), version(&second[name]), "{name}: the second apply changed the key");
    }
    team.kubectl(&["delete", "-f", repository().join("examples/payments-refunds.yaml").to_str().unwrap()]);
    team.kubectl(&["delete", "-f", repository().join("examples/catalog-payments.yaml").to_str().unwrap()]);
}

#[tokio::test]
async fn examples_become_ready_and_a_second_client_side_apply_changes_nothing() {
    assert_examples_are_ready_and_stable(&[]).await;
}

#[tokio::test]
async fn examples_become_ready_and_a_second_server_side_apply_changes_nothing() {
    assert_examples_are_ready_and_stable(&["--server-side", "--field-manager=examples"]).await;
}

#[tokio::test]
async fn refused_examples_are_rejected_with_the_quoted_message() {
    let team = Team::new().await;
    for file in files("examples/refused") {
        let text = std::fs::read_to_string(&file).unwrap();
        let first = text.lines().next().unwrap();
        let (by, quoted) = first.split_once(": ").unwrap_or_else(|| panic!("{}: {first}", file.display()));
        let by_webhook = match by {
            "# Rejected by the webhook" => true,
            "# Rejected by the API server" => false,
            _ => panic!("{}: the first line must name the webhook or the API server: {first}", file.display()),
        };
        for options in [&[][..], &["--server-side", "--field-manager=examples"], &["--dry-run=server"]] {
            let mut args = vec!["apply", "-f", file.to_str().unwrap()];
            args.extend(options);
            if name(&file) == "one-secret-twice.yaml" {
                // A dry run does not store the first key, so the second one has no conflict.
                if options == ["--dry-run=server"] {
                    continue;
                }
                // The webhook must observe the first key before the file is applied.
                let first_key = text.split("---").next().unwrap();
                let file = team.shared.plane.folder().join("one-secret-first.yaml");
                std::fs::write(&file, first_key).unwrap();
                team.kubectl(&["apply", "-f", file.to_str().unwrap()]);
                team.wait_until_condition("apikey/one-secret-first", "Ready", "True", "Active").await;
            }
            // In a dry run these are warnings, because a catalog applied together with the key may resolve them.
            let needs_catalog =
                ["not-ingestion.yaml", "rum-combined.yaml", "unknown-preset.yaml"].contains(&name(&file));
            if needs_catalog && options == ["--dry-run=server"] {
                assert!(by_webhook);
                let output = team.shared.plane.kubectl().args(["-n", &team.namespace]).args(&args).output().unwrap();
                let stderr = String::from_utf8_lossy(&output.stderr);
                assert!(
                    output.status.success() && stderr.contains(&format!("Warning: {quoted}")),
                    "{}: {stderr}",
                    file.display()
                );
                continue;
            }
            let error =
                format!("{:#}", team.try_kubectl(&args).expect_err(&format!("{} was accepted", file.display())));
            assert!(error.trim_end().ends_with(quoted), "{} {options:?}:\n{error}", file.display());
            team.kubectl(&["delete", "apikeys", "--all"]);
        }
    }
    let keys = team.kubectl(&["get", "apikeys", "-o", "name"]);
    assert_eq!(keys, "", "rejected objects are not stored");
}

#[tokio::test]
async fn the_example_workload_references_the_secret_of_the_example_key() {
    let team = Team::new().await;
    let apply = |file: &str| {
        let file = repository().join("examples").join(file);
        team.kubectl(&["apply", "-f", file.to_str().unwrap()])
    };
    apply("workload.yaml");
    apply("send-your-data.yaml");
    team.wait_until_condition("apikey/checkout-telemetry", "Ready", "True", "Active").await;
    let pod = team.get("deployment/checkout")["spec"]["template"]["spec"].clone();
    let from_env = &pod["containers"][0]["env"][0]["valueFrom"]["secretKeyRef"];
    let from_volume = &pod["volumes"][0]["secret"]["secretName"];
    assert_eq!(&from_env["name"], from_volume);
    let secret = eventually("the Secret exists", Duration::from_secs(10), async || {
        team.try_kubectl(&["get", "secret", from_volume.as_str().unwrap(), "-o", "json"])
    })
    .await;
    let secret: Value = serde_json::from_str(&secret).unwrap();
    assert!(secret["data"][from_env["key"].as_str().unwrap()].is_string(), "{from_env}");
}
