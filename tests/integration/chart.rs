//! The chart with a real helm on a real API server: validation of the rendered objects, rights, install, upgrade,
//! uninstall, reinstall, and the plain manifests.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::Command;

use crate::support::operator::NAMESPACE;
use crate::support::{ControlPlane, Operator, Options, Release, TIMEOUT, eventually, output, plane, repository};
use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

/// Starts a separate control plane, for tests that change cluster-scoped objects.
async fn new_control_plane() -> ControlPlane {
    ControlPlane::start(&crate::support::kubernetes_version()).await.unwrap_or_else(|error| panic!("{error:#}"))
}

fn chart() -> std::path::PathBuf {
    repository().join("charts/keywright")
}

fn kubectl(plane: &ControlPlane, args: &[&str]) -> String {
    output(plane.kubectl().args(args)).unwrap_or_else(|error| panic!("{error:#}"))
}

fn get(plane: &ControlPlane, args: &[&str]) -> Value {
    serde_json::from_str(&kubectl(plane, &[&["get", "-o", "json"], args].concat())).unwrap()
}

fn file(plane: &ControlPlane, name: &str, text: &str) -> String {
    let path = plane.folder().join(name);
    std::fs::write(&path, text).unwrap();
    path.to_str().unwrap().to_owned()
}

fn template(plane: &ControlPlane, values: &[&str]) -> Result<String> {
    let mut helm = plane.helm();
    helm.args(["template", "keywright"]).arg(chart()).args(["--namespace", NAMESPACE]);
    output(helm.args(values.iter().flat_map(|value| ["--set-json", value])))
}

/// Parses the YAML documents that helm rendered.
fn documents(rendered: &str) -> Vec<Value> {
    let documents = rendered.split("\n---\n").map(|document| document.trim_start_matches("---\n"));
    let parsed = documents
        .map(|document| serde_saphyr::from_str::<Value>(document).unwrap_or_else(|e| panic!("{e}: {document}")));
    parsed.filter(|document| !document.is_null()).collect()
}

fn names(documents: &[Value]) -> BTreeSet<String> {
    let name = |object: &Value| {
        format!("{}/{}", object["kind"].as_str().unwrap(), object["metadata"]["name"].as_str().unwrap())
    };
    documents.iter().map(name).collect()
}

/// Sets of values that together cover every branch of the templates.
const VALUES: [&[&str]; 9] = [
    &[],
    &["verifier.enabled=false", "metrics.prometheusRule.enabled=true"],
    &[
        "verifier.tls.enabled=false",
        "verifier.autoscaling.enabled=true",
        r#"verifier.lastUsed.interval="0s""#,
        r#"verifier.maxStaleness="0s""#,
        "verifier.maxConnections=100",
        r#"verifier.keyFrom=["query:api key", "header:X-Key"]"#,
        "export.enabled=true",
        r#"export.kind="Secret""#,
        r#"export.namespace="gateway""#,
        r#"verifier.defaultPermission="alerts:Read,logs.data-api#high:ReadData""#,
        r#"verifier.introspectionPermission="off""#,
        r#"verifier.introspectionClusterPermission="off""#,
        "verifier.tellKeyNames=true",
        "verifier.port=8443",
        "verifier.service.grpcPort=1",
        "verifier.service.httpPort=2",
        r#"verifier.service.annotations={"a": "b"}"#,
        r#"verifier.networkPolicy.from=[{"namespaceSelector": {"matchLabels": {"gateway": "yes"}}}]"#,
        "metrics.prometheusRule.enabled=true",
    ],
    &[
        "export.enabled=true",
        r#"export.namespace="keywright-system""#,
        "verifier.replicas=1",
        r#"verifier.extraArgs=["--log=debug"]"#,
        r#"verifier.serviceAccount.annotations={"a": "b"}"#,
        r#"verifier.podDisruptionBudget.maxUnavailable="50%""#,
        r#"verifier.podLabels={"team": "platform"}"#,
        r#"verifier.podAnnotations={"example.com/a": "b"}"#,
        r#"verifier.nodeSelector={"kubernetes.io/os": "linux"}"#,
        r#"verifier.tolerations=[{"key": "a", "operator": "Exists"}]"#,
        r#"verifier.topologySpreadConstraints=[{"maxSkew": 1, "topologyKey": "zone", "whenUnsatisfiable": "ScheduleAnyway", "labelSelector": {"matchLabels": {"a": "b"}}}]"#,
        r#"verifier.priorityClassName="high""#,
    ],
    &["certManager.enabled=true"],
    &["certManager.enabled=true", r#"certManager.issuerRef={"kind": "ClusterIssuer", "name": "internal"}"#],
    &[
        "metrics.podMonitor.enabled=true",
        "metrics.serviceMonitor.enabled=true",
        "metrics.prometheusRule.enabled=true",
        r#"metrics.serviceMonitor.labels={"release": "prometheus"}"#,
    ],
    &[
        "replicas=1",
        "crds.enabled=false",
        "catalog.enabled=false",
        "rbac.aggregate=false",
        "admissionPolicies.enabled=false",
        "networkPolicy.enabled=false",
        "serviceAccount.create=false",
        r#"serviceAccount.name="given""#,
        "verifier.serviceAccount.create=false",
        r#"verifier.serviceAccount.name="other""#,
    ],
    &[
        "replicas=5",
        "crds.keep=false",
        r#"fullnameOverride="other""#,
        r#"image={"repository": "example.com/keywright", "tag": "1", "digest": "sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef", "pullPolicy": "Always"}"#,
        r#"imagePullSecrets=[{"name": "pull"}]"#,
        r#"extraArgs=["--concurrency=3"]"#,
        r#"podDisruptionBudget.minAvailable="50%""#,
        r#"podLabels={"team": "platform"}"#,
        r#"podAnnotations={"example.com/a": "b"}"#,
        r#"nodeSelector={"kubernetes.io/os": "linux"}"#,
        r#"tolerations=[{"key": "a", "operator": "Exists"}]"#,
        r#"affinity={"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [{"matchExpressions": [{"key": "a", "operator": "Exists"}]}]}}}"#,
        r#"topologySpreadConstraints=[{"maxSkew": 1, "topologyKey": "zone", "whenUnsatisfiable": "ScheduleAnyway", "labelSelector": {"matchLabels": {"a": "b"}}}]"#,
        r#"priorityClassName="system-cluster-critical""#,
        r#"resources={"requests": {"cpu": "1"}}"#,
        r#"serviceAccount.annotations={"a": "b"}"#,
        r#"log={"level": "debug", "format": "text"}"#,
        r#"secretCheckInterval="1m""#,
        "webhook.port=8443",
        "webhook.timeoutSeconds=10",
        "health.port=9090",
        "networkPolicy.apiServerPorts=[6444]",
        r#"networkPolicy.apiServer=[{"ipBlock": {"cidr": "10.0.0.2/32"}}]"#,
        r#"networkPolicy.metricsFrom=[{"namespaceSelector": {"matchLabels": {"a": "b"}}}]"#,
        r#"webhook.clientCA={"configMap": "webhook-client-ca", "key": "client-ca.crt"}"#,
    ],
];

/// Kinds whose CRDs are not installed on the test's API server.
const FOREIGN: [&str; 5] = ["Certificate", "Issuer", "PodMonitor", "ServiceMonitor", "PrometheusRule"];

#[tokio::test]
async fn every_rendered_object_passes_strict_validation_of_the_api_server() {
    let plane = plane().await;
    let namespace = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}});
    kubectl(plane, &["apply", "-f", &file(plane, "namespace.json", &namespace.to_string())]);
    let mut foreign = BTreeSet::new();
    for (number, values) in VALUES.iter().enumerate() {
        let rendered = template(plane, values).unwrap_or_else(|error| panic!("{values:?}: {error:#}"));
        let (others, own): (Vec<_>, Vec<_>) =
            documents(&rendered).into_iter().partition(|object| FOREIGN.contains(&object["kind"].as_str().unwrap()));
        foreign.extend(others.iter().map(|object| object["kind"].as_str().unwrap().to_owned()));
        assert_eq!(own.len(), names(&own).len(), "{values:?}: object names must be unique");
        let list = json!({"apiVersion": "v1", "kind": "List", "items": own});
        let file = file(plane, &format!("rendered-{number}.json"), &list.to_string());
        for server_side in [true, false] {
            let mut apply = plane.kubectl();
            apply.args(["create", "--dry-run=server", "--validate=strict", "-f", &file]);
            if server_side {
                apply = plane.kubectl();
                apply.args(["apply", "--server-side", "--dry-run=server", "--validate=strict", "-f", &file]);
            }
            let result = apply.output().unwrap();
            let errors = String::from_utf8_lossy(&result.stderr).into_owned();
            assert!(result.status.success(), "{values:?}: {errors}");
            assert_eq!(errors, "", "{values:?}: kubectl must print no warnings");
            let applied = String::from_utf8_lossy(&result.stdout).lines().count();
            assert_eq!(applied, own.len(), "{values:?}: {}", String::from_utf8_lossy(&result.stdout));
        }
        for object in &own {
            let namespace = object["metadata"]["namespace"].as_str();
            assert!(namespace.is_none_or(|namespace| namespace == NAMESPACE), "{values:?}: {object}");
            let labels = &object["metadata"]["labels"];
            assert_eq!(labels["app.kubernetes.io/instance"], "keywright", "{values:?}: {}", object["metadata"]);
        }
    }
    assert_eq!(
        Vec::from_iter(foreign),
        FOREIGN.iter().map(ToString::to_string).collect::<BTreeSet<_>>().into_iter().collect::<Vec<_>>()
    );
}

