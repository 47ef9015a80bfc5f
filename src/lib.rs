//! API keys as Kubernetes resources: declared in Git, checked at admission, minted in the cluster, written to a
//! Secret once, known by digest afterwards.
//!
//! # The map of the house
//!
//! | module | what it is |
//! | --- | --- |
//! | [`api`] | the custom resources: types, CEL rules and the texts of `kubectl explain`; no logic |
//! | [`domain`] | the rules, pure: key format, catalogue, validation, lifecycle, status; no client, runtime or clock |
//! | [`index`] | watch events to in-memory knowledge, on every replica |
//! | [`access`] | who is asking: SubjectAccessReviews, remembered for seconds |
//! | [`controller`] | one folder a kind: observe, decide (that is `domain`), act, report; on the leader |
//! | [`sealing`] | values encrypted at rest, and answers encrypted to a person; on the leader |
//! | [`admission`] | the validating webhook: thin, calls the same rules; on every replica |
//! | [`verify`] | `keywright verifier`: whether a request may pass, for Envoy, nginx, Caddy, Traefik and RFC 7662 |
//! | [`certs`] | the webhook's own CA, its certificates and the verifier's, or files from cert-manager |
//! | [`cli`] | `kubectl keywright`, with the rights of whoever runs it; no part of the operator |
//! | [`runtime`] | arguments, wiring, listeners, election, readiness, shutdown, telemetry, metrics, the clock |
//!
//! # The way of the data
//!
//! kubectl, Argo CD or Helm → API server → CEL in the CRD → webhook → etcd → watch → index → decision. Only
//! `controller::*::{act, report}` and `certs` write, and people through [`cli`]. The life of a key is one step at a time:
//! [`domain::lifecycle::step`] says which write comes next, and [`controller::api_key`] carries it out.

pub mod access;
pub mod admission;
pub mod api;
pub mod certs;
pub mod cli;
pub mod controller;
pub mod domain;
pub mod index;
pub mod runtime;
pub mod sealing;
pub mod verify;

/// Compiles the examples of the README.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
pub struct Readme;
