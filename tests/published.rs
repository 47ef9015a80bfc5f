//! What Keywright hands out beside the Secrets of keys, on a real control plane: the verifier's certificate, digests for
//! gateways, and the one field of a status that the verifier may write.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]
// When something is due is told by the clock.
#![allow(clippy::disallowed_methods)]

mod support;

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::core::v1::{ConfigMap, Secret};
use k8s_openapi::jiff::{SignedDuration, Timestamp};
use keywright::api::{self, ApiKey, Time};
use kube::api::{Api, DeleteParams, ListParams, Patch, PatchParams, PostParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config, ResourceExt};
use rustls::RootCertStore;
use rustls::client::{WebPkiServerVerifier, danger::ServerCertVerifier};
use rustls::crypto::ring;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::sign::CertifiedKey;
use serde_json::{Value, json};
use support::keys::{looks_like_a_value, sha256, value_of};
use support::operator::NAMESPACE;
use support::{ControlPlane, Operator, Options, PATIENCE, Release, eventually, namespace, output, plane};
use tokio::sync::OnceCell;

/// Where the gateway is, and what it reads.
const GATEWAY: &str = "gateway";
const EXPORT: &str = "digests";

/// From a change until a gateway can see it. A second is what is promised; this machine is busy with the tests.
const SOON: Duration = Duration::from_secs(3);

struct Stage {
    plane: &'static ControlPlane,
    _operator: Operator,
}

/// The chart with the export, and an operator whose certificates live half a minute.
async fn stage() -> &'static Stage {
    static STAGE: OnceCell<Stage> = OnceCell::const_new();
    let start = async || {
        let plane = plane().await;
        output(plane.kubectl().args(["create", "namespace", GATEWAY]))?;
        let values = ["export.enabled=true", "export.namespace=gateway", "export.name=digests"];
        let release = Release::install(plane, &values).await?;
        let args = vec!["--webhook-cert-validity=30s".to_owned()];
        let operator = Operator::start(plane, &release, Options { args, ..Options::default() }).await?;
        operator.wait_ready().await?;
        let catalog = ["wait", "--for=condition=Accepted", "permissioncatalog/coralogix", "--timeout=60s"];
        eventually("the catalogue is accepted", PATIENCE, async || output(plane.kubectl().args(catalog))).await;
        Ok::<_, anyhow::Error>(Stage { plane, _operator: operator })
    };
    STAGE.get_or_init(async || start().await.unwrap_or_else(|error| panic!("{error:#}"))).await
}

/// A client with the token of a service account of the chart.
async fn account(plane: &ControlPlane, name: &str) -> Client {
    let kubeconfig = plane.kubeconfig_for_service_account(NAMESPACE, name, None).await.unwrap();
    let kubeconfig = Kubeconfig::read_from(kubeconfig).unwrap();
    let config = Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await.unwrap();
    Client::try_from(config).unwrap()
}

/// Applies a key, and waits until it has a value.
async fn minted(client: &Client, namespace: &str, name: &str, spec: Value) -> ApiKey {
    let keys: Api<ApiKey> = Api::namespaced(client.clone(), namespace);
    let key = json!({
        "apiVersion": "keywright.dev/v1alpha1", "kind": "ApiKey", "metadata": {"name": name}, "spec": spec,
    });
    let params = PatchParams::apply("test").force();
    eventually(&format!("{name} is minted"), PATIENCE, async || {
        let key = keys.patch(name, &params, &Patch::Apply(&key)).await?;
        let minted = key.status.as_ref().is_some_and(|status| !status.tokens.is_empty());
        ensure!(minted && key.status.as_ref().unwrap().observed_generation == key.metadata.generation, "not yet");
        Ok(key)
    })
    .await
}

async fn edit(client: &Client, namespace: &str, name: &str, spec: Value) {
    let keys: Api<ApiKey> = Api::namespaced(client.clone(), namespace);
    keys.patch(name, &PatchParams::default(), &Patch::Merge(json!({"spec": spec}))).await.unwrap();
}

