//! S4, S5, and one test for each class of security advisories of comparable operators.

use std::collections::BTreeSet;
use std::fmt::Write;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::support::keys::{RECORD, SECRET_TYPE, base64, sha256};
use crate::support::operator::NAMESPACE;
use k8s_openapi::api::authorization::v1::{ResourceAttributes, SubjectAccessReview, SubjectAccessReviewSpec};
use keywright::api::{KeyState, PermissionCatalog};
use keywright::domain::key::is_well_formed;
use kube::api::{ListParams, ObjectMeta};

use super::*;

/// The operator's user name.
const OPERATOR: &str = "system:serviceaccount:keywright-system:keywright";

/// The strings that reveal a value: the value, its random part, and both in base64 at each of the three alignments.
fn traces(value: &str) -> Vec<String> {
    let random = &value[4..47];
    let mut traces = vec![value.to_owned(), random.to_owned()];
    for text in [value, random] {
        for shift in 0..3 {
            let encoded = base64(&format!("{}{text}", "-".repeat(shift)));
            // The first and the last group depend on the surrounding text.
            traces.push(encoded[4..encoded.len() - 4].to_owned());
        }
    }
    traces
}

/// The first well-formed value in a text, plain or in base64.
fn value_in(text: &str) -> Option<String> {
    let plain = |text: &str| {
        ["kwp_", "kws_", "kwt_"].iter().flat_map(|prefix| text.match_indices(prefix)).find_map(|(at, _)| {
            text.get(at..at + keywright::domain::key::LEN).filter(|value| is_well_formed(value)).map(str::to_owned)
        })
    };
    let decode = |text: &str| serde_json::from_value(json!(text)).ok().map(|ByteString(bytes)| bytes);
    let encoded = || {
        let words = text.split(|c: char| !c.is_ascii_alphanumeric() && c != '+' && c != '/');
        words.filter(|word| word.len() >= 70).find_map(|word| {
            (0..4).find_map(|skip| {
                let rest = &word[skip..];
                let (whole, padding) = (rest.len() / 4 * 4, (4 - rest.len() % 4) % 4);
                let bytes = decode(&format!("{rest}{}", "=".repeat(padding))).or_else(|| decode(&rest[..whole]))?;
                plain(&String::from_utf8_lossy(&bytes))
            })
        })
    };
    plain(text).or_else(encoded)
}

#[test]
fn value_search_finds_plain_and_encoded_values() {
    let mut rng = rand::rngs::SysRng;
    let value = keywright::domain::key::Key::mint(keywright::api::KeyType::Team, &mut rng).unwrap().expose().to_owned();
    for prefix in ["", "-", "ab", "xyz", "{\"data\":\""] {
        let encoded = base64(&format!("{prefix}{value}{prefix}"));
        assert_eq!(value_in(&format!("x={encoded}\n")).as_ref(), Some(&value), "{prefix:?}");
        assert!(traces(&value).iter().any(|trace| encoded.contains(trace)), "{prefix:?}");
    }
    assert_eq!(value_in(&format!("a{value}b")), Some(value.clone()));
    assert_eq!(value_in(&value.replace("kwt_", "kwt-")), None);
    assert!(traces(&value).iter().any(|trace| format!("prefix {}", &value[4..]).contains(trace)));
}

