//! The rights that revealing the value of a key needs (docs/specification.md, "Permissions", "Key types").

use anyhow::ensure;
use keywright::api::{KeyReveal, KeyState};
use kube::api::{Api, PostParams};
use serde_json::{Value, json};

use super::{
    Person, Team, UPDATE_TEAM_POLICY, assert_refused, data_key, map_forbidden, personal_key, team_key, wait_until,
    with_policy,
};

const READ_TEAM_KEYS: &str = "team-custom-api-keys:ReadConfig";
const READ_DATA_KEYS: &str = "data-ingest-api-keys:ReadConfig";
const READ_PERSONAL_KEYS: &str = "personal-custom-api-keys:ReadConfig";

impl Person {
    /// Requests the value of a key.
    async fn reveal(&self, key: &str) -> Result<KeyReveal, String> {
        let recipient = age::x25519::Identity::generate().to_public().to_string();
        let spec = json!({"apiKeyRef": {"name": key}, "recipient": recipient});
        let mut request = super::manifest("KeyReveal", "", &spec);
        request["metadata"] = json!({"generateName": "reveal-"});
        let reveals: Api<KeyReveal> = Api::namespaced(self.keys.clone().into_client(), self.keys.namespace().unwrap());
        map_forbidden(reveals.create(&PostParams::default(), &serde_json::from_value(request).unwrap()).await)
    }
}

/// Creates a key and waits until the operator has minted it.
async fn create_minted(team: &Team, name: &str, spec: &Value) {
    team.admin().create(name, spec).await.unwrap();
    wait_until("the key is Active", async || {
        let state = team.admin().keys.get(name).await?.status.and_then(|status| status.state);
        ensure!(state == Some(KeyState::Active), "{state:?}");
        Ok(())
    })
    .await;
}

/// Asserts that revealing a key needs `view`, and that `manage` does not replace it.
async fn assert_view_required(view: &str, manage: &str, spec: &Value, contents: &str) {
    let team = Team::new().await;
    create_minted(&team, "key", spec).await;
    let user = spec["user"].as_str().unwrap_or("viewer");
    let without = team.person(user, &[], &[manage], &[contents]).await;
    assert_refused(without.reveal("key").await, &["lacks permission", view]);
    let with = team.person(user, &[], &[view], &[]).await;
    let reveal =
        wait_until("the webhook admits the request", async || with.reveal("key").await.map_err(anyhow::Error::msg))
            .await;
    assert_eq!(reveal.spec.requester.unwrap().username, user);
}

#[tokio::test]
async fn reveals_of_personal_keys_need_personal_read_config() {
    assert_view_required(READ_PERSONAL_KEYS, super::MANAGE_PERSONAL_KEYS, &personal_key("alice"), "Alerts").await;
}

#[tokio::test]
async fn reveals_of_send_your_data_keys_need_data_ingest_read_config() {
    assert_view_required(READ_DATA_KEYS, super::MANAGE_DATA_KEYS, &data_key(), "SendData").await;
}

#[tokio::test]
async fn reveals_of_team_keys_need_team_read_config() {
    assert_view_required(READ_TEAM_KEYS, super::MANAGE_TEAM_KEYS, &team_key(), "Alerts").await;
}

#[tokio::test]
async fn reveals_of_team_keys_need_every_permission_in_the_key() {
    let team = Team::new().await;
    let spec = json!({"type": "Team", "presets": ["Alerts"], "permissions": ["livetail:Read"]});
    create_minted(&team, "key", &spec).await;
    let some = team.person("some", &[], &[READ_TEAM_KEYS, "livetail:Read"], &[]).await;
    assert_refused(some.reveal("key").await, &["some lacks preset Alerts", "see the value of a Team key"]);
    let all = team.person("all", &[], &[READ_TEAM_KEYS, "livetail:Read"], &["Alerts"]).await;
    all.reveal("key").await.expect("the user holds every permission in the key");
}

#[tokio::test]
async fn members_of_data_scoped_groups_can_not_reveal_team_keys() {
    let team = Team::new().await;
    team.admin().write_settings(&json!({"dataScopedGroups": ["emea"]})).await.unwrap();
    create_minted(&team, "key", &team_key()).await;
    let scoped = team.person("erin", &["emea"], &[READ_TEAM_KEYS], &["Alerts"]).await;
    wait_until("the operator observes the settings", async || {
        let answer = scoped.reveal("key").await;
        ensure!(answer.as_ref().is_err_and(|message| message.contains("group emea sees only part")), "{answer:?}");
        Ok(())
    })
    .await;
    team.person("frank", &["apac"], &[READ_TEAM_KEYS], &["Alerts"])
        .await
        .reveal("key")
        .await
        .expect("frank is in no data-scoped group");
}

#[tokio::test]
async fn reveals_of_personal_keys_are_granted_to_their_user_alone() {
    let team = Team::new().await;
    create_minted(&team, "key", &personal_key("alice")).await;
    let bob = team.person("bob", &[], &[READ_PERSONAL_KEYS, super::MANAGE_PERSONAL_KEYS], &["Alerts"]).await;
    assert_refused(bob.reveal("key").await, &["only alice may see the value"]);
    assert_refused(team.admin().reveal("key").await, &["only alice may see the value"]);
}

#[tokio::test]
async fn reveals_need_level_read_of_the_access_policy() {
    let team = Team::new().await;
    let spec = json!({"mode": "Advanced", "generalAccess": "NoAccess", "rules": [
        {"groups": ["readers"], "access": "Read"},
    ]});
    team.admin().write_policy("readers", &spec).await.unwrap();
    create_minted(&team, "key", &with_policy("readers", team_key())).await;
    let reader = team
        .person("reader", &["readers"], &[READ_TEAM_KEYS, super::MANAGE_TEAM_KEYS, UPDATE_TEAM_POLICY], &["Alerts"])
        .await;
    let other = team.person("other", &[], &[READ_TEAM_KEYS, super::MANAGE_TEAM_KEYS], &["Alerts"]).await;
    wait_until("the operator observes the policy", async || reader.reveal("key").await.map_err(anyhow::Error::msg))
        .await;
    assert_refused(other.reveal("key").await, &["AccessPolicy readers gives other NoAccess", "Read is needed"]);
    assert_refused(reader.edit("key", &json!({"active": false})).await, &["gives reader Read", "Manage is needed"]);
}

#[tokio::test]
async fn the_requester_of_a_reveal_can_not_be_chosen() {
    let team = Team::new().await;
    create_minted(&team, "key", &personal_key("alice")).await;
    let mallory = team.person("mallory", &[], &[READ_PERSONAL_KEYS], &["Alerts"]).await;
    let mut request = super::manifest(
        "KeyReveal",
        "forged",
        &json!({
            "apiKeyRef": {"name": "key"}, "recipient": age::x25519::Identity::generate().to_public().to_string(),
            "requester": {"username": "alice", "groups": ["system:masters"]},
        }),
    );
    request["metadata"]["namespace"] = json!(team.namespace);
    let reveals: Api<KeyReveal> = Api::namespaced(mallory.keys.clone().into_client(), &team.namespace);
    let answer = map_forbidden(reveals.create(&PostParams::default(), &serde_json::from_value(request).unwrap()).await);
    assert_refused(answer, &["only alice may see the value"]);
}
