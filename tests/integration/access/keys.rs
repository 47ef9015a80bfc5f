//! The rights that creating, changing and deleting keys needs (docs/specification.md, "Permissions", "Key types").

use serde_json::{Value, json};

use super::{
    MANAGE_DATA_KEYS, MANAGE_PERSONAL_KEYS, MANAGE_TEAM_KEYS, Team, assert_refused, data_key, personal_key, team_key,
    user_subject,
};

/// Asserts that creating, changing and deleting a key needs `manage`.
async fn assert_manage_required(manage: &str, name: &str, spec: &Value, preset: &str) {
    let team = Team::new().await;
    let with = team.person(name, &[], &[manage], &[preset]).await;
    let others: Vec<_> = [MANAGE_TEAM_KEYS, MANAGE_DATA_KEYS, MANAGE_PERSONAL_KEYS]
        .into_iter()
        .filter(|other| *other != manage)
        .collect();
    let without = team.person("without", &[], &others, &[preset]).await;
    assert_refused(without.create("key", spec).await, &["without lacks permission", manage, &team.namespace]);
    with.create("key", spec).await.expect("a holder of the right is allowed");
    assert_refused(without.edit("key", &json!({"displayName": "mine"})).await, &[manage]);
    assert_refused(without.edit("key", &json!({"active": false})).await, &[manage]);
    with.edit("key", &json!({"displayName": "ours", "active": false})).await.expect("a holder of the right is allowed");
    assert_refused(without.delete("key").await, &[manage, "delete"]);
    with.delete("key").await.expect("a holder of the right is allowed");
}

#[tokio::test]
async fn writes_of_personal_keys_need_personal_manage() {
    assert_manage_required(MANAGE_PERSONAL_KEYS, "alice", &personal_key("alice"), "Alerts").await;
}

#[tokio::test]
async fn writes_of_send_your_data_keys_need_data_ingest_manage() {
    assert_manage_required(MANAGE_DATA_KEYS, "alice", &data_key(), "SendData").await;
}

#[tokio::test]
async fn writes_of_team_keys_need_team_manage() {
    assert_manage_required(MANAGE_TEAM_KEYS, "alice", &team_key(), "Alerts").await;
}

#[tokio::test]
async fn groups_and_service_accounts_can_hold_permissions() {
    let team = Team::new().await;
    let group = json!({"kind": "Group", "name": "sre", "apiGroup": "rbac.authorization.k8s.io"});
    team.grant(&group, &[MANAGE_TEAM_KEYS], &["Alerts"]).await;
    let member = team.person("bob", &["sre"], &[], &[]).await;
    member.create("of-a-group", &super::team_key()).await.expect("a member of the group is allowed");
    let nonmember = team.person("bob2", &["dev"], &[], &[]).await;
    assert_refused(nonmember.create("other", &super::team_key()).await, &[MANAGE_TEAM_KEYS]);

    let account = json!({"kind": "ServiceAccount", "name": "deployer", "namespace": team.namespace});
    team.grant(&account, &[MANAGE_TEAM_KEYS], &["Alerts"]).await;
    let name = format!("system:serviceaccount:{}:deployer", team.namespace);
    let client = team.plane.client_as(&name, &["system:serviceaccounts"]).await.unwrap();
    let key = team
        .as_user(&name, &client)
        .create("of-an-account", &super::team_key())
        .await
        .expect("the ServiceAccount is allowed");
    assert_eq!(super::creator(&key), Some(name.as_str()));
}

