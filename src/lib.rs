//! API keys as Kubernetes resources: declared in Git, checked at admission, minted in the cluster, written to a
//! Secret once, and verified at gateways by digest.
//!
//! # Map of the source tree
//!
//! | module | content | runs on |
//! | --- | --- | --- |
//! | [`api`] | the custom resources: types, CEL rules and the texts of `kubectl explain`; no logic | |
//! | [`domain`] | the rules, as pure functions: key format, catalog, validation, authorization, lifecycle, status | |
//! | [`index`] | the in-memory state, built from watch events | every replica |
//! | [`access`] | SubjectAccessReviews, a cache of granted rights, the ClusterRoles of a catalog | every replica |
//! | [`admission`] | the webhooks: limits, creators, checks by `domain`, notices of Secret writes | every replica |
//! | [`controller`] | one module for each kind: observe, decide (`domain`), act, report | the leader |
//! | [`sealing`] | sealed values, answers to KeyReveals, authentication of records | the leader |
//! | [`certs`] | the CA and the certificates of webhook and verifier, or files from cert-manager | every replica |
//! | [`verify`] | `keywright verifier`: decisions for Envoy, nginx, Caddy, Traefik and RFC 7662 | the verifier |
//! | [`net`] | HTTP servers with limits on connections and request bodies | every replica, the verifier |
//! | [`telemetry`] | logs, traces and metrics | every replica, the verifier |
//! | [`clock`] | the only place that reads the time | |
//! | [`runtime`] | arguments, wiring, election, health, supervision of tasks; no other module imports it | |
//! | [`cli`] | `kubectl keywright`, with the rights of its user | the user's machine |
//!
//! # Data flow
//!
//! kubectl, Argo CD or Helm → API server → CEL rules of the CRD → webhook → etcd → watch → [`index`] → decision.
//! [`domain::lifecycle::step`] decides the next write for a key, and [`controller::api_key`] performs it. Only
//! [`controller`], [`certs`], the leader election, the key store of [`sealing`] and `last_used` of [`verify`] write to
//! the cluster, and [`cli`] for its user. ARCHITECTURE.md describes the flow in detail.

pub mod access;
#[cfg(feature = "server")]
pub mod admission;
pub mod api;
#[cfg(feature = "server")]
pub mod certs;
#[cfg(feature = "cli")]
pub mod cli;
pub mod clock;
#[cfg(feature = "server")]
pub mod controller;
pub mod domain;
#[cfg(feature = "server")]
pub mod index;
#[cfg(feature = "server")]
pub mod net;
#[cfg(feature = "server")]
pub mod runtime;
#[cfg(feature = "server")]
pub mod sealing;
#[cfg(feature = "server")]
pub mod telemetry;
#[cfg(all(test, feature = "server"))]
mod test_support;
#[cfg(feature = "server")]
pub mod verify;

/// Compiles the examples of the README.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
pub struct Readme;
