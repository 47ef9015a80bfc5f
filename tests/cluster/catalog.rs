//! What keys may carry: the shipped catalogue, catalogues of one's own, and what happens to keys when they change.

use std::time::Duration;

use anyhow::ensure;
use serde_json::{Value, json};

use crate::support::{PATIENCE, eventually};
use crate::{Team, api_key, condition};

/// Catalogues are for the whole cluster, so every test has names that begin with its own word.
fn catalog(name: &str, spec: &Value) -> Value {
    json!({
        "apiVersion": "keywright.dev/v1alpha1", "kind": "PermissionCatalog", "metadata": {"name": name}, "spec": spec,
    })
}

/// Applies a catalogue and waits until the operator has judged it.
async fn catalog_in_force(team: &Team, name: &str, spec: &Value) {
    team.apply(&catalog(name, spec));
    team.until_condition(&format!("permissioncatalog/{name}"), "Accepted", "True", "Accepted").await;
}

/// Applies a key whose names the webhook may not have heard of yet, since it learns of a catalogue from a watch.
async fn key_in_force(team: &Team, name: &str, spec: &Value) -> Value {
    eventually("the key is admitted", PATIENCE, async || team.try_apply(&api_key(name, spec))).await;
    team.until_condition(&format!("apikey/{name}"), "Ready", "True", "Active").await
}

