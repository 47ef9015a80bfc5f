//! What policy `key-secrets` costs the writes of Secrets that hold no key: the same writes with the policy and without, in
//! turns and in one run, one request at a time.

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

use crate::support::{ControlPlane, PATIENCE, retry};

const POLICY: &str = "keywright-key-secrets";
const ROUNDS: usize = 10;
/// Creations, and as many updates, in each half of a round.
const WRITES: usize = 250;

/// The latencies of one kind of write, without and with the policy.
#[derive(Default)]
struct Times {
    create: [Vec<Duration>; 2],
    update: [Vec<Duration>; 2],
}

/// Measures and prints.
pub async fn measure(plane: &ControlPlane, admin: &Client, namespace: &str) -> Result<()> {
    let secrets: Api<Secret> = Api::namespaced(admin.clone(), namespace);
    let bindings: Api<ValidatingAdmissionPolicyBinding> = Api::all(admin.clone());
    let binding = bindings.get(POLICY).await?;
    // Somebody to whom the policy makes a difference shows whether it is in force.
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
        retry("the policy is in force, or is not", PATIENCE, async || {
            let dry_run = PostParams { dry_run: true, ..PostParams::default() };
            let refused = match probe.create(&dry_run, &forged).await {
                Ok(_) => false,
                Err(kube::Error::Api(status)) => status.message.contains(POLICY),
                Err(error) => return Err(error.into()),
            };
            ensure!(refused == in_force);
            Ok(())
        })
        .await
    };

    let mut times = Times::default();
    for round in 0..ROUNDS {
        // Which comes first changes, so that what grows during the run counts for both.
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
                let mut made = secrets.create(&PostParams::default(), &secret).await?;
                times.create[with].push(started.elapsed());
                made.string_data = Some([("password".to_owned(), format!("another value {write}"))].into());
                let started = Instant::now();
                secrets.replace(&name, &PostParams::default(), &made).await?;
                times.update[with].push(started.elapsed());
            }
        }
    }
    bindings.patch(POLICY, &PatchParams::apply("bench").force(), &Patch::Apply(&applied(&binding))).await?;
    until(true).await?;
    secrets.delete_collection(&DeleteParams::default(), &ListParams::default().labels("bench=secrets")).await?;

    println!("writes of Secrets of another type, {} of each, one at a time: p50, p99 in ms", ROUNDS * WRITES);
    for (what, halves) in [("create", times.create), ("update", times.update)] {
        for (policy, mut found) in ["without the policy", "with the policy"].into_iter().zip(halves) {
            found.sort_unstable();
            let at = |share: usize| found[(found.len() - 1) * share / 100].as_secs_f64() * 1000.0;
            println!("  {what}, {policy:<18} {:7.3} {:7.3}", at(50), at(99));
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
