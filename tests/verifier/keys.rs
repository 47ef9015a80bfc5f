//! What becomes of keys, and how soon the verifier acts on it.

use std::time::Duration;

use kube::api::{Api, Patch, PatchParams, PostParams};
use serde_json::json;

use crate::support::keys::looks_like_a_value;
use crate::support::verifier::Options;
use crate::support::{self, PATIENCE};
use crate::{SOON, Team, ask, ask_with, from_now, reader, start, until, verifier};

#[tokio::test]
async fn who_may_pass_is_named_in_every_header_and_who_may_not_is_told_why() {
    let (team, verifier) = (Team::new().await, verifier().await);
    let value = team.mint("reader", &reader()).await;
    let answer = until(verifier, "permission=alerts:ReadConfig", &value, 200, PATIENCE).await;
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
    assert_eq!(ask(verifier, &other, &value).await.status, 200);
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
        let answer = ask(verifier, requirement, value).await;
        assert_eq!(answer.status, status, "{requirement}: {}", answer.head);
        assert!(answer.body.contains(&format!("\"error\":\"{error}\"")), "{requirement}: {}", answer.body);
        let challenge = answer.headers("www-authenticate");
        assert!(challenge[0].starts_with("Bearer realm=\"keywright\""), "{challenge:?}");
        assert_eq!(challenge[0].contains("error="), error != "unauthorized", "{challenge:?}");
        assert!(answer.headers("x-keywright-team").is_empty(), "a refusal names nobody");
        assert!(!answer.body.contains(&team.namespace), "{}", answer.body);
        assert_eq!(
            answer.body.contains(&id),
            status == 403 && !requirement.contains("no.such") && !requirement.is_empty()
        );
    }
    // What was done to a key on its way.
    let base64 = serde_json::to_value(k8s_openapi::ByteString(value.clone().into_bytes())).unwrap();
    for (sent, word) in [
        (format!("\"{value}\""), "quotes"),
        (format!("Bearer {value}"), "word Bearer"),
        (base64.as_str().unwrap().to_owned(), "base64"),
        (format!("{value}\\n"), "line end"),
    ] {
        let answer = ask(verifier, "permission=none", &sent).await;
        assert_eq!(answer.status, 401, "{}", answer.head);
        assert!(answer.body.contains(word) && !answer.body.contains(&value[4..]), "{}", answer.body);
    }
}

/// The one who runs the proxy may want clients to be told which object to look at.
#[tokio::test]
async fn names_are_told_to_clients_where_that_is_asked_for() {
    let team = Team::new().await;
    let value = team.mint("reader", &reader()).await;
    let args = vec!["--tell-key-names".to_owned()];
    let verifier = start(Options { args, ..Options::default() }).await.expect("a verifier");
    let answer = until(&verifier, "permission=alerts:UpdateConfig", &value, 403, PATIENCE).await;
    let told = format!("it is ApiKey reader in namespace {}", team.namespace);
    assert!(answer.body.contains(&told) && answer.headers("www-authenticate")[0].contains(&told), "{}", answer.body);
}

#[tokio::test]
async fn a_deactivated_key_is_refused_at_once_and_works_again_with_the_same_value() {
    let (team, verifier) = (Team::new().await, verifier().await);
    let value = team.mint("k", &reader()).await;
    until(verifier, "permission=none", &value, 200, PATIENCE).await;
    team.patch("k", &json!({"active": false})).await;
    let answer = until(verifier, "permission=none", &value, 401, SOON).await;
    assert!(answer.body.contains("is not active"), "{}", answer.body);
    team.patch("k", &json!({"active": true})).await;
    until(verifier, "permission=none", &value, 200, PATIENCE).await;
}

#[tokio::test]
async fn an_expired_key_is_refused_to_the_second_without_any_event() {
    let (team, verifier) = (Team::new().await, verifier().await);
    let value = team.mint("k", &reader()).await;
    let end = from_now(4);
    team.patch("k", &json!({"expiresAt": end})).await;
    until(verifier, "permission=none", &value, 200, PATIENCE).await;
    let answer = until(verifier, "permission=none", &value, 401, Duration::from_secs(6)).await;
    assert!(answer.body.contains(&format!("expired at {end}")), "{}", answer.body);
    assert!(from_now(0) >= end, "not before its end");
    team.patch("k", &json!({"expiresAt": from_now(3600)})).await;
    until(verifier, "permission=none", &value, 200, PATIENCE).await;
}