/// S5. With log level trace, keys are minted, rotated, in conflict, lost, changed by other writers, and their writes
/// rejected by the apiserver. Then all outputs of the operator are searched for the values.
///
/// Classes: a secret in a log, a status or an error (CVE-2025-23216, CVE-2025-55190, CVE-2024-31216, CVE-2022-23469,
/// CVE-2025-62879), in an annotation (CVE-2023-40029, CVE-2026-42880, CVE-2026-45737).
#[tokio::test]
async fn values_are_in_no_log_status_metric_event_or_error() {
    let team = Team::new().await;
    let mut values = BTreeSet::new();
    let mut rejection = String::new();
    let (_, value) = team.minted("busy", spec_with(json!({"secret": {"annotations": {"note": "x"}}}))).await;
    values.insert(value.clone());
    for (ago, overlap) in [(3, "0s"), (2, "1h"), (1, "30m")] {
        team.edit("busy", json!({"rotation": {"requestedAt": from_now(-ago), "overlap": overlap}})).await;
        team.ready("busy").await;
        values.insert(team.value("busy").await);
    }
    // Another writer puts a value into the Secret of another key.
    let (_, leaked) = team.minted("leaked", team_spec()).await;
    values.insert(leaked.clone());
    team.tamper("busy", json!({"data": {"key-value": data(&leaked)}})).await;
    team.until("busy", "SecretValueChanged", |key| reason(key) == "SecretValueChanged").await;
    team.tamper("busy", json!({"data": {"key-value": data("kwt_not-a-key"), "other": data(&leaked)}})).await;
    tokio::time::sleep(CHECK_INTERVAL * 2).await;
    team.edit("busy", json!({"rotation": {"requestedAt": from_now(0)}})).await;
    team.ready("busy").await;
    values.insert(team.value("busy").await);
    // The apiserver rejects writes with a value in the request.
    let immutable = Patch::Merge(json!({"immutable": true}));
    team.secrets.patch("leaked-secret", &PatchParams::default(), &immutable).await.unwrap();
    team.edit("leaked", json!({"rotation": {"requestedAt": from_now(0)}})).await;
    team.until("leaked", "SecretWriteFailed", |key| reason(key) == "SecretWriteFailed").await;
    let quota = json!({"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "none"},
        "spec": {"hard": {"count/secrets": "0"}}});
    team.kubectl(&["apply", "-f", &team.file(&quota)]).unwrap();
    team.kubectl(&["wait", "--for=jsonpath={.status.hard.count/secrets}=0", "quota/none", "--timeout=60s"]).unwrap();
    team.create("quota", team_spec()).await;
    team.until("quota", "SecretWriteFailed", |key| reason(key) == "SecretWriteFailed").await;
    team.kubectl(&["delete", "quota", "none"]).unwrap();
    team.ready("quota").await;
    values.insert(team.value("quota").await);
    // Conflict, loss, and a restore of a value under another name.
    let copy = Secret { metadata: ObjectMeta::default(), ..backup(&team.secret("leaked").await) };
    let copy = Secret { immutable: None, ..copy };
    let mut foreign = copy.clone();
    foreign.metadata.name = Some("conflict-secret".to_owned());
    team.secrets.create(&PostParams::default(), &foreign).await.unwrap();
    team.create("conflict", team_spec()).await;
    team.until("conflict", "in conflict", |key| reason(key) == "SecretNotAuthentic").await;
    team.secrets.delete("quota-secret", &DeleteParams::default()).await.unwrap();
    team.until("quota", "lost", |key| state(key) == Some(KeyState::Lost)).await;
    // The response of admission to an invalid spec.
    let confused = json!({"type": "Team", "presets": ["Alertz"], "displayName": "x"});
    let _ = write!(rejection, "{:?}", team.keys.create(&PostParams::default(), &key("confused", &confused)).await);
    assert!(values.len() >= 7, "{} values", values.len());

    let operator = team.cluster.operator.read().await;
    let mut places = vec![
        ("metrics".to_owned(), operator.metrics().await.unwrap()),
        ("admission".to_owned(), rejection),
        ("argv".to_owned(), std::fs::read_to_string(format!("/proc/{}/cmdline", operator.id())).unwrap()),
        ("environment".to_owned(), std::fs::read_to_string(format!("/proc/{}/environ", operator.id())).unwrap()),
    ];
    for log in team.cluster.logs() {
        let text = String::from_utf8_lossy(&std::fs::read(&log).unwrap()).into_owned();
        places.push((log.display().to_string(), text));
    }
    assert!(places.iter().any(|(_, text)| text.contains("TRACE")), "the operator does not log at level trace");
    let all = "events,events.events.k8s.io,apikeys,permissioncatalogs,configmaps,leases";
    // As JSON: kubectl cannot print the long map keys of `largest_invalid_spec` as YAML.
    let everything = ["get", all, "-A", "-o", "json", "--show-managed-fields"];
    let objects = async || crate::support::output(team.cluster.plane.kubectl().args(everything));
    places.push((
        "objects".to_owned(),
        crate::support::eventually("all objects are read", crate::support::TIMEOUT, objects).await,
    ));
    for secret in team.secrets.list(&ListParams::default()).await.unwrap() {
        let metadata = serde_json::to_string(&secret.metadata).unwrap();
        places.push((format!("metadata of Secret {}", secret.name_any()), metadata));
    }
    for (place, text) in &places {
        assert!(!text.is_empty(), "{place} is empty");
        for value in &values {
            for trace in traces(value) {
                assert!(!text.contains(&trace), "{place} contains a value of this test");
            }
        }
        // This also finds values of other tests.
        assert!(value_in(text).is_none(), "{place} contains a value");
    }
}

