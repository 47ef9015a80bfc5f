//! The seed's "Permissions", "Types of API keys" and "Create an API key": who makes, changes and deletes keys.

use serde_json::{Value, json};

use crate::{DATA, PERSONAL, TEAM, Team, assert_refused, data, personal, team, user};

/// One row: who lacks the permission can neither create nor change nor delete; who has it can.
async fn row(manage: &str, name: &str, spec: &Value, preset: &str) {
    let team = Team::new().await;
    let with = team.person(name, &[], &[manage], &[preset]).await;
    let others: Vec<_> = [TEAM, DATA, PERSONAL].into_iter().filter(|other| *other != manage).collect();
    let without = team.person("without", &[], &others, &[preset]).await;
    assert_refused(without.create("key", spec).await, &["without lacks permission", manage, &team.namespace]);
    with.create("key", spec).await.expect("it is allowed");
    assert_refused(without.edit("key", &json!({"displayName": "mine"})).await, &[manage]);
    assert_refused(without.edit("key", &json!({"active": false})).await, &[manage]);
    with.edit("key", &json!({"displayName": "ours", "active": false})).await.expect("it is allowed");
    assert_refused(without.delete("key").await, &[manage, "delete"]);
    with.delete("key").await.expect("it is allowed");
}

#[tokio::test]
async fn permissions_personal_manage() {
    row(PERSONAL, "alice", &personal("alice"), "Alerts").await;
}

#[tokio::test]
async fn permissions_send_your_data_manage() {
    row(DATA, "alice", &data(), "SendData").await;
}

#[tokio::test]
async fn permissions_team_manage() {
    row(TEAM, "alice", &team(), "Alerts").await;
}

#[tokio::test]
async fn permissions_come_from_groups_and_to_service_accounts_too() {
    let team = Team::new().await;
    let group = json!({"kind": "Group", "name": "sre", "apiGroup": "rbac.authorization.k8s.io"});
    team.grant(&group, &[TEAM], &["Alerts"]).await;
    let member = team.person("bob", &["sre"], &[], &[]).await;
    member.create("of-a-group", &crate::team()).await.expect("the group may");
    let stranger = team.person("bob2", &["dev"], &[], &[]).await;
    assert_refused(stranger.create("other", &crate::team()).await, &[TEAM]);

    let account = json!({"kind": "ServiceAccount", "name": "deployer", "namespace": team.namespace});
    team.grant(&account, &[TEAM], &["Alerts"]).await;
    let name = format!("system:serviceaccount:{}:deployer", team.namespace);
    let client = team.plane.client_as(&name, &["system:serviceaccounts"]).await.unwrap();
    let key = team.of(&name, &client).create("of-an-account", &crate::team()).await.expect("the account may");
    assert_eq!(crate::creator(&key), Some(name.as_str()));
}

#[tokio::test]
async fn role_presets_nobody_attaches_what_they_lack() {
    let team = Team::new().await;
    let alice = team.person("alice", &[], &[TEAM, "alerts:ReadConfig"], &["Alerts"]).await;
    alice.create("whole-preset", &crate::team()).await.expect("a preset that she holds");
    let one = json!({"type": "Team", "permissions": ["alerts:ReadConfig"]});
    alice.create("one", &one).await.expect("a permission that she holds");
    let lacking = json!({"type": "Team", "presets": ["APM"]});
    assert_refused(alice.create("apm", &lacking).await, &["alice lacks preset APM", "create a key that carries it"]);
    let lacking = json!({"type": "Team", "presets": ["Alerts"], "permissions": ["livetail:Read"]});
    assert_refused(alice.create("tail", &lacking).await, &["permission livetail:Read"]);
    // In any spelling.
    assert_refused(
        alice.create("case", &json!({"type": "Team", "presets": ["apm"]})).await,
        &["alice lacks preset APM"],
    );
}

#[tokio::test]
async fn advanced_each_permission_of_a_preset_is_the_preset() {
    let team = Team::new().await;
    let each = ["team-actions:Execute", "team-actions:ReadConfig", "team-actions:UpdateConfig"];
    let rest = ["user-actions:Execute", "user-actions:ReadConfig", "user-actions:UpdateConfig"];
    let all = [&[TEAM], &each[..], &rest[..]].concat();
    let spec = json!({"type": "Team", "presets": ["Actions"]});
    team.person("alice", &[], &all, &[]).await.create("by-parts", &spec).await.expect("she holds each of it");
    let bob = team.person("bob", &[], &[&[TEAM], &each[..]].concat(), &[]).await;
    assert_refused(bob.create("half", &spec).await, &["bob lacks preset Actions"]);
}

