//! The seed's "Access policies for API keys": modes, target groups, general access, policy permissions, reset.

use serde_json::{Value, json};

use crate::{DATA, DATA_POLICY, TEAM, TEAM_POLICY, Team, assert_refused, data, team, under};

#[tokio::test]
async fn permissions_update_access_policy_in_both_spellings() {
    let here = Team::new().await;
    let private = json!({"mode": "Private"});
    let none = here.person("none", &[], &[TEAM, DATA], &["Alerts", "SendData"]).await;
    assert_refused(none.write_policy("p", &private).await, &[DATA_POLICY, TEAM_POLICY]);
    let seed = here.person("seed", &[], &[TEAM, DATA, DATA_POLICY], &["Alerts", "SendData"]).await;
    let other = here.person("other", &[], &[TEAM, DATA, TEAM_POLICY], &["Alerts", "SendData"]).await;
    seed.write_policy("of-seed", &private).await.expect("the seed's spelling");
    other.write_policy("of-other", &private).await.expect("the spelling of other sources");
    // For Team keys both count, for Send-Your-Data keys the one.
    seed.create("team-seed", &under("of-seed", team())).await.expect("both spellings count");
    other.create("team-other", &under("of-other", team())).await.expect("both spellings count");
    seed.create("data-seed", &under("of-seed", data())).await.expect("its own spelling");
    assert_refused(other.create("data-other", &under("of-other", data())).await, &["accessPolicyRef", DATA_POLICY]);
    assert_refused(none.create("team-none", &under("of-seed", team())).await, &["accessPolicyRef", TEAM_POLICY]);
}

#[tokio::test]
async fn changing_the_policy_of_a_key_needs_update_access_policy_and_not_manage() {
    let here = Team::new().await;
    let open = json!({"mode": "Advanced", "generalAccess": "Manage"});
    here.admin().write_policy("open", &open).await.unwrap();
    here.admin().create("key", &team()).await.unwrap();
    let keeper = here.person("keeper", &[], &[TEAM_POLICY], &[]).await;
    let manager = here.person("manager", &[], &[TEAM], &["Alerts"]).await;
    let attach = json!({"accessPolicyRef": {"name": "open"}});
    assert_refused(manager.edit("key", &attach).await, &["accessPolicyRef", TEAM_POLICY]);
    keeper.edit("key", &attach).await.expect("the policy is theirs to set");
    assert_refused(keeper.edit("key", &json!({"active": false})).await, &[TEAM]);
    assert_refused(keeper.edit("key", &json!({"accessPolicyRef": null, "active": false})).await, &[TEAM]);
    keeper.edit("key", &json!({"accessPolicyRef": null})).await.expect("Reset");
}

#[tokio::test]
async fn private_only_you_can_view_and_edit_the_resource() {
    let here = Team::new().await;
    let alice = here.person("alice", &[], &[TEAM, TEAM_POLICY], &["Alerts"]).await;
    let bob = here.person("bob", &[], &[TEAM, TEAM_POLICY], &["Alerts"]).await;
    alice.write_policy("private", &json!({"mode": "Private"})).await.unwrap();
    alice.create("key", &under("private", team())).await.unwrap();
    crate::seen("the policy is known", async || {
        anyhow::ensure!(bob.edit("key", &json!({"displayName": "x"})).await.is_err_and(|e| e.contains("Private")));
        Ok(())
    })
    .await;
    assert_refused(bob.delete("key").await, &["AccessPolicy private gives bob NoAccess", "Manage is needed"]);
    assert_refused(bob.edit("key", &json!({"accessPolicyRef": null})).await, &["access-policies:UpdateAll"]);
    assert_refused(bob.edit_policy("private", &json!({"mode": "Advanced", "generalAccess": "Manage"})).await, &["bob"]);
    alice.edit("key", &json!({"displayName": "mine"})).await.expect("her own");
    // The way out, for one who holds the right over every policy.
    let chief = here.person("chief", &[], &["access-policies:UpdateAll"], &[]).await;
    chief.edit("key", &json!({"accessPolicyRef": null})).await.expect("the way out");
    bob.edit("key", &json!({"displayName": "ours"})).await.expect("gate 1 alone again");
}