/// Confused deputy: a field of a custom resource names another namespace, and the operator reads from it with its own
/// rights (CVE-2026-22822, CVE-2025-55196, CVE-2026-42875, CVE-2026-39961, CVE-2025-29781, CVE-2024-43803,
/// CVE-2026-44935, CVE-2026-54495, CVE-2026-22039, CVE-2026-41068, CVE-2026-29773, CVE-2026-41174). SSRF and
/// exfiltration of tokens (CVE-2026-41323, CVE-2026-40868, CVE-2026-4789, CVE-2026-34984).
#[tokio::test]
async fn confused_deputy_no_field_reaches_another_namespace_or_host() {
    static CALLS: AtomicUsize = AtomicUsize::new(0);
    let (team, victim) = (Team::new().await, Team::new().await);
    victim.minted("victim", team_spec()).await;
    let before = victim.secrets.list(&ListParams::default()).await.unwrap().items;
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/x", listener.local_addr().unwrap());
    std::thread::spawn(move || {
        listener.incoming().for_each(|_| {
            CALLS.fetch_add(1, Ordering::SeqCst);
        });
    });

    let other = &victim.namespace;
    let attempts = [
        format!("{other}/victim-secret"),
        format!("{other}/victim"),
        format!("../{other}/victim-secret"),
        format!("../../namespaces/{other}/secrets/victim-secret"),
        format!("..%2f{other}%2fvictim-secret"),
        format!("victim-secret.{other}"),
        format!("victim-secret?namespace={other}"),
        format!("{{{{ (lookup \"v1\" \"Secret\" \"{other}\" \"victim-secret\").data }}}}"),
        format!("${{{other}/victim-secret}}"),
        "../x".to_owned(),
        "kube-system".to_owned(),
        url,
    ];
    let fields: [fn(&mut Value, &str); 14] = [
        |spec, text| spec["displayName"] = json!(text),
        |spec, text| *spec = json!({"type": "Personal", "user": text, "presets": ["Alerts"]}),
        |spec, text| spec["presets"] = json!([text]),
        |spec, text| spec["permissions"] = json!([text]),
        |spec, text| spec["accessPolicyRef"] = json!({"name": text}),
        |spec, text| spec["accessPolicyRef"] = json!({"name": "x", "namespace": text}),
        |spec, text| spec["expiresAt"] = json!(text),
        |spec, text| spec["rotation"] = json!({"every": text}),
        |spec, text| spec["rotation"] = json!({"requestedAt": text}),
        |spec, text| spec["secret"] = json!({"name": text}),
        |spec, text| spec["secret"] = json!({"namespace": text}),
        |spec, text| spec["secret"] = json!({"key": text}),
        |spec, text| spec["secret"] = json!({"labels": {text: "x", "y": text}}),
        |spec, text| spec["secret"] = json!({"annotations": {"y": text}}),
    ];
    let mut accepted = vec![];
    for (number, (field, text)) in fields.iter().flat_map(|f| attempts.iter().map(move |a| (f, a))).enumerate() {
        let mut spec = team_spec();
        field(&mut spec, text);
        let name = format!("fuzz-{number}");
        let object: kube::api::DynamicObject = serde_json::from_value(manifest(&name, &spec)).unwrap();
        let kind = kube::core::ApiResource::erase::<ApiKey>(&());
        let keys = Api::<kube::api::DynamicObject>::namespaced_with(team.client.clone(), &team.namespace, &kind);
        match keys.create(&PostParams::default(), &object).await {
            Ok(_) => accepted.push(name),
            Err(kube::Error::Api(status)) => assert_eq!(status.code, 422, "{name}: {}", status.message),
            Err(error) => panic!("{name}: {error}"),
        }
    }
    assert!(accepted.len() >= attempts.len() * 2, "too few specs were accepted for this test to be conclusive");
    let mut expected = BTreeSet::new();
    for name in &accepted {
        let key = team.ready(name).await;
        expected.insert(status(&key).secret_ref.clone().unwrap().name);
        assert!(!serde_json::to_string(&key.status).unwrap().contains("victim-secret/"), "{name}");
    }
    let secrets = team.secrets.list(&ListParams::default()).await.unwrap().items;
    assert_eq!(secrets.iter().map(ResourceExt::name_any).collect::<BTreeSet<_>>(), expected);
    assert!(secrets.iter().all(|secret| secret.type_.as_deref() == Some(SECRET_TYPE)));
    let stolen = victim.value("victim").await;
    assert!(secrets.iter().all(|secret| value_of(secret).is_none_or(|value| value != stolen)));
    assert_eq!(
        victim.secrets.list(&ListParams::default()).await.unwrap().items,
        before,
        "the Secrets of the victim changed"
    );
    assert_eq!(CALLS.load(Ordering::SeqCst), 0, "the operator connected to a URL of a spec");
    let is_name = |text: &str| text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"-.".contains(&b));
    for request in team.cluster.proxy.requests().iter().filter(|request| request.path.contains("/secrets")) {
        let parts: Vec<_> = request.path.split('/').collect();
        assert_eq!((parts[1..4].join("/"), parts[5]), ("api/v1/namespaces".to_owned(), "secrets"), "{request:?}");
        assert!(parts.len() <= 7 && parts[4..].iter().all(|part| is_name(part)), "{request:?}");
        let of_the_victim = parts[4] == other && parts.get(6).is_some_and(|secret| *secret != "victim-secret");
        assert!(!of_the_victim, "{request:?}");
    }
}