/// The certificate of the verifier, if its clients take it under `name`, and it has the key.
fn served(secret: &Secret, clients: &ConfigMap, name: &str) -> Result<Vec<u8>> {
    let bundle = clients.data.as_ref().and_then(|data| data.get("ca.crt")).context("no ca.crt")?;
    let data = secret.data.as_ref().context("no data")?;
    ensure!(data["ca.crt"].0 == bundle.as_bytes(), "another CA in the Secret");
    ensure!(secret.type_.as_deref() == Some("kubernetes.io/tls"), "{:?}", secret.type_);
    let mut roots = RootCertStore::empty();
    for root in CertificateDer::pem_slice_iter(bundle.as_bytes()) {
        roots.add(root?)?;
    }
    let provider = std::sync::Arc::new(ring::default_provider());
    let verifier = WebPkiServerVerifier::builder_with_provider(roots.into(), provider).build()?;
    let leaf = CertificateDer::from_pem_slice(&data["tls.crt"].0)?;
    verifier.verify_server_cert(&leaf, &[], &ServerName::try_from(name.to_owned())?, &[], UnixTime::now())?;
    let key = PrivateKeyDer::from_pem_slice(&data["tls.key"].0)?;
    CertifiedKey::new(vec![leaf], ring::sign::any_ecdsa_type(&key)?).keys_match()?;
    Ok(data["tls.crt"].0.clone())
}

#[tokio::test]
async fn the_verifiers_certificate_is_issued_trusted_renewed_and_brought_back() {
    let stage = stage().await;
    let client = stage.plane.client().await.unwrap();
    let secrets: Api<Secret> = Api::namespaced(client.clone(), NAMESPACE);
    let maps: Api<ConfigMap> = Api::namespaced(client.clone(), NAMESPACE);
    let now = async || {
        let (secret, map) = (secrets.get("keywright-verifier-tls").await?, maps.get("keywright-verifier-ca").await?);
        for name in ["keywright-verifier.keywright-system.svc", "keywright-verifier.keywright-system.svc.cluster.local"]
        {
            served(&secret, &map, name)?;
        }
        ensure!(served(&secret, &map, "keywright-webhook.keywright-system.svc").is_err(), "another's name");
        served(&secret, &map, "keywright-verifier.keywright-system")
    };
    eventually("the certificate is issued", PATIENCE, now).await;
    // The Deployment mounts what was issued.
    let deployment = ["get", "deployment", "keywright-verifier", "-n", NAMESPACE, "-o", "json"];
    let deployment: Value = serde_json::from_str(&output(stage.plane.kubectl().args(deployment)).unwrap()).unwrap();
    let volume = &deployment["spec"]["template"]["spec"]["volumes"][0];
    assert_eq!(volume["secret"]["secretName"], "keywright-verifier-tls");

    secrets.delete("keywright-verifier-tls", &DeleteParams::default()).await.unwrap();
    eventually("the Secret is back", PATIENCE, now).await;
    maps.delete("keywright-verifier-ca", &DeleteParams::default()).await.unwrap();
    let before = eventually("the ConfigMap is back", PATIENCE, now).await;

    // By itself, after two thirds of half a minute, and never a moment without one that is trusted.
    eventually("it is renewed", PATIENCE, async || {
        let now = now().await.expect("one that is trusted");
        ensure!(now != before, "still the same");
        Ok(())
    })
    .await;
}

#[tokio::test]
async fn who_takes_over_the_operator_can_write_no_other_tls_secret() {
    let stage = stage().await;
    let operator: Api<Secret> = Api::namespaced(account(stage.plane, "keywright").await, NAMESPACE);
    let params = PostParams { dry_run: true, ..PostParams::default() };
    for (name, kind) in [("gateway-tls", "kubernetes.io/tls"), ("keywright-verifier-tls", "Opaque")] {
        let secret = json!({"metadata": {"name": name}, "type": kind, "data": {"tls.crt": "eA==", "tls.key": "eA=="}});
        let answer = operator.create(&params, &serde_json::from_value(secret).unwrap()).await;
        let error = answer.expect_err(name).to_string();
        assert!(error.contains("the operator may write Secrets of type keywright.dev/api-key"), "{name}: {error}");
    }
}

/// What the gateway reads, over all ConfigMaps of the export.
async fn exported(client: &Client) -> Result<Value> {
    let maps: Api<ConfigMap> = Api::namespaced(client.clone(), GATEWAY);
    let maps = maps.list(&ListParams::default().labels(&format!("keywright.dev/export={EXPORT}"))).await?;
    let mut all = json!({});
    for (id, entry) in maps.items.into_iter().flat_map(|map| map.data.unwrap_or_default()) {
        all[id] = serde_json::from_str(&entry)?;
    }
    Ok(all)
}

