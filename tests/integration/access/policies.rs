//! Access policies (docs/specification.md, "Access policies"): modes, target groups, general access, policy
//! permissions, reset.

use serde_json::{Value, json};

use super::{
    MANAGE_DATA_KEYS, MANAGE_TEAM_KEYS, Team, UPDATE_DATA_POLICY, UPDATE_TEAM_POLICY, assert_refused, data_key,
    team_key, with_policy,
};

#[tokio::test]
async fn policies_of_team_keys_accept_both_spellings_of_update_access_policy() {
    let team = Team::new().await;
    let private = json!({"mode": "Private"});
    let none = team.person("none", &[], &[MANAGE_TEAM_KEYS, MANAGE_DATA_KEYS], &["Alerts", "SendData"]).await;
    assert_refused(none.write_policy("p", &private).await, &[UPDATE_DATA_POLICY, UPDATE_TEAM_POLICY]);
    let data_user = team
        .person("data", &[], &[MANAGE_TEAM_KEYS, MANAGE_DATA_KEYS, UPDATE_DATA_POLICY], &["Alerts", "SendData"])
        .await;
    let team_user = team
        .person("team", &[], &[MANAGE_TEAM_KEYS, MANAGE_DATA_KEYS, UPDATE_TEAM_POLICY], &["Alerts", "SendData"])
        .await;
    data_user.write_policy("of-data", &private).await.expect("data-ingest-api-keys:UpdateAccessPolicy counts");
    team_user.write_policy("of-team", &private).await.expect("team-custom-api-keys:UpdateAccessPolicy counts");
    // Team keys accept both spellings, Send-Your-Data keys only data-ingest-api-keys.
    data_user.create("team-data", &with_policy("of-data", team_key())).await.expect("both spellings count");
    team_user.create("team-team", &with_policy("of-team", team_key())).await.expect("both spellings count");
    data_user.create("data-data", &with_policy("of-data", data_key())).await.expect("the spelling of its type");
    assert_refused(
        team_user.create("data-team", &with_policy("of-team", data_key())).await,
        &["accessPolicyRef", UPDATE_DATA_POLICY],
    );
    assert_refused(
        none.create("team-none", &with_policy("of-data", team_key())).await,
        &["accessPolicyRef", UPDATE_TEAM_POLICY],
    );
}

#[tokio::test]
async fn changing_the_policy_of_a_key_needs_update_access_policy_and_not_manage() {
    let team = Team::new().await;
    let open = json!({"mode": "Advanced", "generalAccess": "Manage"});
    team.admin().write_policy("open", &open).await.unwrap();
    team.admin().create("key", &team_key()).await.unwrap();
    let policy_editor = team.person("policy-editor", &[], &[UPDATE_TEAM_POLICY], &[]).await;
    let manager = team.person("manager", &[], &[MANAGE_TEAM_KEYS], &["Alerts"]).await;
    let attach = json!({"accessPolicyRef": {"name": "open"}});
    assert_refused(manager.edit("key", &attach).await, &["accessPolicyRef", UPDATE_TEAM_POLICY]);
    policy_editor.edit("key", &attach).await.expect("UpdateAccessPolicy suffices");
    assert_refused(policy_editor.edit("key", &json!({"active": false})).await, &[MANAGE_TEAM_KEYS]);
    assert_refused(
        policy_editor.edit("key", &json!({"accessPolicyRef": null, "active": false})).await,
        &[MANAGE_TEAM_KEYS],
    );
    policy_editor.edit("key", &json!({"accessPolicyRef": null})).await.expect("Reset");
}

#[tokio::test]
async fn a_private_policy_gives_access_to_the_creator_alone() {
    let team = Team::new().await;
    let alice = team.person("alice", &[], &[MANAGE_TEAM_KEYS, UPDATE_TEAM_POLICY], &["Alerts"]).await;
    let bob = team.person("bob", &[], &[MANAGE_TEAM_KEYS, UPDATE_TEAM_POLICY], &["Alerts"]).await;
    alice.write_policy("private", &json!({"mode": "Private"})).await.unwrap();
    alice.create("key", &with_policy("private", team_key())).await.unwrap();
    super::wait_until("the operator observes the policy", async || {
        anyhow::ensure!(bob.edit("key", &json!({"displayName": "x"})).await.is_err_and(|e| e.contains("Private")));
        Ok(())
    })
    .await;
    assert_refused(bob.delete("key").await, &["AccessPolicy private gives bob NoAccess", "Manage is needed"]);
    assert_refused(bob.edit("key", &json!({"accessPolicyRef": null})).await, &["access-policies:UpdateAll"]);
    assert_refused(bob.edit_policy("private", &json!({"mode": "Advanced", "generalAccess": "Manage"})).await, &["bob"]);
    alice.edit("key", &json!({"displayName": "mine"})).await.expect("alice created the key");
    // access-policies:UpdateAll overrides every policy.
    let policy_admin = team.person("policy-admin", &[], &["access-policies:UpdateAll"], &[]).await;
    policy_admin.edit("key", &json!({"accessPolicyRef": null})).await.expect("UpdateAll suffices");
    bob.edit("key", &json!({"displayName": "ours"})).await.expect("without a policy, the role alone decides");
}