#[tokio::test]
async fn both_values_of_a_rotation_pass_and_the_old_one_ends_with_the_overlap() {
    let (team, verifier) = (Team::new().await, verifier().await);
    let old = team.mint("k", &reader()).await;
    team.patch("k", &json!({"rotation": {"requestedAt": from_now(0), "overlap": "1h"}})).await;
    let new = support::eventually("a new value", PATIENCE, async || {
        let value = team.value("k").await;
        anyhow::ensure!(value != old, "not yet");
        Ok(value)
    })
    .await;
    let second = until(verifier, "permission=none", &new, 200, PATIENCE).await;
    let first = until(verifier, "permission=none", &old, 200, SOON).await;
    assert_ne!(first.headers("x-keywright-key-id"), second.headers("x-keywright-key-id"), "each by its own id");
    assert_eq!(first.headers("x-keywright-key-name"), second.headers("x-keywright-key-name"));
    team.patch("k", &json!({"rotation": {"overlap": "0s"}})).await;
    until(verifier, "permission=none", &old, 401, SOON).await;
    assert_eq!(ask(verifier, "permission=none", &new).await.status, 200);
}

#[tokio::test]
async fn a_deleted_key_is_unknown() {
    let (team, verifier) = (Team::new().await, verifier().await);
    let value = team.mint("k", &reader()).await;
    until(verifier, "permission=none", &value, 200, PATIENCE).await;
    team.delete("k").await;
    let answer = until(verifier, "permission=none", &value, 401, SOON).await;
    assert!(answer.body.contains("there is no such API key"), "{}", answer.body);
}

/// A finalizer that somebody set keeps an object, and nothing else.
#[tokio::test]
async fn a_deleted_key_that_a_finalizer_holds_is_refused_the_moment_it_is_deleted() {
    let (team, verifier) = (Team::new().await, verifier().await);
    let value = team.mint("k", &reader()).await;
    until(verifier, "permission=none", &value, 200, PATIENCE).await;
    let finalizers = |list: serde_json::Value| Patch::Merge(json!({"metadata": {"finalizers": list}}));
    let params = PatchParams::default();
    team.keys.patch("k", &params, &finalizers(json!(["example.com/hold"]))).await.unwrap();
    team.delete("k").await;
    let answer = until(verifier, "permission=none", &value, 401, SOON).await;
    assert!(answer.body.contains("is not active"), "{}", answer.body);
    // Nothing that is written to it while it is held brings it back.
    let labels = Patch::Merge(json!({"metadata": {"labels": {"held": "true"}}}));
    team.keys.patch("k", &params, &labels).await.unwrap();
    tokio::time::sleep(SOON).await;
    assert_eq!(ask(verifier, "permission=none", &value).await.status, 401);
    team.keys.patch("k", &params, &finalizers(json!(null))).await.unwrap();
    until(verifier, "permission=none", &value, 401, SOON).await;
}

/// Kubernetes takes times of the year 9999 and fields nested as deep as one likes in the managedFields of an object, from
/// whoever may edit it, and such an object may have been there before any webhook was.
#[tokio::test]
async fn managed_fields_of_the_year_9999_stop_neither_the_key_nor_the_others() {
    let (team, verifier) = (Team::new().await, verifier().await);
    let (value, other) = (team.mint("k", &reader()).await, team.mint("other", &reader()).await);
    until(verifier, "permission=none", &value, 200, PATIENCE).await;

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
    let etcd = support::shared().await.plane.etcd().trim_start_matches("http://").parse().unwrap();
    let request = format!(
        "POST /v3/kv/put HTTP/1.1\r\nHost: etcd\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{put}",
        put.len()
    );
    assert_eq!(crate::support::verifier::send(etcd, request.as_bytes()).await.unwrap().status, 200);
    until(verifier, "permission=none", &value, 401, SOON).await;
    let text = team.client.request_text(get()).await.unwrap();
    assert!(text.contains(late), "Kubernetes has it so: {text}");

    // A verifier that starts now, and the operator, read all of them.
    let fresh = start(Options::default()).await.unwrap();
    assert_eq!(ask(&fresh, "permission=none", &value).await.status, 401);
    assert_eq!(ask(&fresh, "permission=none", &other).await.status, 200);
    let later = team.mint("later", &reader()).await;
    until(&fresh, "permission=none", &later, 200, PATIENCE).await;
    // Its last version is no hindrance either when it goes.
    // This client can't read what it is answered.
    let _ = team.keys.delete("k", &kube::api::DeleteParams::default()).await;
    support::eventually("it is gone", PATIENCE, async || {
        let answer = ask(&fresh, "permission=none", &value).await;
        anyhow::ensure!(answer.body.contains("there is no such API key"), "{}", answer.body);
        Ok(())
    })
    .await;
}

