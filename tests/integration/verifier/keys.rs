//! The life cycle of keys, and how fast the verifier applies changes.

use std::time::Duration;

use kube::api::{Api, Patch, PatchParams, PostParams};
use serde_json::json;

use super::{PROPAGATION_LIMIT, Team, check, check_with, from_now, reader, start, verifier, wait_for_status};
use crate::support::TIMEOUT;
use crate::support::keys::find_value;
use crate::support::verifier::Options;

#[tokio::test]
async fn allowed_answers_set_every_identity_header_and_rejections_state_the_reason() {
    let (team, verifier) = (Team::new().await, verifier().await);
    let value = team.mint("reader", &reader()).await;
    let answer = wait_for_status(verifier, "permission=alerts:ReadConfig", &value, 200, TIMEOUT).await;
    let id = team.ready("reader").await.status.unwrap().id.unwrap();
    for (name, expected) in [
        ("x-keywright-key-id", id.as_str()),
        ("x-keywright-key-name", "reader"),
        ("x-keywright-key-type", "Team"),
        ("x-keywright-team", &team.namespace),
        ("x-keywright-user", ""),
    ] {
        assert_eq!(answer.headers(name), [expected], "{name}");
    }
    let other = format!("permission=alerts:ReadConfig&team=bank,{}", team.namespace);
    assert_eq!(check(verifier, &other, &value).await.status, 200);
    let damaged = format!("{}x", &value[..value.len() - 1]);
    for (requirement, value, status, error) in [
        ("permission=alerts:UpdateConfig", value.as_str(), 403, "insufficient_scope"),
        ("permission=alerts:ReadConfig,alerts:UpdateConfig", &value, 403, "insufficient_scope"),
        ("permission=none&team=bank", &value, 403, "insufficient_scope"),
        ("permission=no.such:Thing", &value, 403, "insufficient_scope"),
        ("", &value, 403, "insufficient_scope"),
        ("permission=none", "", 401, "unauthorized"),
        ("permission=none", &damaged, 401, "invalid_token"),
        ("permission=none", "kwt_", 401, "invalid_token"),
        ("permission=none", "some other token", 401, "invalid_token"),
    ] {
        let answer = check(verifier, requirement, value).await;
        assert_eq!(answer.status, status, "{requirement}: {}", answer.head);
        assert!(answer.body.contains(&format!("\"error\":\"{error}\"")), "{requirement}: {}", answer.body);
        let challenge = answer.headers("www-authenticate");
        assert!(challenge[0].starts_with("Bearer realm=\"keywright\""), "{challenge:?}");
        assert_eq!(challenge[0].contains("error="), error != "unauthorized", "{challenge:?}");
        assert!(answer.headers("x-keywright-team").is_empty(), "a rejection has an identity header");
        assert!(!answer.body.contains(&team.namespace), "{}", answer.body);
        assert_eq!(
            answer.body.contains(&id),
            status == 403 && !requirement.contains("no.such") && !requirement.is_empty()
        );
    }
    // Common mistakes of clients, which the answer names.
    let base64 = serde_json::to_value(k8s_openapi::ByteString(value.clone().into_bytes())).unwrap();
    for (sent, word) in [
        (format!("\"{value}\""), "quotes"),
        (format!("Bearer {value}"), "word Bearer"),
        (base64.as_str().unwrap().to_owned(), "base64"),
        (format!("{value}\\n"), "line end"),
    ] {
        let answer = check(verifier, "permission=none", &sent).await;
        assert_eq!(answer.status, 401, "{}", answer.head);
        assert!(answer.body.contains(word) && !answer.body.contains(&value[4..]), "{}", answer.body);
    }
}

#[tokio::test]
async fn rejections_name_the_api_key_only_with_tell_key_names() {
    let team = Team::new().await;
    let value = team.mint("reader", &reader()).await;
    let args = vec!["--tell-key-names".to_owned()];
    let verifier = start(Options { args, ..Options::default() }).await.expect("a verifier");
    let answer = wait_for_status(&verifier, "permission=alerts:UpdateConfig", &value, 403, TIMEOUT).await;
    let name = format!("it is ApiKey reader in namespace {}", team.namespace);
    assert!(answer.body.contains(&name) && answer.headers("www-authenticate")[0].contains(&name), "{}", answer.body);
}

