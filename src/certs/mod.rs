//! The webhook's serving certificate: where it comes from, when it changes, and who trusts it. And the verifier's, which
//! the leader issues from the same CA.
//!
//! Two sources behind one [`Resolver`], which is what the TLS listener asks on each handshake, so that a new
//! certificate needs no new listener:
//!
//! - [`SelfManaged`]: a CA of our own in a Secret, shared by all replicas. Each signs a leaf for itself and keeps its
//!   key in memory; the leader alone changes the CA, and tells the API server by `caBundle` whom to trust.
//! - [`Files`]: a mounted Secret that cert-manager (or anyone) keeps up to date.
//!
//! The promise of the first: the CA changes without one admission call failing. [`authority`] holds the rule as a pure
//! state machine, and its test walks through whole lives of a CA. Deleting the Secret is the way to throw a CA away at
//! once; calls then fail until the new bundle has reached the API servers, about a second.

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
pub use self_managed::{Config, SelfManaged};
pub use serving::{Resolver, Status};
pub use webhooks::Target;
pub use x509::{Authority, Certificate, Validity};

/// The clock that is passed in.
pub type Now = Arc<dyn Fn() -> Timestamp + Send + Sync>;

/// Why there is no new certificate. No text here ever holds a part of a key.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A PEM entry is absent.
    #[error("{0} is missing")]
    Missing(&'static str),
    /// A PEM entry does not parse.
    #[error("{0} cannot be read as PEM")]
    Unreadable(&'static str),
    /// A key belongs to another certificate.
    #[error("{0} does not belong to its certificate")]
    Mismatch(&'static str),
    /// A certificate may not sign.
    #[error("{0} is not a CA certificate")]
    NotCa(&'static str),
    /// A certificate is past its end, or before its beginning.
    #[error("{0} is not valid now")]
    NotValidNow(&'static str),
    /// Someone else's object has our name.
    #[error(
        "{0} exists but is not labelled app.kubernetes.io/managed-by=keywright: delete it, or configure another name"
    )]
    Foreign(String),
    /// There is no certificate yet.
    #[error("no certificate yet")]
    NoLeaf,
    /// A certificate could not be made.
    #[error("cannot make a certificate: {0}")]
    Generate(#[from] rcgen::Error),
    /// The TLS library refuses a certificate, or does not trust it.
    #[error(transparent)]
    Tls(#[from] rustls::Error),
    /// A file cannot be read.
    #[error("cannot read {0}: {1}")]
    File(&'static str, std::io::Error),
    /// The API server refused.
    #[error(transparent)]
    Api(#[from] kube::Error),
    /// The API server did not answer.
    #[error("the API server did not answer in time")]
    Timeout(#[from] tokio::time::error::Elapsed),
}

/// Who writes what is here, in `managedFields`. A name of its own, so that Argo CD can be told to leave `caBundle` alone.
const FIELD_MANAGER: &str = "keywright-certs";

/// How everything here is created and replaced.
fn post_params() -> PostParams {
    PostParams { field_manager: Some(FIELD_MANAGER.to_owned()), ..PostParams::default() }
}

/// The label of what is ours.
const MANAGED_BY: (&str, &str) = ("app.kubernetes.io/managed-by", "keywright");

/// The metadata of an object of ours.
fn metadata(name: &str) -> ObjectMeta {
    let labels = [MANAGED_BY].map(|(key, value)| (key.to_owned(), value.to_owned()));
    ObjectMeta { name: Some(name.to_owned()), labels: Some(labels.into()), ..ObjectMeta::default() }
}

/// That an object is ours: what is not, is not ours to read either, let alone to replace.
fn ours<K: Resource<DynamicType = ()>>(object: &K) -> Result<(), Error> {
    if object.labels().get(MANAGED_BY.0).is_none_or(|by| by != MANAGED_BY.1) {
        return Err(Error::Foreign(format!("{} {}", K::kind(&()), object.name_any())));
    }
    Ok(())
}