#[tokio::test]
async fn attaching_a_preset_or_permission_needs_that_preset_or_permission() {
    let team = Team::new().await;
    let alice = team.person("alice", &[], &[MANAGE_TEAM_KEYS, "alerts:ReadConfig"], &["Alerts"]).await;
    alice.create("whole-preset", &super::team_key()).await.expect("alice holds the preset");
    let one = json!({"type": "Team", "permissions": ["alerts:ReadConfig"]});
    alice.create("one", &one).await.expect("alice holds the permission");
    let lacking = json!({"type": "Team", "presets": ["APM"]});
    assert_refused(alice.create("apm", &lacking).await, &["alice lacks preset APM", "create a key that carries it"]);
    let lacking = json!({"type": "Team", "presets": ["Alerts"], "permissions": ["livetail:Read"]});
    assert_refused(alice.create("tail", &lacking).await, &["permission livetail:Read"]);
    // The check ignores case.
    assert_refused(
        alice.create("case", &json!({"type": "Team", "presets": ["apm"]})).await,
        &["alice lacks preset APM"],
    );
}

#[tokio::test]
async fn holding_every_permission_of_a_preset_is_holding_the_preset() {
    let team = Team::new().await;
    let each = ["team-actions:Execute", "team-actions:ReadConfig", "team-actions:UpdateConfig"];
    let rest = ["user-actions:Execute", "user-actions:ReadConfig", "user-actions:UpdateConfig"];
    let all = [&[MANAGE_TEAM_KEYS], &each[..], &rest[..]].concat();
    let spec = json!({"type": "Team", "presets": ["Actions"]});
    team.person("alice", &[], &all, &[])
        .await
        .create("by-parts", &spec)
        .await
        .expect("alice holds every permission of the preset");
    let bob = team.person("bob", &[], &[&[MANAGE_TEAM_KEYS], &each[..]].concat(), &[]).await;
    assert_refused(bob.create("half", &spec).await, &["bob lacks preset Actions"]);
}

#[tokio::test]
async fn adding_permissions_to_a_key_needs_them_and_removing_does_not() {
    let team = Team::new().await;
    let spec = json!({"type": "SendYourData", "presets": ["SendData"], "permissions": ["contextual-data:SendData"]});
    team.admin().create("key", &spec).await.unwrap();
    let bob = team.person("bob", &[], &[MANAGE_DATA_KEYS], &[]).await;
    bob.edit("key", &json!({"permissions": []})).await.expect("the key loses a permission");
    assert_refused(
        bob.edit("key", &json!({"permissions": ["contextual-data:SendData"]})).await,
        &["bob lacks permission contextual-data:SendData", "raise the rights"],
    );
    // A permission of the preset, listed by itself, adds nothing.
    let parts = json!({"presets": null, "permissions": ["logs.data-ingress:SendData"]});
    bob.edit("key", &parts).await.expect("the key keeps part of its permissions");
    bob.edit("key", &json!({"active": false})).await.expect("revoking needs only Manage");
}

#[tokio::test]
async fn raising_a_team_key_needs_every_permission_in_it() {
    let team = Team::new().await;
    team.admin().create("key", &json!({"type": "Team", "presets": ["Alerts"]})).await.unwrap();
    let bob = team.person("bob", &[], &[MANAGE_TEAM_KEYS, "livetail:Read"], &[]).await;
    let more = json!({"permissions": ["livetail:Read"]});
    assert_refused(bob.edit("key", &more).await, &["bob lacks preset Alerts"]);
    team.grant(&user_subject("bob"), &[], &["Alerts"]).await;
    bob.edit("key", &more).await.expect("bob holds the preset and the permission");
}

