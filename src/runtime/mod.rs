//! The processes: arguments, wiring, election, health and shutdown. No other module imports this one.

pub mod args;
pub mod health;
pub mod lease;
pub mod operator;
pub mod secret_notices;
pub mod supervisor;
pub mod verifier;
pub mod verifier_metrics;

/// An error that prevents the start of the process or stops it.
#[derive(Debug, thiserror::Error)]
pub enum StartupError {
    /// There is neither a kubeconfig nor a ServiceAccount.
    #[error("no Kubernetes cluster: {0}; set KUBECONFIG or run inside a Pod")]
    NoCluster(#[from] kube::config::InferConfigError),
    /// The kubeconfig or the ServiceAccount can't be used.
    #[error("cannot create the Kubernetes client: {0}")]
    Client(#[source] kube::Error),
    /// The catalogs of `--catalog-dir` can't be read.
    #[error("--catalog-dir: {0}")]
    CatalogDirectory(String),
    /// The file of `--webhook-client-ca` can't be read.
    #[error("--webhook-client-ca {}: {source}", file.display())]
    ClientCa {
        /// The file.
        file: std::path::PathBuf,
        /// The cause.
        source: crate::certs::CertError,
    },
    /// TLS can't be configured with the certificates.
    #[error("cannot configure TLS: {0}")]
    Tls(#[source] crate::certs::CertError),
    /// The process can't listen on an address.
    #[error(transparent)]
    Bind(#[from] crate::net::listener::BindError),
    /// A task ended unexpectedly.
    #[error(transparent)]
    Task(#[from] supervisor::EndedTask),
}

/// The configuration of the client, from KUBECONFIG or the ServiceAccount of the Pod.
async fn cluster_config() -> Result<kube::Config, StartupError> {
    Ok(kube::Config::infer().await?)
}