/// Catalogues are ordered by creation time, which has whole seconds: waits until the next one is younger.
async fn until_another_second_begins(team: &Team, since: &str) {
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
async fn the_shipped_catalogue_is_complete_and_says_what_is_inferred() {
    let team = Team::new().await;
    let shipped = team.until_condition("permissioncatalog/coralogix", "Accepted", "True", "Accepted").await;
    let (spec, status) = (&shipped["spec"], &shipped["status"]);
    let count = |list: &str| spec[list].as_array().unwrap().len();
    assert_eq!([count("permissions"), count("presets"), count("roles"), count("legacyRoles")], [301, 38, 7, 8]);
    assert_eq!((&status["permissions"], &status["presets"]), (&json!(301), &json!(38)), "all are in force");
    assert_eq!(status["observedGeneration"], shipped["metadata"]["generation"]);
    assert_eq!(condition(&shipped, "Accepted").unwrap()["message"], "every entry is in force");
    assert!(condition(&shipped, "Stalled").is_none());

    // Nothing that is a guess passes for a fact.
    let evidence = |entry: &Value, field: &str| entry[field].as_str().map(ToOwned::to_owned);
    for permission in spec["permissions"].as_array().unwrap() {
        let known = evidence(permission, "rolesEvidence");
        assert!(known.is_some(), "{permission} says nothing of its evidence");
        let sources = permission["sources"].as_array().map_or(0, Vec::len);
        assert!(known.as_deref() != Some("Documented") || sources > 0, "{permission}: documented where?");
    }
    for preset in spec["presets"].as_array().unwrap() {
        let known = evidence(preset, "evidence").unwrap_or_else(|| panic!("{preset} says nothing of its evidence"));
        let inferred = preset["inferred"].as_array().map_or(&[][..], Vec::as_slice);
        assert_eq!(known == "Mixed", !inferred.is_empty(), "{preset}");
        let has = preset["permissions"].as_array().map_or(&[][..], Vec::as_slice);
        assert_eq!(known == "Unknown", has.is_empty(), "{preset}");
        assert!(inferred.iter().all(|name| has.contains(name)), "{preset}");
        let sources = preset["sources"].as_array().map_or(0, Vec::len);
        assert!(known != "Documented" || sources > 0, "{preset}: documented where?");
    }
    for role in spec["roles"].as_array().unwrap() {
        let lists =
            ["documentedPermissions", "inferredPermissions"].map(|list| role[list].as_array().map_or(0, Vec::len));
        assert!(lists.iter().sum::<usize>() > 0 || evidence(role, "evidence").is_some(), "{role}");
    }
    for role in spec["legacyRoles"].as_array().unwrap() {
        assert!(role["legacyKey"].is_null() || role["legacyKeyEvidence"] == "Inferred", "{role}");
    }
    // Of the presets that the keys page describes, RUM stands alone.
    let alone = spec["presets"].as_array().unwrap().iter().filter(|preset| preset["standalone"] == true);
    assert_eq!(alone.map(|preset| &preset["name"]).collect::<Vec<_>>(), ["RUM"]);
}

/// Each name that the shipped catalogue uses anywhere is one of its permissions, in the same spelling.
#[tokio::test]
async fn the_shipped_catalogue_names_nothing_that_it_does_not_have() {
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
async fn names_of_an_own_catalogue_may_be_used_at_once_in_any_case() {
    let team = Team::new().await;
    let spec = json!({
        "permissions": [{"name": "own.things:Read"}, {"name": "own.events:Send", "ingestion": true}],
        // Names of other catalogues may be in a preset, in any case.
        "presets": [
            {"name": "OwnDesk", "permissions": ["OWN.things:read", "ALERTS:snooze"]},
            {"name": "OwnSender", "permissions": ["own.events:Send"]},
        ],
    });
    catalog_in_force(&team, "own", &spec).await;
    let key = json!({
        "type": "Team", "presets": ["owndesk", "OWNDESK", "alerts"], "permissions": ["Own.Things:READ", "ALERTS:SNOOZE"],
    });
    let key = key_in_force(&team, "any-case", &key).await;
    assert_eq!(key["status"]["presets"], json!(["OwnDesk", "Alerts"]), "the catalogue's spelling, and each once");
    assert_eq!(key["status"]["permissions"], json!(["own.things:Read", "alerts:Snooze"]));
    assert_eq!(key["spec"]["presets"], json!(["owndesk", "OWNDESK", "alerts"]), "what the user wrote is theirs");

    // What an own catalogue says of ingestion holds as well.
    key_in_force(&team, "sender", &json!({"type": "SendYourData", "presets": ["OwnSender"]})).await;
    let refused = team.refusal(&api_key("desk", &json!({"type": "SendYourData", "presets": ["owndesk"]})));
    assert!(
        refused.contains(
            "spec.presets[0]: Invalid value: \"OwnDesk\": a SendYourData key may only send data, and this preset grants"
        ),
        "{refused}"
    );
    let refused = team.refusal(&api_key("near", &json!({"type": "Team", "presets": ["OwnDeks"]})));
    assert!(refused.contains(r#"Not found: "OwnDeks": no preset has this name: did you mean OwnDesk"#), "{refused}");
    let refused = team.refusal(&api_key("swapped", &json!({"type": "Team", "presets": ["own.things:Read"]})));
    assert!(refused.contains("own.things:Read is a permission: list it under spec.permissions"), "{refused}");
    team.kubectl(&["delete", "apikeys", "--all"]);
    team.kubectl(&["delete", "permissioncatalog/own"]);
}

#[tokio::test]
async fn of_two_that_contradict_each_other_the_older_holds_until_it_goes() {
    let team = Team::new().await;
    let older = json!({
        "permissions": [{"name": "rivals:Read"}, {"name": "rivals:Send", "ingestion": true}],
        "presets": [{"name": "Rival", "permissions": ["rivals:Read"]}],
    });
    // By name it comes first: age counts and not the name.
    let younger = json!({
        "permissions": [{"name": "RIVALS:read", "ingestion": true}, {"name": "rivals:Send", "ingestion": true}, {"name": "rivals:Write"}],
        "presets": [
            {"name": "rival", "permissions": ["rivals:Write"]},
            {"name": "RivalOther", "standalone": true, "permissions": ["rivals:Write"]},
        ],
    });
    catalog_in_force(&team, "rivals-z", &older).await;
    until_another_second_begins(&team, "permissioncatalog/rivals-z").await;
    team.apply(&catalog("rivals-a", &younger));

    let loser = team.until_condition("permissioncatalog/rivals-a", "Accepted", "False", "Conflict").await;
    assert_eq!(
        condition(&loser, "Accepted").unwrap()["message"],
        "2 entries have no effect: permission rivals:Read: ingestion is false in catalogue rivals-z; \
         preset Rival: catalogue rivals-z gives it other permissions"
    );
    assert_eq!(
        (&loser["status"]["permissions"], &loser["status"]["presets"]),
        (&json!(2), &json!(1)),
        "the rest holds"
    );
    assert!(condition(&loser, "Stalled").is_some(), "nothing will change by itself");
    let winner = team.get("permissioncatalog/rivals-z");
    assert_eq!(condition(&winner, "Accepted").unwrap()["status"], "True", "the older one is not at fault");
    eventually("an Event tells the younger one's author", PATIENCE, async || {
        let events = team.try_kubectl(&["get", "events", "-A", "-o", "json"])?;
        let events: Value = serde_json::from_str(&events)?;
        let told = events["items"].as_array().unwrap().iter().any(|event| {
            event["involvedObject"]["name"] == "rivals-a" && event["reason"] == "Conflict" && event["type"] == "Warning"
        });
        ensure!(told, "no Event");
        Ok(())
    })
    .await;

    // The older one's word: rivals:Read is no ingestion, and Rival grants it.
    let sender = api_key("sender", &json!({"type": "SendYourData", "permissions": ["rivals:Read"]}));
    let refused = team.refusal(&sender);
    assert!(refused.contains("a SendYourData key may only send data, and this permission does more"), "{refused}");
    key_in_force(&team, "other", &json!({"type": "Team", "presets": ["RivalOther"]})).await;

    team.kubectl(&["delete", "permissioncatalog/rivals-z"]);
    let heir = team.until_condition("permissioncatalog/rivals-a", "Accepted", "True", "Accepted").await;
    assert_eq!((&heir["status"]["permissions"], &heir["status"]["presets"]), (&json!(3), &json!(2)));
    assert!(condition(&heir, "Stalled").is_none());
    let key = key_in_force(&team, "sender", &sender["spec"]).await;
    assert_eq!(key["status"]["permissions"], json!(["RIVALS:read"]), "its spelling is in force as well");
    team.kubectl(&["delete", "apikeys", "--all"]);
    team.kubectl(&["delete", "permissioncatalog/rivals-a"]);
}

/// A catalogue with presets alone may come before the one with the permissions.
#[tokio::test]
async fn the_order_in_which_catalogues_arrive_does_not_matter() {
    let team = Team::new().await;
    let presets = json!({"presets": [{"name": "Early", "permissions": ["early:Read", "early:Write"]}]});
    team.apply(&catalog("early-presets", &presets));
    let waiting = team.until_condition("permissioncatalog/early-presets", "Accepted", "False", "Invalid").await;
    assert_eq!(
        condition(&waiting, "Accepted").unwrap()["message"],
        "2 entries have no effect: preset Early: no catalogue has permission early:Read; \
         preset Early: no catalogue has permission early:Write"
    );
    catalog_in_force(&team, "early-permissions", &json!({"permissions": permissions(&["early:Read", "early:Write"])}))
        .await;
    team.until_condition("permissioncatalog/early-presets", "Accepted", "True", "Accepted").await;
    key_in_force(&team, "early", &json!({"type": "Team", "presets": ["Early"]})).await;
    team.kubectl(&["delete", "apikeys", "--all"]);
    team.kubectl(&["delete", "permissioncatalog/early-presets", "permissioncatalog/early-permissions"]);
}

#[tokio::test]
async fn a_preset_that_vanishes_leaves_the_key_and_its_value_alone() {
    let team = Team::new().await;
    let spec = json!({
        "permissions": permissions(&["fleeting:Read", "fleeting:Write"]),
        "presets": [{"name": "Fleeting", "permissions": ["fleeting:Read"]}],
    });
    catalog_in_force(&team, "fleeting", &spec).await;
    let key_spec =
        json!({"type": "Team", "presets": ["Fleeting", "Alerts"], "permissions": ["fleeting:Write", "alerts:Snooze"]});
    let before = key_in_force(&team, "stays", &key_spec).await;
    let secret = team.get("secret/stays-secret");

    team.kubectl(&["delete", "permissioncatalog/fleeting"]);
    let without = team.until_condition("apikey/stays", "Accepted", "False", "PresetNotFound").await;
    let ready = condition(&without, "Ready").unwrap();
    assert_eq!((&ready["status"], &ready["reason"]), (&json!("False"), &json!("PresetNotFound")));
    let message = ready["message"].as_str().unwrap();
    assert!(message.contains(r#"spec.presets[0]: Not found: "Fleeting": no preset has this name"#), "{message}");
    assert!(
        message.contains(r#"spec.permissions[0]: Not found: "fleeting:Write": no permission has this name"#),
        "{message}"
    );
    let status = &without["status"];
    assert_eq!(status["state"], "Active", "the key works for the rest");
    assert_eq!((&status["presets"], &status["permissions"]), (&json!(["Alerts"]), &json!(["alerts:Snooze"])));
    assert_eq!((&status["id"], &status["tokens"]), (&before["status"]["id"], &before["status"]["tokens"]));
    assert_eq!(team.get("secret/stays-secret")["metadata"]["resourceVersion"], secret["metadata"]["resourceVersion"]);

    // It is still possible to work with the object.
    let patch = |patch: &str| team.try_kubectl(&["patch", "apikey/stays", "--type=merge", "-p", patch]);
    patch(r#"{"metadata": {"labels": {"a": "b"}}}"#).unwrap();
    patch(r#"{"spec": {"active": false}}"#).unwrap();
    team.until("apikey/stays", "Inactive", |key| key["status"]["state"] == "Inactive").await;
    patch(r#"{"spec": {"active": true, "displayName": "Still here"}}"#).unwrap();
    patch(r#"{"spec": {"presets": ["Alerts", "FLEETING"]}}"#).expect("the same name in another place and spelling");
    let refused = format!("{:#}", patch(r#"{"spec": {"presets": ["Fleeting", "Alerts", "Fleeing"]}}"#).unwrap_err());
    assert!(refused.contains(r#"spec.presets[2]: Not found: "Fleeing": no preset has this name"#), "{refused}");
    assert!(!refused.contains("spec.presets[0]"), "only what the change brings in is refused: {refused}");
    // A new key has no such past.
    let refused = team.refusal(&api_key("new", &key_spec));
    assert!(refused.contains(r#"Not found: "Fleeting": no preset has this name"#), "{refused}");

    catalog_in_force(&team, "fleeting", &spec).await;
    let after = team.until_condition("apikey/stays", "Ready", "True", "Active").await;
    assert_eq!(after["status"]["presets"], json!(["Alerts", "Fleeting"]));
    assert_eq!(after["status"]["permissions"], json!(["fleeting:Write", "alerts:Snooze"]));
    assert_eq!(condition(&after, "Accepted").unwrap()["status"], "True");
    assert!(condition(&after, "Stalled").is_none());
    assert_eq!(after["status"]["tokens"], before["status"]["tokens"]);
    assert_eq!(team.get("secret/stays-secret")["data"], secret["data"], "the value is the same to the end");
    team.kubectl(&["delete", "apikeys", "--all"]);
    team.kubectl(&["delete", "permissioncatalog/fleeting"]);
}

/// What a preset grants follows its catalogue; what the spec says does not change, so the key does not either.
#[tokio::test]
async fn a_catalogue_may_be_changed_in_place() {
    let team = Team::new().await;
    let spec = |names: &[&str]| {
        json!({
            "permissions": permissions(&["changing:Read", "changing:Write"]),
            "presets": names.iter().map(|name| json!({"name": name, "permissions": ["changing:Read"]})).collect::<Value>(),
        })
    };
    catalog_in_force(&team, "changing", &spec(&["ChangingOne"])).await;
    key_in_force(&team, "one", &json!({"type": "Team", "presets": ["ChangingOne"]})).await;
    team.apply(&catalog("changing", &spec(&["ChangingOne", "ChangingTwo"])));
    team.until("permissioncatalog/changing", "two presets", |found| found["status"]["presets"] == 2).await;
    key_in_force(&team, "two", &json!({"type": "Team", "presets": ["ChangingTwo"]})).await;
    team.apply(&catalog("changing", &spec(&["ChangingTwo"])));
    team.until_condition("apikey/one", "Accepted", "False", "PresetNotFound").await;
    let two = team.get("apikey/two");
    assert_eq!(condition(&two, "Ready").unwrap()["status"], "True");
    team.kubectl(&["delete", "apikeys", "--all"]);
    team.kubectl(&["delete", "permissioncatalog/changing"]);
}

/// An inferred preset is usable, and kubectl says what it is at every apply.
#[tokio::test]
async fn a_preset_that_is_only_inferred_comes_with_a_warning() {
    let team = Team::new().await;
    let spec = json!({
        "permissions": permissions(&["guessed:Read"]),
        "presets": [
            {"name": "Guessed", "evidence": "Inferred", "permissions": ["guessed:Read"]},
            {"name": "GuessedEmpty", "evidence": "Unknown"},
        ],
    });
    catalog_in_force(&team, "guessed", &spec).await;
    let warnings = |preset: &str| {
        let file = team.file(&api_key("warned", &json!({"type": "Team", "presets": [preset]})));
        let mut create = team.shared.plane.kubectl();
        create.args(["-n", &team.namespace, "create", "--dry-run=server", "-f", &file]);
        let said = create.output().unwrap();
        String::from_utf8_lossy(&said.stderr).into_owned()
    };
    eventually("the webhook knows the catalogue", PATIENCE, async || {
        let said = warnings("Guessed");
        ensure!(!said.contains("no preset has this name"), "{said}");
        Ok(())
    })
    .await;
    assert_eq!(
        warnings("guessed"),
        "Warning: spec.presets[0]: the permissions of preset Guessed are inferred in its catalogue, not documented\n"
    );
    assert_eq!(
        warnings("GuessedEmpty"),
        "Warning: spec.presets[0]: preset GuessedEmpty grants nothing yet: its catalogue does not know its permissions\n"
    );
    team.kubectl(&["delete", "permissioncatalog/guessed"]);
}

/// The webhook is asked before every apply of the cluster, so no spec may keep it busy: here, 512 names that it has
/// never heard of, each of which it might look for something similar to.
#[tokio::test]
async fn the_largest_key_of_unknown_names_is_refused_in_time() {
    let team = Team::new().await;
    let names: Vec<_> = (0..512).map(|n| format!("nobody:{}{n:03}", "A".repeat(118))).collect();
    let started = std::time::Instant::now();
    let refused = team.refusal(&api_key("unknown", &json!({"type": "Team", "permissions": names})));
    assert!(refused.contains("512 problems") || refused.contains("spec.permissions[0]"), "{refused:.300}");
    assert!(started.elapsed() < Duration::from_secs(4), "it took {:?}", started.elapsed());
}
