//! The edges of the process: arguments, wiring, listeners, election, readiness, shutdown, telemetry, metrics and the clock.

pub mod args;
mod bodies;
pub mod clock;
pub mod health;
pub mod lease;
mod lingering;
pub mod listener;
pub mod metrics;
pub mod news;
pub mod operator;
mod places;
pub mod supervisor;
pub mod telemetry;
pub mod verifier;
pub mod verifier_metrics;

use std::fmt;

/// Why the process could not start or go on.
#[derive(Debug)]
pub struct Fatal(String);

impl fmt::Display for Fatal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// How to reach the cluster: as a Pod does, or by KUBECONFIG.
async fn cluster_config() -> Result<kube::Config, Fatal> {
    kube::Config::infer()
        .await
        .map_err(|error| Fatal(format!("no Kubernetes cluster: {error}; set KUBECONFIG or run inside a Pod")))
}