fn rule(group: &str, access: &str) -> Value {
    json!({"groups": [group], "access": access})
}

#[tokio::test]
async fn an_advanced_policy_denies_first_then_gives_the_highest_level_then_general_access() {
    let team = Team::new().await;
    let spec = json!({"mode": "Advanced", "generalAccess": "Read", "rules": [
        rule("readers", "Read"), rule("managers", "Manage"), rule("banned", "NoAccess"),
    ]});
    team.admin().write_policy("advanced", &spec).await.unwrap();
    team.admin().create("key", &with_policy("advanced", team_key())).await.unwrap();
    let table = [
        (&["managers"][..], true),
        (&["readers"], false),
        (&["readers", "managers"], true),
        (&["managers", "banned"], false),
        (&["others"], false),
    ];
    for (n, (groups, allowed)) in table.into_iter().enumerate() {
        let user = team.person(&format!("user{n}"), groups, &[MANAGE_TEAM_KEYS], &["Alerts"]).await;
        super::wait_until(&format!("access of {groups:?} is {allowed}"), async || {
            let answer = user.edit("key", &json!({"displayName": format!("of {n}")})).await;
            anyhow::ensure!(answer.is_ok() == allowed, "{answer:?}");
            Ok(())
        })
        .await;
    }
    // A level of a policy does not replace the role.
    let roleless = team.person("roleless", &["managers"], &[], &[]).await;
    assert_refused(roleless.edit("key", &json!({"displayName": "x"})).await, &[MANAGE_TEAM_KEYS]);
}

#[tokio::test]
async fn changing_a_policy_needs_policy_access_manage() {
    let team = Team::new().await;
    let spec = json!({"mode": "Advanced", "generalAccess": "Manage", "generalPolicyAccess": "NoAccess", "rules": [
        {"groups": ["policy-editors"], "access": "Read", "policyAccess": "Manage"},
    ]});
    team.admin().write_policy("guarded", &spec).await.unwrap();
    let policy_editor = team.person("policy-editor", &["policy-editors"], &[UPDATE_DATA_POLICY], &[]).await;
    let other = team.person("other", &[], &[UPDATE_DATA_POLICY], &[]).await;
    let change = json!({"generalAccess": "Read"});
    assert_refused(other.edit_policy("guarded", &change).await, &["gives other NoAccess", "access-policies:UpdateAll"]);
    let answer = other.policies.delete("guarded", &kube::api::DeleteParams::default()).await;
    assert!(matches!(answer, Err(kube::Error::Api(status)) if status.is_forbidden()));
    policy_editor.edit_policy("guarded", &change).await.expect("the group has policyAccess Manage");
}

#[tokio::test]
async fn a_missing_policy_denies_every_change_but_its_removal() {
    let team = Team::new().await;
    team.admin()
        .create("key", &with_policy("missing", team_key()))
        .await
        .expect("a policy may be created after the key");
    let bob = team.person("bob", &[], &[MANAGE_TEAM_KEYS, UPDATE_TEAM_POLICY], &["Alerts"]).await;
    assert_refused(
        bob.edit("key", &json!({"active": false})).await,
        &["AccessPolicy missing does not exist", "create it, or name another"],
    );
    assert_refused(bob.delete("key").await, &["missing does not exist"]);
    bob.edit("key", &json!({"accessPolicyRef": null})).await.expect("removing the reference is allowed");
    bob.delete("key").await.expect("without a policy, the role alone decides");
}

#[tokio::test]
async fn a_personal_key_with_an_access_policy_is_rejected() {
    let team = Team::new().await;
    let spec = with_policy("p", super::personal_key("admin"));
    let key = serde_json::from_value(super::manifest("ApiKey", "p", &spec)).unwrap();
    let answer = team.admin().keys.create(&kube::api::PostParams::default(), &key).await;
    let Err(kube::Error::Api(status)) = answer else { panic!("{answer:?}") };
    assert!(status.message.contains("only Team and SendYourData keys support access policies"), "{}", status.message);
}
