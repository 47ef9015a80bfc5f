//! The cost of policy `keywright-key-secrets` for writes of Secrets that hold no key: the same writes with and without
//! the policy, alternating in one run, one request at a time.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use k8s_openapi::api::admissionregistration::v1::ValidatingAdmissionPolicyBinding;
use k8s_openapi::api::core::v1::Secret;
use k8s_openapi::api::rbac::v1::RoleBinding;
use kube::{
    Api, Client,
    api::{DeleteParams, ListParams, Patch, PatchParams, PostParams},
};
use serde_json::json;

use crate::support::{ControlPlane, TIMEOUT, retry};

const POLICY: &str = "keywright-key-secrets";
const ROUNDS: usize = 10;
/// The number of creates, and of updates, in each half of a round.
const WRITES: usize = 250;

/// The latencies of creates and updates, each without and with the policy.
#[derive(Default)]
struct Times {
    create: [Vec<Duration>; 2],
    update: [Vec<Duration>; 2],
}

/// Measures the latencies and prints them.
pub async fn measure(plane: &ControlPlane, admin: &Client, namespace: &str) -> Result<()> {
    let secrets: Api<Secret> = Api::namespaced(admin.clone(), namespace);
    let bindings: Api<ValidatingAdmissionPolicyBinding> = Api::all(admin.clone());
    let binding = bindings.get(POLICY).await?;
    // The policy denies a write of this user, which shows whether it is in force.
    let role = json!({
        "metadata": {"name": "probe"}, "subjects": [{"kind": "User", "name": "probe", "apiGroup": "rbac.authorization.k8s.io"}],
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "edit"},
    });
    let roles: Api<RoleBinding> = Api::namespaced(admin.clone(), namespace);
    roles.create(&PostParams::default(), &serde_json::from_value(role)?).await?;
    let probe: Api<Secret> = Api::namespaced(plane.client_as("probe", &[]).await?, namespace);
    let forged: Secret =
        serde_json::from_value(json!({"metadata": {"name": "probe"}, "type": "keywright.dev/api-key"}))?;
    let until = async |in_force: bool| {
        retry("the policy is added or removed", TIMEOUT, async || {
            let dry_run = PostParams { dry_run: true, ..PostParams::default() };
            let denied = match probe.create(&dry_run, &forged).await {
                Ok(_) => false,
                Err(kube::Error::Api(status)) => status.message.contains(POLICY),
                Err(error) => return Err(error.into()),
            };
            ensure!(denied == in_force);
            Ok(())
        })
        .await
    };

    let mut times = Times::default();
    for round in 0..ROUNDS {
        // The order alternates, so that a drift during the run affects both equally.
        for half in 0..2 {
            let with = (round + half) % 2;
            if with == 1 {
                bindings.patch(POLICY, &PatchParams::apply("bench").force(), &Patch::Apply(&applied(&binding))).await?;
            } else if bindings.get_opt(POLICY).await?.is_some() {
                bindings.delete(POLICY, &DeleteParams::default()).await?;
            }
            until(with == 1).await?;
            for write in 0..WRITES {
                let name = format!("other-{round}-{half}-{write}");
                let secret: Secret = serde_json::from_value(json!({
                    "metadata": {"name": name, "labels": {"bench": "secrets"}}, "type": "Opaque",
                    "stringData": {"password": "a value of another kind"},
                }))?;
                let started = Instant::now();
                let mut created = secrets.create(&PostParams::default(), &secret).await?;
                times.create[with].push(started.elapsed());
                created.string_data = Some([("password".to_owned(), format!("another value {write}"))].into());
                let started = Instant::now();
                secrets.replace(&name, &PostParams::default(), &created).await?;
                times.update[with].push(started.elapsed());
            }
        }
    }
    bindings.patch(POLICY, &PatchParams::apply("bench").force(), &Patch::Apply(&applied(&binding))).await?;
    until(true).await?;
    secrets.delete_collection(&DeleteParams::default(), &ListParams::default().labels("bench=secrets")).await?;

    println!("writes of Secrets of another type, {} of each kind, one at a time: p50, p99 in ms", ROUNDS * WRITES);
    for (operation, halves) in [("create", times.create), ("update", times.update)] {
        for (policy, mut times) in ["without the policy", "with the policy"].into_iter().zip(halves) {
            times.sort_unstable();
            let at = |share: usize| times[(times.len() - 1) * share / 100].as_secs_f64() * 1000.0;
            println!("  {operation}, {policy:<18} {:7.3} {:7.3}", at(50), at(99));
        }
    }
    Ok(())
}

fn applied(binding: &ValidatingAdmissionPolicyBinding) -> serde_json::Value {
    json!({
        "apiVersion": "admissionregistration.k8s.io/v1", "kind": "ValidatingAdmissionPolicyBinding",
        "metadata": {"name": POLICY, "labels": binding.metadata.labels}, "spec": binding.spec,
    })
}
