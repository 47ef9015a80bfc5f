//! The seed's "Permissions" (ReadConfig) and "Types of API keys": who sees the value of a key.

use anyhow::ensure;
use keywright::api::{KeyReveal, KeyState};
use kube::api::{Api, PostParams};
use serde_json::{Value, json};

use crate::{Person, TEAM_POLICY, Team, assert_refused, data, personal, refusal, seen, team, under};

const TEAM_VIEW: &str = "team-custom-api-keys:ReadConfig";
const DATA_VIEW: &str = "data-ingest-api-keys:ReadConfig";
const PERSONAL_VIEW: &str = "personal-custom-api-keys:ReadConfig";

impl Person {
    /// Asks for the value of a key.
    async fn reveal(&self, key: &str) -> Result<KeyReveal, String> {
        let recipient = age::x25519::Identity::generate().to_public().to_string();
        let spec = json!({"apiKeyRef": {"name": key}, "recipient": recipient});
        let mut request = crate::manifest("KeyReveal", "", &spec);
        request["metadata"] = json!({"generateName": "see-"});
        let reveals: Api<KeyReveal> = Api::namespaced(self.keys.clone().into_client(), self.keys.namespace().unwrap());
        refusal(reveals.create(&PostParams::default(), &serde_json::from_value(request).unwrap()).await)
    }
}

/// A key that the operator has minted, and so knows.
async fn minted(here: &Team, name: &str, spec: &Value) {
    here.admin().create(name, spec).await.unwrap();
    seen("the key is minted", async || {
        let state = here.admin().keys.get(name).await?.status.and_then(|status| status.state);
        ensure!(state == Some(KeyState::Active), "{state:?}");
        Ok(())
    })
    .await;
}

/// One row: ReadConfig of the type is needed, and no Manage takes its place.
async fn row(view: &str, manage: &str, spec: &Value, contents: &str) {
    let here = Team::new().await;
    minted(&here, "key", spec).await;
    let user = spec["user"].as_str().unwrap_or("viewer");
    let without = here.person(user, &[], &[manage], &[contents]).await;
    assert_refused(without.reveal("key").await, &["lacks permission", view]);
    let with = here.person(user, &[], &[view], &[]).await;
    let reveal = seen("the right counts", async || with.reveal("key").await.map_err(anyhow::Error::msg)).await;
    assert_eq!(reveal.spec.requester.unwrap().username, user);
}

#[tokio::test]
async fn permissions_personal_read_config() {
    row(PERSONAL_VIEW, crate::PERSONAL, &personal("alice"), "Alerts").await;
}

#[tokio::test]
async fn permissions_send_your_data_read_config() {
    row(DATA_VIEW, crate::DATA, &data(), "SendData").await;
}

#[tokio::test]
async fn permissions_team_read_config() {
    row(TEAM_VIEW, crate::TEAM, &team(), "Alerts").await;
}

#[tokio::test]
async fn only_members_with_the_permissions_contained_in_a_team_key_may_access_it() {
    let here = Team::new().await;
    let spec = json!({"type": "Team", "presets": ["Alerts"], "permissions": ["livetail:Read"]});
    minted(&here, "key", &spec).await;
    let some = here.person("some", &[], &[TEAM_VIEW, "livetail:Read"], &[]).await;
    assert_refused(some.reveal("key").await, &["some lacks preset Alerts", "see the value of a Team key"]);
    let all = here.person("all", &[], &[TEAM_VIEW, "livetail:Read"], &["Alerts"]).await;
    all.reveal("key").await.expect("every permission in the key");
}

#[tokio::test]
async fn team_key_viewing_is_restricted_to_groups_without_data_scope() {
    let here = Team::new().await;
    here.admin().write_settings(&json!({"dataScopedGroups": ["emea"]})).await.unwrap();
    minted(&here, "key", &team()).await;
    let scoped = here.person("erin", &["emea"], &[TEAM_VIEW], &["Alerts"]).await;
    seen("the settings are known", async || {
        let answer = scoped.reveal("key").await;
        ensure!(answer.as_ref().is_err_and(|why| why.contains("group emea sees only part")), "{answer:?}");
        Ok(())
    })
    .await;
    here.person("frank", &["apac"], &[TEAM_VIEW], &["Alerts"]).await.reveal("key").await.expect("not scoped");
}

#[tokio::test]
async fn a_personal_key_is_seen_by_its_user_alone() {
    let here = Team::new().await;
    minted(&here, "key", &personal("alice")).await;
    let bob = here.person("bob", &[], &[PERSONAL_VIEW, crate::PERSONAL], &["Alerts"]).await;
    assert_refused(bob.reveal("key").await, &["only alice may see the value"]);
    assert_refused(here.admin().reveal("key").await, &["only alice may see the value"]);
}

#[tokio::test]
async fn an_access_policy_controls_who_can_view_the_key() {
    let here = Team::new().await;
    let spec = json!({"mode": "Advanced", "generalAccess": "NoAccess", "rules": [
        {"groups": ["readers"], "access": "Read"},
    ]});
    here.admin().write_policy("readers", &spec).await.unwrap();
    minted(&here, "key", &under("readers", team())).await;
    let reader = here.person("reader", &["readers"], &[TEAM_VIEW, crate::TEAM, TEAM_POLICY], &["Alerts"]).await;
    let other = here.person("other", &[], &[TEAM_VIEW, crate::TEAM], &["Alerts"]).await;
    seen("the policy is known", async || reader.reveal("key").await.map_err(anyhow::Error::msg)).await;
    assert_refused(other.reveal("key").await, &["AccessPolicy readers gives other NoAccess", "Read is needed"]);
    assert_refused(reader.edit("key", &json!({"active": false})).await, &["gives reader Read", "Manage is needed"]);
}

#[tokio::test]
async fn a_requester_can_not_be_chosen() {
    let here = Team::new().await;
    minted(&here, "key", &personal("alice")).await;
    let mallory = here.person("mallory", &[], &[PERSONAL_VIEW], &["Alerts"]).await;
    let mut request = crate::manifest(
        "KeyReveal",
        "forged",
        &json!({
            "apiKeyRef": {"name": "key"}, "recipient": age::x25519::Identity::generate().to_public().to_string(),
            "requester": {"username": "alice", "groups": ["system:masters"]},
        }),
    );
    request["metadata"]["namespace"] = json!(here.namespace);
    let reveals: Api<KeyReveal> = Api::namespaced(mallory.keys.clone().into_client(), &here.namespace);
    let answer = refusal(reveals.create(&PostParams::default(), &serde_json::from_value(request).unwrap()).await);
    assert_refused(answer, &["only alice may see the value"]);
}