#[tokio::test]
async fn gateways_are_told_the_digests_that_work_and_no_value() {
    let stage = stage().await;
    let client = stage.plane.client().await.unwrap();
    let team = namespace(&client).await;
    let secrets: Api<Secret> = Api::namespaced(client.clone(), &team);
    let value = async |name: &str| value_of(&secrets.get(&format!("{name}-secret")).await.unwrap()).unwrap();
    let id = |value: &str| format!("key_{}", &sha256(value)[..16]);
    let until = async |what: &str, patience: Duration, id: &str, there: bool| {
        let start = Instant::now();
        eventually(what, PATIENCE, async || {
            let all = exported(&client).await?;
            ensure!(all[id].is_object() == there, "{all:#}");
            Ok(all[id].clone())
        })
        .await;
        assert!(start.elapsed() < patience, "{what} only after {:?}", start.elapsed());
        exported(&client).await.unwrap()[id].clone()
    };

    minted(&client, &team, "checkout", json!({"type": "Team", "presets": ["Alerts"]})).await;
    let first = value("checkout").await;
    let entry = until("a key that was minted", SOON, &id(&first), true).await;
    assert_eq!(entry["keyHash"], format!("sha256:{}", sha256(&first)));
    let metadata = json!({
        "team": team, "name": "checkout", "type": "Team", "presets": ["Alerts"], "permissions": [],
    });
    assert_eq!(entry["metadata"], metadata);
    assert_eq!(entry.as_object().unwrap().len(), 2, "what agentgateway reads, and no more");

    edit(&client, &team, "checkout", json!({"active": false})).await;
    until("a key that was turned off", SOON, &id(&first), false).await;
    edit(&client, &team, "checkout", json!({"active": true})).await;
    until("a key that was turned on again", SOON, &id(&first), true).await;

    let rotation = json!({"requestedAt": "2026-01-01T00:00:00Z", "overlap": "4s"});
    edit(&client, &team, "checkout", json!({"rotation": rotation})).await;
    let second = eventually("it is rotated", PATIENCE, async || {
        let second = value("checkout").await;
        ensure!(second != first, "still the first");
        Ok(second)
    })
    .await;
    until("the new value", SOON, &id(&second), true).await;
    until("the old value, when its overlap is over", SOON + Duration::from_secs(4), &id(&first), false).await;

    // A key that expires, by itself.
    let end = Timestamp::from_second((Timestamp::now() + SignedDuration::from_secs(8)).as_second()).unwrap();
    let spec = json!({"type": "SendYourData", "presets": ["SendData"], "expiresAt": end.to_string()});
    minted(&client, &team, "short", spec).await;
    let short = id(&value("short").await);
    let entry = until("a key that will expire", SOON, &short, true).await;
    assert_eq!(entry["metadata"]["expiresAt"].as_str().unwrap().parse::<Timestamp>().unwrap(), end);
    tokio::time::sleep((end - Timestamp::now()).try_into().unwrap_or_default()).await;
    until("a key that expired", SOON, &short, false).await;

    // Somebody adds a key of their own. The next write finds it, and takes it out.
    let maps: Api<ConfigMap> = Api::namespaced(client.clone(), GATEWAY);
    let forged = json!({"data": {"key_0000000000000000": "{}"}});
    maps.patch(EXPORT, &PatchParams::default(), &Patch::Merge(forged)).await.unwrap();
    minted(&client, &team, "other", json!({"type": "Team", "presets": ["Alerts"]})).await;
    let other = value("other").await;
    until("a key that was minted meanwhile", SOON, &id(&other), true).await;
    assert_eq!(exported(&client).await.unwrap()["key_0000000000000000"], Value::Null);

    let dump = ["get", "configmaps", "-A", "-o", "json", "--show-managed-fields"];
    let dump = output(stage.plane.kubectl().args(dump)).unwrap();
    for value in [&first, &second, &other] {
        assert!(!dump.contains(&value[4..47]), "a value");
    }
    assert!(dump.contains(&sha256(&second)), "the search finds what is there");
    assert_eq!(looks_like_a_value(&dump), None);

    let keys: Api<ApiKey> = Api::namespaced(client.clone(), &team);
    keys.delete("checkout", &DeleteParams::default()).await.unwrap();
    until("a key that was deleted", SOON, &id(&second), false).await;

    // The operator's account may touch these ConfigMaps and no other there.
    let operator: Api<ConfigMap> = Api::namespaced(account(stage.plane, "keywright").await, GATEWAY);
    let patch = Patch::Merge(json!({"data": {"a": "b"}}));
    let refused = operator.patch("kube-root-ca.crt", &PatchParams::default(), &patch).await.unwrap_err();
    assert!(refused.to_string().contains("cannot patch resource \"configmaps\""), "{refused}");
}

