//! Spans of reconciliations, admission requests and checks, and their export over OTLP.
//!
//! Without `--otlp-endpoint` no subscriber is interested in the target of these spans, so that a span costs one atomic
//! load and is never created. Attributes follow the semantic conventions of OpenTelemetry where those have a name. No
//! attribute holds the value of a key.

use std::{sync::OnceLock, time::Duration};

use opentelemetry::{
    Context,
    propagation::{Extractor, TextMapPropagator},
    trace::TracerProvider as _,
};
use opentelemetry_otlp::{ExporterBuildError, SpanExporter, WithExportConfig};
use opentelemetry_sdk::{
    Resource,
    propagation::TraceContextPropagator,
    trace::{SdkTracer, SdkTracerProvider},
};
use tracing::Span;
use tracing_opentelemetry::OpenTelemetrySpanExt;

/// The target of every exported span. The filter of the logs never includes it.
pub const TARGET: &str = "keywright::span";

/// The time limit of one export. Spans beyond the buffer of the exporter are dropped; requests do not wait for it.
const EXPORT_TIMEOUT: Duration = Duration::from_secs(5);

/// The exporter of spans.
#[derive(Debug)]
pub(super) struct SpanExport {
    provider: SdkTracerProvider,
}

impl SpanExport {
    /// Exports spans over OTLP/gRPC to an endpoint such as `http://collector:4317`. The sampler is that of the
    /// environment variables `OTEL_TRACES_SAMPLER` and `OTEL_TRACES_SAMPLER_ARG`, by default `parentbased_always_on`.
    /// It has to be called inside a Tokio runtime.
    ///
    /// # Errors
    /// If the endpoint is not a URL of scheme http.
    pub(super) fn start(endpoint: &str, service: &'static str) -> Result<Self, OtlpError> {
        if !endpoint.starts_with("http://") {
            return Err(OtlpError::Scheme(endpoint.to_owned()));
        }
        let exporter =
            SpanExporter::builder().with_tonic().with_endpoint(endpoint).with_timeout(EXPORT_TIMEOUT).build()?;
        let resource = Resource::builder()
            .with_service_name(service)
            .with_attribute(opentelemetry::KeyValue::new("service.version", env!("CARGO_PKG_VERSION")))
            .build();
        let provider = SdkTracerProvider::builder().with_resource(resource).with_batch_exporter(exporter).build();
        Ok(Self { provider })
    }

    /// The tracer of the subscriber.
    pub(super) fn tracer(&self) -> SdkTracer {
        self.provider.tracer("keywright")
    }

    /// Exports the remaining spans, for [`EXPORT_TIMEOUT`] at most.
    pub(super) fn stop(&self) {
        if let Err(error) = self.provider.shutdown_with_timeout(EXPORT_TIMEOUT) {
            tracing::warn!(%error, "the last spans could not be exported");
        }
    }
}

/// An endpoint that can't be used.
#[derive(Debug, thiserror::Error)]
pub enum OtlpError {
    /// The endpoint has another scheme.
    #[error(
        "--otlp-endpoint: {0:?} is not a URL of scheme http: use http://HOST:4317; for TLS, export to a collector in the cluster"
    )]
    Scheme(String),
    /// The endpoint can't be used.
    #[error("--otlp-endpoint: {0}")]
    Endpoint(#[from] ExporterBuildError),
}

/// Makes `span` a child of the span of the caller, by the header `traceparent` of W3C Trace Context. A header that
/// can't be parsed is ignored.
pub fn continue_trace(span: &Span, traceparent: Option<&[u8]>) {
    static PROPAGATOR: OnceLock<TraceContextPropagator> = OnceLock::new();
    let Some(text) = traceparent.and_then(|header| std::str::from_utf8(header).ok()) else { return };
    let parent =
        PROPAGATOR.get_or_init(TraceContextPropagator::new).extract_with_context(&Context::new(), &Header(text));
    // It fails only if the subscriber exports no spans.
    let _ = span.set_parent(parent);
}

/// The header `traceparent` of a request.
struct Header<'a>(&'a str);

impl Extractor for Header<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        (key == "traceparent").then_some(self.0)
    }

    fn keys(&self) -> Vec<&str> {
        vec!["traceparent"]
    }
}