fn rule(group: &str, access: &str) -> Value {
    json!({"groups": [group], "access": access})
}

#[tokio::test]
async fn advanced_target_groups_and_general_access() {
    let here = Team::new().await;
    let spec = json!({"mode": "Advanced", "generalAccess": "Read", "rules": [
        rule("readers", "Read"), rule("managers", "Manage"), rule("banned", "NoAccess"),
    ]});
    here.admin().write_policy("advanced", &spec).await.unwrap();
    here.admin().create("key", &under("advanced", team())).await.unwrap();
    let table = [
        (&["managers"][..], true),
        (&["readers"], false),
        (&["readers", "managers"], true),
        (&["managers", "banned"], false),
        (&["others"], false),
    ];
    for (n, (groups, may)) in table.into_iter().enumerate() {
        let who = here.person(&format!("user{n}"), groups, &[TEAM], &["Alerts"]).await;
        crate::seen(&format!("{groups:?}: {may}"), async || {
            let answer = who.edit("key", &json!({"displayName": format!("of {n}")})).await;
            anyhow::ensure!(answer.is_ok() == may, "{answer:?}");
            Ok(())
        })
        .await;
    }
    // No level of a policy takes the place of the role.
    let roleless = here.person("roleless", &["managers"], &[], &[]).await;
    assert_refused(roleless.edit("key", &json!({"displayName": "x"})).await, &[TEAM]);
}

#[tokio::test]
async fn policy_permissions_control_who_edits_the_policy_itself() {
    let here = Team::new().await;
    let spec = json!({"mode": "Advanced", "generalAccess": "Manage", "generalPolicyAccess": "NoAccess", "rules": [
        {"groups": ["keepers"], "access": "Read", "policyAccess": "Manage"},
    ]});
    here.admin().write_policy("kept", &spec).await.unwrap();
    let keeper = here.person("keeper", &["keepers"], &[DATA_POLICY], &[]).await;
    let other = here.person("other", &[], &[DATA_POLICY], &[]).await;
    let change = json!({"generalAccess": "Read"});
    assert_refused(other.edit_policy("kept", &change).await, &["gives other NoAccess", "access-policies:UpdateAll"]);
    let gone = other.policies.delete("kept", &kube::api::DeleteParams::default()).await;
    assert!(matches!(gone, Err(kube::Error::Api(status)) if status.is_forbidden()));
    keeper.edit_policy("kept", &change).await.expect("a keeper");
}

#[tokio::test]
async fn a_policy_that_is_missing_denies_and_says_so() {
    let here = Team::new().await;
    here.admin().create("key", &under("nowhere", team())).await.expect("manifests come in any order");
    let bob = here.person("bob", &[], &[TEAM, TEAM_POLICY], &["Alerts"]).await;
    assert_refused(
        bob.edit("key", &json!({"active": false})).await,
        &["AccessPolicy nowhere does not exist", "create it, or name another"],
    );
    assert_refused(bob.delete("key").await, &["nowhere does not exist"]);
    bob.edit("key", &json!({"accessPolicyRef": null})).await.expect("the way out");
    bob.delete("key").await.expect("gate 1 alone");
}

#[tokio::test]
async fn personal_keys_support_no_access_policy() {
    let here = Team::new().await;
    let spec = under("p", crate::personal("admin"));
    let key = serde_json::from_value(crate::manifest("ApiKey", "p", &spec)).unwrap();
    let answer = here.admin().keys.create(&kube::api::PostParams::default(), &key).await;
    let Err(kube::Error::Api(status)) = answer else { panic!("{answer:?}") };
    assert!(status.message.contains("only Team and SendYourData keys support access policies"), "{}", status.message);
}