#[tokio::test]
async fn a_deactivated_key_is_rejected_within_a_second_and_works_again_with_the_same_value() {
    let (team, verifier) = (Team::new().await, verifier().await);
    let value = team.mint("k", &reader()).await;
    wait_for_status(verifier, "permission=none", &value, 200, TIMEOUT).await;
    team.patch("k", &json!({"active": false})).await;
    let answer = wait_for_status(verifier, "permission=none", &value, 401, PROPAGATION_LIMIT).await;
    assert!(answer.body.contains("is not active"), "{}", answer.body);
    team.patch("k", &json!({"active": true})).await;
    wait_for_status(verifier, "permission=none", &value, 200, TIMEOUT).await;
}

#[tokio::test]
async fn an_expired_key_is_rejected_from_its_expiry_on_without_a_watch_event() {
    let (team, verifier) = (Team::new().await, verifier().await);
    let value = team.mint("k", &reader()).await;
    let end = from_now(4);
    team.patch("k", &json!({"expiresAt": end})).await;
    wait_for_status(verifier, "permission=none", &value, 200, TIMEOUT).await;
    let answer = wait_for_status(verifier, "permission=none", &value, 401, Duration::from_secs(6)).await;
    assert!(answer.body.contains(&format!("expired at {end}")), "{}", answer.body);
    assert!(from_now(0) >= end, "the key was rejected before its expiry");
    team.patch("k", &json!({"expiresAt": from_now(3600)})).await;
    wait_for_status(verifier, "permission=none", &value, 200, TIMEOUT).await;
}

#[tokio::test]
async fn both_values_pass_during_the_overlap_and_the_old_one_is_rejected_after_it() {
    let (team, verifier) = (Team::new().await, verifier().await);
    let old = team.mint("k", &reader()).await;
    team.patch("k", &json!({"rotation": {"requestedAt": from_now(0), "overlap": "1h"}})).await;
    let new = crate::support::eventually("a new value", TIMEOUT, async || {
        let value = team.value("k").await;
        anyhow::ensure!(value != old, "the value is still the old one");
        Ok(value)
    })
    .await;
    let second = wait_for_status(verifier, "permission=none", &new, 200, TIMEOUT).await;
    let first = wait_for_status(verifier, "permission=none", &old, 200, PROPAGATION_LIMIT).await;
    assert_ne!(first.headers("x-keywright-key-id"), second.headers("x-keywright-key-id"), "each value has its own id");
    assert_eq!(first.headers("x-keywright-key-name"), second.headers("x-keywright-key-name"));
    team.patch("k", &json!({"rotation": {"overlap": "0s"}})).await;
    wait_for_status(verifier, "permission=none", &old, 401, PROPAGATION_LIMIT).await;
    assert_eq!(check(verifier, "permission=none", &new).await.status, 200);
}

#[tokio::test]
async fn a_deleted_key_is_rejected_as_unknown() {
    let (team, verifier) = (Team::new().await, verifier().await);
    let value = team.mint("k", &reader()).await;
    wait_for_status(verifier, "permission=none", &value, 200, TIMEOUT).await;
    team.delete("k").await;
    let answer = wait_for_status(verifier, "permission=none", &value, 401, PROPAGATION_LIMIT).await;
    assert!(answer.body.contains("there is no such API key"), "{}", answer.body);
}

#[tokio::test]
async fn a_key_with_a_deletion_timestamp_is_rejected_while_a_finalizer_keeps_the_object() {
    let (team, verifier) = (Team::new().await, verifier().await);
    let value = team.mint("k", &reader()).await;
    wait_for_status(verifier, "permission=none", &value, 200, TIMEOUT).await;
    let finalizers = |list: serde_json::Value| Patch::Merge(json!({"metadata": {"finalizers": list}}));
    let params = PatchParams::default();
    team.keys.patch("k", &params, &finalizers(json!(["example.com/hold"]))).await.unwrap();
    team.delete("k").await;
    let answer = wait_for_status(verifier, "permission=none", &value, 401, PROPAGATION_LIMIT).await;
    assert!(answer.body.contains("is not active"), "{}", answer.body);
    // Further writes to the object do not make the key work again.
    let labels = Patch::Merge(json!({"metadata": {"labels": {"held": "true"}}}));
    team.keys.patch("k", &params, &labels).await.unwrap();
    tokio::time::sleep(PROPAGATION_LIMIT).await;
    assert_eq!(check(verifier, "permission=none", &value).await.status, 401);
    team.keys.patch("k", &params, &finalizers(json!(null))).await.unwrap();
    wait_for_status(verifier, "permission=none", &value, 401, PROPAGATION_LIMIT).await;
}