/// The operator writes an object that an attacker controls (CVE-2026-42876: a Secret of type service-account-token, for
/// which the control plane then creates a token; CVE-2026-22872, CVE-2026-65835, CVE-2021-41254).
#[tokio::test]
async fn attacker_controlled_template_never_creates_a_service_account_token() {
    let team = Team::new().await;
    let spec = spec_with(json!({"secret": {
        "type": "kubernetes.io/service-account-token",
        "annotations": {"kubernetes.io/service-account.name": "default", "kubernetes.io/service-account.uid": "x"},
        "labels": {"kubernetes.io/legacy-token-last-used": "2026-01-01", "type": "service-account-token"},
    }}));
    let kind = kube::core::ApiResource::erase::<ApiKey>(&());
    let keys = Api::<kube::api::DynamicObject>::namespaced_with(team.client.clone(), &team.namespace, &kind);
    keys.create(&PostParams::default(), &serde_json::from_value(manifest("token", &spec)).unwrap()).await.unwrap();
    let key = team.ready("token").await;
    // The token controller would have written its token by now.
    tokio::time::sleep(CHECK_INTERVAL).await;
    let secret = team.secret("token").await;
    assert_eq!(secret.type_.as_deref(), Some(SECRET_TYPE));
    assert_eq!(secret.data.as_ref().unwrap().keys().collect::<Vec<_>>(), ["key-value"]);
    assert!(
        !serde_json::to_string(&team.keys.get("token").await.unwrap())
            .unwrap()
            .contains("service-account-token\",\"key")
    );
    assert_eq!(tokens(&key).len(), 1);

    // With the operator's credentials other types cannot be written either: a policy restricts the type.
    let operator = team.cluster.plane.client_as(OPERATOR, &[]).await.unwrap();
    let secrets: Api<Secret> = Api::namespaced(operator, &team.namespace);
    for kind in ["kubernetes.io/service-account-token", "Opaque", "kubernetes.io/dockerconfigjson"] {
        let secret = json!({
            "metadata": {"name": "evil", "annotations": {"kubernetes.io/service-account.name": "default"}},
            "type": kind, "data": {".dockerconfigjson": data("{}")},
        });
        let error = secrets.create(&PostParams::default(), &serde_json::from_value(secret).unwrap()).await.unwrap_err();
        assert!(error.to_string().contains("may write Secrets of type keywright.dev/api-key"), "{kind}: {error}");
    }
}