/// For gateways that read credentials from Secrets only.
#[tokio::test]
async fn gateways_that_read_secrets_are_told_the_same_and_the_operator_writes_no_others() {
    let plane = &ControlPlane::start(&support::kubernetes_version()).await.unwrap();
    output(plane.kubectl().args(["create", "namespace", GATEWAY])).unwrap();
    let values =
        ["export.enabled=true", "export.kind=Secret", "export.namespace=gateway", "export.name=digests", "replicas=1"];
    let release = Release::install(plane, &values).await.unwrap();
    let operator = Operator::start(plane, &release, Options::default()).await.unwrap();
    operator.wait_ready().await.unwrap();
    let client = plane.client().await.unwrap();
    let team = namespace(&client).await;
    minted(&client, &team, "checkout", json!({"type": "Team", "presets": ["Alerts"]})).await;
    let secrets: Api<Secret> = Api::namespaced(client.clone(), &team);
    let value = value_of(&secrets.get("checkout-secret").await.unwrap()).unwrap();
    let id = format!("key_{}", &sha256(&value)[..16]);
    let exported: Api<Secret> = Api::namespaced(client.clone(), GATEWAY);
    let until = async |what: &str, there: bool| {
        eventually(what, SOON, async || {
            let secret = exported.get(EXPORT).await?;
            ensure!(secret.data.iter().any(|data| data.contains_key(&id)) == there, "{:?}", secret.data);
            Ok(secret)
        })
        .await
    };
    let secret = until("a key that was minted", true).await;
    assert_eq!(secret.type_.as_deref(), Some("keywright.dev/digests"));
    assert_eq!(secret.labels()["keywright.dev/export"], EXPORT);
    let entry: Value = serde_json::from_slice(&secret.data.unwrap()[&id].0).unwrap();
    assert_eq!(entry["keyHash"], format!("sha256:{}", sha256(&value)));
    edit(&client, &team, "checkout", json!({"active": false})).await;
    until("a key that was turned off", false).await;

    let account = account(plane, "keywright").await;
    let params = PostParams { dry_run: true, ..PostParams::default() };
    let create = async |namespace: &str, name: &str, kind: &str| {
        let secret = serde_json::from_value(json!({"metadata": {"name": name}, "type": kind})).unwrap();
        Api::<Secret>::namespaced(account.clone(), namespace).create(&params, &secret).await.map(drop)
    };
    let kind = "keywright.dev/digests";
    for name in ["digests-2", "digests-10", "digests-32"] {
        create(GATEWAY, name, kind).await.unwrap();
    }
    for (namespace, name, kind) in [
        (GATEWAY, "digests-33", kind),
        (GATEWAY, "digests-1", kind),
        (GATEWAY, "other", kind),
        (GATEWAY, "digests-2", "Opaque"),
        (&team, "digests-2", kind),
    ] {
        let error = create(namespace, name, kind).await.expect_err(name).to_string();
        assert!(error.contains("the operator may write Secrets of type keywright.dev/api-key"), "{name}: {error}");
    }
}

/// Other values than `value` that the schema takes: each differs in one place.
fn others(schema: &Value, value: &Value) -> Vec<Value> {
    match schema["type"].as_str().unwrap() {
        "object" => {
            let mut found = vec![];
            for (name, below) in schema["properties"].as_object().unwrap() {
                let changed = value.get(name).map_or_else(|| vec![sample(below)], |value| others(below, value));
                found.extend(changed.into_iter().map(|changed| {
                    let mut value = value.clone();
                    value[name] = changed;
                    value
                }));
            }
            found
        }
        "array" => {
            let items = value.as_array().unwrap();
            let mut found = vec![json!([])];
            for (place, item) in items.iter().enumerate() {
                found.extend(others(&schema["items"], item).into_iter().map(|changed| {
                    let mut items = items.clone();
                    items[place] = changed;
                    json!(items)
                }));
            }
            if schema["maxItems"].as_u64().is_none_or(|most| (items.len() as u64) < most) {
                found.push(json!([items.clone(), vec![sample(&schema["items"])]].concat()));
            }
            found.retain(|changed| changed != value);
            found
        }
        "integer" => vec![json!(value.as_i64().unwrap() + 1)],
        _ if schema["enum"].is_array() => {
            schema["enum"].as_array().unwrap().iter().filter(|other| *other != value).cloned().collect()
        }
        _ if schema["format"] == "date-time" => vec![json!("2001-01-01T00:00:00Z")],
        _ => vec![json!(format!("{}x", value.as_str().unwrap()))],
    }
}

