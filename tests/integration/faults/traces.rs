//! The export of spans over OTLP, to a real collector.

use super::*;
use crate::support::{
    collector::Collector,
    verifier::{self, Verifier},
};

const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";

/// The span of this name that has all of `parts` in its text.
async fn span(collector: &Collector, name: &str, parts: &[&str]) -> String {
    eventually(&format!("a span {name} with {parts:?}"), TIMEOUT, async || {
        let spans = collector.spans();
        let is_name = |span: &&String| {
            span.lines().any(|line| line.trim().starts_with("Name") && line.ends_with(&format!(": {name}")))
        };
        let found = spans.iter().filter(is_name).find(|span| parts.iter().all(|part| span.contains(part)));
        found.cloned().with_context(|| format!("{} spans", spans.len()))
    })
    .await
}

#[tokio::test]
async fn reconciliations_admission_requests_and_checks_are_exported_as_spans_without_values() {
    let plane = plane().await;
    let collector = Collector::start(plane).await.expect("a collector");
    let endpoint = format!("--otlp-endpoint={}", collector.endpoint());
    let fixture = Fixture::new(&[&endpoint]).await;
    let namespace = crate::support::namespace(&fixture.client).await;
    apply(&fixture.client, &namespace, "traced", &json!({"type": "Team", "presets": ["Alerts"]}))
        .await
        .expect("the key is applied");
    let keys: Api<ApiKey> = Api::namespaced(fixture.client.clone(), &namespace);
    let key = eventually("the key is ready", TIMEOUT, async || {
        let key = keys.get("traced").await?;
        settled(&key)?;
        Ok(key)
    })
    .await;
    let uid = key.metadata.uid.clone().unwrap();
    let id = key.status.as_ref().and_then(|status| status.id.clone()).unwrap();
    let object = ["k8s.object.name: Str(traced)", &format!("k8s.namespace.name: Str({namespace})")];

    let reconcile =
        span(&collector, "reconcile", &[object[0], object[1], &format!("k8s.object.uid: Str({uid})")]).await;
    assert!(!reconcile.contains("error"), "{reconcile}");
    span(&collector, "reconcile", &[object[0], &format!("keywright.key.id: Str({id})")]).await;
    span(
        &collector,
        "admission",
        &[object[0], object[1], "keywright.operation: Str(CREATE)", "keywright.allowed: Bool(true)"],
    )
    .await;
    let refused = apply(&fixture.client, &namespace, "refused", &json!({"type": "Team", "presets": ["Nope"]})).await;
    assert!(refused.is_err());
    span(&collector, "admission", &["k8s.object.name: Str(refused)", "keywright.allowed: Bool(false)"]).await;

    let options = verifier::Options { args: vec![endpoint], ..verifier::Options::default() };
    let verifier = Verifier::start(plane, options).await.expect("a verifier");
    verifier.wait_ready().await.expect("it is ready");
    let secrets: Api<Secret> = Api::namespaced(fixture.client.clone(), &namespace);
    let value = value_of(&secrets.get("traced-secret").await.unwrap()).unwrap();
    let trace = format!("00-{TRACE}-b7ad6b7169203331-01");
    for (authorization, verdict) in [(format!("Bearer {value}"), "Allowed"), ("Bearer wrong".to_owned(), "Refused")] {
        let request = format!(
            "GET /nginx/permission=none HTTP/1.1\r\nhost: verifier\r\nauthorization: {authorization}\r\ntraceparent: {trace}\r\nconnection: close\r\n\r\n"
        );
        verifier::send(verifier.address(), request.as_bytes()).await.expect("an answer");
        let check = span(&collector, "check", &[&format!("keywright.verdict: Str({verdict})")]).await;
        assert!(check.contains(TRACE), "the span continues the trace of the caller: {check}");
        assert!(verdict == "Refused" || check.contains(&id) && check.contains(object[0]), "{check}");
    }
    assert!(find_value(&collector.log()).is_none(), "a span has something like a value");
    // The operator exports the last spans when it stops.
    let operator = fixture.operator();
    assert!(operator.terminate().await.expect("it stops").success());
}