/// Excessive rights in the chart (CVE-2024-45041, CVE-2023-29018).
#[tokio::test]
async fn operator_has_no_excessive_rights() {
    let cluster = cluster().await;
    let client = cluster.plane.client().await.unwrap();
    let namespace = crate::support::namespace(&client).await;
    let reviews: Api<SubjectAccessReview> = Api::all(client);
    let may = async |verb: &str, group: &str, resource: &str, namespace: &str| {
        let attributes = ResourceAttributes {
            verb: Some(verb.to_owned()),
            group: Some(group.to_owned()),
            resource: Some(resource.to_owned()),
            namespace: Some(namespace.to_owned()),
            ..ResourceAttributes::default()
        };
        let spec = SubjectAccessReviewSpec {
            user: Some(OPERATOR.to_owned()),
            groups: Some(vec![format!("system:serviceaccounts:{NAMESPACE}"), "system:authenticated".to_owned()]),
            resource_attributes: Some(attributes),
            ..SubjectAccessReviewSpec::default()
        };
        let review = SubjectAccessReview { spec, ..SubjectAccessReview::default() };
        reviews.create(&PostParams::default(), &review).await.unwrap().status.unwrap().allowed
    };
    assert!(
        may("get", "", "secrets", &namespace).await,
        "the operator may not get Secrets: the test uses a wrong user"
    );
    let rbac = "rbac.authorization.k8s.io";
    for (verb, group, resource) in [
        ("list", "", "secrets"),
        ("watch", "", "secrets"),
        ("update", "", "secrets"),
        ("deletecollection", "", "secrets"),
        ("create", "", "serviceaccounts/token"),
        ("create", "", "pods"),
        ("create", "", "pods/exec"),
        ("get", "", "configmaps"),
        ("impersonate", "", "users"),
        ("impersonate", "", "serviceaccounts"),
        ("escalate", rbac, "clusterroles"),
        ("bind", rbac, "clusterroles"),
        ("create", rbac, "rolebindings"),
        ("update", "keywright.dev", "apikeys"),
        ("patch", "keywright.dev", "apikeys"),
        ("create", "keywright.dev", "apikeys"),
        ("delete", "keywright.dev", "apikeys"),
        ("*", "*", "*"),
    ] {
        assert!(!may(verb, group, resource, &namespace).await, "the operator may {verb} {resource}.{group}");
        assert!(!may(verb, group, resource, "").await, "the operator may {verb} {resource}.{group} everywhere");
    }
    // This installation has the right to delete Secrets, which the plugin OwnerReferencesPermissionEnforcement
    // requires. A policy denies its use.
    let operator = cluster.plane.client_as(OPERATOR, &["system:authenticated"]).await.unwrap();
    let secrets: Api<Secret> = Api::namespaced(operator, &namespace);
    let admin: Api<Secret> = Api::namespaced(cluster.plane.client().await.unwrap(), &namespace);
    let bystander = serde_json::from_value(json!({"metadata": {"name": "bystander"}})).unwrap();
    admin.create(&PostParams::default(), &bystander).await.unwrap();
    let denied = secrets.delete("bystander", &kube::api::DeleteParams::default()).await.unwrap_err().to_string();
    assert!(denied.contains("the operator must not delete Secrets"), "{denied}");
}