#[tokio::test]
async fn permissions_come_and_go_with_the_spec_and_the_catalogue() {
    let (team, verifier) = (Team::new().await, verifier().await);
    let value =
        team.mint("k", &json!({"type": "Team", "permissions": ["alerts:ReadConfig", "alerts:UpdateConfig"]})).await;
    until(verifier, "permission=ALERTS:UPDATECONFIG", &value, 200, PATIENCE).await;
    team.patch("k", &json!({"permissions": ["alerts:ReadConfig"]})).await;
    until(verifier, "permission=alerts:UpdateConfig", &value, 403, SOON).await;
    assert_eq!(ask(verifier, "permission=alerts:ReadConfig", &value).await.status, 200);

    // A preset of a catalogue of one's own: what it grants is what the catalogue says now.
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
    support::eventually("the preset is known", PATIENCE, async || {
        let spec = json!({"type": "Team", "presets": [name]});
        support::keys::apply(&team.client, &team.namespace, "own", &spec).await
    })
    .await;
    team.ready("own").await;
    let own = team.value("own").await;
    until(verifier, &format!("permission={}", permission("Write")), &own, 200, PATIENCE).await;
    let less = kube::api::Patch::Merge(catalog(&["Read"]));
    catalogs.patch(&name, &kube::api::PatchParams::default(), &less).await.unwrap();
    until(verifier, &format!("permission={}", permission("Write")), &own, 403, SOON).await;
    assert_eq!(ask(verifier, &format!("permission={}", permission("Read")), &own).await.status, 200);
    catalogs.delete(&name, &kube::api::DeleteParams::default()).await.unwrap();
    let answer = until(verifier, &format!("permission={}", permission("Read")), &own, 403, SOON).await;
    assert!(answer.body.contains("which no PermissionCatalog has"), "{}", answer.body);
}

/// Two teams import the same legacy value: the one that did first decides alone, whatever becomes of it.
#[tokio::test]
async fn duplicate_key_material_never_makes_a_wrong_answer() {
    let verifier = verifier().await;
    let (first, second) = (Team::new().await, Team::new().await);
    let value = format!("legacy-{}-{}", first.namespace, second.namespace);
    let spec = |kind: &str, key_type: &str| json!({"type": key_type, "legacy": kind, "secret": {"name": "old", "key": "token"}});
    for team in [&first, &second] {
        let secret = json!({"metadata": {"name": "old"}, "stringData": {"token": value}});
        team.secrets.create(&PostParams::default(), &serde_json::from_value(secret).unwrap()).await.unwrap();
    }
    first.apply("k", &spec("SendYourData", "SendYourData")).await;
    let answer = until(verifier, "permission=none", &value, 200, PATIENCE).await;
    assert_eq!(answer.headers("x-keywright-team"), [first.namespace.as_str()]);
    // Kubernetes tells times by whole seconds.
    tokio::time::sleep(Duration::from_millis(1100)).await;
    let scim = spec("Scim", "Team");
    support::keys::apply(&second.client, &second.namespace, "k", &scim).await.expect("a key");
    support::eventually("the second is refused", PATIENCE, async || {
        let status = second.keys.get("k").await?.status.unwrap_or_default();
        anyhow::ensure!(status.conditions.iter().any(|c| c.reason == "DigestInUse"), "{status:?}");
        Ok(())
    })
    .await;
    let answer = ask(verifier, "permission=none", &value).await;
    assert_eq!(answer.headers("x-keywright-team"), [first.namespace.as_str()], "the first one's identity");
    first.patch("k", &json!({"active": false})).await;
    until(verifier, "permission=none", &value, 401, SOON).await;
    first.delete("k").await;
    // The second is tried again by and by; it never was the first one's identity.
    until(verifier, "permission=none", &value, 401, SOON).await;
    second.delete("k").await;
    until(verifier, "permission=none", &value, 401, SOON).await;
}