#[tokio::test]
async fn raising_the_rights_of_a_key_counts_and_lowering_does_not() {
    let team = Team::new().await;
    let spec = json!({"type": "SendYourData", "presets": ["SendData"], "permissions": ["contextual-data:SendData"]});
    team.admin().create("key", &spec).await.unwrap();
    let bob = team.person("bob", &[], &[DATA], &[]).await;
    bob.edit("key", &json!({"permissions": []})).await.expect("less than before");
    assert_refused(
        bob.edit("key", &json!({"permissions": ["contextual-data:SendData"]})).await,
        &["bob lacks permission contextual-data:SendData", "raise the rights"],
    );
    // What the preset gave, one by one, is no more than before.
    let parts = json!({"presets": null, "permissions": ["logs.data-ingress:SendData"]});
    bob.edit("key", &parts).await.expect("a part of what it had");
    bob.edit("key", &json!({"active": false})).await.expect("revoking takes no more than Manage");
}

#[tokio::test]
async fn team_keys_are_raised_only_by_holders_of_all_that_is_in_them() {
    let team = Team::new().await;
    team.admin().create("key", &json!({"type": "Team", "presets": ["Alerts"]})).await.unwrap();
    let bob = team.person("bob", &[], &[TEAM, "livetail:Read"], &[]).await;
    let more = json!({"permissions": ["livetail:Read"]});
    assert_refused(bob.edit("key", &more).await, &["bob lacks preset Alerts"]);
    team.grant(&user("bob"), &[], &["Alerts"]).await;
    bob.edit("key", &more).await.expect("he holds both");
}

