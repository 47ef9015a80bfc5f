//! The life cycle and the permissions of keys, through every proxy.

use std::process::Command;
use std::time::{Duration, Instant};

use keywright::api::{KeyState, KeyType};
use keywright::domain::key::Key;
use kube::api::DeleteParams;

use super::*;
use crate::support::gateways::values;
use crate::support::output;

/// Asserts that the application received each identity header once, and not the key.
#[track_caller]
fn assert_identity(gateway: &Gateway, head: &str, value: &str, expected: [&str; 5]) {
    for (name, expected) in IDENTITY.into_iter().zip(expected) {
        let received = values(head, name);
        // Some proxies remove empty headers.
        let received = if received.is_empty() { vec![""] } else { received };
        assert_eq!(received, [expected], "{:?}: {name} in {head}", gateway.kind);
    }
    assert!(!head.contains(value), "{:?}: the application received the key", gateway.kind);
    for name in ["authorization", "x-api-key"] {
        assert_eq!(values(head, name), Vec::<&str>::new(), "{:?}: {name}", gateway.kind);
    }
}

#[tokio::test]
async fn the_application_receives_the_identity_and_not_the_key() {
    let edge = edge().await;
    let team = Team::of(SHOP).await;
    let (key, value) = team.minted("passes", &team_key(&["alerts-map:Read", "logs.data-ingress:SendData"])).await;
    let id = id(&key);
    let expected = [id.as_str(), "passes", "Team", SHOP, ""];
    for gateway in &edge.gateways {
        for path in ["/alerts/1?a=b%20c", "/ingest/", "/account/x"] {
            for (name, value_of_header) in [("Authorization", bearer(&value)), ("X-API-Key", value.clone())] {
                let sent = edge.get(gateway, path, &[(name, &value_of_header)]).await;
                let head = Edge::assert_passed(gateway, &sent, path);
                assert!(head.starts_with(&format!("GET {path} HTTP/1.1\r\n")), "{:?}: {head}", gateway.kind);
                assert_identity(gateway, head, &value, expected);
            }
        }
    }
}

#[tokio::test]
async fn the_body_of_an_allowed_request_reaches_the_application() {
    let edge = edge().await;
    let body = "x".repeat(100_000);
    for gateway in &edge.gateways {
        for (method, value, passes) in
            [("POST", reader().await, true), ("PUT", reader().await, true), ("POST", "", false)]
        {
            let mark = mark();
            let request = format!(
                "{method} /alerts/1 HTTP/1.1\r\nHost: shop.example.com\r\nX-API-Key: {value}\r\nX-Mark: {mark}\r\n\
                 Content-Length: {}\r\nConnection: close\r\n\r\n{body}",
                body.len()
            );
            let answer = gateway.send(request.as_bytes()).await;
            let sent = Sent { answer, upstream: edge.upstream.seen(&mark) };
            if passes {
                let received = Edge::assert_passed(gateway, &sent, method);
                assert!(received.starts_with(&format!("{method} /alerts/1 HTTP/1.1\r\n")), "{:?}", gateway.kind);
                assert!(received.ends_with(&body), "{:?}", gateway.kind);
            } else {
                Edge::assert_rejected(gateway, &sent, &[401], "a body without a key");
            }
        }
    }
}

#[tokio::test]
async fn the_application_receives_the_user_of_a_personal_key() {
    let edge = edge().await;
    let team = Team::of(SHOP).await;
    let user = "alice@example.com";
    let spec = json!({"type": "Personal", "user": user, "permissions": ["alerts-map:Read"]});
    crate::support::keys::apply(&team.client, SHOP, "personal", &spec).await.expect("the ApiKey");
    let key = team.ready("personal").await;
    let plane = crate::support::shared().await.plane;
    let mut reveal = Command::new(env!("CARGO_BIN_EXE_kubectl-keywright"));
    reveal.args(["-n", SHOP, "--as", user, "--as-group", "system:masters", "reveal", "personal"]);
    let value = output(reveal.env("KUBECONFIG", plane.kubeconfig())).expect("the value").trim().to_owned();
    edge.wait_until_accepted(&value).await;
    let id = id(&key);
    for gateway in &edge.gateways {
        let sent = edge.get(gateway, "/alerts/1", &[("Authorization", &bearer(&value))]).await;
        let head = Edge::assert_passed(gateway, &sent, "a personal key");
        assert_identity(gateway, head, &value, [&id, "personal", "Personal", SHOP, user]);
    }
}