/// A user who may edit an object can write times of the year 9999 and deeply nested fields to its managedFields, and
/// such an object may be older than the admission policies.
#[tokio::test]
async fn managed_fields_of_the_year_9999_affect_neither_the_key_nor_other_keys() {
    let (team, verifier) = (Team::new().await, verifier().await);
    let (value, other) = (team.mint("k", &reader()).await, team.mint("other", &reader()).await);
    wait_for_status(verifier, "permission=none", &value, 200, TIMEOUT).await;

    let path = format!("/apis/keywright.dev/v1alpha1/namespaces/{}/apikeys", team.namespace);
    let get = || kube::core::Request::new(&path).get("k", &kube::api::GetParams::default()).unwrap();
    let late = "9999-12-31T23:59:59Z";
    let mut key: serde_json::Value = team.client.request(get()).await.unwrap();
    key["metadata"].as_object_mut().unwrap().remove("resourceVersion");
    let deep = (0..60).fold(json!({}), |inner, _| json!({"f:displayName": inner}));
    key["metadata"]["managedFields"] = json!([{
        "manager": "m", "operation": "Update", "apiVersion": "keywright.dev/v1alpha1", "time": late,
        "fieldsType": "FieldsV1", "fieldsV1": {"f:spec": deep},
    }]);
    key["spec"]["active"] = json!(false);
    key["status"]["lastUsedAt"] = json!(late);
    let base64 = |text: String| serde_json::to_value(k8s_openapi::ByteString(text.into_bytes())).unwrap();
    let at = format!("/registry/keywright.dev/apikeys/{}/k", team.namespace);
    let put = json!({"key": base64(at), "value": base64(key.to_string())}).to_string();
    let etcd = crate::support::shared().await.plane.etcd().trim_start_matches("http://").parse().unwrap();
    let request = format!(
        "POST /v3/kv/put HTTP/1.1\r\nHost: etcd\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{put}",
        put.len()
    );
    assert_eq!(crate::support::verifier::send(etcd, request.as_bytes()).await.unwrap().status, 200);
    wait_for_status(verifier, "permission=none", &value, 401, PROPAGATION_LIMIT).await;
    let text = team.client.request_text(get()).await.unwrap();
    assert!(text.contains(late), "the API server does not serve the time: {text}");

    // A verifier that starts now, and the operator, read all keys.
    let fresh = start(Options::default()).await.unwrap();
    assert_eq!(check(&fresh, "permission=none", &value).await.status, 401);
    assert_eq!(check(&fresh, "permission=none", &other).await.status, 200);
    let later = team.mint("later", &reader()).await;
    wait_for_status(&fresh, "permission=none", &later, 200, TIMEOUT).await;
    // The deletion is observed too. The client of this test can't read the answer to it.
    let _ = team.keys.delete("k", &kube::api::DeleteParams::default()).await;
    crate::support::eventually("the key is unknown", TIMEOUT, async || {
        let answer = check(&fresh, "permission=none", &value).await;
        anyhow::ensure!(answer.body.contains("there is no such API key"), "{}", answer.body);
        Ok(())
    })
    .await;
}

#[tokio::test]
async fn permissions_change_with_the_spec_and_the_catalog() {
    let (team, verifier) = (Team::new().await, verifier().await);
    let value =
        team.mint("k", &json!({"type": "Team", "permissions": ["alerts:ReadConfig", "alerts:UpdateConfig"]})).await;
    wait_for_status(verifier, "permission=ALERTS:UPDATECONFIG", &value, 200, TIMEOUT).await;
    team.patch("k", &json!({"permissions": ["alerts:ReadConfig"]})).await;
    wait_for_status(verifier, "permission=alerts:UpdateConfig", &value, 403, PROPAGATION_LIMIT).await;
    assert_eq!(check(verifier, "permission=alerts:ReadConfig", &value).await.status, 200);

    // A preset of another catalog: it grants the permissions that the catalog currently lists.
    let name = format!("own-{}", team.namespace);
    let permission = |action: &str| format!("{name}:{action}");
    let catalog = |actions: &[&str]| {
        json!({
            "apiVersion": "keywright.dev/v1alpha1", "kind": "PermissionCatalog", "metadata": {"name": name},
            "spec": {
                "permissions": [{"name": permission("Read")}, {"name": permission("Write")}],
                "presets": [{"name": name, "permissions": actions.iter().map(|a| permission(a)).collect::<Vec<_>>()}],
            },
        })
    };
    let catalogs: Api<keywright::api::PermissionCatalog> = Api::all(team.client.clone());
    catalogs
        .create(&PostParams::default(), &serde_json::from_value(catalog(&["Read", "Write"])).unwrap())
        .await
        .unwrap();
    crate::support::eventually("the preset is known", TIMEOUT, async || {
        let spec = json!({"type": "Team", "presets": [name]});
        crate::support::keys::apply(&team.client, &team.namespace, "own", &spec).await
    })
    .await;
    team.ready("own").await;
    let own = team.value("own").await;
    wait_for_status(verifier, &format!("permission={}", permission("Write")), &own, 200, TIMEOUT).await;
    let less = kube::api::Patch::Merge(catalog(&["Read"]));
    catalogs.patch(&name, &kube::api::PatchParams::default(), &less).await.unwrap();
    wait_for_status(verifier, &format!("permission={}", permission("Write")), &own, 403, PROPAGATION_LIMIT).await;
    assert_eq!(check(verifier, &format!("permission={}", permission("Read")), &own).await.status, 200);
    catalogs.delete(&name, &kube::api::DeleteParams::default()).await.unwrap();
    let answer =
        wait_for_status(verifier, &format!("permission={}", permission("Read")), &own, 403, PROPAGATION_LIMIT).await;
    assert!(answer.body.contains("which no PermissionCatalog has"), "{}", answer.body);
}