/// A value that the schema takes.
fn sample(schema: &Value) -> Value {
    match schema["type"].as_str().unwrap() {
        "object" => {
            let properties = schema["properties"].as_object().unwrap();
            properties
                .iter()
                .map(|(name, below)| (name.clone(), sample(below)))
                .collect::<serde_json::Map<_, _>>()
                .into()
        }
        "array" => json!([sample(&schema["items"])]),
        "integer" => json!(1),
        _ if schema["enum"].is_array() => schema["enum"][0].clone(),
        _ if schema["format"] == "date-time" => json!("2001-01-01T00:00:00Z"),
        _ => json!("Sample"),
    }
}

fn json_patch(steps: Value) -> Patch<()> {
    Patch::Json(serde_json::from_value(steps).unwrap())
}

/// Whatever field of the status there is, the verifier's account can't change it: a forged digest would be a forged key.
#[tokio::test]
async fn the_verifier_changes_no_field_of_a_status_but_the_one() {
    let stage = stage().await;
    let client = stage.plane.client().await.unwrap();
    let team = namespace(&client).await;
    let spec = json!({
        "type": "Team", "presets": ["Alerts"], "permissions": ["logs.data-api#high:ReadData"],
        "rotation": {"every": "720h", "overlap": "24h", "requestedAt": "2026-01-01T00:00:00Z"},
    });
    minted(&client, &team, "guarded", spec).await;
    edit(&client, &team, "guarded", json!({"rotation": {"requestedAt": "2026-01-02T00:00:00Z"}})).await;
    let keys: Api<ApiKey> = Api::namespaced(client.clone(), &team);
    let key = eventually("two values, and rest", PATIENCE, async || {
        let key = keys.get("guarded").await?;
        let status = key.status.as_ref().context("no status")?;
        ensure!(status.tokens.len() == 2 && status.observed_generation == key.metadata.generation, "{status:?}");
        Ok(key)
    })
    .await;
    let status = serde_json::to_value(key.status.unwrap()).unwrap();

    let crd = api::crds().into_iter().find(|crd| crd.spec.names.kind == "ApiKey").unwrap();
    let crd = serde_json::to_value(crd).unwrap();
    let schema = &crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["status"];
    let [as_operator, as_verifier]: [Api<ApiKey>; 2] = [
        Api::namespaced(account(stage.plane, "keywright").await, &team),
        Api::namespaced(account(stage.plane, "keywright-verifier").await, &team),
    ];
    let dry = PatchParams { dry_run: true, ..PatchParams::default() };
    let mut tried = 0;
    let mut present = BTreeSet::new();
    for (field, below) in schema["properties"].as_object().unwrap() {
        if field == "lastUsedAt" {
            continue;
        }
        let path = format!("/status/{field}");
        let mut changes = vec![];
        if let Some(value) = status.get(field) {
            present.insert(field.as_str());
            changes.push(json!([{"op": "remove", "path": path}]));
            changes.extend(
                others(below, value).into_iter().map(|other| json!([{"op": "replace", "path": path, "value": other}])),
            );
        } else {
            changes.push(json!([{"op": "add", "path": path, "value": sample(below)}]));
        }
        for change in changes {
            tried += 1;
            // It is a change that could be made.
            as_operator
                .patch_status("guarded", &dry, &json_patch(change.clone()))
                .await
                .unwrap_or_else(|error| panic!("{change}: {error}"));
            // Nor does it come in with one that is allowed.
            let mut both = change.as_array().unwrap().clone();
            both.push(json!({"op": "add", "path": "/status/lastUsedAt", "value": "2026-01-01T00:00:00Z"}));
            for change in [change, json!(both)] {
                let answer = as_verifier.patch_status("guarded", &dry, &json_patch(change.clone())).await;
                let error = answer.err().unwrap_or_else(|| panic!("not refused: {change}")).to_string();
                assert!(error.contains("may write status.lastUsedAt and nothing else"), "{change}: {error}");
            }
        }
    }
    assert!(present.len() >= 12 && tried > 50, "{tried} changes, of {present:?}");
    for field in ["conditions", "creator", "id", "permissions", "presets", "state", "tokens"] {
        assert!(present.contains(field), "{field}");
    }
}