#[tokio::test]
async fn personal_keys_are_specific_to_individual_users() {
    let team = Team::new().await;
    let alice = team.person("alice", &[], &[PERSONAL], &["Alerts"]).await;
    alice.create("mine", &personal("alice")).await.expect("her own");
    assert_refused(alice.create("bobs", &personal("bob")).await, &["spec.user", "impersonate bob"]);
    // One who may act as bob anyway.
    let role = json!({"metadata": {"name": format!("as-bob-{}", team.namespace)},
        "rules": [{"apiGroups": [""], "resources": ["users"], "resourceNames": ["bob"], "verbs": ["impersonate"]}]});
    let binding = json!({"metadata": {"name": format!("as-bob-{}", team.namespace)}, "subjects": [user("helpdesk")],
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": format!("as-bob-{}", team.namespace)}});
    let roles = kube::Api::<k8s_openapi::api::rbac::v1::ClusterRole>::all(team.admin.clone());
    roles.create(&kube::api::PostParams::default(), &serde_json::from_value(role).unwrap()).await.unwrap();
    let bindings = kube::Api::<k8s_openapi::api::rbac::v1::ClusterRoleBinding>::all(team.admin.clone());
    bindings.create(&kube::api::PostParams::default(), &serde_json::from_value(binding).unwrap()).await.unwrap();
    let helpdesk = team.person("helpdesk", &[], &[PERSONAL], &["Alerts"]).await;
    crate::seen("the helpdesk may impersonate bob", async || {
        helpdesk.create("bobs", &personal("bob")).await.map_err(anyhow::Error::msg)
    })
    .await;
}

#[tokio::test]
async fn a_personal_key_is_changed_rotated_extended_and_deleted_by_its_user_or_who_may_act_as_that_user() {
    let team = Team::new().await;
    let mut spec = personal("alice");
    spec["expiresAt"] = json!("2098-01-01T00:00:00Z");
    let alice = team.person("alice", &[], &[PERSONAL], &["Alerts"]).await;
    alice.create("key", &spec).await.expect("her own");
    // He may do all of this to keys of his own, and holds all that is in hers.
    let bob = team.person("bob", &[], &[PERSONAL], &["Alerts"]).await;
    let changes = [
        json!({"displayName": "x"}),
        json!({"active": false}),
        json!({"permissions": ["alerts:ReadConfig"]}),
        json!({"expiresAt": "2099-01-01T00:00:00Z"}),
        json!({"rotation": {"requestedAt": "2026-11-25T10:00:00Z"}}),
        json!({"rotation": {"every": "720h"}}),
    ];
    for change in &changes {
        assert_refused(bob.edit("key", change).await, &["spec.user", "bob may not impersonate alice"]);
    }
    assert_refused(bob.mark("key", &json!({"labels": {"a": "b"}})).await, &["impersonate alice"]);
    assert_refused(bob.delete("key").await, &["spec.user", "impersonate alice", "delete"]);
    alice.edit("key", &changes[0]).await.expect("her own");
    // Who may act as alice may revoke it, and a cluster administrator may anyway.
    let helpdesk = team.person("helpdesk", &[], &[PERSONAL], &["Alerts"]).await;
    team.allow("helpdesk", "impersonate", ("", "users"), Some("alice")).await;
    helpdesk.edit("key", &json!({"active": false})).await.expect("may act as alice");
    team.admin().edit("key", &json!({"active": true})).await.expect("may act as anybody");
    helpdesk.delete("key").await.expect("may act as alice");
}

#[tokio::test]
async fn a_personal_key_of_a_service_account_is_managed_by_who_may_act_as_it() {
    let team = Team::new().await;
    let account = format!("system:serviceaccount:{}:deployer", team.namespace);
    team.admin().create("key", &personal(&account)).await.unwrap();
    let bob = team.person("bob", &[], &[PERSONAL], &["Alerts"]).await;
    assert_refused(bob.delete("key").await, &["impersonate", "deployer"]);
    team.allow("bob", "impersonate", ("", "serviceaccounts"), None).await;
    bob.edit("key", &json!({"active": false})).await.expect("may act as the account");
    bob.delete("key").await.expect("may act as the account");
}

#[tokio::test]
async fn turning_on_extending_and_rotating_a_key_takes_what_it_carries_and_revoking_does_not() {
    let team = Team::new().await;
    let carries = [(TEAM, "preset Alerts", crate::team()), (DATA, "preset SendData", data())];
    for (manage, contents, mut spec) in carries {
        let (name, admin) = (manage.split(':').next().unwrap(), team.admin());
        spec["expiresAt"] = json!("2098-01-01T00:00:00Z");
        admin.create(name, &spec).await.unwrap();
        let bob = team.person(&format!("bob-of-{name}"), &[], &[manage], &[]).await;
        let refused = async |change: Value, what: &str| {
            assert_refused(bob.edit(name, &change).await, &["bob-of", contents, what]);
        };
        bob.edit(name, &json!({"active": false})).await.expect("turning off takes no more than Manage");
        refused(json!({"active": true}), "turn on").await;
        refused(json!({"active": null}), "turn on").await;
        bob.edit(name, &json!({"expiresAt": "2097-01-01T00:00:00Z"})).await.expect("shortening takes no more");
        refused(json!({"expiresAt": "2099-01-01T00:00:00Z"}), "extend").await;
        refused(json!({"expiresAt": null}), "extend").await;
        refused(json!({"rotation": {"requestedAt": "2026-11-25T10:00:00Z"}}), "rotate").await;
        refused(json!({"rotation": {"every": "24h"}}), "rotate").await;
        bob.edit(name, &json!({"displayName": "x"})).await.expect("its name");
        let holder = team.person(&format!("holder-of-{name}"), &[], &[manage], &["Alerts", "SendData"]).await;
        holder.edit(name, &json!({"active": true})).await.expect("holds all that is in it");
        bob.delete(name).await.expect("deleting takes no more than Manage");
    }
}

#[tokio::test]
async fn a_member_of_a_data_scoped_group_does_not_turn_a_team_key_on() {
    let team = Team::new().await;
    team.admin().write_settings(&json!({"dataScopedGroups": ["emea"]})).await.unwrap();
    team.admin().create("key", &crate::team()).await.unwrap();
    let scoped = team.person("erin", &["emea"], &[TEAM], &["Alerts"]).await;
    scoped.edit("key", &json!({"active": false})).await.expect("revoking shows nothing");
    let mut tries = 0;
    crate::seen("the settings are known", async || {
        tries += 1;
        let rotate = json!({"rotation": {"requestedAt": crate::support::from_now(tries)}});
        let answer = scoped.edit("key", &rotate).await;
        anyhow::ensure!(answer.is_err_and(|why| why.contains("group emea sees only part")), "not yet");
        Ok(())
    })
    .await;
    assert_refused(scoped.edit("key", &json!({"active": true})).await, &["group emea", "turn on"]);
}

#[tokio::test]
async fn team_key_creation_is_restricted_to_groups_without_data_scope() {
    let team = Team::new().await;
    team.admin().write_settings(&json!({"dataScopedGroups": ["emea"]})).await.unwrap();
    let scoped = team.person("erin", &["emea"], &[TEAM, DATA], &["Alerts", "SendData"]).await;
    let free = team.person("frank", &["apac"], &[TEAM], &["Alerts"]).await;
    let refused = crate::seen("the settings are known", async || match scoped.create("scoped", &crate::team()).await {
        Err(refused) => Ok(refused),
        Ok(key) => {
            scoped.delete(&kube::ResourceExt::name_any(&key)).await.unwrap();
            anyhow::bail!("not yet")
        }
    })
    .await;
    assert!(refused.contains("group emea sees only part of the data"), "{refused}");
    free.create("free", &crate::team()).await.expect("not in such a group");
    scoped.create("data", &data()).await.expect("Send-Your-Data keys have no such limit");
}

#[tokio::test]
async fn permissions_send_data_is_for_people_who_bind_its_cluster_role() {
    let team = Team::new().await;
    let binding = json!({"metadata": {"name": "senders"}, "subjects": [user("sam")],
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "keywright-preset-senddata"}});
    let bindings =
        kube::Api::<k8s_openapi::api::rbac::v1::RoleBinding>::namespaced(team.admin.clone(), &team.namespace);
    bindings.create(&kube::api::PostParams::default(), &serde_json::from_value(binding).unwrap()).await.unwrap();
    let sam = team.person("sam", &[], &[], &[]).await;
    crate::seen("the binding counts", async || sam.create("key", &data()).await.map_err(anyhow::Error::msg)).await;
    assert_refused(sam.create("team", &crate::team()).await, &[TEAM]);
}