/// An administrator of a namespace gains rights in the cluster through the operator (CVE-2026-11769). A forged digest
/// in a status would be a forged key.
#[tokio::test]
async fn roles_edit_and_admin_of_a_namespace_gain_no_rights_outside_it() {
    let team = Team::new().await;
    let other = Team::new().await;
    let (key, _) = team.minted("mine", team_spec()).await;
    for role in ["edit", "admin"] {
        let user = format!("{role}@{}", team.namespace);
        let binding = format!("--clusterrole={role}");
        team.kubectl(&["create", "rolebinding", role, &binding, &format!("--user={user}")]).unwrap();
        let (name, everything) = (format!("{role}-use"), "--clusterrole=keywright-everything");
        team.kubectl(&["create", "rolebinding", &name, everything, &format!("--user={user}")]).unwrap();
        let client = team.cluster.plane.client_as(&user, &[]).await.unwrap();
        let keys: Api<ApiKey> = Api::namespaced(client.clone(), &team.namespace);
        eventually("the role is bound", TIMEOUT, async || {
            Ok(keys.create(&PostParams::default(), &super::key(role, &team_spec())).await?)
        })
        .await;
        team.ready(role).await;

        let forbidden = |result: kube::Result<ApiKey>, action: &str| match result {
            Err(kube::Error::Api(status)) => assert_eq!(status.code, 403, "{role}: {action}: {}", status.message),
            other => panic!("{role}: {action}: {other:?}"),
        };
        let mut forged = team.keys.get("mine").await.unwrap();
        forged.status.as_mut().unwrap().tokens[0].sha256 = "0".repeat(64);
        forbidden(keys.replace_status("mine", &PostParams::default(), &forged).await, "replace status");
        let patch = json!({"status": {"permissions": ["team-payments:UpdateConfig"]}});
        forbidden(keys.patch_status("mine", &PatchParams::default(), &Patch::Merge(&patch)).await, "patch status");
        // A status in a create or update of the main resource is ignored.
        let mut created = super::key(&format!("created-{role}"), &spec_with(json!({"active": false})));
        created.status = forged.status.clone();
        let created = keys.create(&PostParams::default(), &created).await.unwrap();
        assert_eq!(created.status, None);
        let patched = keys.patch("mine", &PatchParams::default(), &Patch::Merge(&patch)).await.unwrap();
        assert!(status(&patched).permissions.is_empty());

        let elsewhere: Api<ApiKey> = Api::namespaced(client.clone(), &other.namespace);
        forbidden(elsewhere.create(&PostParams::default(), &super::key("x", &team_spec())).await, "another namespace");
        let catalogs: Api<PermissionCatalog> = Api::all(client);
        let catalog = json!({"metadata": {"name": "own"}, "spec": {"permissions": [{"name": "a:Read"}]},
            "apiVersion": "keywright.dev/v1alpha1", "kind": "PermissionCatalog"});
        let catalog: PermissionCatalog = serde_json::from_value(catalog).unwrap();
        let error = catalogs.create(&PostParams::default(), &catalog).await.unwrap_err();
        assert!(matches!(&error, kube::Error::Api(status) if status.code == 403), "{error}");
    }
    // A cluster administrator cannot write a status either.
    let mut forged = team.keys.get("mine").await.unwrap();
    forged.status.as_mut().unwrap().tokens[0].sha256 = "0".repeat(64);
    let error = team.keys.replace_status("mine", &PostParams::default(), &forged).await.unwrap_err();
    assert!(error.to_string().contains("forged"), "{error}");
    assert_eq!(tokens(&team.keys.get("mine").await.unwrap()), tokens(&key));
}