#[tokio::test]
async fn rendering_the_same_values_twice_gives_the_same_manifests() {
    let plane = plane().await;
    for values in VALUES {
        let renders = [(); 2].map(|()| template(plane, values).unwrap());
        assert!(
            renders[0] == renders[1],
            "{values:?}: two renders differ, so GitOps tools would apply changes forever"
        );
    }
    for entry in std::fs::read_dir(chart().join("templates")).unwrap() {
        let path = entry.unwrap().path();
        let text = std::fs::read_to_string(&path).unwrap();
        for function in [
            "lookup",
            "rand",
            "genCA",
            "genSelfSigned",
            "genSigned",
            "genPrivateKey",
            "uuidv4",
            "now",
            "htpasswd",
            "bcrypt",
        ] {
            let calls = text.split("{{").skip(1).any(|part| {
                let code = part.split("}}").next().unwrap();
                // Ignores comments and string literals of the template.
                let code: String = code.split('"').step_by(2).collect();
                !code.trim_start_matches('-').trim_start().starts_with("/*")
                    && code.split(|c: char| !c.is_alphanumeric() && c != '.').any(|word| word.starts_with(function))
            });
            assert!(!calls, "{}: {function} is not deterministic, or has no result without a cluster", path.display());
        }
    }
}

/// Asserts that the schema and the values have the same keys, at each level with fixed keys.
fn assert_same_keys(path: &str, schema: &Value, values: &Value) {
    let Some(known) = schema["properties"].as_object() else { return };
    let in_schema: BTreeSet<_> =
        known.keys().filter(|key| !path.is_empty() || !matches!(key.as_str(), "global" | "enabled")).collect();
    let any_key = values.as_object().is_some_and(serde_json::Map::is_empty);
    let in_values: BTreeSet<_> = values.as_object().unwrap().keys().collect();
    assert!(any_key || in_schema == in_values, "{path}: {in_schema:?} and {in_values:?}");
    assert_eq!(schema["additionalProperties"], false, "{path} must reject unknown keys");
    for (key, below) in known {
        assert_same_keys(&format!("{path}.{key}"), below, &values[key]);
    }
}

