//! Spans of reconciliations, admission requests and checks, and their export over OTLP.
//!
//! Without `--otlp-endpoint` no subscriber is interested in the target of these spans, so that a span costs one atomic
//! load and is never created. Attributes follow the semantic conventions of OpenTelemetry where those have a name. No
//! attribute holds the value of a key.

use std::{fmt, time::Duration};

use opentelemetry::{
    Context,
    trace::{SpanContext, SpanId, TraceContextExt, TraceFlags, TraceId, TraceState, TracerProvider as _},
};
use opentelemetry_otlp::{ExporterBuildError, SpanExporter, WithExportConfig};
use opentelemetry_sdk::{
    Resource,
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

/// The header `traceparent` of a request (W3C Trace Context, section 3.2).
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct TraceParent<'a> {
    /// The id of the trace, 32 hex digits.
    pub trace_id: &'a str,
    /// The id of the span of the caller, 16 hex digits.
    pub span_id: &'a str,
    sampled: bool,
}

impl fmt::Debug for TraceParent<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.trace_id, self.span_id)
    }
}

impl<'a> TraceParent<'a> {
    /// Parses the header. A client may send any bytes, so only the valid form is accepted.
    #[must_use]
    pub fn parse(header: &'a [u8]) -> Option<Self> {
        let text = std::str::from_utf8(header).ok()?;
        let mut parts = text.split('-');
        let mut hex = |len: usize| {
            let part = parts.next()?;
            let is_valid = part.len() == len && part.bytes().all(|b| b.is_ascii_digit() || matches!(b, b'a'..=b'f'));
            is_valid.then_some(part)
        };
        let (version, trace_id, span_id, flags) = (hex(2)?, hex(32)?, hex(16)?, hex(2)?);
        let is_zero = |id: &str| id.bytes().all(|b| b == b'0');
        let sampled = u8::from_str_radix(flags, 16).is_ok_and(|flags| flags & 1 == 1);
        (version != "ff" && !is_zero(trace_id) && !is_zero(span_id)).then_some(Self { trace_id, span_id, sampled })
    }

    fn span_context(self) -> Option<SpanContext> {
        let (trace_id, span_id) = (TraceId::from_hex(self.trace_id).ok()?, SpanId::from_hex(self.span_id).ok()?);
        let flags = if self.sampled { TraceFlags::SAMPLED } else { TraceFlags::default() };
        Some(SpanContext::new(trace_id, span_id, flags, true, TraceState::default()))
    }
}

/// Makes `span` a child of the span of the caller. A header that can't be parsed is ignored.
pub fn continue_trace(span: &Span, traceparent: Option<&[u8]>) {
    if let Some(caller) = traceparent.and_then(TraceParent::parse).and_then(TraceParent::span_context) {
        // It fails only if the subscriber exports no spans.
        let _ = span.set_parent(Context::new().with_remote_span_context(caller));
    }
}