#[tokio::test]
async fn role_view_sees_keys_and_no_secrets() {
    let team = Team::new().await;
    team.minted("seen", team_spec()).await;
    let user = format!("view@{}", team.namespace);
    team.kubectl(&["create", "rolebinding", "view", "--clusterrole=view", &format!("--user={user}")]).unwrap();
    let client = team.cluster.plane.client_as(&user, &[]).await.unwrap();
    let keys: Api<ApiKey> = Api::namespaced(client.clone(), &team.namespace);
    eventually("the role is bound", TIMEOUT, async || Ok(keys.get("seen").await?)).await;
    let secrets: Api<Secret> = Api::namespaced(client, &team.namespace);
    assert!(matches!(secrets.get("seen-secret").await, Err(kube::Error::Api(status)) if status.code == 403));
    let error = keys.delete("seen", &DeleteParams::default()).await.unwrap_err();
    assert!(matches!(&error, kube::Error::Api(status) if status.code == 403), "{error}");
}

/// Users who may write Secrets (role `edit`) must not be able to put a digest into a status through the record, for
/// instance the digest of another team's key, which every viewer of that key can read. Forges the record of a key with
/// `forge`; returns the digests of its status before and after, and the digest of the other team's key.
async fn with_forged_record(forge: impl FnOnce(&mut Value, &str)) -> (Vec<String>, Vec<String>, String) {
    let (team, victim) = (Team::new().await, Team::new().await);
    let (theirs, _) = victim.minted("theirs", team_spec()).await;
    let stolen = tokens(&theirs)[0].sha256.clone();
    let (before, _) = team.minted("ours", team_spec()).await;
    let digests = |key: &ApiKey| tokens(key).iter().map(|token| token.sha256.clone()).collect::<Vec<_>>();
    team.forge("ours", |record| forge(record, &stolen)).await;
    // By the periodic check, and by a change of the spec.
    tokio::time::sleep(CHECK_INTERVAL * 2).await;
    team.edit("ours", json!({"displayName": "x"})).await;
    let after = team.settled("ours").await;
    (digests(&before), digests(&after), stolen)
}

#[tokio::test]
async fn forged_current_digest_in_the_record_is_not_accepted() {
    let (before, after, stolen) =
        with_forged_record(|record, stolen| record["current"]["sha256"] = json!(stolen)).await;
    assert!(!after.contains(&stolen), "the digest of another team's key is the current one of this key");
    assert_eq!(after, before, "the minted digest was removed");
}

#[tokio::test]
async fn forged_previous_digest_in_the_record_is_not_accepted() {
    let (before, after, stolen) = with_forged_record(|record, stolen| {
        record["previous"] = json!({"sha256": stolen, "mintedAt": from_now(0), "expiresAt": "2099-01-01T00:00:00Z"});
    })
    .await;
    assert!(!after.contains(&stolen), "the digest of another team's key is in the overlap of this key");
    assert_eq!(after, before);
}

/// Rotation extends the permissions of a key or the destination of its value (CVE-2026-22728: the rotated object trusts
/// its template). This test changes the Secret; module `bypass` tests invalid specs.
#[tokio::test]
async fn rotation_ignores_grants_written_into_the_secret() {
    let team = Team::new().await;
    let (before, _) = team.minted("narrow", spec_with(json!({"presets": ["Alerts"]}))).await;
    team.forge("narrow", |record| {
        record["permissions"] = json!(["team-payments:UpdateConfig"]);
        record["presets"] = json!(["APIKeys"]);
        record["namespace"] = json!("kube-system");
        record["labels"] = json!(["app.kubernetes.io/managed-by"]);
    })
    .await;
    team.tamper(
        "narrow",
        json!({"metadata": {"annotations": {"keywright.dev/permissions": "team-payments:UpdateConfig"}}}),
    )
    .await;
    team.edit("narrow", json!({"rotation": {"requestedAt": from_now(0), "overlap": "0s"}})).await;
    let key = team.ready("narrow").await;
    assert_eq!(
        (&status(&key).presets, &status(&key).permissions),
        (&status(&before).presets, &status(&before).permissions)
    );
    let secret = team.secret("narrow").await;
    assert_eq!(secret.type_.as_deref(), Some(SECRET_TYPE));
    assert_eq!(tokens(&key)[0].sha256, sha256(&value_of(&secret).unwrap()));
    let fields = record(&secret).as_object().unwrap().keys().cloned().collect::<Vec<_>>();
    assert_eq!(record(&secret)["namespace"], team.namespace.as_str());
    for forged in ["permissions", "presets"] {
        assert!(!fields.contains(&forged.to_owned()), "{forged} is still in the record");
    }
    assert_eq!(secret.labels()["app.kubernetes.io/managed-by"], "keywright");
    assert!(secret.annotations().contains_key(RECORD));
}

