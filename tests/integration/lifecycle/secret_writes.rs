//! Writes to the Secrets of keys by other writers: warnings, and the cost of forged notices. `tests/ha.rs` tests how
//! soon writes are detected, with the long check interval of the chart.

use std::process::Command;

use k8s_openapi::api::admissionregistration::v1::WebhookClientConfig;
use keywright::admission::{secrets::NOTICE_PATH, self_check};

use super::*;

/// The standard output and standard error of a kubectl command.
fn kubectl_output(team: &Team, args: &[&str]) -> String {
    let mut kubectl: Command = team.cluster.plane.kubectl();
    let output = kubectl.args(["-n", &team.namespace]).args(args).output().expect("kubectl");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned()
}

#[tokio::test]
async fn kubectl_warns_only_on_deletion_of_a_value_in_use() {
    let team = Team::new().await;
    let _running = team.cluster.operator.read().await;
    let (_, value) = team.minted("used", team_spec()).await;
    let (_, _) = team.minted("off", spec_with(json!({"active": false}))).await;
    team.until("off", "inactive", |key| state(key) == Some(KeyState::Inactive)).await;

    for (args, is_warned) in [
        (vec!["delete", "secret", "used-secret", "--dry-run=server"], true),
        (vec!["label", "secret", "used-secret", "a=b"], false),
        (vec!["delete", "secret", "off-secret"], false),
        (vec!["delete", "secret", "used-secret"], true),
    ] {
        let shown = kubectl_output(&team, &args);
        let warning = "Warning: Secret used-secret holds the value of ApiKey used, which is in use";
        assert_eq!(shown.contains(warning), is_warned, "{args:?}: {shown}");
        assert_eq!(shown.contains("Warning"), is_warned, "{args:?}: {shown}");
        assert!(!shown.contains(&value), "{shown}");
    }
    team.until("used", "lost", |key| state(key) == Some(KeyState::Lost)).await;
}

/// The address of the webhook and its CA bundle.
async fn webhook(team: &Team) -> (std::net::SocketAddr, Vec<u8>) {
    let webhooks: Api<ValidatingWebhookConfiguration> = Api::all(team.client.clone());
    let all = webhooks.get("keywright").await.expect("the configuration").webhooks.unwrap_or_default();
    let bundles: Vec<_> =
        all.iter().map(|w| &w.client_config).map(|WebhookClientConfig { ca_bundle, .. }| ca_bundle).collect();
    let bundle = bundles[0].clone().expect("a bundle").0;
    assert!(
        bundles.iter().all(|other| other.as_ref().is_some_and(|other| other.0 == bundle)),
        "the webhooks have different CA bundles"
    );
    let address = team.cluster.release.webhook_address(&*team.cluster.operator.read().await);
    (address.parse().expect("an address"), bundle)
}

/// Forged reviews and notices, sent by a client that can reach the port: for an existing key and for many that do not
/// exist.
#[tokio::test]
async fn flood_of_forged_notices_causes_few_reads_and_hides_no_change() {
    const SPAN: Duration = Duration::from_secs(6);
    let team = Team::new().await;
    let running = team.cluster.operator.read().await;
    let (known, _) = team.minted("known", team_spec()).await;
    team.minted("other", team_spec()).await;
    let (address, bundle) = webhook(&team).await;
    let server_name = "keywright-webhook.keywright-system.svc";
    let namespace = &team.namespace;
    let send = async |path: &str, body: Value| {
        let request = hyper::Request::post(path).header("host", server_name).header("content-type", "application/json");
        let request = request.body(body.to_string().into()).unwrap();
        self_check::send(address, server_name, &bundle, None, request).await
    };
    let review = |name: &str| {
        let secret =
            json!({"metadata": {"name": name}, "type": "keywright.dev/api-key", "data": {"key-value": "eA=="}});
        json!({"request": {"uid": "1", "operation": "UPDATE", "namespace": namespace, "object": secret, "oldObject": secret}})
    };

    let started = Instant::now();
    let flood = futures::future::join_all((0..8).map(async |number| {
        let mut answered = 0;
        while started.elapsed() < SPAN {
            let secret =
                if number % 2 == 0 { "known-secret".to_owned() } else { format!("unknown-{number}-{answered}") };
            let answer = if number < 4 {
                send("/secrets", review(&secret)).await
            } else {
                send(NOTICE_PATH, json!([{"namespace": namespace, "secret": secret}])).await
            };
            answered += usize::from(answer.is_ok_and(|status| status.is_success()));
        }
        answered
    }));
    let meanwhile = async {
        tokio::time::sleep(Duration::from_secs(2)).await;
        team.secrets.delete("other-secret", &DeleteParams::default()).await.unwrap();
        team.until("other", "lost", |key| state(key) == Some(KeyState::Lost)).await;
    };
    let (answered, ()) = tokio::join!(flood, meanwhile);
    let answered: usize = answered.into_iter().sum();
    let reads = |secret: &str| {
        let path = format!("/api/v1/namespaces/{namespace}/secrets/{secret}");
        let requests = team.cluster.proxy.requests();
        requests.iter().filter(|r| r.at > started && r.path.starts_with(&path)).count()
    };
    println!("{answered} forged messages in {:?}: {} reads", started.elapsed(), reads("known-secret"));
    assert!(answered > 500, "only {answered} messages were answered");
    // The check interval of these tests is two seconds.
    assert!(reads("known-secret") <= 30, "{} reads", reads("known-secret"));
    assert!(reads("known-secret") >= 5, "the notices were ignored");
    assert_eq!(reads("unknown-"), 0, "a Secret that no key claims was read");
    assert_eq!(team.keys.get("known").await.unwrap().status, known.status);
    // Malformed and too large messages are rejected.
    for (path, body, status) in [
        (NOTICE_PATH, json!([{"namespace": "a", "secret": "b", "data": "c"}]), 422),
        (NOTICE_PATH, json!({"namespace": "a"}), 422),
        (NOTICE_PATH, json!([{"namespace": "a", "secret": "x".repeat(200_000)}]), 413),
        ("/secrets", json!({"request": {"uid": "1", "operation": "CREATE"}}), 400),
        ("/secrets", json!([]), 400),
    ] {
        let answer = send(path, body.clone()).await.expect("a response");
        assert_eq!(answer.as_u16(), status, "{path} {}", body.to_string().get(..80).unwrap_or_default());
    }
    drop(running);
}
