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

use super::listener::{self, Places};

/// Says why the process is not ready.
pub type Readiness = Arc<dyn Fn() -> BoxFuture<'static, Result<(), String>> + Send + Sync>;

#[derive(Clone)]
struct Health {
    ready: Readiness,
    metrics: Arc<Registry>,
}

/// The three endpoints. `/healthz` answers while the process can answer at all; what else may be wrong is not mended
/// by a restart.
fn router(ready: Readiness, metrics: Arc<Registry>) -> Router {
    Router::new()
        .route("/healthz", get(|| async { "ok" }))
        .route("/readyz", get(readyz))
        .route("/metrics", get(metrics_text))
        .with_state(Health { ready, metrics })
}

/// How many connections these endpoints have at a time: a kubelet, a few Prometheus.
const CONNECTIONS: usize = 64;

/// Serves the three endpoints for as long as the process lasts.
///
/// # Errors
/// If the socket can't be used.
pub async fn serve(listener: TcpListener, ready: Readiness, metrics: Arc<Registry>) -> io::Result<()> {
    let router = router(ready, metrics);
    listener::serve(listener, None, Handle::new(), Places::new(CONNECTIONS), move || router.clone()).await
}

async fn readyz(State(health): State<Health>) -> Response {
    match (health.ready)().await {
        Ok(()) => "ok".into_response(),
        Err(why) => (StatusCode::SERVICE_UNAVAILABLE, why).into_response(),
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