/// A reused or predictable initial credential (CVE-2025-4057).
#[tokio::test]
async fn every_minted_value_is_unique() {
    let team = Team::new().await;
    let mut values = BTreeSet::new();
    for number in 0..20 {
        team.create(&format!("k{number}"), team_spec()).await;
    }
    for number in 0..20 {
        let name = format!("k{number}");
        team.ready(&name).await;
        values.insert(team.value(&name).await);
    }
    let prefixes: BTreeSet<_> = values.iter().map(|value| value[4..12].to_owned()).collect();
    assert_eq!((values.len(), prefixes.len()), (20, 20), "two values share their first 48 bits");
    team.delete("k0").await;
    team.minted("k0", team_spec()).await;
    assert!(values.insert(team.value("k0").await), "a recreated key has an old value");
}

/// An invalid spec with as many and as long names as the CRD admits, similar to real ones: each name is compared with
/// the whole catalog.
fn largest_invalid_spec() -> Value {
    let permissions: Vec<_> = (0..512).map(|number| format!("{:x<120}:{number:04}", "logs.data-ingress")).collect();
    let presets: Vec<_> = (0..64).map(|number| format!("{:é<60}{number}", "SendData")).collect();
    let label = |number| (format!("{number} {}", "\\u0000(a+)+$".repeat(100)), json!("x"));
    let labels: serde_json::Map<_, _> = (0..32).map(label).collect();
    json!({"type": "Team", "presets": presets, "permissions": permissions, "secret": {"labels": labels}})
}

/// One tenant blocks the webhook for all (CVE-2025-25207, CVE-2025-25208, CVE-2024-12401, CVE-2026-65834).
#[tokio::test]
async fn largest_invalid_spec_is_rejected_within_the_webhook_timeout() {
    let team = Team::new().await;
    let started = std::time::Instant::now();
    let answer = team.keys.create(&PostParams::default(), &key("big", &largest_invalid_spec())).await;
    let took = started.elapsed();
    let Err(kube::Error::Api(status)) = answer else { panic!("not rejected: {answer:?}") };
    let message: String = status.message.chars().take(300).collect();
    assert_eq!((status.code, status.reason.as_str()), (422, "Invalid"), "after {took:?}: {message}");
    assert!(took < Duration::from_secs(2), "{took:?}: the webhook timeout of the apiserver is 5 s");
}

/// One tenant blocks the controller for all (CVE-2026-25518, CVE-2026-23881, CVE-2026-41485).
#[tokio::test]
async fn largest_invalid_specs_of_one_team_do_not_delay_another_team() {
    let (team, other) = (Team::bypassing().await, Team::new().await);
    for number in 0..4 {
        team.create(&format!("big-{number}"), largest_invalid_spec()).await;
    }
    let started = std::time::Instant::now();
    other.minted("small", team_spec()).await;
    assert!(started.elapsed() < Duration::from_secs(5), "another team waited {:?}", started.elapsed());
    for number in 0..4 {
        let key = team.settled(&format!("big-{number}")).await;
        assert_eq!(super::state(&key), Some(KeyState::Rejected));
        assert!(serde_json::to_string(&key.status).unwrap().len() < 32 * 1024, "the status is too large");
    }
    let operator = team.cluster.operator.read().await;
    assert!(operator.get("/healthz").await.is_ok());
}
