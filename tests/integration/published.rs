//! Objects that Keywright writes besides Secrets of keys, on a real control plane: the certificate of the verifier,
//! exported digests for gateways, and the one status field that the verifier may write.

// The tests measure delays with the real clock.
#![allow(clippy::disallowed_methods)]

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use crate::support::keys::{find_value, sha256, value_of};
use crate::support::operator::NAMESPACE;
use crate::support::wait_for_catalog;
use crate::support::{ControlPlane, Operator, Options, Release, TIMEOUT, eventually, namespace, output, plane};
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
use tokio::sync::OnceCell;

/// Namespace and name of the export that the gateway reads.
const GATEWAY: &str = "gateway";
const EXPORT: &str = "digests";

/// The maximum delay from a change to its export: documented as one second, but other tests load the machine.
const MAX_DELAY: Duration = Duration::from_secs(3);

struct Fixture {
    plane: &'static ControlPlane,
    _operator: Operator,
}

/// Installs the chart with the export and starts an operator whose certificates are valid for 30 seconds.
async fn fixture() -> &'static Fixture {
    static FIXTURE: OnceCell<Fixture> = OnceCell::const_new();
    let start = async || {
        let plane = plane().await;
        output(plane.kubectl().args(["create", "namespace", GATEWAY]))?;
        let values = ["export.enabled=true", "export.namespace=gateway", "export.name=digests"];
        let release = Release::install(plane, &values).await?;
        let args = vec!["--webhook-cert-validity=30s".to_owned()];
        let operator = Operator::start(plane, &release, Options { args, ..Options::default() }).await?;
        operator.wait_ready().await?;
        wait_for_catalog(plane, TIMEOUT).await?;
        Ok::<_, anyhow::Error>(Fixture { plane, _operator: operator })
    };
    FIXTURE.get_or_init(async || start().await.unwrap_or_else(|error| panic!("{error:#}"))).await
}

/// Returns a client with the token of a ServiceAccount of the chart.
async fn client_of_account(plane: &ControlPlane, name: &str) -> Client {
    let kubeconfig = plane.kubeconfig_for_service_account(NAMESPACE, name, None).await.unwrap();
    let kubeconfig = Kubeconfig::read_from(kubeconfig).unwrap();
    let config = Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await.unwrap();
    Client::try_from(config).unwrap()
}

/// Applies a key, and waits until it has a value.
async fn create_minted(client: &Client, namespace: &str, name: &str, spec: Value) -> ApiKey {
    let keys: Api<ApiKey> = Api::namespaced(client.clone(), namespace);
    let key = json!({
        "apiVersion": "keywright.dev/v1alpha1", "kind": "ApiKey", "metadata": {"name": name}, "spec": spec,
    });
    let params = PatchParams::apply("test").force();
    eventually(&format!("{name} is minted"), TIMEOUT, async || {
        let key = keys.patch(name, &params, &Patch::Apply(&key)).await?;
        let minted = key.status.as_ref().is_some_and(|status| !status.tokens.is_empty());
        ensure!(
            minted && key.status.as_ref().unwrap().observed_generation == key.metadata.generation,
            "the key is not minted"
        );
        Ok(key)
    })
    .await
}

async fn edit(client: &Client, namespace: &str, name: &str, spec: Value) {
    let keys: Api<ApiKey> = Api::namespaced(client.clone(), namespace);
    keys.patch(name, &PatchParams::default(), &Patch::Merge(json!({"spec": spec}))).await.unwrap();
}