#[tokio::test]
async fn public_paths_need_no_key_and_unlisted_paths_are_closed() {
    let edge = edge().await;
    for gateway in &edge.gateways {
        let sent = edge.get(gateway, "/public/x", &[]).await;
        Edge::assert_passed(gateway, &sent, "without a key");
        let sent = edge.get(gateway, "/public/x", &[("X-API-Key", reader().await)]).await;
        let head = Edge::assert_passed(gateway, &sent, "with a key");
        assert_identity(gateway, head, reader().await, [""; 5]);
        for path in ["/", "/nowhere/x", "/permission=none/alerts/x", "/alerts", "/envoy/permission=none"] {
            let sent = edge.get(gateway, path, &[("X-API-Key", reader().await)]).await;
            Edge::assert_rejected(gateway, &sent, &[404, 403, 301], path);
        }
    }
}

#[tokio::test]
async fn requests_without_a_key_or_with_an_invalid_one_are_rejected_with_401() {
    let edge = edge().await;
    let unknown = Key::mint(KeyType::Team, &mut rand::rng()).expect("random bytes");
    let mut damaged = unknown.expose().to_owned();
    damaged.truncate(damaged.len() - 1);
    let mut another = reader().await.to_owned();
    another.replace_range(10..11, if &another[10..11] == "a" { "b" } else { "a" });
    for gateway in &edge.gateways {
        for path in ["/alerts/1", "/ingest/1", "/account/1"] {
            let sent = edge.get(gateway, path, &[]).await;
            Edge::assert_rejected(gateway, &sent, &[401], "no key");
            let challenges = sent.answer.headers("www-authenticate");
            assert_eq!(challenges.len(), 1, "{:?}: {}", gateway.kind, sent.answer.head);
            assert!(challenges[0].starts_with("Bearer realm=\"keywright\""), "{:?}: {challenges:?}", gateway.kind);
            assert!(!challenges[0].contains("error="), "RFC 6750, section 3.1: no error without a key");
            for (what, value) in
                [("unknown", unknown.expose()), ("damaged", &damaged), ("another", &another), ("nonsense", "x")]
            {
                let sent = edge.get(gateway, path, &[("Authorization", &bearer(value))]).await;
                Edge::assert_rejected(gateway, &sent, &[401], what);
                let challenges = sent.answer.headers("www-authenticate");
                assert!(challenges[0].contains("error=\"invalid_token\""), "{:?}: {challenges:?}", gateway.kind);
                let sent = edge.get(gateway, path, &[("X-API-Key", value)]).await;
                Edge::assert_rejected(gateway, &sent, &[401], what);
            }
        }
    }
}

#[tokio::test]
async fn a_key_without_the_permission_is_rejected_with_403_and_the_name_of_the_permission() {
    let edge = edge().await;
    for gateway in &edge.gateways {
        let sent = edge.get(gateway, "/ingest/1", &[("X-API-Key", reader().await)]).await;
        Edge::assert_rejected(gateway, &sent, &[403], "no permission");
        let challenges = sent.answer.headers("www-authenticate");
        assert_eq!(challenges.len(), 1, "{:?}: {}", gateway.kind, sent.answer.head);
        assert!(challenges[0].contains("error=\"insufficient_scope\""), "{:?}: {challenges:?}", gateway.kind);
        assert!(challenges[0].contains("scope=\"logs.data-ingress:SendData\""), "{:?}: {challenges:?}", gateway.kind);
    }
}

#[tokio::test]
async fn a_key_of_another_team_is_rejected_on_routes_with_a_team() {
    let edge = edge().await;
    let permissions = team_key(&["alerts-map:Read", "logs.data-ingress:SendData"]);
    let (_, value) = Team::of(OTHER).await.minted("stranger", &permissions).await;
    for gateway in &edge.gateways {
        let sent = edge.get(gateway, "/ingest/1", &[("X-API-Key", &value)]).await;
        Edge::assert_rejected(gateway, &sent, &[403], "another team");
        let sent = edge.get(gateway, "/alerts/1", &[("X-API-Key", &value)]).await;
        Edge::assert_passed(gateway, &sent, "any team");
    }
}

