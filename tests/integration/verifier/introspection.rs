//! Introspection (RFC 7662).

use k8s_openapi::ByteString;
use serde_json::{Value, json};

use super::{Team, reader, verifier, wait_for_status};
use crate::support::TIMEOUT;
use crate::support::verifier::{Answer, Verifier, send};

async fn introspect(verifier: &Verifier, own: &str, body: &str) -> Answer {
    introspect_with(verifier, &format!("Bearer {own}"), body).await
}

async fn introspect_with(verifier: &Verifier, authorization: &str, body: &str) -> Answer {
    let request = format!(
        "POST /introspect HTTP/1.1\r\nHost: verifier\r\nConnection: close\r\nAuthorization: {authorization}\r\n\
         Content-Type: application/x-www-form-urlencoded\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    );
    send(verifier.address(), request.as_bytes()).await.expect("an answer")
}

#[tokio::test]
async fn introspection_describes_a_working_key_and_answers_inactive_for_any_other() {
    let (team, verifier) = (Team::new().await, verifier().await);
    let own = team.mint("resource", &json!({"type": "Team", "permissions": ["team-custom-api-keys:ReadConfig"]})).await;
    let mut spec = reader();
    spec["expiresAt"] = json!("2099-01-01T00:00:00Z");
    let value = team.mint("k", &spec).await;
    wait_for_status(verifier, "permission=none", &value, 200, TIMEOUT).await;
    wait_for_status(verifier, "permission=none", &own, 200, TIMEOUT).await;

    let answer = introspect(verifier, &own, &format!("token={value}&token_type_hint=access_token")).await;
    assert_eq!((answer.status, answer.headers("cache-control")), (200, vec!["no-store"]));
    let claims: Value = serde_json::from_str(&answer.body).unwrap();
    let id = team.ready("k").await.status.unwrap().id.unwrap();
    assert_eq!(
        claims,
        json!({
            "active": true, "scope": "alerts:ReadConfig", "client_id": id, "sub": id, "token_type": "Bearer",
            "exp": 4_070_908_800_i64, "keywright_key_name": "k", "keywright_key_type": "Team",
            "keywright_team": team.namespace,
        })
    );
    let inactive = async |token: &str| introspect(verifier, &own, &format!("token={token}")).await.body;
    assert_eq!(inactive("kwt_nothing").await, r#"{"active":false}"#);
    team.patch("k", &json!({"active": false})).await;
    wait_for_status(verifier, "permission=none", &value, 401, TIMEOUT).await;
    assert_eq!(inactive(&value).await, r#"{"active":false}"#, "the answer reveals that the key exists");
}

#[tokio::test]
async fn introspection_needs_a_key_with_the_permission_and_one_token() {
    let (team, verifier) = (Team::new().await, verifier().await);
    let value = team.mint("k", &reader()).await;
    let own = team.mint("resource", &json!({"type": "Team", "permissions": ["team-custom-api-keys:ReadConfig"]})).await;
    for value in [&value, &own] {
        wait_for_status(verifier, "permission=none", value, 200, TIMEOUT).await;
    }
    let token = format!("token={value}");
    for (own, body, status) in [
        ("", token.as_str(), 401),
        ("kwt_nothing", &token, 401),
        (&value, &token, 403),
        (&own, "", 400),
        (&own, "token=a&token=b", 400),
        (&own, &format!("token={}", "a".repeat(20_000)), 413),
        (&own, &token, 200),
    ] {
        let answer = introspect(verifier, own, body).await;
        assert_eq!(answer.status, status, "{}", answer.body);
    }
    let get =
        send(verifier.address(), b"GET /introspect HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").await.unwrap();
    assert_eq!(get.status, 405);
}

/// HTTP Basic as Spring, curl and others send it, with the key as the password or as the user name.
#[tokio::test]
async fn a_resource_server_can_authenticate_with_http_basic() {
    let (team, verifier) = (Team::new().await, verifier().await);
    let own = team.mint("resource", &json!({"type": "Team", "permissions": ["team-custom-api-keys:ReadConfig"]})).await;
    let value = team.mint("k", &reader()).await;
    for value in [&value, &own] {
        wait_for_status(verifier, "permission=none", value, 200, TIMEOUT).await;
    }
    for (pair, status) in [
        (format!("my%20client:{own}"), 200),
        (format!("{own}:"), 200),
        (format!("{own}:x"), 200),
        (format!("client:{value}"), 403),
        ("client:secret".to_owned(), 401),
        (format!("{own}:{value}"), 400),
    ] {
        let base64 = serde_json::to_value(ByteString(pair.into_bytes())).unwrap();
        let own = format!("Basic {}", base64.as_str().unwrap());
        let answer = introspect_with(verifier, &own, &format!("token={value}")).await;
        assert_eq!(answer.status, status, "{}", answer.body);
        assert_eq!(answer.body.contains("\"active\":true"), status == 200, "{}", answer.body);
        let challenges = answer.headers("www-authenticate");
        assert_eq!(challenges.contains(&"Basic realm=\"keywright\""), status == 401, "{challenges:?}");
    }
}

#[tokio::test]
async fn introspection_covers_keys_of_other_namespaces_only_with_the_cluster_permission() {
    let (team, other, verifier) = (Team::new().await, Team::new().await, verifier().await);
    let own = team.mint("resource", &json!({"type": "Team", "permissions": ["team-custom-api-keys:ReadConfig"]})).await;
    let spec = json!({"type": "Team", "permissions": ["team-custom-api-keys:ReadConfig", "api-keys:IntrospectAll"]});
    let everywhere = team.mint("everywhere", &spec).await;
    let (ours, theirs) = (team.mint("k", &reader()).await, other.mint("k", &reader()).await);
    for value in [&own, &everywhere, &ours, &theirs] {
        wait_for_status(verifier, "permission=none", value, 200, TIMEOUT).await;
    }
    let active = async |own: &str, token: &str| {
        let answer = introspect(verifier, own, &format!("token={token}")).await;
        assert_eq!(answer.status, 200, "{}", answer.body);
        serde_json::from_str::<Value>(&answer.body).unwrap()
    };
    assert_eq!(active(&own, &ours).await["active"], true);
    assert_eq!(active(&own, &theirs).await, json!({"active": false}));
    assert_eq!(active(&everywhere, &theirs).await["keywright_team"], other.namespace);
}