/// Returns the verifier's certificate if clients trust it for `name` and its private key matches.
fn verified_certificate(secret: &Secret, clients: &ConfigMap, name: &str) -> Result<Vec<u8>> {
    let bundle = clients.data.as_ref().and_then(|data| data.get("ca.crt")).context("no ca.crt")?;
    let data = secret.data.as_ref().context("no data")?;
    ensure!(data["ca.crt"].0 == bundle.as_bytes(), "the Secret has another CA than the ConfigMap");
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
async fn the_certificate_of_the_verifier_is_issued_recreated_and_renewed_before_it_expires() {
    let fixture = fixture().await;
    let client = fixture.plane.client().await.unwrap();
    let secrets: Api<Secret> = Api::namespaced(client.clone(), NAMESPACE);
    let maps: Api<ConfigMap> = Api::namespaced(client.clone(), NAMESPACE);
    let current = async || {
        let (secret, map) = (secrets.get("keywright-verifier-tls").await?, maps.get("keywright-verifier-ca").await?);
        for name in ["keywright-verifier.keywright-system.svc", "keywright-verifier.keywright-system.svc.cluster.local"]
        {
            verified_certificate(&secret, &map, name)?;
        }
        ensure!(
            verified_certificate(&secret, &map, "keywright-webhook.keywright-system.svc").is_err(),
            "the certificate must not be valid for another Service"
        );
        verified_certificate(&secret, &map, "keywright-verifier.keywright-system")
    };
    eventually("the certificate is issued", TIMEOUT, current).await;
    // The Deployment mounts the Secret.
    let deployment = ["get", "deployment", "keywright-verifier", "-n", NAMESPACE, "-o", "json"];
    let deployment: Value = serde_json::from_str(&output(fixture.plane.kubectl().args(deployment)).unwrap()).unwrap();
    let volume = &deployment["spec"]["template"]["spec"]["volumes"][0];
    assert_eq!(volume["secret"]["secretName"], "keywright-verifier-tls");

    secrets.delete("keywright-verifier-tls", &DeleteParams::default()).await.unwrap();
    eventually("the Secret is recreated", TIMEOUT, current).await;
    maps.delete("keywright-verifier-ca", &DeleteParams::default()).await.unwrap();
    let before = eventually("the ConfigMap is recreated", TIMEOUT, current).await;

    // The certificate is renewed after two thirds of 30 seconds, and is valid at all times.
    eventually("the certificate is renewed", TIMEOUT, async || {
        let certificate = current().await.expect("a trusted certificate");
        ensure!(certificate != before, "the certificate has not changed");
        Ok(())
    })
    .await;
}

#[tokio::test]
async fn the_operators_account_can_not_create_other_tls_secrets() {
    let fixture = fixture().await;
    let operator: Api<Secret> = Api::namespaced(client_of_account(fixture.plane, "keywright").await, NAMESPACE);
    let params = PostParams { dry_run: true, ..PostParams::default() };
    for (name, kind) in [("gateway-tls", "kubernetes.io/tls"), ("keywright-verifier-tls", "Opaque")] {
        let secret = json!({"metadata": {"name": name}, "type": kind, "data": {"tls.crt": "eA==", "tls.key": "eA=="}});
        let answer = operator.create(&params, &serde_json::from_value(secret).unwrap()).await;
        let error = answer.expect_err(name).to_string();
        assert!(error.contains("the operator may write Secrets of type keywright.dev/api-key"), "{name}: {error}");
    }
}

/// Returns the entries of all ConfigMaps of the export.
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
async fn config_maps_of_the_export_have_the_digests_of_valid_keys_and_no_values() {
    let fixture = fixture().await;
    let client = fixture.plane.client().await.unwrap();
    let team = namespace(&client).await;
    let secrets: Api<Secret> = Api::namespaced(client.clone(), &team);
    let value = async |name: &str| value_of(&secrets.get(&format!("{name}-secret")).await.unwrap()).unwrap();
    let id = |value: &str| format!("key_{}", &sha256(value)[..16]);
    let wait_for_entry = async |title: &str, timeout: Duration, id: &str, present: bool| {
        let start = Instant::now();
        eventually(title, TIMEOUT, async || {
            let all = exported(&client).await?;
            ensure!(all[id].is_object() == present, "{all:#}");
            Ok(all[id].clone())
        })
        .await;
        assert!(start.elapsed() < timeout, "{title}: took {:?}", start.elapsed());
        exported(&client).await.unwrap()[id].clone()
    };

    create_minted(&client, &team, "checkout", json!({"type": "Team", "presets": ["Alerts"]})).await;
    let first = value("checkout").await;
    let entry = wait_for_entry("the key is minted", MAX_DELAY, &id(&first), true).await;
    assert_eq!(entry["keyHash"], format!("sha256:{}", sha256(&first)));
    let metadata = json!({
        "team": team, "name": "checkout", "type": "Team", "presets": ["Alerts"], "permissions": [],
    });
    assert_eq!(entry["metadata"], metadata);
    assert_eq!(entry.as_object().unwrap().len(), 2, "the entry has the two fields that agentgateway reads");

    edit(&client, &team, "checkout", json!({"active": false})).await;
    wait_for_entry("the key is inactive", MAX_DELAY, &id(&first), false).await;
    edit(&client, &team, "checkout", json!({"active": true})).await;
    wait_for_entry("the key is active again", MAX_DELAY, &id(&first), true).await;

    let rotation = json!({"requestedAt": "2026-01-01T00:00:00Z", "overlap": "4s"});
    edit(&client, &team, "checkout", json!({"rotation": rotation})).await;
    let second = eventually("the key is rotated", TIMEOUT, async || {
        let second = value("checkout").await;
        ensure!(second != first, "the value has not changed");
        Ok(second)
    })
    .await;
    wait_for_entry("the new value is exported", MAX_DELAY, &id(&second), true).await;
    wait_for_entry("the overlap of the old value ends", MAX_DELAY + Duration::from_secs(4), &id(&first), false).await;

    // An expired key is removed without another event.
    let end = Timestamp::from_second((Timestamp::now() + SignedDuration::from_secs(8)).as_second()).unwrap();
    let spec = json!({"type": "SendYourData", "presets": ["SendData"], "expiresAt": end.to_string()});
    create_minted(&client, &team, "short", spec).await;
    let short = id(&value("short").await);
    let entry = wait_for_entry("the expiring key is minted", MAX_DELAY, &short, true).await;
    assert_eq!(entry["metadata"]["expiresAt"].as_str().unwrap().parse::<Timestamp>().unwrap(), end);
    tokio::time::sleep((end - Timestamp::now()).try_into().unwrap_or_default()).await;
    wait_for_entry("the key expires", MAX_DELAY, &short, false).await;

    // The next write of the operator removes an entry that another client added.
    let maps: Api<ConfigMap> = Api::namespaced(client.clone(), GATEWAY);
    let forged = json!({"data": {"key_0000000000000000": "{}"}});
    maps.patch(EXPORT, &PatchParams::default(), &Patch::Merge(forged)).await.unwrap();
    create_minted(&client, &team, "other", json!({"type": "Team", "presets": ["Alerts"]})).await;
    let other = value("other").await;
    wait_for_entry("another key is minted", MAX_DELAY, &id(&other), true).await;
    assert_eq!(exported(&client).await.unwrap()["key_0000000000000000"], Value::Null);

    let dump = ["get", "configmaps", "-A", "-o", "json", "--show-managed-fields"];
    let dump = output(fixture.plane.kubectl().args(dump)).unwrap();
    for value in [&first, &second, &other] {
        assert!(!dump.contains(&value[4..47]), "a ConfigMap contains a value");
    }
    assert!(dump.contains(&sha256(&second)), "the search finds exported digests");
    assert_eq!(find_value(&dump), None);

    let keys: Api<ApiKey> = Api::namespaced(client.clone(), &team);
    keys.delete("checkout", &DeleteParams::default()).await.unwrap();
    wait_for_entry("the key is deleted", MAX_DELAY, &id(&second), false).await;

    // The operator may patch only the ConfigMaps of the export in that namespace.
    let operator: Api<ConfigMap> = Api::namespaced(client_of_account(fixture.plane, "keywright").await, GATEWAY);
    let patch = Patch::Merge(json!({"data": {"a": "b"}}));
    let refused = operator.patch("kube-root-ca.crt", &PatchParams::default(), &patch).await.unwrap_err();
    assert!(refused.to_string().contains("cannot patch resource \"configmaps\""), "{refused}");
}

/// Some gateways read credentials from Secrets only.
#[tokio::test]
async fn an_export_to_secrets_has_the_digests_and_the_operator_can_not_create_other_secrets() {
    let plane = &ControlPlane::start(&crate::support::kubernetes_version()).await.unwrap();
    output(plane.kubectl().args(["create", "namespace", GATEWAY])).unwrap();
    let values =
        ["export.enabled=true", "export.kind=Secret", "export.namespace=gateway", "export.name=digests", "replicas=1"];
    let release = Release::install(plane, &values).await.unwrap();
    let operator = Operator::start(plane, &release, Options::default()).await.unwrap();
    operator.wait_ready().await.unwrap();
    let client = plane.client().await.unwrap();
    let team = namespace(&client).await;
    create_minted(&client, &team, "checkout", json!({"type": "Team", "presets": ["Alerts"]})).await;
    let secrets: Api<Secret> = Api::namespaced(client.clone(), &team);
    let value = value_of(&secrets.get("checkout-secret").await.unwrap()).unwrap();
    let id = format!("key_{}", &sha256(&value)[..16]);
    let exported: Api<Secret> = Api::namespaced(client.clone(), GATEWAY);
    let wait_for_entry = async |title: &str, present: bool| {
        eventually(title, MAX_DELAY, async || {
            let secret = exported.get(EXPORT).await?;
            ensure!(secret.data.iter().any(|data| data.contains_key(&id)) == present, "{:?}", secret.data);
            Ok(secret)
        })
        .await
    };
    let secret = wait_for_entry("the key is minted", true).await;
    assert_eq!(secret.type_.as_deref(), Some("keywright.dev/digests"));
    assert_eq!(secret.labels()["keywright.dev/export"], EXPORT);
    let entry: Value = serde_json::from_slice(&secret.data.unwrap()[&id].0).unwrap();
    assert_eq!(entry["keyHash"], format!("sha256:{}", sha256(&value)));
    edit(&client, &team, "checkout", json!({"active": false})).await;
    wait_for_entry("the key is inactive", false).await;

    let account = client_of_account(plane, "keywright").await;
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

/// Returns values that the schema accepts and that differ from `value` in one place.
fn changed_values(schema: &Value, value: &Value) -> Vec<Value> {
    match schema["type"].as_str().unwrap() {
        "object" => {
            let mut found = vec![];
            for (name, below) in schema["properties"].as_object().unwrap() {
                let changed = value.get(name).map_or_else(|| vec![sample(below)], |value| changed_values(below, value));
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
            for (index, item) in items.iter().enumerate() {
                found.extend(changed_values(&schema["items"], item).into_iter().map(|changed| {
                    let mut items = items.clone();
                    items[index] = changed;
                    json!(items)
                }));
            }
            if schema["maxItems"].as_u64().is_none_or(|max| (items.len() as u64) < max) {
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

/// Returns a value that the schema accepts.
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

/// The verifier must not change any other status field: a forged digest would be a forged key.
#[tokio::test]
async fn the_verifier_can_change_no_status_field_but_last_used_at() {
    let fixture = fixture().await;
    let client = fixture.plane.client().await.unwrap();
    let team = namespace(&client).await;
    let spec = json!({
        "type": "Team", "presets": ["Alerts"], "permissions": ["logs.data-api#high:ReadData"],
        "rotation": {"every": "720h", "overlap": "24h", "requestedAt": "2026-01-01T00:00:00Z"},
    });
    create_minted(&client, &team, "guarded", spec).await;
    edit(&client, &team, "guarded", json!({"rotation": {"requestedAt": "2026-01-02T00:00:00Z"}})).await;
    let keys: Api<ApiKey> = Api::namespaced(client.clone(), &team);
    let key = eventually("the key has two tokens and is reconciled", TIMEOUT, async || {
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
        Api::namespaced(client_of_account(fixture.plane, "keywright").await, &team),
        Api::namespaced(client_of_account(fixture.plane, "keywright-verifier").await, &team),
    ];
    let dry_run = PatchParams { dry_run: true, ..PatchParams::default() };
    let mut tested = 0;
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
                changed_values(below, value)
                    .into_iter()
                    .map(|other| json!([{"op": "replace", "path": path, "value": other}])),
            );
        } else {
            changes.push(json!([{"op": "add", "path": path, "value": sample(below)}]));
        }
        for change in changes {
            tested += 1;
            // The operator can make the same change, so the change itself is valid.
            as_operator
                .patch_status("guarded", &dry_run, &json_patch(change.clone()))
                .await
                .unwrap_or_else(|error| panic!("{change}: {error}"));
            // The same change together with an allowed one is denied too.
            let mut both = change.as_array().unwrap().clone();
            both.push(json!({"op": "add", "path": "/status/lastUsedAt", "value": "2026-01-01T00:00:00Z"}));
            for change in [change, json!(both)] {
                let answer = as_verifier.patch_status("guarded", &dry_run, &json_patch(change.clone())).await;
                let error = answer.err().unwrap_or_else(|| panic!("the change was accepted: {change}")).to_string();
                assert!(error.contains("may write only status.lastUsedAt"), "{change}: {error}");
            }
        }
    }
    assert!(present.len() >= 12 && tested > 50, "{tested} changes of the fields {present:?}");
    for field in ["conditions", "creator", "id", "permissions", "presets", "state", "tokens"] {
        assert!(present.contains(field), "{field}");
    }
}

#[tokio::test]
async fn the_verifier_can_set_last_used_at_only_to_later_times_up_to_now() {
    let fixture = fixture().await;
    let client = fixture.plane.client().await.unwrap();
    let team = namespace(&client).await;
    create_minted(&client, &team, "used", json!({"type": "Team", "presets": ["Alerts"]})).await;
    let verifier = client_of_account(fixture.plane, "keywright-verifier").await;
    let keys: Api<ApiKey> = Api::namespaced(verifier.clone(), &team);
    let params = PatchParams::default();
    let set_last_used = async |at: Value| {
        keys.patch_status("used", &params, &Patch::Merge(json!({"status": {"lastUsedAt": at}}))).await
    };
    let assert_rejected = |answer: kube::Result<ApiKey>, code: u16, text: &str| match answer {
        Err(kube::Error::Api(status)) => {
            assert!(status.code == code && status.message.contains(text), "{}: {}", status.code, status.message);
        }
        other => panic!("{other:?}"),
    };
    for at in ["2026-01-02T00:00:00Z", "2026-01-02T00:00:00Z", "2026-01-03T10:00:00Z", "2026-01-03T12:00:00+01:00"] {
        set_last_used(json!(at)).await.unwrap_or_else(|error| panic!("{at}: {error}"));
    }
    // Another replica wrote a later time: the verifier recognizes this by the code 422.
    assert_rejected(
        set_last_used(json!("2026-01-03T10:59:59Z")).await,
        422,
        "status.lastUsedAt: Invalid value: must not be earlier",
    );
    assert_rejected(set_last_used(Value::Null).await, 422, "status.lastUsedAt: Invalid value: must not be earlier");
    // Rejected: times that clients can't parse, and future times, which no correct time could replace. Future times get
    // 403, after which the verifier retries, unlike after 422.
    for at in ["9999-12-31T23:59:59Z", "9999-12-31T23:59:59-14:00", "0001-01-01T00:00:00Z", "2027-01-01t00:00:00Z"] {
        assert_rejected(
            set_last_used(json!(at)).await,
            422,
            "status.lastUsedAt: Invalid value: must be an RFC 3339 time between",
        );
    }
    let from_now = |minutes| json!(Timestamp::now() + SignedDuration::from_mins(minutes));
    for at in [from_now(6), from_now(24 * 60), json!("8999-12-31T23:59:59Z")] {
        assert_rejected(
            set_last_used(at).await,
            403,
            "status.lastUsedAt is more than five minutes later than the time of the API server",
        );
    }
    set_last_used(from_now(4)).await.expect("clocks may differ by five minutes");
    // Forged times in managedFields do not change the limit: the API server adds the time of the request itself.
    let all: Api<ApiKey> = Api::namespaced(client.clone(), &team);
    let mut forged = all.get("used").await.unwrap();
    for entry in forged.metadata.managed_fields.iter_mut().flatten() {
        entry.time = Some(Time("8999-12-31T23:59:59Z".parse().unwrap()));
    }
    forged.labels_mut().insert("a".to_owned(), "b".to_owned());
    let forged = all.replace("used", &PostParams::default(), &forged).await.unwrap();
    let times = forged.metadata.managed_fields.iter().flatten().filter_map(|entry| entry.time.as_ref());
    assert!(times.filter(|time| time.0.to_string().starts_with("8999")).count() > 1, "{:?}", forged.metadata);
    assert_rejected(set_last_used(from_now(60)).await, 403, "status.lastUsedAt is more than five minutes later");
    let before = Api::<ApiKey>::namespaced(client.clone(), &team).get("used").await.unwrap();
    let remove_status = Patch::Merge(json!({"status": null}));
    assert_rejected(keys.patch_status("used", &params, &remove_status).await, 403, "may write only status.lastUsedAt");

    // RBAC denies the spec.
    let spec = Patch::Merge(json!({"spec": {"active": false}}));
    assert_rejected(keys.patch("used", &params, &spec).await, 403, "cannot patch resource \"apikeys\"");
    // The status subresource ignores changes of metadata.
    let label = Patch::Merge(json!({"metadata": {"labels": {"a": "b"}}}));
    keys.patch_status("used", &params, &label).await.unwrap();
    let after = Api::<ApiKey>::namespaced(client.clone(), &team).get("used").await.unwrap();
    assert_eq!((after.labels(), &after.spec, &after.status), (before.labels(), &before.spec, &before.status));
    let secrets: Api<Secret> = Api::namespaced(verifier, &team);
    let error = secrets.get("used-secret").await.unwrap_err().to_string();
    assert!(error.contains("cannot get resource \"secrets\""), "{error}");

    // Other users can't change the status, not even a cluster administrator.
    let admin: Api<ApiKey> = Api::namespaced(client, &team);
    let patch = Patch::Merge(json!({"status": {"lastUsedAt": "2026-02-01T00:00:00Z"}}));
    assert_rejected(admin.patch_status("used", &params, &patch).await, 403, "only the operator");
}