#[tokio::test]
async fn invalid_values_are_rejected_and_the_schema_covers_every_value() {
    let plane = plane().await;
    for (value, text) in [
        ("replica=2", "replica"),
        ("webhok.port=9443", "webhok"),
        ("webhook.prot=9443", "prot"),
        ("crds.kep=false", "kep"),
        ("replicas=0", "replicas"),
        (r#"replicas="two""#, "replicas"),
        ("webhook.timeoutSeconds=31", "timeoutSeconds"),
        ("webhook.port=70000", "port"),
        (r#"image.digest="sha256:1""#, "digest"),
        (r#"log.format="xml""#, "format"),
        (r#"secretCheckInterval="10 minutes""#, "secretCheckInterval"),
        ("networkPolicy.apiServerPorts=[]", "apiServerPorts"),
        ("verifier.keyFrom=[]", "keyFrom"),
        (r#"verifier.keyFrom=["cookie:key"]"#, "keyFrom"),
        (r#"verifier.defaultPermission="alerts""#, "defaultPermission"),
        (r#"verifier.introspectionPermission="none""#, "introspectionPermission"),
        (r#"verifier.introspectionClusterPermission="none""#, "introspectionClusterPermission"),
        (r#"verifier.tellKeyNames="yes""#, "tellKeyNames"),
        (r#"verifier.maxStaleness="never""#, "maxStaleness"),
        ("verifier.maxConnections=0", "maxConnections"),
        ("verifier.autoscaling.maxReplica=3", "maxReplica"),
        (r#"export.name="Digests""#, "name"),
        (r#"export.kind="Pod""#, "kind"),
    ] {
        let refused = format!("{:#}", template(plane, &[value]).expect_err(value));
        assert!(refused.contains("values don't meet the specifications of the schema"), "{value}: {refused}");
        assert!(refused.contains(text), "{value}: {refused}");
    }
    // Helm passes `global` from a parent chart.
    template(plane, &[r#"global={"imageRegistry": "example.com"}"#]).unwrap();
    let refused = template(plane, &["serviceAccount.create=false"]).expect_err("a ServiceAccount name is required");
    assert!(format!("{refused:#}").contains("serviceAccount.name: Required value"), "{refused:#}");
    for (values, text) in [
        (&["verifier.serviceAccount.create=false"][..], "verifier.serviceAccount.name: Required value"),
        (&[r#"verifier.serviceAccount.name="keywright""#], "verifier.serviceAccount.name: Invalid value"),
        (&["export.enabled=true"], "export.namespace: Required value"),
    ] {
        let refused = format!("{:#}", template(plane, values).expect_err(text));
        assert!(refused.contains(text), "{values:?}: {refused}");
    }

    let schema: Value =
        serde_json::from_str(&std::fs::read_to_string(chart().join("values.schema.json")).unwrap()).unwrap();
    let values: Value = serde_saphyr::from_str(&std::fs::read_to_string(chart().join("values.yaml")).unwrap()).unwrap();
    assert_same_keys("", &schema, &values);
}

/// Creates Pods from the templates of the Deployments, in a namespace that enforces the level.
#[tokio::test]
async fn pods_satisfy_the_restricted_pod_security_standard() {
    let plane = plane().await;
    let labels: BTreeMap<_, _> =
        ["enforce", "warn"].map(|mode| (format!("pod-security.kubernetes.io/{mode}"), "restricted")).into();
    let namespace =
        json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "restricted", "labels": labels}});
    kubectl(plane, &["apply", "-f", &file(plane, "restricted.json", &namespace.to_string())]);
    let create = |pod: &Value| {
        let file = file(plane, "pod.json", &pod.to_string());
        plane.kubectl().args(["create", "--dry-run=server", "-n", "restricted", "-f", &file]).output().unwrap()
    };
    for values in VALUES {
        let rendered = documents(&template(plane, values).unwrap());
        for deployment in rendered.iter().filter(|object| object["kind"] == "Deployment") {
            let mut pod = deployment["spec"]["template"].clone();
            pod["apiVersion"] = json!("v1");
            pod["kind"] = json!("Pod");
            pod["metadata"]["name"] = json!("a-pod");
            // The ServiceAccount and PriorityClass of the chart do not exist here.
            pod["spec"]["serviceAccountName"] = json!("default");
            pod["spec"]["priorityClassName"] = json!("");
            eventually("the namespace has its service account", TIMEOUT, async || {
                output(plane.kubectl().args(["get", "serviceaccount", "default", "-n", "restricted"]))
            })
            .await;
            let result = create(&pod);
            assert!(result.status.success(), "{values:?}: {}", String::from_utf8_lossy(&result.stderr));
            assert_eq!(String::from_utf8_lossy(&result.stderr), "", "{values:?}");

            // The namespace rejects a Pod that violates the level.
            pod["spec"]["containers"][0]["securityContext"]["allowPrivilegeEscalation"] = json!(true);
            let refused = String::from_utf8_lossy(&create(&pod).stderr).into_owned();
            assert!(refused.contains(r#"violates PodSecurity "restricted:latest""#), "{refused}");
        }
    }
}

/// Returns the rights of a ServiceAccount from the roles bound to it, as `verb group/resource[name]`, cluster-wide or
/// in the namespace of the release. Asserts that each binding has one of the chart's two ServiceAccounts as subject.
fn rights(rendered: &[Value], account: &str) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for binding in
        rendered.iter().filter(|object| matches!(object["kind"].as_str(), Some("RoleBinding" | "ClusterRoleBinding")))
    {
        let [subject] = &binding["subjects"].as_array().unwrap()[..] else {
            panic!("more than one subject: {binding}")
        };
        let known = ["keywright", "keywright-verifier"].iter().any(|account| subject["name"] == *account);
        let bound = known && subject["kind"] == "ServiceAccount" && subject["namespace"] == NAMESPACE;
        assert!(bound, "the subject must be a ServiceAccount of the chart: {binding}");
        if subject["name"] != account {
            continue;
        }
        let (kind, name) = (&binding["roleRef"]["kind"], &binding["roleRef"]["name"]);
        let role = rendered.iter().find(|object| object["kind"] == *kind && object["metadata"]["name"] == *name);
        let scope = if binding["kind"] == "ClusterRoleBinding" { "cluster" } else { "own" };
        let strings = |value: &Value| -> Vec<String> {
            value.as_array().into_iter().flatten().map(|text| text.as_str().unwrap().to_owned()).collect()
        };
        for rule in role.expect("the chart contains the role")["rules"].as_array().unwrap() {
            assert!(rule.get("nonResourceURLs").is_none(), "{rule}");
            let names = match strings(&rule["resourceNames"]) {
                names if names.is_empty() => vec![String::new()],
                names => names.into_iter().map(|name| format!("[{name}]")).collect(),
            };
            for group in strings(&rule["apiGroups"]) {
                for resource in strings(&rule["resources"]) {
                    for verb in strings(&rule["verbs"]) {
                        found.extend(names.iter().map(|name| format!("{scope}: {verb} {group}/{resource}{name}")));
                    }
                }
            }
        }
    }
    found
}

const OPERATOR_RIGHTS: [&str; 56] = [
    "cluster: create /secrets",
    "cluster: create authorization.k8s.io/subjectaccessreviews",
    "cluster: create events.k8s.io/events",
    "cluster: create keywright.dev/permissioncatalogs",
    "cluster: delete keywright.dev/keyreveals",
    "cluster: get /secrets",
    "cluster: get admissionregistration.k8s.io/mutatingwebhookconfigurations[keywright]",
    "cluster: get admissionregistration.k8s.io/validatingwebhookconfigurations[keywright]",
    "cluster: get keywright.dev/accesspolicies",
    "cluster: get keywright.dev/apikeys",
    "cluster: get keywright.dev/keyreveals",
    "cluster: get keywright.dev/permissioncatalogs",
    "cluster: get keywright.dev/securitysettings",
    "cluster: list admissionregistration.k8s.io/mutatingwebhookconfigurations[keywright]",
    "cluster: list admissionregistration.k8s.io/validatingwebhookconfigurations[keywright]",
    "cluster: list keywright.dev/accesspolicies",
    "cluster: list keywright.dev/apikeys",
    "cluster: list keywright.dev/keyreveals",
    "cluster: list keywright.dev/permissioncatalogs",
    "cluster: list keywright.dev/securitysettings",
    "cluster: patch /secrets",
    "cluster: patch admissionregistration.k8s.io/mutatingwebhookconfigurations[keywright]",
    "cluster: patch admissionregistration.k8s.io/validatingwebhookconfigurations[keywright]",
    "cluster: patch events.k8s.io/events",
    "cluster: patch keywright.dev/accesspolicies/status",
    "cluster: patch keywright.dev/apikeys/status",
    "cluster: patch keywright.dev/keyreveals/status",
    "cluster: patch keywright.dev/permissioncatalogs/status",
    "cluster: patch keywright.dev/permissioncatalogs[coralogix]",
    "cluster: patch keywright.dev/permissioncatalogs[keywright]",
    "cluster: update keywright.dev/apikeys/finalizers",
    "cluster: watch admissionregistration.k8s.io/mutatingwebhookconfigurations[keywright]",
    "cluster: watch admissionregistration.k8s.io/validatingwebhookconfigurations[keywright]",
    "cluster: watch keywright.dev/accesspolicies",
    "cluster: watch keywright.dev/apikeys",
    "cluster: watch keywright.dev/keyreveals",
    "cluster: watch keywright.dev/permissioncatalogs",
    "cluster: watch keywright.dev/securitysettings",
    "own: create /configmaps",
    "own: create coordination.k8s.io/leases",
    "own: get /configmaps[keywright-verifier-ca]",
    "own: get /secrets[keywright-sealing-keys]",
    "own: get /secrets[keywright-verifier-tls]",
    "own: get /secrets[keywright-webhook-ca]",
    "own: get coordination.k8s.io/leases[keywright-operator]",
    "own: list /configmaps[keywright-verifier-ca]",
    "own: list /secrets[keywright-verifier-tls]",
    "own: list /secrets[keywright-webhook-ca]",
    "own: update /configmaps[keywright-verifier-ca]",
    "own: update /secrets[keywright-sealing-keys]",
    "own: update /secrets[keywright-verifier-tls]",
    "own: update /secrets[keywright-webhook-ca]",
    "own: update coordination.k8s.io/leases[keywright-operator]",
    "own: watch /configmaps[keywright-verifier-ca]",
    "own: watch /secrets[keywright-verifier-tls]",
    "own: watch /secrets[keywright-webhook-ca]",
];

/// The rights of the verifier: none on Secrets, and none in its own namespace only.
const VERIFIER_RIGHTS: [&str; 7] = [
    "cluster: get keywright.dev/apikeys",
    "cluster: get keywright.dev/permissioncatalogs",
    "cluster: list keywright.dev/apikeys",
    "cluster: list keywright.dev/permissioncatalogs",
    "cluster: patch keywright.dev/apikeys/status",
    "cluster: watch keywright.dev/apikeys",
    "cluster: watch keywright.dev/permissioncatalogs",
];

#[tokio::test]
async fn the_operator_has_exactly_the_listed_rights() {
    let plane = plane().await;
    let expected: BTreeSet<String> = OPERATOR_RIGHTS.iter().map(ToString::to_string).collect();
    let rights_with = |values: &[&str], account: &str| rights(&documents(&template(plane, values).unwrap()), account);
    let found = rights_with(&[], "keywright");
    let unlisted: Vec<_> = found.difference(&expected).collect();
    let missing: Vec<_> = expected.difference(&found).collect();
    assert!(unlisted.is_empty() && missing.is_empty(), "not in the list: {unlisted:#?}\nnot granted: {missing:#?}");

    // cert-manager and a disabled catalog remove the rights that the operator does not need.
    let fewer = rights_with(&["certManager.enabled=true", "catalog.enabled=false"], "keywright");
    assert!(fewer.is_subset(&expected));
    let lost: Vec<_> = expected.difference(&fewer).map(String::as_str).collect();
    assert_eq!(
        lost,
        [
            "cluster: create keywright.dev/permissioncatalogs",
            "cluster: get admissionregistration.k8s.io/mutatingwebhookconfigurations[keywright]",
            "cluster: list admissionregistration.k8s.io/mutatingwebhookconfigurations[keywright]",
            "cluster: patch admissionregistration.k8s.io/mutatingwebhookconfigurations[keywright]",
            "cluster: patch admissionregistration.k8s.io/validatingwebhookconfigurations[keywright]",
            "cluster: patch keywright.dev/permissioncatalogs[coralogix]",
            "cluster: patch keywright.dev/permissioncatalogs[keywright]",
            "cluster: watch admissionregistration.k8s.io/mutatingwebhookconfigurations[keywright]",
            "own: create /configmaps",
            "own: get /configmaps[keywright-verifier-ca]",
            "own: get /secrets[keywright-verifier-tls]",
            "own: get /secrets[keywright-webhook-ca]",
            "own: list /configmaps[keywright-verifier-ca]",
            "own: list /secrets[keywright-verifier-tls]",
            "own: list /secrets[keywright-webhook-ca]",
            "own: update /configmaps[keywright-verifier-ca]",
            "own: update /secrets[keywright-verifier-tls]",
            "own: update /secrets[keywright-webhook-ca]",
            "own: watch /configmaps[keywright-verifier-ca]",
            "own: watch /secrets[keywright-verifier-tls]",
            "own: watch /secrets[keywright-webhook-ca]",
        ]
    );
    // The same if the operator issues no certificate for the verifier.
    for value in ["verifier.enabled=false", "verifier.tls.enabled=false"] {
        let fewer = rights_with(&[value], "keywright");
        let lost: Vec<_> = expected.difference(&fewer).collect();
        let for_the_verifier = |right: &&String| right.contains("verifier") || right.contains("create /configmaps");
        assert!(
            fewer.is_subset(&expected) && lost.len() == 9 && lost.iter().all(for_the_verifier),
            "{value}: {lost:#?}"
        );
    }

    // The export needs rights on named ConfigMaps in the namespace of the gateway.
    let export = ["export.enabled=true", r#"export.namespace="keywright-system""#, r#"export.name="digests""#];
    let more = rights_with(&export, "keywright");
    let more: BTreeSet<_> = more.difference(&expected).map(String::as_str).collect();
    let maps = (1..=32).map(|n| if n == 1 { "digests".to_owned() } else { format!("digests-{n}") });
    let granted = maps.flat_map(|map| ["get", "patch"].map(|verb| format!("own: {verb} /configmaps[{map}]")));
    let granted: BTreeSet<_> = granted.collect();
    assert_eq!(more, granted.iter().map(String::as_str).collect());
    // Secrets need no more rights: an admission policy limits the operator to named ones.
    assert_eq!(rights_with(&[&export[..], &[r#"export.kind="Secret""#]].concat(), "keywright"), expected);
}

#[tokio::test]
async fn the_verifier_has_exactly_the_listed_rights() {
    let plane = plane().await;
    let rights_with = |values: &[&str]| rights(&documents(&template(plane, values).unwrap()), "keywright-verifier");
    let expected: BTreeSet<String> = VERIFIER_RIGHTS.iter().map(ToString::to_string).collect();
    assert_eq!(rights_with(&[]), expected);
    assert_eq!(rights_with(&["certManager.enabled=true"]), expected);

    // Without lastUsed, or without the admission policy that limits its writes, the verifier may not write.
    let argument = |values: &[&str]| {
        let rendered = documents(&template(plane, values).unwrap());
        let verifier = rendered
            .iter()
            .find(|object| object["kind"] == "Deployment" && object["metadata"]["name"] == "keywright-verifier");
        let container = &verifier.unwrap()["spec"]["template"]["spec"]["containers"][0];
        let args = container["args"].as_array().unwrap();
        args.iter().filter_map(|arg| arg.as_str()?.strip_prefix("--last-used-interval=")).collect::<String>()
    };
    assert_eq!(argument(&[]), "1h");
    for value in [
        r#"verifier.lastUsed.interval="0s""#,
        r#"verifier.lastUsed.interval="0h0m""#,
        "admissionPolicies.enabled=false",
    ] {
        let lost: Vec<_> = expected.difference(&rights_with(&[value])).cloned().collect();
        assert_eq!(lost, ["cluster: patch keywright.dev/apikeys/status"], "{value}");
        assert_eq!(argument(&[value]), "0s", "{value}");
    }
    assert_eq!(rights_with(&["verifier.enabled=false"]), BTreeSet::new());
}

#[tokio::test]
async fn network_policies_allow_the_api_server_proxies_replicas_and_metrics_scrapers() {
    let plane = plane().await;
    let ingress = |values: &[&str], name: &str| {
        let rendered = documents(&template(plane, values).unwrap());
        let found = rendered.into_iter().find(|o| o["kind"] == "NetworkPolicy" && o["metadata"]["name"] == name);
        let spec = found.unwrap()["spec"].take();
        assert_eq!(spec["policyTypes"], json!(["Ingress", "Egress"]));
        spec["ingress"].clone()
    };
    let anywhere = |port: &str| json!({"ports": [{"port": port}]});
    // NetworkPolicies always allow traffic from the kubelet of the pod's node.
    assert_eq!(ingress(&[], "keywright"), json!([anywhere("webhook")]));
    assert_eq!(ingress(&[], "keywright-verifier"), json!([anywhere("check")]));
    let pods = json!({"ports": [{"port": "health"}], "from": [{"namespaceSelector": {}}]});
    for monitor in ["metrics.podMonitor.enabled=true", "metrics.serviceMonitor.enabled=true"] {
        assert_eq!(ingress(&[monitor], "keywright"), json!([anywhere("webhook"), pods]));
        assert_eq!(ingress(&[monitor], "keywright-verifier"), json!([anywhere("check"), pods]));
    }
    let (api_server, prometheus) =
        (json!([{"ipBlock": {"cidr": "10.0.0.2/32"}}]), json!([{"namespaceSelector": {"matchLabels": {"a": "b"}}}]));
    let values = [
        &format!("networkPolicy.apiServer={api_server}")[..],
        &format!("networkPolicy.metricsFrom={prometheus}"),
        "metrics.podMonitor.enabled=true",
    ];
    // Replicas send each other notices about writes of Secrets.
    let replicas = json!({"podSelector": {"matchLabels": {
        "app.kubernetes.io/component": "operator", "app.kubernetes.io/instance": "keywright",
        "app.kubernetes.io/name": "keywright",
    }}});
    let expected = json!([
        {"ports": [{"port": "webhook"}], "from": [api_server[0], replicas]},
        {"ports": [{"port": "health"}], "from": prometheus},
    ]);
    assert_eq!(ingress(&values, "keywright"), expected);
}

/// Selectors are immutable, and one that matches too much routes requests to the wrong pods.
#[tokio::test]
async fn selectors_of_verifier_and_operator_match_their_own_pods_only() {
    let plane = plane().await;
    let values = ["verifier.autoscaling.enabled=true"];
    let rendered = documents(&template(plane, &values).unwrap());
    let object = |kind: &str, name: &str| {
        let found = rendered.iter().find(|object| object["kind"] == kind && object["metadata"]["name"] == name);
        found.unwrap_or_else(|| panic!("no {kind} {name}"))
    };
    let pod = |name: &str| object("Deployment", name)["spec"]["template"]["metadata"]["labels"].clone();
    let selects = |selector: &Value, labels: &Value| {
        selector.as_object().unwrap().iter().all(|(label, value)| labels[label] == *value)
    };
    let (own, other) = (pod("keywright-verifier"), pod("keywright"));
    let selectors = [
        ("Deployment", "keywright-verifier", "/spec/selector/matchLabels"),
        ("PodDisruptionBudget", "keywright-verifier", "/spec/selector/matchLabels"),
        ("NetworkPolicy", "keywright-verifier", "/spec/podSelector/matchLabels"),
        ("Service", "keywright-verifier", "/spec/selector"),
    ];
    for (kind, name, pointer) in selectors {
        let selector = object(kind, name).pointer(pointer).unwrap();
        assert!(selects(selector, &own) && !selects(selector, &other), "{kind}: {selector}");
        let operators = name.replace("-verifier", if kind == "Service" { "-webhook" } else { "" });
        let selector = object(kind, &operators).pointer(pointer).unwrap();
        assert!(!selects(selector, &own) && selects(selector, &other), "{kind}: {selector}");
    }
    let both = &object("Service", "keywright-metrics")["spec"]["selector"];
    assert!(selects(both, &own) && selects(both, &other), "the metrics Service selects both");
    let deployment = &object("Deployment", "keywright-verifier")["spec"];
    assert_eq!(deployment["replicas"], Value::Null, "the autoscaler owns replicas");
    let limits = &deployment["template"]["spec"]["containers"][0]["resources"]["limits"];
    assert_eq!(*limits, json!({"memory": "128Mi"}), "there is no CPU limit");

    for (tls, protocols) in [(true, ["https", "https"]), (false, ["kubernetes.io/h2c", "http"])] {
        let rendered = documents(&template(plane, &[&format!("verifier.tls.enabled={tls}")]).unwrap());
        let service = rendered.iter().find(|o| o["kind"] == "Service" && o["metadata"]["name"] == "keywright-verifier");
        let ports = service.unwrap()["spec"]["ports"].as_array().unwrap();
        let found: Vec<_> = ports.iter().map(|port| [&port["name"], &port["port"], &port["appProtocol"]]).collect();
        assert_eq!(
            found,
            [
                [&json!("grpc"), &json!(9191), &json!(protocols[0])],
                [&json!("http"), &json!(9192), &json!(protocols[1])]
            ]
        );
        assert!(ports.iter().all(|port| port["targetPort"] == "check"));
    }
}

#[tokio::test]
#[expect(clippy::too_many_lines, reason = "one release from install to reinstall")]
async fn upgrade_uninstall_and_reinstall_keep_keys_and_their_values() {
    let plane = &new_control_plane().await;
    let (release, operator) = crate::support::install(plane).await.unwrap();
    assert_rights_of_the_accounts(plane);

    kubectl(plane, &["create", "namespace", "shop"]);
    let example = repository().join("examples/send-your-data.yaml");
    let apply_key = async || {
        eventually("the key is applied", TIMEOUT, async || {
            output(plane.kubectl().args(["apply", "-n", "shop", "-f", example.to_str().unwrap()]))
        })
        .await;
        kubectl(plane, &["wait", "-n", "shop", "--for=condition=Ready", "apikey/checkout-telemetry", "--timeout=60s"]);
    };
    apply_key().await;
    let value = || get(plane, &["-n", "shop", "secret", "checkout-telemetry-secret"])["data"]["key-value"].clone();
    let tokens = || get(plane, &["-n", "shop", "apikey", "checkout-telemetry"])["status"]["tokens"].clone();
    let (minted, digest) = (value(), tokens());
    assert!(minted.is_string());
    let bundle = || {
        get(plane, &["validatingwebhookconfiguration", "keywright"])["webhooks"][0]["clientConfig"]["caBundle"].clone()
    };
    let trusted = bundle();
    assert!(trusted.as_str().is_some_and(|text| text.len() > 100), "{trusted}");

    // Upgrade with other values, an outdated CRD (applied by helm, as by an older chart) and a changed catalog.
    let mut old = get(plane, &["crd", "apikeys.keywright.dev"]);
    old["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]["properties"]
        .as_object_mut()
        .unwrap()
        .remove("displayName");
    let metadata = old["metadata"].as_object_mut().unwrap();
    metadata.retain(|key, _| matches!(key.as_str(), "name" | "labels" | "annotations"));
    old.as_object_mut().unwrap().remove("status");
    let old = file(plane, "old-crd.json", &old.to_string());
    kubectl(plane, &["apply", "--server-side", "--field-manager=helm", "-f", &old]);
    kubectl(
        plane,
        &[
            "patch",
            "permissioncatalog",
            "coralogix",
            "--type=json",
            "-p",
            r#"[{"op": "remove", "path": "/spec/presets"}]"#,
        ],
    );
    // Helm must neither remove fields of the operator nor fail because of them.
    Release::upgrade(plane, &["replicas=3", "log.level=debug"]).unwrap();
    let deployment = get(plane, &["-n", NAMESPACE, "deployment", "keywright"]);
    assert_eq!(deployment["spec"]["replicas"], 3);
    assert!(
        deployment["spec"]["template"]["spec"]["containers"][0]["args"]
            .as_array()
            .unwrap()
            .contains(&json!("--log=debug"))
    );
    assert_eq!(bundle(), trusted, "the upgrade removed the CA bundle");
    let crd = get(plane, &["crd", "apikeys.keywright.dev"]);
    let spec = &crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]["properties"];
    assert!(spec["displayName"].is_object(), "the CRD was not upgraded");
    release.route_webhook(plane, 1).await.unwrap();
    // Replaces the operator, as the Deployment would.
    assert!(operator.terminate().await.unwrap().success());
    drop(operator);
    let operator = Operator::start(plane, &release, Options::default()).await.unwrap();
    operator.wait_ready().await.unwrap();
    eventually("the operator restores the shipped catalog", TIMEOUT, async || {
        let catalog = get(plane, &["permissioncatalog", "coralogix"]);
        let presets = catalog["spec"]["presets"].as_array().context("no presets")?.len();
        ensure!(presets == 38 && catalog["status"]["presets"] == 38, "{presets} presets, {}", catalog["status"]);
        Ok(())
    })
    .await;
    apply_key().await;
    assert_eq!((value(), tokens()), (minted.clone(), digest.clone()), "an upgrade does not rotate keys");
    assert_eq!(bundle(), trusted);

    // Uninstalling keeps the objects of users.
    assert!(operator.terminate().await.unwrap().success());
    drop(operator);
    let uninstall =
        output(plane.helm().args(["uninstall", "keywright", "-n", NAMESPACE, "--wait", "--timeout=60s"])).unwrap();
    for crd in ["accesspolicies", "apikeys", "keyreveals", "permissioncatalogs", "securitysettings"] {
        get(plane, &["crd", &format!("{crd}.keywright.dev")]);
        assert!(uninstall.contains(&format!("{crd}.keywright.dev")), "helm lists the kept CRDs: {uninstall}");
    }
    assert_eq!(get(plane, &["permissioncatalog", "coralogix"])["spec"]["presets"].as_array().unwrap().len(), 38);
    assert_eq!((value(), tokens()), (minted.clone(), digest.clone()));
    for kind in [
        "validatingwebhookconfigurations",
        "validatingadmissionpolicies",
        "validatingadmissionpolicybindings",
        "clusterroles",
        "clusterrolebindings",
    ] {
        let remaining = kubectl(plane, &["get", kind, "-l", "app.kubernetes.io/part-of=keywright", "-o", "name"]);
        assert_eq!(remaining, "", "helm uninstall must delete its objects");
    }
    let remaining = kubectl(
        plane,
        &[
            "get",
            "all,configmaps,leases,roles,rolebindings,networkpolicies,pdb",
            "-n",
            NAMESPACE,
            "-l",
            "app.kubernetes.io/part-of=keywright",
            "-o",
            "name",
        ],
    );
    assert_eq!(remaining, "", "helm uninstall must delete its objects");

    // Without the operator, keys can be changed and deleted, and namespaces can be deleted.
    kubectl(plane, &["create", "namespace", "leaving"]);
    kubectl(plane, &["apply", "-n", "leaving", "-f", example.to_str().unwrap()]);
    kubectl(plane, &["delete", "namespace", "leaving", "--timeout=60s"]);
    kubectl(plane, &["label", "-n", "shop", "apikey/checkout-telemetry", "touched=yes"]);
    kubectl(plane, &["delete", "namespace", NAMESPACE, "--timeout=60s"]);

    // Installing again adopts the existing objects.
    let release = Release::install(plane, &[]).await.unwrap();
    let operator = Operator::start(plane, &release, Options::default()).await.unwrap();
    operator.wait_ready().await.unwrap();
    apply_key().await;
    let generation = get(plane, &["-n", "shop", "apikey", "checkout-telemetry"])["metadata"]["generation"].clone();
    eventually("the operator reconciles the key", TIMEOUT, async || {
        let key = get(plane, &["-n", "shop", "apikey", "checkout-telemetry"]);
        ensure!(key["status"]["observedGeneration"] == generation, "{}", key["status"]);
        Ok(())
    })
    .await;
    assert_eq!((value(), tokens()), (minted, digest), "reinstalling does not rotate keys");
    let crd = get(plane, &["crd", "apikeys.keywright.dev"]);
    assert_eq!(crd["metadata"]["annotations"]["helm.sh/resource-policy"], "keep");
    kubectl(plane, &["delete", "namespace", "shop", "--timeout=60s"]);
}

/// Asserts the most important rights of the operator with `kubectl auth can-i`, and all rights of both ServiceAccounts.
fn assert_rights_of_the_accounts(plane: &ControlPlane) {
    let account = format!("--as=system:serviceaccount:{NAMESPACE}:keywright");
    let group = "--as-group=system:serviceaccounts";
    let can = |namespace: &str, verb: &str, resource: &str| {
        let mut can_i = plane.kubectl();
        can_i.args(["auth", "can-i", verb, resource, "-n", namespace, &account, group]);
        let output = can_i.output().unwrap();
        let answer = String::from_utf8_lossy(&output.stdout).trim().to_owned();
        assert!(answer == "yes" || answer.starts_with("no"), "{answer}");
        answer == "yes"
    };
    for verb in ["list", "watch", "delete", "deletecollection", "update"] {
        for namespace in ["default", NAMESPACE] {
            assert!(!can(namespace, verb, "secrets"), "the operator can {verb} secrets in {namespace}");
        }
    }
    for (verb, resource) in [
        ("update", "apikeys.keywright.dev"),
        ("patch", "apikeys.keywright.dev"),
        ("delete", "apikeys.keywright.dev"),
        ("create", "apikeys.keywright.dev"),
        ("delete", "permissioncatalogs.keywright.dev"),
        ("patch", "permissioncatalogs.keywright.dev/other"),
        ("create", "pods"),
        ("get", "configmaps"),
        ("create", "rolebindings.rbac.authorization.k8s.io"),
        ("escalate", "clusterroles.rbac.authorization.k8s.io"),
        ("impersonate", "users"),
        ("create", "serviceaccounts/token"),
        ("patch", "validatingwebhookconfigurations.admissionregistration.k8s.io/other"),
        ("delete", "validatingwebhookconfigurations.admissionregistration.k8s.io/keywright"),
        ("patch", "mutatingwebhookconfigurations.admissionregistration.k8s.io/other"),
        ("patch", "customresourcedefinitions.apiextensions.k8s.io"),
    ] {
        assert!(!can("default", verb, resource), "the operator can {verb} {resource}");
    }
    for (verb, resource) in
        [("create", "secrets"), ("get", "secrets"), ("patch", "secrets"), ("list", "apikeys.keywright.dev")]
    {
        assert!(can("default", verb, resource), "the operator can't {verb} {resource}");
    }

    for (account, rights) in [("keywright", &OPERATOR_RIGHTS[..]), ("keywright-verifier", &VERIFIER_RIGHTS)] {
        let own: BTreeSet<String> =
            all_rights(plane, account).difference(&all_rights(plane, "without-rights")).cloned().collect();
        let expected: BTreeSet<String> =
            rights.iter().map(|right| right.split_once(": ").unwrap().1.to_owned()).collect();
        assert_eq!(own, expected, "{account}");
    }
}

/// Returns all rights of a ServiceAccount in the operator's namespace, as `verb group/resource[name]`.
fn all_rights(plane: &ControlPlane, account: &str) -> BTreeSet<String> {
    let account = format!("--as=system:serviceaccount:{NAMESPACE}:{account}");
    let args = ["auth", "can-i", "--list", "-n", NAMESPACE, &account, "--as-group=system:serviceaccounts"];
    let mut listed = BTreeSet::new();
    for line in kubectl(plane, &args).lines().skip(1).filter(|line| !line.starts_with(' ')) {
        let (resource, rest) = line.split_once(' ').unwrap();
        let lists: Vec<&str> = rest.split('[').skip(1).map(|part| part.split(']').next().unwrap()).collect();
        let [_, names, verbs] = lists[..] else { panic!("{line}") };
        // The format is resource.group/subresource.
        let (kind, group) = resource.split_once('.').unwrap_or((resource, ""));
        let (group, sub) =
            group.split_once('/').map_or((group, String::new()), |(group, sub)| (group, format!("/{sub}")));
        for verb in verbs.split(' ') {
            let names = names.split(' ').map(|name| if name.is_empty() { String::new() } else { format!("[{name}]") });
            listed.extend(names.map(|name| format!("{verb} {group}/{kind}{sub}{name}")));
        }
    }
    listed
}

#[tokio::test]
async fn the_plain_manifests_work_on_a_new_cluster_and_equal_the_rendered_chart() {
    let plane = &new_control_plane().await;
    let manifests = repository().join("charts/manifests");
    let apply = ["apply", "--server-side", "--validate=strict", "-k", manifests.to_str().unwrap()];
    let result = plane.kubectl().args(apply).output().unwrap();
    assert!(result.status.success(), "{}", String::from_utf8_lossy(&result.stderr));
    assert_eq!(String::from_utf8_lossy(&result.stderr), "", "kubectl must print no warnings");
    kubectl(plane, &["wait", "--for=condition=Established", "crd", "--all", "--timeout=60s"]);
    let enforced = &get(plane, &["namespace", NAMESPACE])["metadata"]["labels"]["pod-security.kubernetes.io/enforce"];
    assert_eq!(*enforced, "restricted");

    // The manifests fix the port, so this searches for an address on which it is free.
    let replica =
        (100..200).find(|n| std::net::TcpListener::bind((std::net::Ipv4Addr::new(127, 0, 0, *n), 9443)).is_ok());
    let options = Options { replica: replica.unwrap(), ..Options::default() };
    let release = Release::adopt(plane, options.replica).await.unwrap();
    let operator = Operator::start(plane, &release, options).await.unwrap();
    operator.wait_ready().await.unwrap();
    kubectl(plane, &["create", "namespace", "shop"]);
    let example = repository().join("examples/send-your-data.yaml");
    eventually("the key is applied", TIMEOUT, async || {
        output(plane.kubectl().args(["apply", "-n", "shop", "-f", example.to_str().unwrap()]))
    })
    .await;
    kubectl(plane, &["wait", "-n", "shop", "--for=condition=Ready", "apikey/checkout-telemetry", "--timeout=60s"]);

    // Applying again keeps the fields of the operator.
    let bundle = || {
        get(plane, &["validatingwebhookconfiguration", "keywright"])["webhooks"][0]["clientConfig"]["caBundle"].clone()
    };
    let trusted = bundle();
    assert!(trusted.is_string());
    // Forces conflicts because the test replaced the Service: there is no kube-proxy.
    output(plane.kubectl().args(apply).arg("--force-conflicts")).unwrap();
    assert_eq!(bundle(), trusted);

    // The manifests are the rendered chart, as `make generate` writes it.
    let rendered = template(plane, &["crds.keep=false"]).unwrap();
    let helm_only = ["app.kubernetes.io/managed-by: Helm", "helm.sh/chart: "];
    let fresh: Vec<_> = rendered.lines().filter(|line| !helm_only.iter().any(|part| line.contains(part))).collect();
    let stored = std::fs::read_to_string(manifests.join("keywright.yaml")).unwrap();
    let stored: Vec<_> = stored.lines().collect();
    let first = fresh.iter().zip(&stored).position(|(one, other)| one != other);
    assert!(fresh == stored, "run `make generate`: line {:?} of {}", first.map(|n| n + 1), stored.len());
}

#[tokio::test]
async fn the_chart_passes_helm_lint_strict() {
    let plane = plane().await;
    for values in VALUES {
        let mut lint: Command = plane.helm();
        lint.args(["lint", "--strict"]).arg(Path::new(&chart()));
        output(lint.args(values.iter().flat_map(|value| ["--set-json", value])))
            .unwrap_or_else(|e| panic!("{values:?}: {e:#}"));
    }
}
