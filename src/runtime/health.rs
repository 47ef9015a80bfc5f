//! `/healthz`, `/readyz` and `/metrics`, over plain HTTP inside the Pod's network.

use std::{io, net::TcpListener, sync::Arc};

use axum::{
    Router,
    extract::State,
    http::{StatusCode, header},
    response::{IntoResponse, Response},
    routing::get,
};
use axum_server::Handle;
use futures::future::BoxFuture;
use prometheus_client::registry::Registry;

use crate::net::listener::{self, ConnectionLimit};

/// Returns the reason if the process is not ready.
pub type ReadinessProbe = Arc<dyn Fn() -> BoxFuture<'static, Result<(), String>> + Send + Sync>;

#[derive(Clone)]
struct Health {
    ready: ReadinessProbe,
    metrics: Arc<Registry>,
}

/// The router of the three endpoints. `/healthz` has no checks, since a restart would fix none of the other problems.
fn router(ready: ReadinessProbe, metrics: Arc<Registry>) -> Router {
    Router::new()
        .route("/healthz", get(|| async { "ok" }))
        .route("/readyz", get(readyz))
        .route("/metrics", get(metrics_text))
        .with_state(Health { ready, metrics })
}

/// The maximum number of connections: the kubelet and a few Prometheus servers.
const CONNECTIONS: usize = 64;

/// Serves the endpoints for the lifetime of the process.
///
/// # Errors
/// If the socket fails.
pub async fn serve(listener: TcpListener, ready: ReadinessProbe, metrics: Arc<Registry>) -> io::Result<()> {
    let router = router(ready, metrics);
    listener::serve(listener, None, Handle::new(), ConnectionLimit::new(CONNECTIONS), move || router.clone()).await
}

async fn readyz(State(health): State<Health>) -> Response {
    match (health.ready)().await {
        Ok(()) => "ok".into_response(),
        Err(reason) => (StatusCode::SERVICE_UNAVAILABLE, reason).into_response(),
    }
}

async fn metrics_text(State(health): State<Health>) -> Response {
    let mut text = String::new();
    match prometheus_client::encoding::text::encode(&mut text, &health.metrics) {
        Ok(()) => ([(header::CONTENT_TYPE, "application/openmetrics-text; version=1.0.0; charset=utf-8")], text)
            .into_response(),
        Err(_) => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
    }
}