#[tokio::test]
async fn the_verifier_says_when_a_key_was_last_used_and_never_takes_it_back() {
    let stage = stage().await;
    let client = stage.plane.client().await.unwrap();
    let team = namespace(&client).await;
    minted(&client, &team, "used", json!({"type": "Team", "presets": ["Alerts"]})).await;
    let verifier = account(stage.plane, "keywright-verifier").await;
    let keys: Api<ApiKey> = Api::namespaced(verifier.clone(), &team);
    let params = PatchParams::default();
    let used = async |at: Value| {
        keys.patch_status("used", &params, &Patch::Merge(json!({"status": {"lastUsedAt": at}}))).await
    };
    let refused = |answer: kube::Result<ApiKey>, code: u16, text: &str| match answer {
        Err(kube::Error::Api(status)) => {
            assert!(status.code == code && status.message.contains(text), "{}: {}", status.code, status.message);
        }
        other => panic!("{other:?}"),
    };
    for at in ["2026-01-02T00:00:00Z", "2026-01-02T00:00:00Z", "2026-01-03T10:00:00Z", "2026-01-03T12:00:00+01:00"] {
        used(json!(at)).await.unwrap_or_else(|error| panic!("{at}: {error}"));
    }
    // Another replica was faster: the verifier tells it by the code.
    refused(used(json!("2026-01-03T10:59:59Z")).await, 422, "status.lastUsedAt: Invalid value: may move forward only");
    refused(used(Value::Null).await, 422, "status.lastUsedAt: Invalid value: may move forward only");
    // Times that clients can't read, and times of the future, which no true time would replace. The last is a matter of
    // the verifier's clock: it tries again, which it does not after a 422.
    for at in ["9999-12-31T23:59:59Z", "9999-12-31T23:59:59-14:00", "0001-01-01T00:00:00Z", "2027-01-01t00:00:00Z"] {
        refused(used(json!(at)).await, 422, "status.lastUsedAt: Invalid value: must be an RFC 3339 time between");
    }
    let from_now = |minutes| json!(Timestamp::now() + SignedDuration::from_mins(minutes));
    for at in [from_now(6), from_now(24 * 60), json!("8999-12-31T23:59:59Z")] {
        refused(
            used(at).await,
            403,
            "status.lastUsedAt is more than five minutes later than the time of the API server",
        );
    }
    used(from_now(4)).await.expect("clocks differ");
    // A time that somebody writes into managedFields moves no clock: the API server notes the time of this very change.
    let all: Api<ApiKey> = Api::namespaced(client.clone(), &team);
    let mut forged = all.get("used").await.unwrap();
    for entry in forged.metadata.managed_fields.iter_mut().flatten() {
        entry.time = Some(Time("8999-12-31T23:59:59Z".parse().unwrap()));
    }
    forged.labels_mut().insert("a".to_owned(), "b".to_owned());
    let forged = all.replace("used", &PostParams::default(), &forged).await.unwrap();
    let times = forged.metadata.managed_fields.iter().flatten().filter_map(|entry| entry.time.as_ref());
    assert!(times.filter(|time| time.0.to_string().starts_with("8999")).count() > 1, "{:?}", forged.metadata);
    refused(used(from_now(60)).await, 403, "status.lastUsedAt is more than five minutes later");
    let before = Api::<ApiKey>::namespaced(client.clone(), &team).get("used").await.unwrap();
    let gone = Patch::Merge(json!({"status": null}));
    refused(keys.patch_status("used", &params, &gone).await, 403, "may write status.lastUsedAt and nothing else");

    // Its other rights are RBAC's.
    let spec = Patch::Merge(json!({"spec": {"active": false}}));
    refused(keys.patch("used", &params, &spec).await, 403, "cannot patch resource \"apikeys\"");
    // Metadata does not change through a status.
    let label = Patch::Merge(json!({"metadata": {"labels": {"a": "b"}}}));
    keys.patch_status("used", &params, &label).await.unwrap();
    let after = Api::<ApiKey>::namespaced(client.clone(), &team).get("used").await.unwrap();
    assert_eq!((after.labels(), &after.spec, &after.status), (before.labels(), &before.spec, &before.status));
    let secrets: Api<Secret> = Api::namespaced(verifier, &team);
    let error = secrets.get("used-secret").await.unwrap_err().to_string();
    assert!(error.contains("cannot get resource \"secrets\""), "{error}");

    // Nobody else may, not even who may do everything.
    let admin: Api<ApiKey> = Api::namespaced(client, &team);
    let patch = Patch::Merge(json!({"status": {"lastUsedAt": "2026-02-01T00:00:00Z"}}));
    refused(admin.patch_status("used", &params, &patch).await, 403, "only the operator");
}