/// Two teams import the same legacy value: the first import decides alone, also after it is deactivated or deleted.
#[tokio::test]
async fn a_legacy_value_that_two_teams_import_is_answered_for_the_first_import_only() {
    let verifier = verifier().await;
    let (first, second) = (Team::new().await, Team::new().await);
    let value = format!("legacy-{}-{}", first.namespace, second.namespace);
    let spec = |kind: &str, key_type: &str| json!({"type": key_type, "legacy": kind, "secret": {"name": "old", "key": "token"}});
    for team in [&first, &second] {
        let secret = json!({"metadata": {"name": "old"}, "stringData": {"token": value}});
        team.secrets.create(&PostParams::default(), &serde_json::from_value(secret).unwrap()).await.unwrap();
    }
    first.apply("k", &spec("SendYourData", "SendYourData")).await;
    let answer = wait_for_status(verifier, "permission=none", &value, 200, TIMEOUT).await;
    assert_eq!(answer.headers("x-keywright-team"), [first.namespace.as_str()]);
    // Times in Kubernetes have a resolution of one second.
    tokio::time::sleep(Duration::from_millis(1100)).await;
    let scim = spec("Scim", "Team");
    crate::support::keys::apply(&second.client, &second.namespace, "k", &scim).await.expect("a key");
    crate::support::eventually("the second import is rejected", TIMEOUT, async || {
        let status = second.keys.get("k").await?.status.unwrap_or_default();
        anyhow::ensure!(status.conditions.iter().any(|c| c.reason == "DigestInUse"), "{status:?}");
        Ok(())
    })
    .await;
    let answer = check(verifier, "permission=none", &value).await;
    assert_eq!(answer.headers("x-keywright-team"), [first.namespace.as_str()], "the identity of the first import");
    first.patch("k", &json!({"active": false})).await;
    wait_for_status(verifier, "permission=none", &value, 401, PROPAGATION_LIMIT).await;
    first.delete("k").await;
    // The operator may retry the second import later, but not within this limit.
    wait_for_status(verifier, "permission=none", &value, 401, PROPAGATION_LIMIT).await;
    second.delete("k").await;
    wait_for_status(verifier, "permission=none", &value, 401, PROPAGATION_LIMIT).await;
}

