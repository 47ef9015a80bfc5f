//! The serving certificate of the webhook, and that of the verifier, which the leader issues from the webhook's CA.
//!
//! The TLS listener queries a [`Resolver`] at each handshake, so that a new certificate needs no new listener. The
//! resolver has one of two sources:
//!
//! - [`SelfManaged`]: a CA in a Secret that all replicas share. Each replica signs its own leaf and keeps the key in
//!   memory. Only the leader changes the CA and writes it to `caBundle` of the webhook configurations.
//! - [`Files`]: a mounted Secret that cert-manager or another tool updates.
//!
//! With [`SelfManaged`], no admission request fails when the CA changes. [`authority`] implements this as a pure state
//! machine, and its test simulates several CAs. To replace a CA at once, delete its Secret; requests then fail until
//! the new bundle has reached the API servers, which takes about a second.

pub mod authority;
mod client_ca;
mod files;
mod issued;
mod self_managed;
mod serving;
mod webhooks;
mod x509;

use std::sync::Arc;

pub use client_ca::{ClientCa, Own};
pub use files::Files;
pub use issued::IssuedConfig;
use jiff::Timestamp;
use kube::{
    Resource, ResourceExt,
    api::{ObjectMeta, PostParams},
};
pub use self_managed::{SelfManaged, SelfManagedConfig};
pub use serving::{CertificateStatus, Resolver};
pub use webhooks::WebhookTarget;
pub use x509::{Authority, Certificate, Validity};

/// Returns the current time.
pub type Now = Arc<dyn Fn() -> Timestamp + Send + Sync>;

/// The reason why a certificate cannot be generated, read or published. No message contains a part of a key.
#[derive(Debug, thiserror::Error)]
pub enum CertError {
    /// A PEM entry is absent.
    #[error("{0} is missing")]
    Missing(&'static str),
    /// A PEM entry does not parse.
    #[error("{0} cannot be read as PEM")]
    Unreadable(&'static str),
    /// A key does not belong to its certificate.
    #[error("{0} does not belong to its certificate")]
    Mismatch(&'static str),
    /// A certificate may not sign other certificates.
    #[error("{0} is not a CA certificate")]
    NotCa(&'static str),
    /// A certificate is expired or not yet valid.
    #[error("{0} is not valid now")]
    NotValidNow(&'static str),
    /// An object with the configured name is not managed by the operator.
    #[error("{0} exists without label app.kubernetes.io/managed-by=keywright: delete it, or configure another name")]
    Foreign(String),
    /// There is no certificate yet.
    #[error("no certificate yet")]
    NoLeaf,
    /// A certificate could not be generated.
    #[error("cannot generate a certificate: {0}")]
    Generate(#[from] rcgen::Error),
    /// The TLS library rejects a certificate.
    #[error(transparent)]
    Tls(#[from] rustls::Error),
    /// A file cannot be read.
    #[error("cannot read {0}: {1}")]
    File(&'static str, std::io::Error),
    /// A request to the API server failed.
    #[error(transparent)]
    Api(#[from] kube::Error),
    /// The API server did not answer.
    #[error("the API server did not answer in time")]
    Timeout(#[from] tokio::time::error::Elapsed),
}

/// The field manager of the writes of this module. The other writes of the operator have other field managers, so that
/// Argo CD can be configured to ignore `caBundle`.
const FIELD_MANAGER: &str = "keywright-certs";

fn post_params() -> PostParams {
    PostParams { field_manager: Some(FIELD_MANAGER.to_owned()), ..PostParams::default() }
}

/// The label of objects that the operator manages.
const MANAGED_BY: (&str, &str) = ("app.kubernetes.io/managed-by", "keywright");

/// Returns the metadata of a new object that the operator manages.
fn metadata(name: &str) -> ObjectMeta {
    let labels = [MANAGED_BY].map(|(key, value)| (key.to_owned(), value.to_owned()));
    ObjectMeta { name: Some(name.to_owned()), labels: Some(labels.into()), ..ObjectMeta::default() }
}

/// Returns an error unless the operator manages the object. Other objects are neither used nor replaced.
fn check_managed<K: Resource<DynamicType = ()>>(object: &K) -> Result<(), CertError> {
    if object.labels().get(MANAGED_BY.0).is_none_or(|by| by != MANAGED_BY.1) {
        return Err(CertError::Foreign(format!("{} {}", K::kind(&()), object.name_any())));
    }
    Ok(())
}
