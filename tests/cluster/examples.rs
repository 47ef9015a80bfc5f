//! Every file of `examples/` does what its comment says.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::ensure;
use serde_json::Value;
use tokio::sync::Mutex;

use crate::support::{PATIENCE, eventually, repository};
use crate::{Team, condition};

/// The catalogue among the examples is for the whole cluster: tests that apply it take turns.
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

/// Applies all examples; a key that is applied in the same moment as its catalogue may be refused until the webhook has
/// heard of it.
async fn apply(team: &Team, options: &[&str]) {
    for file in files("examples") {
        let args = [&["apply", "-f", file.to_str().unwrap()], options].concat();
        if name(&file) == "payments-refunds.yaml" {
            eventually("the webhook knows the catalogue", PATIENCE, async || team.try_kubectl(&args)).await;
        } else {
            let said = team.kubectl(&args);
            assert!(!said.contains("Warning"), "{}: {said}", file.display());
        }
    }
}

/// Waits until all keys are Ready, and returns what is stored of each: metadata that people write, and spec.
async fn ready(team: &Team) -> BTreeMap<String, Value> {
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

async fn every_example_is_ready_and_stays_as_it_is(options: &[&str]) {
    let _turn = CATALOG.lock().await;
    let team = Team::new().await;
    apply(&team, options).await;
    let first = ready(&team).await;
    let written =
        files("examples").iter().filter(|f| std::fs::read_to_string(f).unwrap().contains("kind: ApiKey")).count();
    assert_eq!(first.len(), written, "one ApiKey a file: {:?}", first.keys());
    for (name, key) in &first {
        let active = key["spec"]["active"] != false;
        assert_eq!(key["status"]["state"], if active { "Active" } else { "Inactive" }, "{name}");
        let place = &key["status"]["secretRef"];
        let secret = team.get(&format!("secret/{}", place["name"].as_str().unwrap()));
        assert!(secret["data"][place["key"].as_str().unwrap()].is_string(), "{name}: {place}");
    }

    // What is in Git is what is stored: nothing to apply, and no difference to show.
    apply(&team, options).await;
    let diff: Vec<_> =
        files("examples").iter().flat_map(|file| ["-f".to_owned(), file.display().to_string()]).collect();
    let diff: Vec<_> =
        ["diff"].into_iter().chain(diff.iter().map(String::as_str)).chain(options.iter().copied()).collect();
    assert_eq!(team.kubectl(&diff), "", "kubectl diff ends with an error if there is a difference");
    let second = ready(&team).await;
    for (name, key) in &first {
        let version = |key: &Value| (key["metadata"]["generation"].clone(), key["metadata"]["resourceVersion"].clone());
        assert_eq!(version(key), version(&second[name]), "{name}: applying the same again changed it");
    }
    team.kubectl(&["delete", "-f", repository().join("examples/payments-refunds.yaml").to_str().unwrap()]);
    team.kubectl(&["delete", "-f", repository().join("examples/catalog-payments.yaml").to_str().unwrap()]);
}

#[tokio::test]
async fn every_example_applied_by_the_client_is_ready_and_stays_as_it_is() {
    every_example_is_ready_and_stays_as_it_is(&[]).await;
}

#[tokio::test]
async fn every_example_applied_by_the_server_is_ready_and_stays_as_it_is() {
    every_example_is_ready_and_stays_as_it_is(&["--server-side", "--field-manager=examples"]).await;
}

#[tokio::test]
async fn every_refused_example_is_refused_with_the_text_that_it_quotes() {
    let team = Team::new().await;
    for file in files("examples/refused") {
        let text = std::fs::read_to_string(&file).unwrap();
        let first = text.lines().next().unwrap();
        let (by, quoted) = first.split_once(": ").unwrap_or_else(|| panic!("{}: {first}", file.display()));
        let by_webhook = match by {
            "# Refused by the webhook" => true,
            "# Refused by the apiserver" => false,
            _ => panic!("{}: who refuses it? {first}", file.display()),
        };
        for options in [&[][..], &["--server-side", "--field-manager=examples"], &["--dry-run=server"]] {
            let mut args = vec!["apply", "-f", file.to_str().unwrap()];
            args.extend(options);
            if name(&file) == "one-secret-twice.yaml" {
                // A dry run stores no first key for the second to meet.
                if options == ["--dry-run=server"] {
                    continue;
                }
                // Both at once are accepted if the webhook has not heard of the first: so it goes first.
                let first_key = text.split("---").next().unwrap();
                let file = team.shared.plane.folder().join("one-secret-first.yaml");
                std::fs::write(&file, first_key).unwrap();
                team.kubectl(&["apply", "-f", file.to_str().unwrap()]);
                team.until_condition("apikey/one-secret-first", "Ready", "True", "Active").await;
            }
            // What a catalogue of the same set may mend is a warning in a dry run.
            let of_catalog = ["not-ingestion.yaml", "rum-combined.yaml", "unknown-preset.yaml"].contains(&name(&file));
            if of_catalog && options == ["--dry-run=server"] {
                assert!(by_webhook);
                let output = team.shared.plane.kubectl().args(["-n", &team.namespace]).args(&args).output().unwrap();
                let said = String::from_utf8_lossy(&output.stderr);
                assert!(
                    output.status.success() && said.contains(&format!("Warning: {quoted}")),
                    "{}: {said}",
                    file.display()
                );
                continue;
            }
            let said = format!("{:#}", team.try_kubectl(&args).expect_err(&format!("{} was accepted", file.display())));
            assert!(said.trim_end().ends_with(quoted), "{} {options:?}:\n{said}", file.display());
            team.kubectl(&["delete", "apikeys", "--all"]);
        }
    }
    let keys = team.kubectl(&["get", "apikeys", "-o", "name"]);
    assert_eq!(keys, "", "nothing of what was refused is stored");
}

/// The workload waits for the Secret that the key's example makes, under the names that the example has.
#[tokio::test]
async fn the_example_workload_mounts_what_the_example_key_makes() {
    let team = Team::new().await;
    let apply = |file: &str| {
        let file = repository().join("examples").join(file);
        team.kubectl(&["apply", "-f", file.to_str().unwrap()])
    };
    apply("workload.yaml");
    apply("send-your-data.yaml");
    team.until_condition("apikey/checkout-telemetry", "Ready", "True", "Active").await;
    let pod = team.get("deployment/checkout")["spec"]["template"]["spec"].clone();
    let from_env = &pod["containers"][0]["env"][0]["valueFrom"]["secretKeyRef"];
    let from_volume = &pod["volumes"][0]["secret"]["secretName"];
    assert_eq!(&from_env["name"], from_volume);
    let secret = eventually("the Secret", Duration::from_secs(10), async || {
        team.try_kubectl(&["get", "secret", from_volume.as_str().unwrap(), "-o", "json"])
    })
    .await;
    let secret: Value = serde_json::from_str(&secret).unwrap();
    assert!(secret["data"][from_env["key"].as_str().unwrap()].is_string(), "{from_env}");
}
