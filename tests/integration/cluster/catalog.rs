//! PermissionCatalogs: the shipped one, custom ones, and their effect on keys when they change.

use std::time::Duration;

use anyhow::ensure;
use serde_json::{Value, json};

use super::{Team, api_key, condition};
use crate::support::{TIMEOUT, eventually};

/// Returns the manifest of a PermissionCatalog. The kind is cluster-scoped, so each test uses its own prefix in names.
fn catalog(name: &str, spec: &Value) -> Value {
    json!({
        "apiVersion": "keywright.dev/v1alpha1", "kind": "PermissionCatalog", "metadata": {"name": name}, "spec": spec,
    })
}

/// Applies a catalog and waits until it is Accepted.
async fn apply_catalog(team: &Team, name: &str, spec: &Value) {
    team.apply(&catalog(name, spec));
    team.wait_until_condition(&format!("permissioncatalog/{name}"), "Accepted", "True", "Accepted").await;
}

/// Applies a key and waits until it is Ready. Retries because the webhook observes a new catalog through a watch.
async fn apply_key(team: &Team, name: &str, spec: &Value) -> Value {
    eventually("the key is admitted", TIMEOUT, async || team.try_apply(&api_key(name, spec))).await;
    team.wait_until_condition(&format!("apikey/{name}"), "Ready", "True", "Active").await
}

/// Waits until a new object has a later creationTimestamp, which has whole seconds and orders catalogs.
async fn wait_for_next_second(team: &Team, since: &str) {
    let created = team.get(since)["metadata"]["creationTimestamp"].as_str().unwrap().to_owned();
    eventually("a second has passed", Duration::from_secs(10), async || {
        let probe = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"generateName": "time-"}});
        let file = team.file(&probe);
        let now: Value = serde_json::from_str(&team.try_kubectl(&["create", "-f", &file, "-o", "json"])?)?;
        ensure!(now["metadata"]["creationTimestamp"].as_str() > Some(&created), "still {created}");
        Ok(())
    })
    .await;
}

fn permissions(names: &[&str]) -> Value {
    names.iter().map(|name| json!({"name": name})).collect()
}

#[tokio::test]
async fn the_shipped_catalog_is_complete_and_states_its_evidence() {
    let team = Team::new().await;
    let shipped = team.wait_until_condition("permissioncatalog/coralogix", "Accepted", "True", "Accepted").await;
    let (spec, status) = (&shipped["spec"], &shipped["status"]);
    let count = |list: &str| spec[list].as_array().unwrap().len();
    assert_eq!([count("permissions"), count("presets"), count("roles"), count("legacyRoles")], [301, 38, 7, 8]);
    assert_eq!((&status["permissions"], &status["presets"]), (&json!(301), &json!(38)), "every entry has an effect");
    assert_eq!(status["observedGeneration"], shipped["metadata"]["generation"]);
    assert_eq!(condition(&shipped, "Accepted").unwrap()["message"], "every entry is in force");
    assert!(condition(&shipped, "Stalled").is_none());

    // Every entry states whether it is documented or inferred.
    let evidence = |entry: &Value, field: &str| entry[field].as_str().map(ToOwned::to_owned);
    for permission in spec["permissions"].as_array().unwrap() {
        let known = evidence(permission, "rolesEvidence");
        assert!(known.is_some(), "{permission} has no evidence");
        let sources = permission["sources"].as_array().map_or(0, Vec::len);
        assert!(known.as_deref() != Some("Documented") || sources > 0, "{permission} is Documented without sources");
    }
    for preset in spec["presets"].as_array().unwrap() {
        let known = evidence(preset, "evidence").unwrap_or_else(|| panic!("{preset} has no evidence"));
        let inferred = preset["inferred"].as_array().map_or(&[][..], Vec::as_slice);
        assert_eq!(known == "Mixed", !inferred.is_empty(), "{preset}");
        let has = preset["permissions"].as_array().map_or(&[][..], Vec::as_slice);
        assert_eq!(known == "Unknown", has.is_empty(), "{preset}");
        assert!(inferred.iter().all(|name| has.contains(name)), "{preset}");
        let sources = preset["sources"].as_array().map_or(0, Vec::len);
        assert!(known != "Documented" || sources > 0, "{preset} is Documented without sources");
    }
    for role in spec["roles"].as_array().unwrap() {
        let lists =
            ["documentedPermissions", "inferredPermissions"].map(|list| role[list].as_array().map_or(0, Vec::len));
        assert!(lists.iter().sum::<usize>() > 0 || evidence(role, "evidence").is_some(), "{role}");
    }
    for role in spec["legacyRoles"].as_array().unwrap() {
        assert!(role["legacyKey"].is_null() || role["legacyKeyEvidence"] == "Inferred", "{role}");
    }
    let alone = spec["presets"].as_array().unwrap().iter().filter(|preset| preset["standalone"] == true);
    assert_eq!(alone.map(|preset| &preset["name"]).collect::<Vec<_>>(), ["RUM"]);
}