#[tokio::test]
async fn creating_a_personal_key_for_another_user_needs_impersonate() {
    let team = Team::new().await;
    let alice = team.person("alice", &[], &[MANAGE_PERSONAL_KEYS], &["Alerts"]).await;
    alice.create("mine", &personal_key("alice")).await.expect("alice can create her own key");
    assert_refused(alice.create("bobs", &personal_key("bob")).await, &["spec.user", "impersonate bob"]);
    let role_name = format!("as-bob-{}", team.namespace);
    let role = json!({"metadata": {"name": role_name},
        "rules": [{"apiGroups": [""], "resources": ["users"], "resourceNames": ["bob"], "verbs": ["impersonate"]}]});
    let binding = json!({"metadata": {"name": role_name}, "subjects": [user_subject("helpdesk")],
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": role_name}});
    let roles = kube::Api::<k8s_openapi::api::rbac::v1::ClusterRole>::all(team.admin.clone());
    roles.create(&kube::api::PostParams::default(), &serde_json::from_value(role).unwrap()).await.unwrap();
    let bindings = kube::Api::<k8s_openapi::api::rbac::v1::ClusterRoleBinding>::all(team.admin.clone());
    bindings.create(&kube::api::PostParams::default(), &serde_json::from_value(binding).unwrap()).await.unwrap();
    let helpdesk = team.person("helpdesk", &[], &[MANAGE_PERSONAL_KEYS], &["Alerts"]).await;
    super::wait_until("the helpdesk may impersonate bob", async || {
        helpdesk.create("bobs", &personal_key("bob")).await.map_err(anyhow::Error::msg)
    })
    .await;
}

#[tokio::test]
async fn writes_of_a_personal_key_of_another_user_need_impersonate() {
    let team = Team::new().await;
    let mut spec = personal_key("alice");
    spec["expiresAt"] = json!("2098-01-01T00:00:00Z");
    let alice = team.person("alice", &[], &[MANAGE_PERSONAL_KEYS], &["Alerts"]).await;
    alice.create("key", &spec).await.expect("alice can create her own key");
    // bob may manage his own Personal keys and holds every permission in the key.
    let bob = team.person("bob", &[], &[MANAGE_PERSONAL_KEYS], &["Alerts"]).await;
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
    assert_refused(bob.patch_metadata("key", &json!({"labels": {"a": "b"}})).await, &["impersonate alice"]);
    assert_refused(bob.delete("key").await, &["spec.user", "impersonate alice", "delete"]);
    alice.edit("key", &changes[0]).await.expect("alice can change her own key");
    let helpdesk = team.person("helpdesk", &[], &[MANAGE_PERSONAL_KEYS], &["Alerts"]).await;
    team.allow("helpdesk", "impersonate", ("", "users"), Some("alice")).await;
    helpdesk.edit("key", &json!({"active": false})).await.expect("helpdesk may impersonate alice");
    team.admin()
        .edit("key", &json!({"active": true}))
        .await
        .expect("the cluster administrator may impersonate every user");
    helpdesk.delete("key").await.expect("helpdesk may impersonate alice");
}

#[tokio::test]
async fn writes_of_a_personal_key_of_a_service_account_need_impersonate() {
    let team = Team::new().await;
    let account = format!("system:serviceaccount:{}:deployer", team.namespace);
    team.admin().create("key", &personal_key(&account)).await.unwrap();
    let bob = team.person("bob", &[], &[MANAGE_PERSONAL_KEYS], &["Alerts"]).await;
    assert_refused(bob.delete("key").await, &["impersonate", "deployer"]);
    team.allow("bob", "impersonate", ("", "serviceaccounts"), None).await;
    bob.edit("key", &json!({"active": false})).await.expect("bob may impersonate the ServiceAccount");
    bob.delete("key").await.expect("bob may impersonate the ServiceAccount");
}

#[tokio::test]
async fn activating_extending_and_rotating_a_key_needs_its_permissions_and_revoking_does_not() {
    let team = Team::new().await;
    let carries =
        [(MANAGE_TEAM_KEYS, "preset Alerts", super::team_key()), (MANAGE_DATA_KEYS, "preset SendData", data_key())];
    for (manage, contents, mut spec) in carries {
        let (name, admin) = (manage.split(':').next().unwrap(), team.admin());
        spec["expiresAt"] = json!("2098-01-01T00:00:00Z");
        admin.create(name, &spec).await.unwrap();
        let bob = team.person(&format!("bob-of-{name}"), &[], &[manage], &[]).await;
        let refused = async |change: Value, action: &str| {
            assert_refused(bob.edit(name, &change).await, &["bob-of", contents, action]);
        };
        bob.edit(name, &json!({"active": false})).await.expect("deactivating needs only Manage");
        refused(json!({"active": true}), "turn on").await;
        refused(json!({"active": null}), "turn on").await;
        bob.edit(name, &json!({"expiresAt": "2097-01-01T00:00:00Z"}))
            .await
            .expect("shortening the lifetime needs only Manage");
        refused(json!({"expiresAt": "2099-01-01T00:00:00Z"}), "extend").await;
        refused(json!({"expiresAt": null}), "extend").await;
        refused(json!({"rotation": {"requestedAt": "2026-11-25T10:00:00Z"}}), "rotate").await;
        refused(json!({"rotation": {"every": "24h"}}), "rotate").await;
        bob.edit(name, &json!({"displayName": "x"})).await.expect("changing displayName needs only Manage");
        let holder = team.person(&format!("holder-of-{name}"), &[], &[manage], &["Alerts", "SendData"]).await;
        holder.edit(name, &json!({"active": true})).await.expect("the user holds every permission in the key");
        bob.delete(name).await.expect("deleting needs only Manage");
    }
}

#[tokio::test]
async fn members_of_data_scoped_groups_can_not_activate_or_rotate_team_keys() {
    let team = Team::new().await;
    team.admin().write_settings(&json!({"dataScopedGroups": ["emea"]})).await.unwrap();
    team.admin().create("key", &super::team_key()).await.unwrap();
    let scoped = team.person("erin", &["emea"], &[MANAGE_TEAM_KEYS], &["Alerts"]).await;
    scoped.edit("key", &json!({"active": false})).await.expect("revoking is allowed because it reveals no data");
    let mut tries = 0;
    super::wait_until("the operator observes the settings", async || {
        tries += 1;
        let rotate = json!({"rotation": {"requestedAt": crate::support::from_now(tries)}});
        let answer = scoped.edit("key", &rotate).await;
        anyhow::ensure!(
            answer.is_err_and(|message| message.contains("group emea sees only part")),
            "the operator has not observed the settings"
        );
        Ok(())
    })
    .await;
    assert_refused(scoped.edit("key", &json!({"active": true})).await, &["group emea", "turn on"]);
}

#[tokio::test]
async fn members_of_data_scoped_groups_can_not_create_team_keys() {
    let team = Team::new().await;
    team.admin().write_settings(&json!({"dataScopedGroups": ["emea"]})).await.unwrap();
    let scoped = team.person("erin", &["emea"], &[MANAGE_TEAM_KEYS, MANAGE_DATA_KEYS], &["Alerts", "SendData"]).await;
    let unscoped = team.person("frank", &["apac"], &[MANAGE_TEAM_KEYS], &["Alerts"]).await;
    let refused = super::wait_until("the operator observes the settings", async || {
        match scoped.create("scoped", &super::team_key()).await {
            Err(refused) => Ok(refused),
            Ok(key) => {
                scoped.delete(&kube::ResourceExt::name_any(&key)).await.unwrap();
                anyhow::bail!("the operator has not observed the settings")
            }
        }
    })
    .await;
    assert!(refused.contains("group emea sees only part of the data"), "{refused}");
    unscoped.create("unscoped", &super::team_key()).await.expect("frank is in no data-scoped group");
    scoped.create("data", &data_key()).await.expect("data-scoped groups apply to Team keys only");
}

#[tokio::test]
async fn the_cluster_role_of_preset_senddata_grants_data_ingest_manage() {
    let team = Team::new().await;
    let binding = json!({"metadata": {"name": "senders"}, "subjects": [user_subject("sam")],
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole",
            "name": "keywright-preset-senddata"}});
    let bindings =
        kube::Api::<k8s_openapi::api::rbac::v1::RoleBinding>::namespaced(team.admin.clone(), &team.namespace);
    bindings.create(&kube::api::PostParams::default(), &serde_json::from_value(binding).unwrap()).await.unwrap();
    let sam = team.person("sam", &[], &[], &[]).await;
    super::wait_until("the RoleBinding applies", async || {
        sam.create("key", &data_key()).await.map_err(anyhow::Error::msg)
    })
    .await;
    assert_refused(sam.create("team", &super::team_key()).await, &[MANAGE_TEAM_KEYS]);
}