/// The attacker's object is older, and its name sorts first; the owner's value was imported first.
#[tokio::test]
async fn an_older_key_of_another_team_does_not_take_a_value_over() {
    let verifier = verifier().await;
    let (owner, attacker) = (Team::new().await, Team::new().await);
    let value = format!("public-{}-{}", owner.namespace, attacker.namespace);
    let spec = json!({"type": "SendYourData", "legacy": "SendYourData", "secret": {"name": "old", "key": "token"}});
    let secret = json!({"metadata": {"name": "old"}, "stringData": {"token": value}});
    let put = async |team: &Team| {
        team.secrets.create(&PostParams::default(), &serde_json::from_value(secret.clone()).unwrap()).await.unwrap();
    };
    crate::support::keys::apply(&attacker.client, &attacker.namespace, "a", &spec)
        .await
        .expect("a key without a Secret");
    // Times in Kubernetes have a resolution of one second.
    tokio::time::sleep(Duration::from_millis(1100)).await;
    put(&owner).await;
    owner.apply("z", &spec).await;
    let team_of = |answer: &crate::support::verifier::Answer| answer.headers("x-keywright-team").join(",");
    let answer = wait_for_status(verifier, "permission=none", &value, 200, TIMEOUT).await;
    assert_eq!(team_of(&answer), owner.namespace);
    tokio::time::sleep(Duration::from_millis(1100)).await;
    put(&attacker).await;
    // Each change makes the operator reconcile the attacker's key. The owner stays the same.
    for active in [true, false] {
        attacker.patch("a", &json!({"active": active})).await;
        for _ in 0..20 {
            let answer = check(verifier, "permission=none", &value).await;
            assert_eq!((answer.status, team_of(&answer)), (200, owner.namespace.clone()), "{active}");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }
    // The attacker's key does not make a deactivated value work again.
    attacker.patch("a", &json!({"active": true})).await;
    owner.patch("z", &json!({"active": false})).await;
    wait_for_status(verifier, "permission=none", &value, 401, PROPAGATION_LIMIT).await;
    tokio::time::sleep(2 * PROPAGATION_LIMIT).await;
    assert_eq!(check(verifier, "permission=none", &value).await.status, 401);
}

#[tokio::test]
async fn a_key_is_read_only_from_the_configured_places_and_two_keys_are_rejected() {
    let team = Team::new().await;
    let value = team.mint("k", &reader()).await;
    let args = ["--key-from=authorization,header:X-Token", "--key-from=query:api_key"].map(str::to_owned).into();
    let verifier = start(Options { args, ..Options::default() }).await.expect("a verifier");
    wait_for_status(&verifier, "permission=none", &value, 200, TIMEOUT).await;
    let bearer = format!("Bearer {value}");
    let uri = format!("/shop?a=b&api_key={value}");
    let envoy = format!("/envoy/permission=none{uri}");
    let check = async |path: &str, headers: &[(&str, &str)]| check_with(verifier.address(), path, headers).await;
    for (path, headers, status) in [
        ("/nginx/permission=none", &[("X-Token", value.as_str())][..], 200),
        ("/nginx/permission=none", &[("X-API-Key", &value)], 401),
        ("/nginx/permission=none", &[("X-Original-URI", &uri)], 200),
        ("/caddy/permission=none", &[("X-Forwarded-Uri", &uri)], 200),
        ("/traefik/permission=none", &[("X-Forwarded-Uri", &uri)], 200),
        ("/caddy/permission=none", &[("X-Original-URI", &uri)], 401),
        (&envoy, &[], 200),
        ("/nginx/permission=none", &[("X-Token", &value), ("Authorization", &bearer)], 400),
        ("/nginx/permission=none", &[("X-Original-URI", &uri), ("Authorization", &bearer)], 400),
        ("/nginx/permission=none", &[("Authorization", &bearer), ("Authorization", &bearer)], 400),
        (&envoy, &[("X-Token", &value)], 400),
        // The query of the request to the verifier may be the client's, so it is ignored.
        (&format!("/caddy/permission=none?api_key={value}"), &[], 401),
        (&format!("/caddy/?permission=none&api_key={value}"), &[("X-Token", &value)], 403),
    ] {
        let answer = check(path, headers).await;
        assert_eq!(answer.status, status, "{} {}", answer.head, answer.body);
    }
    let stripped = check("/envoy/permission=none/", &[("X-Token", &value)]).await;
    assert_eq!(stripped.headers("x-envoy-auth-headers-to-remove"), ["x-token"]);
}

/// The shared verifier logs every decision at level trace. The test searches all lines that any test caused so far.
#[tokio::test]
async fn logs_and_metrics_contain_no_value_at_level_trace() {
    let (team, verifier) = (Team::new().await, verifier().await);
    let value = team.mint("k", &reader()).await;
    let trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    wait_for_status(verifier, "permission=none", &value, 200, TIMEOUT).await;
    for path in ["/nginx/permission=alerts:UpdateConfig".to_owned(), format!("/envoy/permission=none/?api_key={value}")]
    {
        let bearer = format!("Bearer {value}");
        check_with(verifier.address(), &path, &[("Authorization", &bearer), ("traceparent", trace)]).await;
    }
    check(verifier, "permission=none", &format!("{value}x")).await;
    let log = verifier.log();
    assert!(log.contains("0af7651916cd43dd8448eb211c80319c"), "the log lacks the trace");
    assert!(log.contains("LacksPermission"), "the log lacks the reason of a rejection");
    let id = team.ready("k").await.status.unwrap().id.unwrap();
    assert!(log.contains(&id), "the log lacks the id of the key");
    let metrics = verifier.get("/metrics").await.unwrap();
    assert!(metrics.contains(r#"keywright_verifier_decisions_total{front_end="Nginx",verdict="Allowed",reason=""}"#));
    for text in [&log, &metrics] {
        assert_eq!(find_value(text), None);
    }
}