#[tokio::test]
async fn every_reference_of_the_shipped_catalog_is_one_of_its_permissions_in_the_same_case() {
    let team = Team::new().await;
    let spec = team.get("permissioncatalog/coralogix")["spec"].clone();
    let known: Vec<&str> = spec["permissions"].as_array().unwrap().iter().filter_map(|p| p["name"].as_str()).collect();
    let lists = [
        ("presets", "permissions"),
        ("presets", "inferred"),
        ("presets", "uncertain"),
        ("presets", "peoplePermissions"),
        ("roles", "documentedPermissions"),
        ("roles", "inferredPermissions"),
        ("legacyRoles", "permissions"),
    ];
    let mut names = 0;
    for (entries, list) in lists {
        for entry in spec[entries].as_array().unwrap() {
            for name in entry[list].as_array().into_iter().flatten() {
                names += 1;
                assert!(known.contains(&name.as_str().unwrap()), "{entries} {}: {list} has {name}", entry["name"]);
            }
        }
    }
    assert!(names > 300, "{names}");
}

#[tokio::test]
async fn names_of_a_custom_catalog_can_be_used_in_any_case() {
    let team = Team::new().await;
    let spec = json!({
        "permissions": [{"name": "own.things:Read"}, {"name": "own.events:Send", "ingestion": true}],
        // A preset may contain permissions of other catalogs, in any case.
        "presets": [
            {"name": "OwnDesk", "permissions": ["OWN.things:read", "ALERTS:snooze"]},
            {"name": "OwnSender", "permissions": ["own.events:Send"]},
        ],
    });
    apply_catalog(&team, "own", &spec).await;
    let key = json!({
        "type": "Team", "presets": ["owndesk", "OWNDESK", "alerts"], "permissions": ["Own.Things:READ", "ALERTS:SNOOZE"],
    });
    let key = apply_key(&team, "any-case", &key).await;
    assert_eq!(
        key["status"]["presets"],
        json!(["OwnDesk", "Alerts"]),
        "names are in the case of the catalog, without duplicates"
    );
    assert_eq!(key["status"]["permissions"], json!(["own.things:Read", "alerts:Snooze"]));
    assert_eq!(key["spec"]["presets"], json!(["owndesk", "OWNDESK", "alerts"]), "the spec is unchanged");

    // `ingestion` of a custom catalog counts for SendYourData keys.
    apply_key(&team, "sender", &json!({"type": "SendYourData", "presets": ["OwnSender"]})).await;
    let refused = team.apply_error(&api_key("desk", &json!({"type": "SendYourData", "presets": ["owndesk"]})));
    assert!(
        refused.contains(
            "spec.presets[0]: Invalid value: \"OwnDesk\": a SendYourData key may only send data, and this preset grants"
        ),
        "{refused}"
    );
    let refused = team.apply_error(&api_key("near", &json!({"type": "Team", "presets": ["OwnDeks"]})));
    assert!(refused.contains(r#"Not found: "OwnDeks": no preset has this name: did you mean OwnDesk"#), "{refused}");
    let refused = team.apply_error(&api_key("swapped", &json!({"type": "Team", "presets": ["own.things:Read"]})));
    assert!(refused.contains("own.things:Read is a permission: list it under spec.permissions"), "{refused}");
    team.kubectl(&["delete", "apikeys", "--all"]);
    team.kubectl(&["delete", "permissioncatalog/own"]);
}

#[tokio::test]
async fn of_conflicting_catalogs_the_older_has_effect_until_it_is_deleted() {
    let team = Team::new().await;
    let older = json!({
        "permissions": [{"name": "disputed:Read"}, {"name": "disputed:Send", "ingestion": true}],
        "presets": [{"name": "Disputed", "permissions": ["disputed:Read"]}],
    });
    // Its name sorts first, but creation time decides.
    let younger = json!({
        "permissions": [
            {"name": "DISPUTED:read", "ingestion": true}, {"name": "disputed:Send", "ingestion": true},
            {"name": "disputed:Write"},
        ],
        "presets": [
            {"name": "disputed", "permissions": ["disputed:Write"]},
            {"name": "DisputedOther", "standalone": true, "permissions": ["disputed:Write"]},
        ],
    });
    apply_catalog(&team, "disputed-z", &older).await;
    wait_for_next_second(&team, "permissioncatalog/disputed-z").await;
    team.apply(&catalog("disputed-a", &younger));

    let loser = team.wait_until_condition("permissioncatalog/disputed-a", "Accepted", "False", "Conflict").await;
    assert_eq!(
        condition(&loser, "Accepted").unwrap()["message"],
        "2 entries have no effect: permission disputed:Read: ingestion is false in catalog disputed-z; \
         preset Disputed: catalog disputed-z gives it other permissions"
    );
    assert_eq!(
        (&loser["status"]["permissions"], &loser["status"]["presets"]),
        (&json!(2), &json!(1)),
        "the other entries have an effect"
    );
    assert!(condition(&loser, "Stalled").is_some(), "retries would not change the result");
    let winner = team.get("permissioncatalog/disputed-z");
    assert_eq!(condition(&winner, "Accepted").unwrap()["status"], "True", "the older catalog is Accepted");
    eventually("the younger catalog has a Warning Event", TIMEOUT, async || {
        let events = team.try_kubectl(&["get", "events", "-A", "-o", "json"])?;
        let events: Value = serde_json::from_str(&events)?;
        let found = events["items"].as_array().unwrap().iter().any(|event| {
            event["involvedObject"]["name"] == "disputed-a"
                && event["reason"] == "Conflict"
                && event["type"] == "Warning"
        });
        ensure!(found, "no Event");
        Ok(())
    })
    .await;

    // By the older catalog, disputed:Read is not ingestion, and Disputed grants it.
    let sender = api_key("sender", &json!({"type": "SendYourData", "permissions": ["disputed:Read"]}));
    let refused = team.apply_error(&sender);
    assert!(refused.contains("a SendYourData key may only send data, and this permission does more"), "{refused}");
    apply_key(&team, "other", &json!({"type": "Team", "presets": ["DisputedOther"]})).await;

    team.kubectl(&["delete", "permissioncatalog/disputed-z"]);
    let successor = team.wait_until_condition("permissioncatalog/disputed-a", "Accepted", "True", "Accepted").await;
    assert_eq!((&successor["status"]["permissions"], &successor["status"]["presets"]), (&json!(3), &json!(2)));
    assert!(condition(&successor, "Stalled").is_none());
    let key = apply_key(&team, "sender", &sender["spec"]).await;
    assert_eq!(key["status"]["permissions"], json!(["DISPUTED:read"]), "the case of the remaining catalog");
    team.kubectl(&["delete", "apikeys", "--all"]);
    team.kubectl(&["delete", "permissioncatalog/disputed-a"]);
}

#[tokio::test]
async fn a_catalog_of_presets_can_be_created_before_the_catalog_of_their_permissions() {
    let team = Team::new().await;
    let presets = json!({"presets": [{"name": "Early", "permissions": ["early:Read", "early:Write"]}]});
    team.apply(&catalog("early-presets", &presets));
    let waiting = team.wait_until_condition("permissioncatalog/early-presets", "Accepted", "False", "Invalid").await;
    assert_eq!(
        condition(&waiting, "Accepted").unwrap()["message"],
        "2 entries have no effect: preset Early: no catalog has permission early:Read; \
         preset Early: no catalog has permission early:Write"
    );
    apply_catalog(&team, "early-permissions", &json!({"permissions": permissions(&["early:Read", "early:Write"])}))
        .await;
    team.wait_until_condition("permissioncatalog/early-presets", "Accepted", "True", "Accepted").await;
    apply_key(&team, "early", &json!({"type": "Team", "presets": ["Early"]})).await;
    team.kubectl(&["delete", "apikeys", "--all"]);
    team.kubectl(&["delete", "permissioncatalog/early-presets", "permissioncatalog/early-permissions"]);
}

#[tokio::test]
async fn deleting_a_catalog_removes_its_permissions_from_a_key_but_keeps_the_value() {
    let team = Team::new().await;
    let spec = json!({
        "permissions": permissions(&["fleeting:Read", "fleeting:Write"]),
        "presets": [{"name": "Fleeting", "permissions": ["fleeting:Read"]}],
    });
    apply_catalog(&team, "fleeting", &spec).await;
    let key_spec =
        json!({"type": "Team", "presets": ["Fleeting", "Alerts"], "permissions": ["fleeting:Write", "alerts:Snooze"]});
    let before = apply_key(&team, "stays", &key_spec).await;
    let secret = team.get("secret/stays-secret");

    team.kubectl(&["delete", "permissioncatalog/fleeting"]);
    let without = team.wait_until_condition("apikey/stays", "Accepted", "False", "PresetNotFound").await;
    let ready = condition(&without, "Ready").unwrap();
    assert_eq!((&ready["status"], &ready["reason"]), (&json!("False"), &json!("PresetNotFound")));
    let message = ready["message"].as_str().unwrap();
    assert!(message.contains(r#"spec.presets[0]: Not found: "Fleeting": no preset has this name"#), "{message}");
    assert!(
        message.contains(r#"spec.permissions[0]: Not found: "fleeting:Write": no permission has this name"#),
        "{message}"
    );
    let status = &without["status"];
    assert_eq!(status["state"], "Active", "the key keeps its other permissions");
    assert_eq!((&status["presets"], &status["permissions"]), (&json!(["Alerts"]), &json!(["alerts:Snooze"])));
    assert_eq!((&status["id"], &status["tokens"]), (&before["status"]["id"], &before["status"]["tokens"]));
    assert_eq!(team.get("secret/stays-secret")["metadata"]["resourceVersion"], secret["metadata"]["resourceVersion"]);

    // The ApiKey can still be changed.
    let patch = |patch: &str| team.try_kubectl(&["patch", "apikey/stays", "--type=merge", "-p", patch]);
    patch(r#"{"metadata": {"labels": {"a": "b"}}}"#).unwrap();
    patch(r#"{"spec": {"active": false}}"#).unwrap();
    team.wait_until("apikey/stays", "Inactive", |key| key["status"]["state"] == "Inactive").await;
    patch(r#"{"spec": {"active": true, "displayName": "Still here"}}"#).unwrap();
    patch(r#"{"spec": {"presets": ["Alerts", "FLEETING"]}}"#).expect("the same name in another position and case");
    let refused = format!("{:#}", patch(r#"{"spec": {"presets": ["Fleeting", "Alerts", "Fleeing"]}}"#).unwrap_err());
    assert!(refused.contains(r#"spec.presets[2]: Not found: "Fleeing": no preset has this name"#), "{refused}");
    assert!(!refused.contains("spec.presets[0]"), "only names that the change adds are rejected: {refused}");
    // A new key can't use the missing names.
    let refused = team.apply_error(&api_key("new", &key_spec));
    assert!(refused.contains(r#"Not found: "Fleeting": no preset has this name"#), "{refused}");

    apply_catalog(&team, "fleeting", &spec).await;
    let after = team.wait_until_condition("apikey/stays", "Ready", "True", "Active").await;
    assert_eq!(after["status"]["presets"], json!(["Alerts", "Fleeting"]));
    assert_eq!(after["status"]["permissions"], json!(["fleeting:Write", "alerts:Snooze"]));
    assert_eq!(condition(&after, "Accepted").unwrap()["status"], "True");
    assert!(condition(&after, "Stalled").is_none());
    assert_eq!(after["status"]["tokens"], before["status"]["tokens"]);
    assert_eq!(team.get("secret/stays-secret")["data"], secret["data"], "the value is unchanged");
    team.kubectl(&["delete", "apikeys", "--all"]);
    team.kubectl(&["delete", "permissioncatalog/fleeting"]);
}

#[tokio::test]
async fn changes_of_a_catalog_apply_to_existing_keys() {
    let team = Team::new().await;
    let spec = |names: &[&str]| {
        json!({
            "permissions": permissions(&["changing:Read", "changing:Write"]),
            "presets": names.iter().map(|name| json!({"name": name, "permissions": ["changing:Read"]})).collect::<Value>(),
        })
    };
    apply_catalog(&team, "changing", &spec(&["ChangingOne"])).await;
    apply_key(&team, "one", &json!({"type": "Team", "presets": ["ChangingOne"]})).await;
    team.apply(&catalog("changing", &spec(&["ChangingOne", "ChangingTwo"])));
    team.wait_until("permissioncatalog/changing", "two presets", |found| found["status"]["presets"] == 2).await;
    apply_key(&team, "two", &json!({"type": "Team", "presets": ["ChangingTwo"]})).await;
    team.apply(&catalog("changing", &spec(&["ChangingTwo"])));
    team.wait_until_condition("apikey/one", "Accepted", "False", "PresetNotFound").await;
    let two = team.get("apikey/two");
    assert_eq!(condition(&two, "Ready").unwrap()["status"], "True");
    team.kubectl(&["delete", "apikeys", "--all"]);
    team.kubectl(&["delete", "permissioncatalog/changing"]);
}

#[tokio::test]
async fn a_key_with_an_inferred_preset_is_accepted_with_a_warning() {
    let team = Team::new().await;
    let spec = json!({
        "permissions": permissions(&["guessed:Read"]),
        "presets": [
            {"name": "Guessed", "evidence": "Inferred", "permissions": ["guessed:Read"]},
            {"name": "GuessedEmpty", "evidence": "Unknown"},
        ],
    });
    apply_catalog(&team, "guessed", &spec).await;
    let warnings = |preset: &str| {
        let file = team.file(&api_key("warned", &json!({"type": "Team", "presets": [preset]})));
        let mut create = team.shared.plane.kubectl();
        create.args(["-n", &team.namespace, "create", "--dry-run=server", "-f", &file]);
        let output = create.output().unwrap();
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    eventually("the webhook observes the catalog", TIMEOUT, async || {
        let warning = warnings("Guessed");
        ensure!(!warning.contains("no preset has this name"), "{warning}");
        Ok(())
    })
    .await;
    assert_eq!(
        warnings("guessed"),
        "Warning: spec.presets[0]: the permissions of preset Guessed are inferred in its catalog, not documented\n"
    );
    assert_eq!(
        warnings("GuessedEmpty"),
        "Warning: spec.presets[0]: preset GuessedEmpty grants nothing yet: its catalog lists no permissions for it\n"
    );
    team.kubectl(&["delete", "permissioncatalog/guessed"]);
}

/// The webhook blocks every write of an ApiKey, so each request must be cheap. For each of these 512 unknown names it
/// could search for a similar known name.
#[tokio::test]
async fn a_key_with_512_unknown_names_is_rejected_in_4_seconds() {
    let team = Team::new().await;
    let names: Vec<_> = (0..512).map(|n| format!("unknown:{}{n:03}", "A".repeat(117))).collect();
    let started = std::time::Instant::now();
    let refused = team.apply_error(&api_key("unknown", &json!({"type": "Team", "permissions": names})));
    assert!(refused.contains("512 problems") || refused.contains("spec.permissions[0]"), "{refused:.300}");
    assert!(started.elapsed() < Duration::from_secs(4), "the rejection took {:?}", started.elapsed());
}