/// The thief's object is older, and its name comes first; the owner's value was imported first.
#[tokio::test]
async fn an_older_key_of_another_team_does_not_take_a_value_over() {
    let verifier = verifier().await;
    let (owner, thief) = (Team::new().await, Team::new().await);
    let value = format!("public-{}-{}", owner.namespace, thief.namespace);
    let spec = json!({"type": "SendYourData", "legacy": "SendYourData", "secret": {"name": "old", "key": "token"}});
    let secret = json!({"metadata": {"name": "old"}, "stringData": {"token": value}});
    let put = async |team: &Team| {
        team.secrets.create(&PostParams::default(), &serde_json::from_value(secret.clone()).unwrap()).await.unwrap();
    };
    support::keys::apply(&thief.client, &thief.namespace, "a", &spec).await.expect("a key without a Secret");
    // Kubernetes tells the age of objects by whole seconds.
    tokio::time::sleep(Duration::from_millis(1100)).await;
    put(&owner).await;
    owner.apply("z", &spec).await;
    let team_of = |answer: &crate::support::verifier::Answer| answer.headers("x-keywright-team").join(",");
    let answer = until(verifier, "permission=none", &value, 200, PATIENCE).await;
    assert_eq!(team_of(&answer), owner.namespace);
    tokio::time::sleep(Duration::from_millis(1100)).await;
    put(&thief).await;
    // Whether the operator refuses it or not: what is written for it changes nothing. A change has it look now.
    for active in [true, false] {
        thief.patch("a", &json!({"active": active})).await;
        for _ in 0..20 {
            let answer = ask(verifier, "permission=none", &value).await;
            assert_eq!((answer.status, team_of(&answer)), (200, owner.namespace.clone()), "{active}");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }
    // Nor does it bring a value back.
    thief.patch("a", &json!({"active": true})).await;
    owner.patch("z", &json!({"active": false})).await;
    until(verifier, "permission=none", &value, 401, SOON).await;
    tokio::time::sleep(2 * SOON).await;
    assert_eq!(ask(verifier, "permission=none", &value).await.status, 401);
}

#[tokio::test]
async fn a_key_is_read_from_where_it_is_configured_and_two_are_refused() {
    let team = Team::new().await;
    let value = team.mint("k", &reader()).await;
    let args = ["--key-from=authorization,header:X-Token", "--key-from=query:api_key"].map(str::to_owned).into();
    let verifier = start(Options { args, ..Options::default() }).await.expect("a verifier");
    until(&verifier, "permission=none", &value, 200, PATIENCE).await;
    let bearer = format!("Bearer {value}");
    let uri = format!("/shop?a=b&api_key={value}");
    let envoy = format!("/envoy/permission=none{uri}");
    let ask = async |path: &str, headers: &[(&str, &str)]| ask_with(verifier.address(), path, headers).await;
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
        // The query of the request to the verifier itself may be the client's: it says nothing.
        (&format!("/caddy/permission=none?api_key={value}"), &[], 401),
        (&format!("/caddy/?permission=none&api_key={value}"), &[("X-Token", &value)], 403),
    ] {
        let answer = ask(path, headers).await;
        assert_eq!(answer.status, status, "{} {}", answer.head, answer.body);
    }
    let stripped = ask("/envoy/permission=none/", &[("X-Token", &value)]).await;
    assert_eq!(stripped.headers("x-envoy-auth-headers-to-remove"), ["x-token"]);
}

/// Runs last of what it looks at or not: every line that was written until now has to be clean.
#[tokio::test]
async fn logs_and_metrics_of_a_verifier_that_logs_everything_hold_no_value() {
    let (team, verifier) = (Team::new().await, verifier().await);
    let value = team.mint("k", &reader()).await;
    let trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    until(verifier, "permission=none", &value, 200, PATIENCE).await;
    for path in ["/nginx/permission=alerts:UpdateConfig".to_owned(), format!("/envoy/permission=none/?api_key={value}")]
    {
        let bearer = format!("Bearer {value}");
        ask_with(verifier.address(), &path, &[("Authorization", &bearer), ("traceparent", trace)]).await;
    }
    ask(verifier, "permission=none", &format!("{value}x")).await;
    let log = verifier.log();
    assert!(log.contains("0af7651916cd43dd8448eb211c80319c"), "the trace is taken over");
    assert!(log.contains("LacksPermission"), "refusals are logged with their reason");
    let id = team.ready("k").await.status.unwrap().id.unwrap();
    assert!(log.contains(&id), "by the id of the key");
    let metrics = verifier.get("/metrics").await.unwrap();
    assert!(metrics.contains(r#"keywright_verifier_decisions_total{front_end="Nginx",verdict="Allowed",reason=""}"#));
    for text in [&log, &metrics] {
        assert_eq!(looks_like_a_value(text), None);
    }
}