#[tokio::test]
async fn a_deactivated_key_is_rejected_within_a_second_and_works_again_when_activated() {
    let edge = edge().await;
    let team = Team::of(SHOP).await;
    let (_, value) = team.minted("paused", &team_key(&["alerts-map:Read"])).await;
    // Other tests run at the same time, so the shortest of three times counts.
    let mut best = Duration::MAX;
    for _ in 0..3 {
        team.edit("paused", json!({"active": false})).await;
        let deactivated = Instant::now();
        edge.wait_until(&value, 401).await;
        best = best.min(deactivated.elapsed());
        eventually("the key is inactive", TIMEOUT, async || {
            let state = team.keys.get("paused").await?.status.and_then(|status| status.state);
            ensure!(state == Some(KeyState::Inactive), "{state:?}");
            Ok(())
        })
        .await;
        edge.wait_until(&value, 401).await;
        team.edit("paused", json!({"active": true})).await;
        edge.wait_until(&value, 200).await;
    }
    assert!(best < Duration::from_secs(1), "deactivation took {best:?}");
}

#[tokio::test]
#[allow(clippy::disallowed_methods, reason = "tests live in real time")]
async fn a_key_is_rejected_from_its_expiry_on() {
    let edge = edge().await;
    let team = Team::of(SHOP).await;
    let end = from_now(12);
    let mut spec = team_key(&["alerts-map:Read"]);
    spec["expiresAt"] = json!(end);
    let (_, value) = team.minted("expires", &spec).await;
    edge.wait_until(&value, 401).await;
    assert!(Timestamp::now() >= end.parse().unwrap(), "the key was rejected before its expiry");
}

#[tokio::test]
async fn both_values_pass_during_the_overlap_and_only_the_new_one_after_it() {
    let edge = edge().await;
    let team = Team::of(SHOP).await;
    let (before, old) = team.minted("turns", &team_key(&["alerts-map:Read"])).await;
    team.edit("turns", json!({"rotation": {"requestedAt": from_now(0), "overlap": "15s"}})).await;
    let new = eventually("a new value", TIMEOUT, async || {
        let new = team.value("turns").await;
        ensure!(new != old, "the value is still the old one");
        Ok(new)
    })
    .await;
    edge.wait_until_accepted(&new).await;
    for gateway in &edge.gateways {
        let sent = edge.get(gateway, "/account/x", &[("X-API-Key", &old)]).await;
        let head = Edge::assert_passed(gateway, &sent, "the old value in the overlap");
        assert_eq!(values(head, IDENTITY[0]), [id(&before)], "the id of the old value");
    }
    edge.wait_until(&old, 401).await;
    edge.wait_until(&new, 200).await;
}

#[tokio::test]
async fn a_deleted_key_is_rejected() {
    let edge = edge().await;
    let team = Team::of(SHOP).await;
    let (_, value) = team.minted("deleted", &team_key(&["alerts-map:Read"])).await;
    team.keys.delete("deleted", &DeleteParams::background()).await.expect("the ApiKey is deleted");
    edge.wait_until(&value, 401).await;
}

#[tokio::test]
async fn a_key_in_the_query_passes_if_the_verifier_reads_the_query() {
    super::edge().await;
    let args = ["--key-from=query:api_key", "--key-from=header:X-API-Key"].map(str::to_owned).to_vec();
    let edge = Edge::start(VerifierOptions { args, ..VerifierOptions::default() }).await.expect("an edge");
    edge.verifier.wait_ready().await.expect("a verifier");
    let value = reader().await;
    for gateway in &edge.gateways {
        let sent = edge.get(gateway, &format!("/alerts/1?a=%20b&api_key={value}&c=d"), &[]).await;
        let head = Edge::assert_passed(gateway, &sent, "a key in the query");
        assert_eq!(values(head, IDENTITY[1]), ["reader"], "{:?}: {head}", gateway.kind);
        // Other proxies forward the key, or need another setting: see their examples.
        if gateway.kind == Kind::EnvoyGrpc {
            assert!(head.starts_with("GET /alerts/1?a=%20b&c=d HTTP/1.1\r\n"), "{head}");
        }
        for (query, headers, status) in [
            (format!("api_key={value}&api_key={value}"), &[][..], 400),
            (format!("api_key={value}"), &[("X-API-Key", value)], 400),
            ("api_key=".to_owned(), &[], 401),
            (format!("API_KEY={value}"), &[], 401),
        ] {
            let sent = edge.get(gateway, &format!("/alerts/1?{query}"), headers).await;
            Edge::assert_rejected(gateway, &sent, &[status], "a query");
        }
    }
}
